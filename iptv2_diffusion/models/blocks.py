"""What the U is made of: norms, the FG block, down- and up-sampling (model.md §1, §2)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import FocalContextAttention, GlobalGridAttention
from .feed_forward import FeedForward, RepLeFFN
from .linear import Linear
from .operators import scale_add

__all__ = ["AdaLayerNormZero2d", "Downsample", "FGBlock", "LayerNorm2d", "SkipConnection", "Upsample"]


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map, in float32.

    `bias=False` is the bias-free norm of denoisers (Restormer's finding; ours keeps LayerNorm's centring).
    """

    def __init__(self, channels: int, eps: float = 1e-6, elementwise_affine: bool = True, bias: bool = True):
        super().__init__(channels, eps=eps, elementwise_affine=elementwise_affine, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's layer_norm accumulates in float32 whatever the input, so no cast is written here.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


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
        return scale_add(shift, 1 + scale, self.norm(x)), gate[0] if gate else None


class FGBlock(nn.Module):
    """Focal + Global block: `x → FCSA → Rep-LeFFN → GGSA → Rep-LeFFN`, each with its norm and residual [paper].

    Args:
        channels: C.
        num_heads: heads of every attention.
        attention_pattern: the attentions in order, each "focal" or "grid", a Rep-LeFFN after each [ours: the order].
        window_size, shifted: of FCSA.
        grid_stride, grid_size: of GGSA; exactly one is not None.
        feed_forward: "rep-leffn", or "plain" for one without depthwise convolutions (an ablation).
        ffn_ratio: r of the feed-forward.
        conditioning_dim: D; None makes an unconditional block with plain norms.
        norm_bias: bias of the plain norms.
        temperature_init: of FCSA.
        fused: build Rep-LeFFN in its deployed form.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        attention_pattern: Sequence[str] = ("focal", "grid"),
        window_size: int = 8,
        shifted: bool = True,
        grid_stride: int | None = 2,
        grid_size: int | None = None,
        feed_forward: str = "rep-leffn",
        ffn_ratio: float = 2.0,
        conditioning_dim: int | None = None,
        norm_bias: bool = True,
        temperature_init: float = 1.0,
        fused: bool = False,
    ):
        super().__init__()
        self.conditional = conditioning_dim is not None

        def norm() -> nn.Module:
            if self.conditional:
                return AdaLayerNormZero2d(channels, conditioning_dim)
            return LayerNorm2d(channels, bias=norm_bias)

        def attention(kind: str) -> nn.Module:
            if kind == "focal":
                return FocalContextAttention(
                    channels, num_heads, window_size, shifted, temperature_init=temperature_init
                )
            if kind == "grid":
                return GlobalGridAttention(channels, num_heads, grid_stride, grid_size)
            raise ValueError(f"attention_pattern has {kind!r}; it may name 'focal' and 'grid'")

        def ffn() -> nn.Module:
            if feed_forward == "rep-leffn":
                return RepLeFFN(channels, ffn_ratio, fused)
            if feed_forward == "plain":
                return FeedForward(channels, ffn_ratio)
            raise ValueError(f"feed_forward is {feed_forward!r}; it may be 'rep-leffn' or 'plain'")

        self.norms = nn.ModuleList()
        self.layers = nn.ModuleList()
        for kind in attention_pattern:
            self.norms.extend((norm(), norm()))
            self.layers.extend((attention(kind), ffn()))

    def forward(self, x: Tensor, conditioning: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), conditioning (B, D) if the block is conditional -> (B, C, H, W)."""
        for norm, layer in zip(self.norms, self.layers, strict=True):
            if self.conditional:
                normed, gate = norm(x, conditioning)
                x = scale_add(x, gate, layer(normed))
            else:
                x = x + layer(norm(x))
        return x


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
