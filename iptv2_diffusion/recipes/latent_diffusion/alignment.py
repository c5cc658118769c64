"""Representation alignment: a stage's tokens are drawn to the features of an encoder (REPA, Yu et al. 2024).

    loss = diffusion loss + weight * mean over tokens of -cos(projection(tokens of x_t), features(x0))

(arXiv 2410.06940, eq. 8). The encoder is the user's: a `TargetFeatures`, named by `--align_target module:function`. The
projection is an MLP of three layers. It is a part of the model while this trains, so that optimiser, averages, sharding
and checkpoints hold it, and no part of what is saved at the end. Switched off there is neither a hook nor a parameter.
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

PREFIX = "alignment."  # of the projection's names in the model's state dict


class TargetFeatures(Protocol):
    """What tokens are aligned with. `--align_target` names a function of the run's `LatentCodec` that returns one.

    Attributes:
        dim: D of the features.
    """

    dim: int

    def __call__(self, latents: Tensor) -> Tensor:
        """Features (B, D, h, w), of any h and w, of clean latents (B, C, H, W) in model units, on their device.

        `codec.decode(latents)` gives the pictures, mirrored and cropped as the latents are. No gradient is taken.
        """


class Alignment(nn.Module):
    """The projection, and the loss of what it was given at the last forward pass.

    Args:
        width: channels of the tokens.
        dim: D of the features.
        hidden: width of the two inner layers, 2048 in the paper.
    """

    def __init__(self, width: int, dim: int, hidden: int = 2048) -> None:
        super().__init__()
        self.projection = nn.Sequential(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, dim)
        )
        self._projected: Tensor | None = None

    def capture(self, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        """A forward pre-hook of whatever module the tokens (B, C, h, w) go into. Does nothing but in training."""
        if torch.is_grad_enabled() and module.training:
            self._projected = self.projection(arguments[0].permute(0, 2, 3, 1))  # (B, h, w, D)

    def loss(self, features: Tensor) -> Tensor:
        """-cos of each sample, (B,) float32 in [-1, 1], for features (B, D, any h, any w); once a forward pass."""
        projected, self._projected = self._projected, None
        size = projected.shape[1:3]
        features = features.float()
        if features.shape[-2:] != size:
            features = F.interpolate(features, size, mode="bilinear", antialias=True, align_corners=False)
        similarity = F.cosine_similarity(projected.float(), features.permute(0, 2, 3, 1), dim=-1)
        return -similarity.mean(dim=(1, 2))


def attach_alignment(model: nn.Module, stage: int, dim: int, hidden: int = 2048) -> Alignment:
    """Give the model an `Alignment` of the tokens that leave `stage`: 0 to 2L-2 for L levels, L-1 the bottleneck.

    The hook sits on the module that takes them up, which gradient checkpointing does not run again.
    """
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise ConfigError(f"alignment goes with IPT-V2 models; {type(model).__name__} has no stages: leave it out")
    last, encoder = len(backbone.width_levels) - 1, backbone.levels - 1
    if not 0 <= stage <= last:
        raise ConfigError(f"align_stage is {stage}; this model has the stages 0 to {last}, {encoder} the bottleneck")
    takers = [*backbone.downsamples, *backbone.upsamples, model.head]
    model.alignment = Alignment(model.config.channels * 2 ** backbone.width_levels[stage], dim, hidden)
    takers[stage].register_forward_pre_hook(model.alignment.capture)
    return model.alignment


def without_alignment(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict less what only training needs."""
    return {name: tensor for name, tensor in state.items() if not name.startswith(PREFIX)}


def load_target(name: str, codec: LatentCodec) -> TargetFeatures:
    """The features that `module:function` makes for a codec."""
    module, colon, function = name.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        what = f" ({error})" if colon else ""
        raise ConfigError(
            f"align_target is {name!r}: no such module:function{what}; its folder must be on PYTHONPATH"
        ) from error
    return make(codec)
