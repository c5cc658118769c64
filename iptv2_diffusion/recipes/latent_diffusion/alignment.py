"""Representation alignment: training brings a stage's tokens close to an encoder's features (REPA, Yu et al. 2024).

    loss = diffusion loss + weight * mean over tokens of -cos(projection(tokens of x_t), features(x0))

This is arXiv 2410.06940, eq. 8. The user supplies the encoder: `--align_target module:function` names a function that
returns a `TargetFeatures`. The projection is an MLP of three layers. During training it is a part of the model, so that
the optimiser, the EMA, sharding and checkpoints include it. The saved pipeline does not contain it. Without
`--align_target`, there are no hooks and no additional parameters.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iptv2_diffusion.training.errors import ConfigError

if TYPE_CHECKING:
    from iptv2_diffusion.latents import LatentCodec

PREFIX = "alignment."  # prefix of the projection's names in the model's state dict


class TargetFeatures(Protocol):
    """Features to align tokens with. `--align_target` names a function that returns them for the run's `LatentCodec`.

    Attributes:
        dim: width D of the features.
    """

    dim: int

    def __call__(self, latents: Tensor) -> Tensor:
        """Return features (B, D, h, w), any h and w, of clean latents (B, C, H, W) in model units, on their device.

        `codec.decode(latents)` returns the images, mirrored and cropped as the latents are. The call runs without
        gradients.
        """


class Alignment(nn.Module):
    """The projection, and the alignment loss of the last forward pass.

    Args:
        width: number of channels of the tokens.
        dim: width D of the features.
        hidden: width of the two inner layers, 2048 in the paper.
    """

    def __init__(self, width: int, dim: int, hidden: int = 2048) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )
        self._projected: Tensor | None = None

    def capture(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Forward pre-hook of the module that takes the tokens (B, C, h, w). It does nothing in evaluation mode."""
        if torch.is_grad_enabled() and module.training:
            self._projected = self.projection(arguments[0].permute(0, 2, 3, 1))  # (B, h, w, D)

    def loss(self, features: Tensor) -> Tensor:
        """Return -cos of each sample, (B,) float32 in [-1, 1], for features (B, D, h, w). Call it once per forward."""
        projected, self._projected = self._projected, None
        size = projected.shape[1:3]
        features = features.float()
        if features.shape[-2:] != size:
            features = F.interpolate(features, size, mode="bilinear", antialias=True, align_corners=False)
        similarity = F.cosine_similarity(projected.float(), features.permute(0, 2, 3, 1), dim=-1)
        return -similarity.mean(dim=(1, 2))


def attach_alignment(model: nn.Module, stage: int, dim: int, hidden: int = 2048) -> Alignment:
    """Add an `Alignment` of the output tokens of `stage` (0 to 2L-2 for L levels; L-1 is the bottleneck) to the model.

    The hook is on the next module, which gradient checkpointing does not run a second time.
    """
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise ConfigError(
            f"alignment needs an IPT-V2 model; {type(model).__name__} has no stages: leave align_target out"
        )
    last, encoder = len(backbone.width_levels) - 1, backbone.levels - 1
    if not 0 <= stage <= last:
        raise ConfigError(f"align_stage is {stage}; this model has stages 0 to {last}, and {encoder} is the bottleneck")
    takers = [*backbone.downsamples, *backbone.upsamples, model.head]
    model.alignment = Alignment(model.config.channels * 2 ** backbone.width_levels[stage], dim, hidden)
    takers[stage].register_forward_pre_hook(model.alignment.capture)
    return model.alignment


def without_alignment(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the alignment, which only training needs."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}


def load_target(name: str, codec: LatentCodec) -> TargetFeatures:
    """Return the features that `module:function` creates for a codec."""
    module, colon, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        what = f" ({error})" if colon else ""
        raise ConfigError(
            f"align_target is {name!r}: no such module:function{what}; its folder must be on PYTHONPATH"
        ) from error
    return make(codec)
