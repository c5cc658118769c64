"""The U-shaped backbone of IPT-V2, shared by the denoiser and the restorer (model.md §1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iptv2_diffusion.kernels import operator

from . import symbolic_sizes  # noqa: F401  (the import registers the operators' forms for export)
from .blocks import Downsample, FGBlock, FGBlockConfig, SkipConnection, Upsample

__all__ = ["IPTV2Backbone", "StageSpec", "stage_specs"]

Item = TypeVar("Item")


@dataclass(frozen=True)
class StageSpec:
    """One stage of the U.

    Attributes:
        width_level: level that sets its width, C·2^width_level, and selects its conditioning vector.
        channels: its width.
        num_layers: number of FG blocks.
        num_heads: number of attention heads.
        block: settings of its blocks.
    """

    width_level: int
    channels: int
    num_layers: int
    num_heads: int
    block: FGBlockConfig


class IPTV2Backbone(nn.Module):
    """U-shaped encoder–decoder of FG blocks: (B, C, H, W) -> (B, 2C, H, W), any H and W [paper; details lineage].

    A U of L levels has 2L-1 stages: L-1 in the encoder, the bottleneck, and L-1 in the decoder. For L = 3:

        level     0    1    2    1    0
        width     C    2C   4C   2C   2C
        map       H    H/2  H/4  H/2  H

    The last stage keeps the width 2C of its skip concatenation [lineage]. With one level the output has C channels.

    Args:
        channels: C, even.
        layers_per_stage: number of FG blocks of each stage, 2L-1 numbers.
        num_attention_heads: number of attention heads, one number or one per stage.
        block: settings that all blocks share. `window_size` is an upper limit: the window of a level is at most as
            large as its map at `sample_size`. The backbone sets `shifted`, `grid_stride` and `conditioning_dim` of
            each stage itself and ignores those of `block`.
        grid_stride: stride of GGSA, one number or one per level; None if `block.grid_size` is given.
        conditioning_dim: D. One number means one conditioning vector for all stages, one number per level means one
            vector per level, and None means an unconditional backbone.
        sample_size: (height, width) of the map to which the windows are fitted; None to leave the windows as they are.

    Raises:
        ValueError: a sequence has the wrong number of entries, or a block rejects its settings.
    """

    def __init__(
        self,
        channels: int,
        layers_per_stage: Sequence[int] = (2, 5, 8, 5, 2),
        num_attention_heads: int | Sequence[int] = 4,
        block: FGBlockConfig = FGBlockConfig(),  # noqa: B008 (frozen)
        grid_stride: int | Sequence[int] | None = 2,
        conditioning_dim: int | Sequence[int] | None = None,
        sample_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        specs = stage_specs(
            channels, layers_per_stage, num_attention_heads, block, grid_stride, conditioning_dim, sample_size
        )
        self.levels = levels = len(specs) // 2 + 1
        self.width_levels = [spec.width_level for spec in specs]  # 0 1 2 1 1 with three levels
        self.out_channels = specs[-1].channels
        self._gradient_checkpointing_func: Callable[..., Tensor]
        self.gradient_checkpointing = False  # ModelMixin.enable_gradient_checkpointing sets it and the function

        encoder, bottleneck, decoder = specs[: levels - 1], specs[levels - 1], specs[levels:]
        below = specs[levels - 1 : -1]  # the stage before each stage of the decoder
        self.encoder = nn.ModuleList(make_stage(spec) for spec in encoder)
        self.downsamples = nn.ModuleList(Downsample(spec.channels) for spec in encoder)
        self.bottleneck = make_stage(bottleneck)
        self.upsamples = nn.ModuleList(Upsample(spec.channels) for spec in below)
        self.skips = nn.ModuleList(
            SkipConnection(before.channels // 2, encoded.channels, spec.channels)
            for before, encoded, spec in zip(below, reversed(encoder), decoder, strict=True)
        )
        self.decoder = nn.ModuleList(make_stage(spec) for spec in decoder)

    def forward(self, x: Tensor, conditioning: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Run the U: x (B, C, H, W), conditioning (B, D), one (B, D) per level, or None -> (B, out_channels, H, W)."""
        _, _, height, width = x.shape
        x = pad_replicate(x, multiple=2 ** (self.levels - 1)).contiguous(memory_format=torch.channels_last)
        if conditioning is None or isinstance(conditioning, Tensor):
            vectors: Sequence[Tensor | None] = [conditioning] * self.levels
        else:
            vectors = conditioning
        vectors = [vectors[level] for level in self.width_levels]  # one per stage: the vector of its width level

        # Encoder, level l: (B, 2^l·C, H/2^l, W/2^l) -> (B, 2^(l+1)·C, H/2^(l+1), W/2^(l+1))
        encoded = []
        for stage, downsample, vector in zip(self.encoder, self.downsamples, vectors, strict=False):
            x = self.run_stage(stage, x, vector)
            encoded.append(x)
            x = downsample(x)

        # Bottleneck: (B, 2^(L-1)·C, H/2^(L-1), W/2^(L-1))
        x = self.run_stage(self.bottleneck, x, vectors[self.levels - 1])

        # Decoder, level l: (B, 2^(l+1)·C, H/2^(l+1), W/2^(l+1)) -> (B, 2^l·C, H/2^l, W/2^l); 2C channels at level 0
        for upsample, skip, stage, vector in zip(
            self.upsamples, self.skips, self.decoder, vectors[self.levels :], strict=True
        ):
            x = skip(upsample(x), encoded.pop())
            x = self.run_stage(stage, x, vector)
        return x[..., :height, :width]

    def run_stage(self, stage: nn.Module, x: Tensor, conditioning: Tensor | None) -> Tensor:
        """Apply the FG blocks of a stage, with gradient checkpointing if it is enabled."""
        for block in stage.children():
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, conditioning)
            else:
                x = block(x, conditioning)
        return x


def stage_specs(
    channels: int,
    layers_per_stage: Sequence[int],
    num_attention_heads: int | Sequence[int],
    block: FGBlockConfig,
    grid_stride: int | Sequence[int] | None,
    conditioning_dim: int | Sequence[int] | None,
    sample_size: tuple[int, int] | None,
) -> list[StageSpec]:
    """Expand the arguments of `IPTV2Backbone` to its 2L-1 stages. Raises a ValueError for a wrong number of entries."""
    stages = len(layers_per_stage)
    if stages % 2 == 0:
        raise ValueError(
            f"layers_per_stage has {stages} entries {tuple(layers_per_stage)}; a U of L levels has 2L-1: encoder, "
            "bottleneck, decoder"
        )
    levels = stages // 2 + 1
    heads = per_item("num_attention_heads", num_attention_heads, stages)
    strides = per_item("grid_stride", grid_stride, levels)
    dims = per_item("conditioning_dim", conditioning_dim, levels)
    specs = []
    for stage, num_layers in enumerate(layers_per_stage):
        level = min(stage, stages - 1 - stage)  # 0 1 2 1 0 with three levels
        width_level = level if stage < levels else max(level, 1)  # 0 1 2 1 1
        window, shifted = fit_window(block.window_size, level, levels, sample_size)
        config = replace(
            block,
            attention_pattern=tuple(block.attention_pattern),
            window_size=window,
            shifted=shifted,
            grid_stride=strides[level],
            conditioning_dim=dims[width_level],
        )
        specs.append(StageSpec(width_level, channels * 2**width_level, num_layers, heads[stage], config))
    return specs


def make_stage(spec: StageSpec) -> nn.ModuleList:
    return nn.ModuleList(FGBlock(spec.channels, spec.num_heads, spec.block) for _ in range(spec.num_layers))


@operator
def pad_replicate(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of a (B, C, H, W) map until H and W are multiples of `multiple`."""
    height, width = x.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return x
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def fit_window(window_size: int, level: int, levels: int, sample_size: tuple[int, int] | None) -> tuple[int, bool]:
    """Return the window size of a level, at most its map's size at `sample_size`, and whether shifted windows fit.

    The map includes the padding to a multiple of 2^(L-1) that `forward` adds.
    """
    if sample_size is None:
        return window_size, True
    coarsest = 2 ** (levels - 1)
    height, width = (math.ceil(side / coarsest) * coarsest // 2**level for side in sample_size)
    window = min(window_size, height, width)
    return window, height > window and width > window


def per_item(name: str, value: Item | Sequence[Item], count: int) -> list[Item]:
    """Expand `value` to `count` stages or levels: one number is repeated, a sequence must have `count` entries."""
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries {tuple(value)}; give one number or {count} of them")
    return list(value)
