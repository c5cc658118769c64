"""The U-shaped backbone of IPT-V2, shared by the denoiser and the restorer (model.md §1)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iptv2_diffusion.kernels import operator

from . import symbolic_sizes  # noqa: F401  (its forms are registered)
from .blocks import Downsample, FGBlock, FGBlockConfig, SkipConnection, Upsample

__all__ = ["IPTV2Backbone"]


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
        sample_size: (height, width) of the map that the windows are fitted to; None to fit no size.

    Raises:
        ValueError: a sequence has the wrong number of entries, or a block refuses its settings.
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
        stage_levels = [min(stage, stages - 1 - stage) for stage in range(stages)]  # 0 1 2 1 0 with three levels
        self.width_levels = [*range(levels), *(max(level, 1) for level in stage_levels[levels:])]  # 0 1 2 1 1
        widths = [channels * 2**level for level in self.width_levels]
        self.levels = levels
        self.out_channels = widths[-1]
        self.gradient_checkpointing = False  # ModelMixin.enable_gradient_checkpointing sets it and the function

        def make_stage(stage: int) -> nn.ModuleList:
            level = stage_levels[stage]
            window, shifted = fit_window(block.window_size, level, levels, sample_size)
            config = replace(
                block,
                attention_pattern=tuple(block.attention_pattern),
                window_size=window,
                shifted=shifted,
                grid_stride=strides[level],
                conditioning_dim=dims[self.width_levels[stage]],
            )
            return nn.ModuleList(FGBlock(widths[stage], heads[stage], config) for _ in range(layers_per_stage[stage]))

        encoder, decoder = range(levels - 1), range(levels, stages)
        self.encoder = nn.ModuleList(make_stage(stage) for stage in encoder)
        self.downsamples = nn.ModuleList(Downsample(widths[stage]) for stage in encoder)
        self.bottleneck = make_stage(levels - 1)
        self.upsamples = nn.ModuleList(Upsample(widths[stage - 1]) for stage in decoder)
        self.skips = nn.ModuleList(
            SkipConnection(widths[stage - 1] // 2, widths[stage_levels[stage]], widths[stage]) for stage in decoder
        )
        self.decoder = nn.ModuleList(make_stage(stage) for stage in decoder)

    def forward(self, x: Tensor, conditioning: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """Run the U: x (B, C, H, W), conditioning (B, D), one (B, D) per level, or None -> (B, out_channels, H, W)."""
        _, _, height, width = x.shape
        x = pad_replicate(x, multiple=2 ** (self.levels - 1)).contiguous(memory_format=torch.channels_last)
        vectors = conditioning if isinstance(conditioning, (tuple, list)) else [conditioning] * self.levels
        vectors = [vectors[level] for level in self.width_levels]  # one per stage, that of the stage's width

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

    def run_stage(self, stage: nn.ModuleList, x: Tensor, conditioning: Tensor | None) -> Tensor:
        """Apply the FG blocks of a stage, with gradient checkpointing if it is enabled."""
        for block in stage:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, conditioning)
            else:
                x = block(x, conditioning)
        return x


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


def per_item(name: str, value: int | Sequence[int] | None, count: int) -> Sequence[int | None]:
    """Expand `value` to `count` stages or levels: one number is repeated, a sequence must have `count` entries."""
    if value is None or isinstance(value, int):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries {tuple(value)}; give one number or {count} of them")
    return list(value)
