"""The package of pipelines, in a clone of the repository: its code is in the folder `pipelines/` beside this package.

A wheel installs that folder as `iptv2_diffusion/pipelines/`, which Python prefers to this file.
"""

from pathlib import Path

__path__ = [str(Path(__file__).parents[1] / "pipelines")]  # makes a package of this module
