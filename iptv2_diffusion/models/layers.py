"""The layers that everything else is made of: linear, depthwise convolution, layer norm, scale and add.

Feature maps are (B, C, H, W) in channels-last memory, so that `permute(0, 2, 3, 1)` is a free view on which a 1×1
convolution is one `nn.Linear`. Functions marked `@operator` are plain formulas that `kernels/` may do faster.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iptv2_diffusion.kernels import fast_forms_in_use, operator, without_autocast

__all__ = [
    "DepthwiseConv2d",
    "LayerNorm2d",
    "Linear",
    "add_depthwise",
    "depthwise_conv2d",
    "is_hooked",
    "linear",
    "linear_gelu",
    "linear_pair",
    "merge_depthwise",
    "merge_pair",
    "scale_add",
]


@operator
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x Wᵀ + b, or GELU (the exact form) of it: (…, in) by (out, in) -> (…, out)."""
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


@operator
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Convolution of each channel by itself: (B, C, H, W) by (C, 1, k, k), k odd, zero-padded to the same size."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


@operator
def scale_add(x: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """base + scale · x for a map x (B, C, H, W), scale (B, C, 1, 1), and a base of either shape."""
    return torch.addcmul(base, scale, x)


class Linear(nn.Linear):
    """`nn.Linear` over the last dimension of x."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one group a channel and "same" padding: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, kernel_size: int, bias: bool = True):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map, in float32.

    `bias=False` is the bias-free norm of denoisers (Restormer's finding; ours keeps LayerNorm's centring).
    """

    def __init__(self, channels: int, eps: float = 1e-6, elementwise_affine: bool = True, bias: bool = True):
        super().__init__(channels, eps=eps, elementwise_affine=elementwise_affine, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's layer_norm accumulates in float32 whatever the input, so no cast is written here.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Linear layers in a row, and side by side, as one [ours: the merging while training]


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU(layer(x)) of a (B, H, W, C) map."""
    return linear(x, layer.weight, layer.bias, gelu=True) if may_merge(layer) else F.gelu(layer(x))


def linear_pair(x: Tensor, first: nn.Linear, second: nn.Linear, gelu: bool = False) -> Tensor:
    """second(first(x)) of a (B, H, W, C) map, or GELU of it, in the order of fewer multiplications.

    Merging the two costs in·middle·out once and saves middle·(in + out) - in·out at each position.
    """
    inner, middle, outer = first.in_features, first.out_features, second.out_features
    saved = x.numel() // inner * (middle * (inner + outer) - inner * outer)
    if may_merge(first, second) and saved > inner * middle * outer:
        return linear(x, *merge_pair(first, second), gelu)
    x = first(x)
    if gelu:
        return linear_gelu(x, second)
    return second(x)


def add_depthwise(x: Tensor, *branches: nn.Conv2d) -> Tensor:
    """x + Σ branch(x) of a (B, C, H, W) map, as one convolution."""
    if may_merge(*branches):
        return depthwise_conv2d(x, *merge_depthwise(*branches))
    return sum((branch(x) for branch in branches), x)


def merge_pair(first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight W₂W₁ and bias W₂b₁ + b₂ of `second ∘ first`.

    Autocast is off here: in half precision the rounding of W₂W₁ would add to that of the product with x.
    """
    with without_autocast(first.weight):
        bias = None if first.bias is None else second.weight @ first.bias + second.bias
        return second.weight @ first.weight, bias


def merge_depthwise(*branches: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """5×5 kernel (C, 1, 5, 5) and bias of x + Σ branch(x): Σ pad(K) + δ; biases add. Branches are at most 5×5."""
    delta = F.pad(branches[0].weight.new_ones(1, 1, 1, 1), (2, 2, 2, 2))
    kernel = sum((F.pad(b.weight, ((5 - b.weight.shape[-1]) // 2,) * 4) for b in branches), delta)
    return kernel, None if branches[0].bias is None else reduce(torch.add, (branch.bias for branch in branches))


def may_merge(*layers: nn.Module) -> bool:
    """Whether weights may be read, and merged, instead of calling the layers.

    Not so for a layer that an adapter wraps (LoRA), or that a hook gives its weights only during its forward; nor
    where the plain formulas are asked for.
    """
    plain = all(type(layer) in (Linear, DepthwiseConv2d) and not is_hooked(layer) for layer in layers)
    return plain and fast_forms_in_use("merged_weights")


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate (sequential offload) or diffusers (layerwise casting, group offload) hooks into a module."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
