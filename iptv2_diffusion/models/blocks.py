"""What the U is made of: adaptive norm, the FG block, down- and up-sampling, the skip (model.md §1, §2)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FocalContextAttention, GlobalGridAttention
from .feed_forward import FeedForward, RepLeFFN
from .layers import LayerNorm2d, Linear, scale_add

__all__ = ["AdaLayerNormZero2d", "Downsample", "FGBlock", "FGBlockConfig", "SkipConnection", "Upsample"]


class AdaLayerNormZero2d(nn.Module):
    """adaLN-Zero (Peebles & Xie 2023): shift, scale and gate from the conditioning vector, zero at initialisation.

    Args:
        channels: C.
        conditioning_dim: D, the width of the conditioning vector.
        gate: without one, this is the norm before an output layer.
    """

    def __init__(self, channels: int, conditioning_dim: int, gate: bool = True):
        super().__init__()
        self.gate = gate
        self.norm = LayerNorm2d(channels, elementwise_affine=False)
        self.linear = nn.Linear(conditioning_dim, (3 if gate else 2) * channels)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, conditioning: Tensor) -> tuple[Tensor, Tensor | None]:
        """x (B, C, H, W), conditioning (B, D) -> the modulated map and the residual's gate (B, C, 1, 1) or None."""
        shift, scale, *gate = self.linear(F.silu(conditioning))[:, :, None, None].chunk(3 if self.gate else 2, dim=1)
        return scale_add(self.norm(x), 1 + scale, shift), gate[0] if gate else None


@dataclass(frozen=True)
class FGBlockConfig:
    """What one FG block is, beside its width and heads.

    Attributes:
        attention_pattern: the attentions in order, each "focal" or "grid", a feed-forward after each [ours: the order].
        window_size, shifted, temperature_init: of FCSA, see `FocalContextAttention`.
        grid_stride, grid_size: of GGSA, exactly one is not None, see `GlobalGridAttention`.
        feed_forward: "rep-leffn", or "plain" for one without depthwise convolutions (an ablation).
        ffn_ratio: r of the feed-forward.
        conditioning_dim: D; None makes an unconditional block with plain norms.
        norm_bias: bias of the plain norms.
        fused: build Rep-LeFFN in its deployed form.
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
    """Focal + Global block: `x → FCSA → Rep-LeFFN → GGSA → Rep-LeFFN`, each with its norm and residual [paper].

    Args:
        channels: C.
        num_heads: heads of every attention.
        config: the rest.
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
        """x (B, C, H, W), conditioning (B, D) if the block is conditional -> (B, C, H, W)."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            if self.conditional:
                normed, gate = norm(x, conditioning)
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
    raise ValueError(f"attention_pattern has {kind!r}; it may name 'focal' and 'grid'")


def make_feed_forward(channels: int, config: FGBlockConfig) -> nn.Module:
    if config.feed_forward == "rep-leffn":
        return RepLeFFN(channels, config.ffn_ratio, config.fused)
    if config.feed_forward == "plain":
        return FeedForward(channels, config.ffn_ratio)
    raise ValueError(f"feed_forward is {config.feed_forward!r}; it may be 'rep-leffn' or 'plain'")


class Downsample(nn.Module):
    """3×3 convolution C → C/2, then pixel-unshuffle: (B, C, H, W) -> (B, 2C, H/2, W/2) for even H and W [paper]."""

    def __init__(self, channels: int):
        super().__init__()
        if channels % 2:
            raise ValueError(f"{channels} channels cannot be halved for down-sampling; use {channels + 1}")
        self.conv = nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_unshuffle(self.conv(x), 2)


class Upsample(nn.Module):
    """3×3 convolution C → 2C, then pixel-shuffle: (B, C, H, W) -> (B, C/2, 2H, 2W) [paper]."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.pixel_shuffle(self.conv(x), 2)


class SkipConnection(nn.Module):
    """Concatenation of the up-sampled map and the encoder's, in this order, then a 1×1 convolution [paper]."""

    def __init__(self, upsampled_channels: int, encoder_channels: int, out_channels: int):
        super().__init__()
        self.proj = Linear(upsampled_channels + encoder_channels, out_channels)

    def forward(self, upsampled: Tensor, encoded: Tensor) -> Tensor:
        x = torch.cat((upsampled, encoded), dim=1)  # (B, C₁ + C₂, H, W)
        return self.proj(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
