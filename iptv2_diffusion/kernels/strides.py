"""Gradients of depthwise kernels in the strides of their parameter.

In channels-last memory a (C, 1, k, k) parameter has another stride in its second dimension than a contiguous tensor,
although both lie in memory alike. Autograd takes a contiguous gradient for it, but DDP warns that the strides differ.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .registry import wants_gradient


def keep_strides(weight: Tensor) -> Tensor:
    """The weight itself, whose gradient will have the weight's strides."""
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
