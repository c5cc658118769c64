"""Blocks of the U: adaptive norm, FG block, down- and up-sampling, skip connection (model.md §1, §2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FocalContextAttention, GlobalGridAttention
from .feed_forward import FeedForward, RepLeFFN
from .layers import LayerNorm2d, Linear, pixel_shuffle, pixel_unshuffle, scale_add

__all__ = ["AdaLayerNormZero2d", "Downsample", "FGBlock", "FGBlockConfig", "SkipConnection", "Upsample"]


class AdaLayerNormZero2d(nn.Module):
    """Adaptive layer norm (adaLN-Zero, Peebles & Xie 2023): the conditioning vector determines its parameters.

        shift, scale, gate = Linear(SiLU(conditioning)),   y = norm(x)·(1 + scale) + shift

    The linear map starts at zero, so that a residual branch scaled by `gate` starts as zero.

    Args:
        channels: C.
        conditioning_dim: D, the width of the conditioning vector.
        gate: whether to compute a gate. The norm before an output layer has none.
    """

    def __init__(self, channels: int, conditioning_dim: int, gate: bool = True):
        super().__init__()
        self.gate = gate
        self.norm = LayerNorm2d(channels, elementwise_affine=False)
        self.linear = nn.Linear(conditioning_dim, (3 if gate else 2) * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normalise x (B, C, H, W) by conditioning (B, D); returns y (B, C, H, W) and the gate (B, C, 1, 1) or None."""
        parameters = self.linear(F.silu(conditioning))[:, :, None, None]  # (B, 3C, 1, 1), or 2C without a gate
        shift, scale, *gate = parameters.chunk(3 if self.gate else 2, dim=1)  # (B, C, 1, 1) each
        y = scale_add(self.norm(x), 1 + scale, shift)  # norm(x)·(1 + scale) + shift
        return y, gate[0] if gate else None

    def extra_repr(self) -> str:
        return f"gate={self.gate}"


@dataclass(frozen=True)
class FGBlockConfig:
    """Configuration of an FG block, except its width and its number of heads.

    Attributes:
        attention_pattern: attentions in order, each "focal" or "grid". A feed-forward follows each [ours: the order].
        window_size: window size w of FCSA.
        shifted: whether FCSA has shifted windows.
        temperature_init: initial temperature of FCSA.
        grid_stride: stride p of GGSA; None if `grid_size` is given.
        grid_size: grid size G of GGSA; None if `grid_stride` is given.
        feed_forward: "rep-leffn", or "plain" for a feed-forward without depthwise convolutions (an ablation).
        ffn_ratio: expansion ratio r of the feed-forward.
        conditioning_dim: width D of the conditioning vector; None builds an unconditional block with plain norms.
        norm_bias: whether the plain norms have a bias.
        fused: whether to build Rep-LeFFN in its deployed form.
    """

    attention_pattern: tuple[str, ...] = ("focal", "grid")
    window_size: int = 8
    shifted: bool = True
    temperature_init: float = 1.0
    grid_stride: int | None = 2
    grid_size: int | None = None
    feed_forward: str = "rep-leffn"
    ffn_ratio: float = 2.0
    conditioning_dim: int | None = None
    norm_bias: bool = True
    fused: bool = False


class FGBlock(nn.Module):
    """Focal–global block: x → FCSA → Rep-LeFFN → GGSA → Rep-LeFFN, each with its norm and residual [paper; order ours].

        x = x + gate · layer(norm(x))     conditional; norm and gate come from the conditioning vector
        x = x + layer(norm(x))            unconditional

    Args:
        channels: C.
        num_heads: number of heads of every attention.
        config: all other settings.

    Raises:
        ValueError: `config` names an unknown attention or feed-forward, or has settings that these reject.
    """

    def __init__(self, channels: int, num_heads: int, config: FGBlockConfig = FGBlockConfig()):
        super().__init__()
        self.conditional = config.conditioning_dim is not None
        self.norms = nn.ModuleList()
        self.layers = nn.ModuleList()
        for kind in config.attention_pattern:
            self.norms.extend((make_norm(channels, config), make_norm(channels, config)))
            self.layers.extend((make_attention(kind, channels, num_heads, config), make_feed_forward(channels, config)))

    def forward(self, x: Tensor, conditioning: Tensor | None = None) -> Tensor:
        """Apply the block: x (B, C, H, W), conditioning (B, D) or None if unconditional -> (B, C, H, W)."""
        for norm, layer in zip(self.norms, self.layers, strict=True):  # attention, feed-forward, attention, …
            if self.conditional:
                normed, gate = norm(x, conditioning)  # (B, C, H, W), (B, C, 1, 1)
                x = scale_add(layer(normed), gate, x)  # x + gate · layer(norm(x))
            else:
                x = x + layer(norm(x))
        return x


def make_norm(channels: int, config: FGBlockConfig) -> nn.Module:
    if config.conditioning_dim is not None:
        return AdaLayerNormZero2d(channels, config.conditioning_dim)
    return LayerNorm2d(channels, bias=config.norm_bias)


def make_attention(kind: str, channels: int, num_heads: int, config: FGBlockConfig) -> nn.Module:
    if kind == "focal":
        return FocalContextAttention(
            channels, num_heads, config.window_size, config.shifted, temperature_init=config.temperature_init
        )
    if kind == "grid":
        return GlobalGridAttention(channels, num_heads, config.grid_stride, config.grid_size)
    raise ValueError(f"attention_pattern has {kind!r}; use 'focal' and 'grid'")


def make_feed_forward(channels: int, config: FGBlockConfig) -> nn.Module:
    if config.feed_forward == "rep-leffn":
        return RepLeFFN(channels, config.ffn_ratio, config.fused)
    if config.feed_forward == "plain":
        return FeedForward(channels, config.ffn_ratio)
    raise ValueError(f"feed_forward is {config.feed_forward!r}; use 'rep-leffn' or 'plain'")


class Downsample(nn.Module):
    """Down-sampling by a 3×3 convolution C→C/2 and pixel-unshuffle: (B, C, H, W) -> (B, 2C, H/2, W/2) [paper].

    H and W must be even.
    """

    def __init__(self, channels: int):
        super().__init__()
        if channels % 2:
            raise ValueError(f"{channels} channels cannot be halved for down-sampling; use {channels + 1}")
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_unshuffle(self.conv(x), 2)


class Upsample(nn.Module):
    """Up-sampling by a 3×3 convolution C→2C and pixel-shuffle: (B, C, H, W) -> (B, C/2, 2H, 2W) [paper]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return pixel_shuffle(self.conv(x), 2)


class SkipConnection(nn.Module):
    """Skip connection: concatenate the up-sampled map and the encoder's, then mix them by a 1×1 convolution [paper].

    The up-sampled map comes first [lineage].
    """

    def __init__(self, upsampled_channels: int, encoder_channels: int, out_channels: int):
        super().__init__()
        self.proj = Linear(upsampled_channels + encoder_channels, out_channels)

    def forward(self, upsampled: Tensor, encoded: Tensor) -> Tensor:
        x = torch.cat((upsampled, encoded), dim=1)  # (B, C₁ + C₂, H, W)
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, out_channels, H, W)
