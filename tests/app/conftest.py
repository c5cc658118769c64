"""Tiny pipelines for the page."""

import pytest
import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from kl_vae import make_kl_vae

from iptv2_diffusion import IPTV2Pipeline, IPTV2RestorationPipeline, IPTV2Transformer2DModel, create_model

NAMES = {0: "cat", 1: "dog", 2: "red panda"}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A folder with an IPT-V2 and a DiT, which generate, and two restorers: one that takes σ, one of two tasks."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    vae = make_kl_vae(8, 16, norm_num_groups=4, sample_size=16)
    options = {"channels": 8, "layers_per_stage": (1, 1, 1), "num_attention_heads": 1, "window_size": 4}
    options |= {"grid_stride": (2, 1), "conditioning_dim": 16, "sample_size": 8, "num_class_embeds": 3}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "patch_size": 2}
    denoisers = {
        "iptv2": IPTV2Transformer2DModel(**options),
        "dit": DiTTransformer2DModel(**heads, out_channels=4, num_embeds_ada_norm=3),
    }
    for name, denoiser in denoisers.items():
        for parameter in denoiser.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        IPTV2Pipeline(denoiser.eval(), vae, FlowMatchEulerDiscreteScheduler(), NAMES).save_pretrained(folder / name)
    for name, config in {"denoise": {"sigma_conditioning": "map"}, "two-tasks": {"num_tasks": 2}}.items():
        restorer = create_model("restoration-tiny", **config)
        for parameter in restorer.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        IPTV2RestorationPipeline(restorer.fuse()).save_pretrained(folder / name)
    return folder
