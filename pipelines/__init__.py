"""diffusers pipelines and command lines of IPT-V2, imported as ``iptv2_diffusion.pipelines``.

The pipelines are public names of ``iptv2_diffusion``.
"""
