"""Depthwise convolution with a weight gradient that is not slow in bfloat16 on CPUs.

Own code because the library's is missing there: oneDNN has a fast weight gradient for depthwise 3×3 kernels only. For a
5×5 kernel over (64, 128, 16, 16) in bfloat16 it needs 24-42 ms, and four 3×3 gradients of shifted maps, which together
cover the 5×5 taps, need 5 ms (one core, AMD EPYC with AVX-512, torch 2.14.1). Everywhere else `F.conv2d` runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["DepthwiseConv2d", "depthwise_conv2d"]


class DepthwiseConv2d(nn.Conv2d):
    """`nn.Conv2d` with one group a channel and "same" padding: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int, kernel_size: int, bias: bool = True):
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return depthwise_conv2d(x, self.weight, self.bias)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise convolution of (B, C, H, W) by (C, 1, k, k), k odd, zero-padded to the same size."""
    if x.device.type == "cpu" and weight.shape[-1] == 5 and torch.is_grad_enabled():
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        if dtype == torch.bfloat16:
            bias = bias if bias is None else bias.to(dtype)
            return Depthwise5x5.apply(x.to(dtype), weight.to(dtype), bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


class Depthwise5x5(torch.autograd.Function):
    """5×5 depthwise convolution whose weight gradient is put together from four 3×3 ones."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return F.conv2d(x, weight, bias, padding=2, groups=weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        height, width = x.shape[-2:]
        grad_x = grad_weight = grad_bias = None
        grad = grad.contiguous(memory_format=torch.channels_last)
        if ctx.needs_input_grad[0]:
            grad_x = convolution_backward(grad, x, weight, padding=2, wanted=0)
        if ctx.needs_input_grad[1]:
            # Tap (i, j) of the 5×5 gradient correlates `grad` with the map shifted by (i - 2, j - 2): the 3×3
            # gradients at the four corners cover all taps, the middle row and column twice with the same value.
            padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 2, 2, 2, 2)).permute(0, 3, 1, 2)  # keeps channels-last
            grad_weight = torch.empty_like(weight)
            for i in (0, 2):
                for j in (0, 2):
                    part = padded[..., i : i + height + 2, j : j + width + 2]
                    part = part.contiguous(memory_format=torch.channels_last)
                    corner = weight[..., i : i + 3, j : j + 3]
                    grad_weight[..., i : i + 3, j : j + 3] = convolution_backward(grad, part, corner, 0, wanted=1)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            grad_bias = grad.sum(dim=(0, 2, 3))
        return grad_x, grad_weight, grad_bias


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
