"""The U of IPT-V2, shared by the denoiser and the restorer (model.md §1)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .blocks import Downsample, FGBlock, FGBlockConfig, SkipConnection, Upsample

__all__ = ["IPTV2Backbone"]


class IPTV2Backbone(nn.Module):
    """U-shaped encoder–decoder of FG blocks: (B, C, H, W) -> (B, 2C, H, W), or C if L is 1; any H and W.

    With L levels there are 2L-1 stages: L-1 of the encoder, the bottleneck, L-1 of the decoder, of widths
    C, 2C, …, 2^(L-1)·C, …, 2C, and 2C again: the last decoder stage keeps both halves of its skip concatenation
    [lineage]. After a skip, the up-sampled map comes first, then the encoder's; a 1×1 convolution mixes them.

    Args:
        channels: C, even.
        layers_per_stage: FG blocks of each stage, 2L-1 numbers.
        num_attention_heads: one number, or one per stage.
        block: what every block has in common; at each level its window is no larger than the level's map at
            `sample_size`.
        grid_stride: stride of GGSA, one number or one per level; None if `block.grid_size` is given.
        conditioning_dim: D: one number for one vector that feeds all stages, one per level for a vector per level,
            None for an unconditional U.
        sample_size: (height, width) of the map that windows are fitted to; None for no particular size.
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
        resolutions = [min(stage, stages - 1 - stage) for stage in range(stages)]  # 0 1 2 1 0 with three levels
        self.width_levels = [*range(levels), *(max(level, 1) for level in resolutions[levels:])]  # 0 1 2 1 1
        widths = [channels * 2**level for level in self.width_levels]
        self.levels = levels
        self.out_channels = widths[-1]
        self.gradient_checkpointing = False  # ModelMixin.enable_gradient_checkpointing sets it and the function

        def make_stage(stage: int) -> nn.ModuleList:
            level = resolutions[stage]
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
            SkipConnection(widths[stage - 1] // 2, widths[resolutions[stage]], widths[stage]) for stage in decoder
        )
        self.decoder = nn.ModuleList(make_stage(stage) for stage in decoder)

    def forward(self, x: Tensor, conditioning: Tensor | Sequence[Tensor] | None = None) -> Tensor:
        """x (B, C, H, W); conditioning (B, D), or one such per level, or None -> (B, out_channels, H, W)."""
        height, width = x.shape[-2:]
        x = pad_replicate(x, multiple=2 ** (self.levels - 1)).contiguous(memory_format=torch.channels_last)
        vectors = conditioning if isinstance(conditioning, (tuple, list)) else [conditioning] * self.levels
        vectors = [vectors[level] for level in self.width_levels]  # one per stage

        encoded = []
        for stage, downsample, vector in zip(self.encoder, self.downsamples, vectors, strict=False):
            x = self.run_stage(stage, x, vector)
            encoded.append(x)
            x = downsample(x)

        x = self.run_stage(self.bottleneck, x, vectors[self.levels - 1])

        for upsample, skip, stage, vector in zip(
            self.upsamples, self.skips, self.decoder, vectors[self.levels :], strict=True
        ):
            x = skip(upsample(x), encoded.pop())
            x = self.run_stage(stage, x, vector)
        return x[..., :height, :width]

    def run_stage(self, stage: nn.ModuleList, x: Tensor, conditioning: Tensor | None) -> Tensor:
        for block in stage:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, x, conditioning)
            else:
                x = block(x, conditioning)
        return x


def pad_replicate(x: Tensor, multiple: int) -> Tensor:
    """Repeat the last row and column of a (B, C, H, W) map until both sides are multiples of `multiple`."""
    height, width = x.shape[-2:]
    if height % multiple == 0 and width % multiple == 0:
        return x
    return F.pad(x, (0, -width % multiple, 0, -height % multiple), mode="replicate")


def fit_window(window_size: int, level: int, levels: int, sample_size: tuple[int, int] | None) -> tuple[int, bool]:
    """Window of a level, no larger than its map at `sample_size`, and whether shifted windows exist there.

    That map is the one of `sample_size` padded to a multiple of 2^(L-1), as `forward` does.
    """
    if sample_size is None:
        return window_size, True
    coarsest = 2 ** (levels - 1)
    height, width = (math.ceil(side / coarsest) * coarsest // 2**level for side in sample_size)
    window = min(window_size, height, width)
    return window, height > window and width > window


def per_item(name: str, value: int | Sequence[int] | None, count: int) -> Sequence[int | None]:
    """`value` for each of `count` stages or levels: one number is repeated, a sequence must have `count` entries."""
    if value is None or isinstance(value, int):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries {tuple(value)}; give one number or {count} of them")
    return list(value)
