"""Depthwise 5×5 convolution with a weight gradient that is not slow on CPUs.

Own code because the library's is missing there: oneDNN has a fast weight gradient for depthwise kernels of at most
three columns. For a 5×5 kernel over (64, 128, 16, 16) in float32 the library's backward needs 23 ms; a 5×3 and a 5×2
gradient of shifted maps, which together hold the 25 taps, and a plain sum for the bias need 6 ms (one core of an Intel
Xeon with AVX-512, torch 2.14.1). Everywhere else `F.conv2d` runs.
"""

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .linear import Linear
from .operators import wants_gradient

__all__ = ["DepthwiseConv2d", "add_depthwise", "depthwise_conv2d", "is_plain", "merge_depthwise"]


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one group a channel and "same" padding: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, kernel_size: int, bias: bool = True):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution of (B, C, H, W) by (C, 1, k, k), k odd, zero-padded to the same size."""
    if (
        x.device.type == "cpu"
        and weight.shape[-1] == 5
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
    ):
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
        return Depthwise5x5.apply(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def add_depthwise(branches: Sequence[nn.Conv2d], x: Tensor) -> Tensor:
    """x + Σ branch(x) of a (B, C, H, W) map, as one convolution."""
    if all(is_plain(branch) for branch in branches):
        return depthwise_conv2d(x, *merge_depthwise(*branches))
    return sum((branch(x) for branch in branches), x)


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer's weights may be read instead of calling it.

    Not so for one that an adapter wraps (LoRA), or that a hook gives its weights only during its forward.
    """
    return type(layer) in (Linear, DepthwiseConv2d) and not is_hooked(layer)


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate (sequential offload) or diffusers (layerwise casting, group offload) hooks into a module."""
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def merge_depthwise(*branches: nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    """5×5 kernel (C, 1, 5, 5) and bias of the sum of depthwise branches and the identity; biases add."""
    kernels = [branch.weight for branch in branches]
    kernel = MergeKernels.apply(*kernels) if wants_gradient(*kernels) else merge_kernels(*kernels)
    return kernel, None if branches[0].bias is None else reduce(torch.add, (branch.bias for branch in branches))


def merge_kernels(*kernels: Tensor) -> Tensor:
    """Sum of kernels of at most 5×5, each around the centre, and the identity."""
    merged = torch.zeros(len(kernels[0]), 1, 5, 5, dtype=kernels[0].dtype, device=kernels[0].device)
    for kernel in kernels:
        centre(merged, kernel.shape[-1]).add_(kernel)
    centre(merged, 1).add_(1)
    return merged


def centre(kernel: Tensor, size: int) -> Tensor:
    """The size×size taps in the middle of a 5×5 kernel."""
    margin = (5 - size) // 2
    return kernel[..., margin : margin + size, margin : margin + size]


class MergeKernels(torch.autograd.Function):
    """`merge_kernels`, a tenth of the nodes that autograd would make of it."""

    @staticmethod
    def forward(ctx, *kernels: Tensor) -> Tensor:
        ctx.sizes = [kernel.shape[-1] for kernel in kernels]
        return merge_kernels(*kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(centre(grad, size).clone() for size in ctx.sizes)


class Depthwise5x5(torch.autograd.Function):
    """5×5 depthwise convolution whose weight gradient is put together from one of 5×3 and one of 5×2 taps."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, padding=2, groups=weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[0]:
            grad_x = convolution_backward(grad, x, weight, padding=2, wanted=0)
        if ctx.needs_input_grad[1]:
            # Tap (i, j) correlates `grad` with the map shifted by (i - 2, j - 2): columns 0 to 2 want two columns of
            # zeros before the map, columns 3 and 4 two behind it. Rows are padded here too: oneDNN is slow where its
            # own padding makes up most of a small map.
            left = pad_pixels(x, columns=(2, 0))  # (B, C, H + 4, W + 2)
            right = pad_pixels(x[..., 1:], columns=(0, 2))  # (B, C, H + 4, W + 1)
            parts = ((left, weight[..., :3]), (right, weight[..., 3:]))
            grad_weight = torch.cat([convolution_backward(grad, *part, padding=0, wanted=1) for part in parts], dim=-1)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias


def pad_pixels(x: Tensor, columns: tuple[int, int]) -> Tensor:
    """Two rows of zeros above and below a (B, C, H, W) map, and `columns` of them left and right; channels-last.

    Unlike `F.pad`, it writes zeros only where they stay.
    """
    batch, channels, height, width = x.shape
    left, right = columns
    padded = x.new_empty(batch, height + 4, width + left + right, channels)
    for margin in (padded[:, :2], padded[:, -2:], padded[:, 2:-2, :left], padded[:, 2:-2, left + width :]):
        margin.zero_()
    padded[:, 2:-2, left : left + width] = x.permute(0, 2, 3, 1)
    return padded.permute(0, 3, 1, 2)


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, padding: int, wanted: int) -> Tensor:
    """Gradient of a depthwise convolution with respect to its input (wanted=0) or its weight (wanted=1)."""
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        bias_sizes=None,
        stride=(1, 1),
        padding=(padding, padding),
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=weight.shape[0],
        output_mask=(wanted == 0, wanted == 1, False),
    )[wanted]
