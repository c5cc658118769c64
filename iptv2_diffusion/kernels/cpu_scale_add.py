"""base + scale · x on CPUs (adaLN's modulation and the gated residual), with fewer passes in the backward."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .registry import fast_form, wants_gradient


def takes_scale_add(x: Tensor, scale: Tensor, base: Tensor) -> bool:
    return wants_gradient(x, scale, base)


@fast_form("scale_add", device="cpu", takes=takes_scale_add)
def scale_add_cpu(x: Tensor, scale: Tensor, base: Tensor) -> Tensor:
    """See `scale_add` in models/layers.py."""
    return ScaleAdd.apply(x, scale, base)


class ScaleAdd(torch.autograd.Function):
    """`torch.addcmul` without the two products by its argument `value` = 1 that PyTorch's backward computes."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, base: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.base = base.shape, base.dtype
        return torch.addcmul(base, scale, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, scale = ctx.saved_tensors
        shape, dtype = ctx.base
        grad_x = grad_scale = grad_base = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad * scale).sum_to_size(x.shape).to(x.dtype)
        if ctx.needs_input_grad[1]:
            grad_scale = (grad * x).sum_to_size(scale.shape).to(scale.dtype)
        if ctx.needs_input_grad[2]:
            grad_base = grad.sum_to_size(shape).to(dtype)
        return grad_x, grad_scale, grad_base
