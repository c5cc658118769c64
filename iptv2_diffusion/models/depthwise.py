"""Depthwise 5×5 convolution with a weight gradient that is not slow on CPUs.

Own code because the library's is missing there: oneDNN has a fast weight gradient for depthwise kernels of at most
three columns. The 25 taps come from two 5×3 gradients without a copy: of the map as it is, columns -1, 0 and 1; of the
same memory read as pairs of pixels, 2C channels at half the width, columns -2, 0 and 2. Over (64, 256, 16, 16) in
float32 the library's gradient needs 37 ms, these two 10 ms (one core of an Intel Xeon with AVX-512, torch 2.14.1).
Everywhere else `F.conv2d` runs.
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
        ctx.layouts = [(kernel.shape, kernel.stride()) for kernel in kernels]
        return merge_kernels(*kernels)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        whole = torch.contiguous_format
        return tuple(like(centre(grad, shape[-1]).clone(memory_format=whole), stride) for shape, stride in ctx.layouts)


def like(kernels: Tensor, stride: tuple[int, ...]) -> Tensor:
    """Contiguous (C, 1, k, k) under other strides: of one input channel all layouts are one in memory, but DDP
    complains of a gradient whose strides are not its parameter's."""
    return kernels.as_strided(kernels.shape, stride)


class Depthwise5x5(torch.autograd.Function):
    """5×5 depthwise convolution whose weight gradient is put together from two of 5×3 taps."""

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
            grad_x = convolution_backward(grad, x, weight, padding=(2, 2), wanted=0)
        if ctx.needs_input_grad[1]:
            grad_weight = like(weight_gradient(grad, x), weight.stride())
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient (C, 1, 5, 5) of a depthwise convolution from its input and its output's gradient, both (B, C, H, W)."""
    _, channels, height, width = x.shape
    if width % 2:  # a column of zeros adds nothing
        x, grad = F.pad(x, (0, 1)), F.pad(grad, (0, 1))
    rows = 2
    if height < 5:  # oneDNN is slow where its own padding makes up most of a map
        x, rows = F.pad(x, (0, 0, 2, 2)), 0
    near = convolution_backward(grad, x, x.new_empty(channels, 1, 5, 3), padding=(rows, 1), wanted=1)
    kernel = x.new_empty(2 * channels, 1, 5, 3)
    far = convolution_backward(pixel_pairs(grad), pixel_pairs(x), kernel, padding=(rows, 1), wanted=1)
    result = x.new_empty(channels, 1, 5, 5)
    torch.add(far[:channels], far[channels:], out=result[..., ::2])  # even and odd pixels
    result[..., 1::2] = near[..., ::2]
    return result


def pixel_pairs(x: Tensor) -> Tensor:
    """A channels-last (B, C, H, W) map as (B, 2C, H, W/2), without a copy."""
    return x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).flatten(3).permute(0, 3, 1, 2)


def convolution_backward(grad: Tensor, x: Tensor, weight: Tensor, padding: tuple[int, int], wanted: int) -> Tensor:
    """Gradient of a depthwise convolution with respect to its input (wanted=0) or its weight (wanted=1)."""
    return torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        bias_sizes=None,
        stride=(1, 1),
        padding=padding,
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=weight.shape[0],
        output_mask=(wanted == 0, wanted == 1, False),
    )[wanted]
