"""Fixtures of the tests of iptv2-restore."""

import pytest
import torch

from iptv2_diffusion import IPTV2RestorationPipeline, create_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Folder of a tiny restorer that takes a noise level."""
    torch.manual_seed(0)
    restorer = create_model("restoration-tiny", sigma_conditioning="map")
    torch.nn.init.normal_(restorer.head.weight, std=0.02)
    folder = tmp_path_factory.mktemp("model")
    IPTV2RestorationPipeline(restorer.fuse()).save_pretrained(folder)
    return str(folder)
