"""Diffusers pipelines of IPT-V2. Users import them from ``iptv2_diffusion``, where they are loaded when first used."""
