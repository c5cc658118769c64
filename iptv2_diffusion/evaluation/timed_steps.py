"""Models and single steps on random inputs for timing (`eval/throughput.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import yaml
from diffusers import UNet2DModel
from torch import nn

from iptv2_diffusion.models.presets import create_model
from iptv2_diffusion.objectives import null_label
from iptv2_diffusion.training.cuda_graphs import GraphedModel
from iptv2_diffusion.training.errors import user_errors


def make_model(spec: str, sample_size: int | None = None, device: str = "cpu") -> nn.Module:
    """Build a new channels-last model from a name such as `iptv2-s` or `iptv2-s:conditioning_dim=64:window_size=4`."""
    name, overrides = parse_spec(spec)
    overrides |= {} if sample_size is None else {"sample_size": sample_size}
    with user_errors(ValueError), torch.device(device):
        model = make_unet(**overrides) if name == "unet-s" else create_model(name, **overrides)
    return model.to(memory_format=torch.channels_last)


def parse_spec(spec: str) -> tuple[str, dict[str, Any]]:
    """Split `name:key=value:…` into the name and its overrides, whose values are YAML."""
    name, *arguments = spec.split(":")
    pairs = (argument.partition("=") for argument in arguments)
    return name, {key: yaml.safe_load(value) for key, _, value in pairs}


def make_unet(**overrides: Any) -> nn.Module:
    """Build diffusers' class-conditional UNet with attention at the two lower resolutions."""
    config = {
        "sample_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "num_class_embeds": 1001,
        "block_out_channels": (128, 256, 224),
        "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": 32,
    }
    return UNet2DModel(**{**config, **overrides})


def deploy(model: nn.Module, form: str) -> nn.Module:
    """Prepare a model for inference. `form` is "fused", "unfused" or "compiled" (fused, then `torch.compile`)."""
    if form != "unfused" and hasattr(model, "fuse"):
        model = model.fuse()
    model = model.eval().requires_grad_(False)
    return torch.compile(model) if form == "compiled" else model


class Autocast(nn.Module):
    """Model with autocast around its forward but not its backward, as `Accelerator.prepare` does in training."""

    def __init__(self, model: nn.Module, device: str, precision: str) -> None:
        super().__init__()
        self.model, self.device, self.precision = model, device, precision

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model under autocast."""
        with torch.autocast(self.device, getattr(torch, self.precision), enabled=self.precision != "float32"):
            return self.model(*args, **kwargs)


def make_step(
    model: nn.Module, batch_size: int, precision: str, training: bool, graphs: bool = False
) -> Callable[[], None]:
    """Return a function that runs one forward, or one forward and backward, on fixed random inputs.

    Args:
        model: denoiser; the inputs are on its device.
        batch_size: number of samples.
        precision: autocast dtype, such as "bfloat16"; "float32" disables autocast.
        training: whether to run the backward too.
        graphs: whether to record and replay a CUDA graph.
    """
    size, labels = model.config.sample_size, null_label(model)
    with model.device:
        latents = torch.randn(batch_size, model.config.in_channels, size, size)
        timestep = torch.linspace(0, 999, batch_size)
        class_labels = torch.arange(batch_size) % labels
    call = Autocast(model, model.device.type, precision)
    call = GraphedModel(call) if graphs else call

    def run() -> None:
        with torch.set_grad_enabled(training):
            sample = call(latents, timestep, class_labels=class_labels, return_dict=False)[0]
        if training:
            sample.float().square().mean().backward()
            model.zero_grad(set_to_none=True)

    return run
