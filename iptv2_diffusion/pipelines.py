"""The package of pipelines in a clone of the repository, whose code is in the folder `pipelines/` of the repository.

A wheel installs this folder as `iptv2_diffusion/pipelines/`, which Python prefers to this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "pipelines")]  # makes this module a package
