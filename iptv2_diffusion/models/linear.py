"""Linear layers whose bias and GELU are no passes of their own on a CPU.

`F.linear` on a CPU copies the bias into its output before the product adds to it, and GELU reads and writes the output
once more. oneDNN does the product, the bias and the exact GELU in one pass: 16,384 positions of 128 channels to 256 in
float32 take 11.2 ms by `F.linear` and 15.5 ms with `F.gelu`, 8.6 and 9.7 ms by oneDNN; the product alone takes 8.9 ms
(one core of an Intel Xeon with AVX-512, torch 2.14.1). Everywhere else, and in whatever is compiled, `F.linear` runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .operators import wants_gradient

__all__ = ["Linear", "linear"]


class Linear(nn.Linear):
    """`nn.Linear` over the last dimension of x."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """x Wᵀ + b, or GELU (the exact form) of it: (…, in) by (out, in) -> (…, out)."""
    if not onednn_takes(x, weight):
        x = F.linear(x, weight, bias)
        return F.gelu(x) if gelu else x
    if wants_gradient(x, weight, *(() if bias is None else (bias,))):
        x = LinearFunction.apply(x, weight, bias)
        return F.gelu(x) if gelu else x
    return onednn_linear(x, weight, bias, gelu)


def onednn_takes(x: Tensor, weight: Tensor) -> bool:
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or x.device.type != "cpu":
        return False
    plain = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and x.dim() > 1 and x.numel() > 0 and torch.backends.mkldnn.is_available()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool = False) -> Tensor:
    """What `torch.compile` makes of a linear layer on a CPU; it knows no gradients."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")


class LinearFunction(torch.autograd.Function):
    """`F.linear` by oneDNN; the bias's gradient, a sum over positions, is a product by a row of ones: half the time."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        grad_x = grad_weight = grad_bias = None
        rows = grad.reshape(-1, weight.shape[0])  # (positions, out)
        if ctx.needs_input_grad[0]:
            grad_x = (rows @ weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            grad_weight = rows.t() @ x.reshape(-1, weight.shape[1])
        if ctx.needs_input_grad[2]:
            grad_bias = (rows.new_ones(1, len(rows)) @ rows)[0]
        return grad_x, grad_weight, grad_bias
