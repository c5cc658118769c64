"""Data and configurations for runs of the latent-diffusion scripts."""

import pytest
from ldm_runs import finish, launch, lay_ground


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    """A folder with `images/CLASS/*.png`, `vae/` and `run.yaml`."""
    return lay_ground(tmp_path_factory.mktemp("ldm"))


@pytest.fixture(scope="session")
def reference(ground):
    """One uninterrupted run of the documented command."""
    folder = ground / "reference"
    assert "What to try next" in finish(launch(ground, folder))
    return folder
