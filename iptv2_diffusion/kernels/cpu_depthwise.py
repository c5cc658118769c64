"""Depthwise 5×5 convolution on CPUs, with a fast weight gradient.

oneDNN has a fast weight gradient only for depthwise kernels of at most three columns. Here the 25 taps come from two
5×3 gradients, without a copy. The map itself gives columns -1, 0 and 1. The same memory read as pairs of pixels (2C
channels at half the width) gives columns -2, 0 and 2. For a (64, 256, 16, 16) map in float32, oneDNN's 5×5 gradient
takes 37 ms and the two 5×3 gradients take 10 ms (one core of an Intel Xeon with AVX-512, torch 2.14.1).

The map and its gradient may have any layout. A layout that is not channels-last costs a copy.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .registry import fast_form, wants_gradient
from .strides import keep_strides


def takes_depthwise_5x5(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return weight.shape[-2:] == (5, 5) and x.numel() > 0 and wants_gradient(x, weight, bias)


@fast_form("depthwise_conv2d", device="cpu", takes=takes_depthwise_5x5)
def depthwise_5x5_cpu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `depthwise_conv2d` in models/layers.py: (B, C, H, W) by (C, 1, 5, 5) -> (B, C, H, W)."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x, weight, bias = x.to(dtype), weight.to(dtype), bias if bias is None else bias.to(dtype)
    return Depthwise5x5.apply(x, keep_strides(weight), bias)


class Depthwise5x5(torch.autograd.Function):
    """5×5 depthwise convolution whose weight gradient is assembled from two gradients of 5×3 taps."""

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
            grad_weight = weight_gradient(grad, x)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """Weight gradient (C, 1, 5, 5) of a depthwise convolution from its output's gradient and its input (B, C, H, W)."""
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
    """View a channels-last (B, C, H, W) map as (B, 2C, H, W/2): two neighbouring pixels become one."""
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
