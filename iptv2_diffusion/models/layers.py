"""Basic layers of all models: linear, depthwise convolution, layer norm, scale and add.

Feature maps are (B, C, H, W) in channels-last memory. `permute(0, 2, 3, 1)` is then a free view, on which a 1×1
convolution is one `nn.Linear`. Functions marked `@operator` are plain formulas that `kernels/` can replace with faster
implementations.
"""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iptv2_diffusion.kernels import fast_forms_in_use, is_quantized, is_recording, operator, without_autocast
from iptv2_diffusion.kernels.strides import keep_strides

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
    "pixel_shuffle",
    "pixel_unshuffle",
    "scale_add",
]


@operator
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x Wᵀ + b, or GELU(x Wᵀ + b) in the exact (erf) form: x (…, in), W (out, in) -> (…, out)."""
    x = F.linear(x, weight, bias)
    return F.gelu(x) if gelu else x


@operator
def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution with zero padding: x (B, C, H, W), weight (C, 1, k, k), k odd -> (B, C, H, W)."""
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


@operator
def scale_add(x: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """base + scale · x: x (B, C, H, W), scale (B, C, 1, 1), base of either shape -> (B, C, H, W)."""
    return torch.addcmul(base, scale, x)


@operator
def pixel_shuffle(x: Tensor, factor: int) -> Tensor:
    """Turn channels into cells of factor × factor pixels: (B, C·factor², H, W) -> (B, C, H·factor, W·factor)."""
    return F.pixel_shuffle(x, factor)


@operator
def pixel_unshuffle(x: Tensor, factor: int) -> Tensor:
    """Turn cells of factor × factor pixels into channels: (B, C, H, W) -> (B, C·factor², H/factor, W/factor)."""
    return F.pixel_unshuffle(x, factor)


class Linear(nn.Linear):
    """`nn.Linear` that runs as the operator `linear`: (…, in) -> (…, out)."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one group per channel and "same" padding: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, kernel_size: int, bias: bool = True):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias)


class LayerNorm2d(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, H, W) map, with float32 statistics.

    `bias=False` gives the bias-free norm of denoisers, as Restormer recommends. Unlike Restormer's, it still subtracts
    the mean [ours].
    """

    def __init__(self, channels: int, eps: float = 1e-6, elementwise_affine: bool = True, bias: bool = True):
        super().__init__(channels, eps=eps, elementwise_affine=elementwise_affine, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # PyTorch's layer_norm accumulates in float32 for every input dtype, so no cast is needed.
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


# ---------------------------------------------------------------------------------------------------------------------
# Consecutive and parallel linear layers, merged into one [ours: the merge during training]


def linear_gelu(x: Tensor, layer: nn.Linear) -> Tensor:
    """GELU(layer(x)): (B, H, W, in) -> (B, H, W, out)."""
    return linear(x, layer.weight, layer.bias, gelu=True) if may_merge(layer) else F.gelu(layer(x))


def linear_pair(x: Tensor, first: nn.Linear, second: nn.Linear, gelu: bool = False) -> Tensor:
    """second(first(x)), or GELU(second(first(x))), in the cheaper order: (B, H, W, in) -> (B, H, W, out).

    Merging the two weights costs in·middle·out multiplications once and saves middle·(in + out) - in·out at each
    position.
    """
    inner, middle, outer = first.in_features, first.out_features, second.out_features
    if may_merge(first, second):
        saved = x.numel() // inner * (middle * (inner + outer) - inner * outer)
        if saved > inner * middle * outer:
            return linear(x, *merge_pair(first, second), gelu)
    x = first(x)
    if gelu:
        return linear_gelu(x, second)
    return second(x)


def add_depthwise(x: Tensor, *branches: nn.Conv2d) -> Tensor:
    """x + Σ branch(x), computed as one convolution where the weights can be merged: (B, C, H, W) -> (B, C, H, W)."""
    if may_merge(*branches):
        return depthwise_conv2d(x, *merge_depthwise(*branches))
    return sum((branch(x) for branch in branches), x)


def merge_pair(first: nn.Linear, second: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Return the weight W₂W₁ and the bias W₂b₁ + b₂ of `second ∘ first`.

    Autocast is disabled because rounding W₂W₁ to half precision would add to the rounding of the product with x.
    """
    with without_autocast(first.weight):
        bias = None if first.bias is None else second.weight @ first.bias + second.bias
        return second.weight @ first.weight, bias


def merge_depthwise(*branches: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """Return the 5×5 kernel Σ pad(K) + δ, (C, 1, 5, 5), and the bias Σ b of x + Σ branch(x), branches up to 5×5."""
    delta = F.pad(branches[0].weight.new_ones(1, 1, 1, 1), (2, 2, 2, 2))
    kernel = sum((F.pad(keep_strides(b.weight), ((5 - b.weight.shape[-1]) // 2,) * 4) for b in branches), delta)
    biases = [branch.bias for branch in branches if branch.bias is not None]
    return kernel, reduce(torch.add, biases) if biases else None


def may_merge(*layers: nn.Linear | nn.Conv2d) -> bool:
    """Return whether the layers' weights may be read and merged instead of calling the layers.

    A layer must be called if it is inside an adapter (LoRA), if torchao has quantised its weight, or if a hook loads
    its weights only during its forward. `use_fast_forms(False)` also disables merging. A recorded graph is not merged,
    because the benefit depends on the size and exporters expect constant weights; `fuse()` the model first.
    """
    plain = all(
        type(layer) in (Linear, DepthwiseConv2d) and not is_hooked(layer) and not is_quantized(layer.weight)
        for layer in layers
    )
    return plain and fast_forms_in_use("merged_weights") and not is_recording()


def is_hooked(module: nn.Module) -> bool:
    """Return whether accelerate (sequential offload) or diffusers (layerwise casting, group offload) hooks a module."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")
