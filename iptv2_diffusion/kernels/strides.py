"""Gradients of depthwise kernels in the strides of their parameter.

A (C, 1, k, k) parameter in channels-last memory and a contiguous tensor have the same memory layout, but different
strides in the second dimension. Autograd accepts a contiguous gradient for the parameter, but DDP warns about the
strides.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .registry import wants_gradient


def keep_strides(weight: Tensor) -> Tensor:
    """Return the weight itself. Its gradient will have the weight's strides."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not wants_gradient(weight):
        return weight
    return KeepStrides.apply(weight)


class KeepStrides(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.like = torch.empty_like(weight, device="meta")  # keeps the strides of a dense weight
        return weight.view_as(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad.new_empty_strided(ctx.like.shape, ctx.like.stride()).copy_(grad)
