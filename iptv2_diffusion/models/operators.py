"""The inner products of both attentions, with gradients that move fewer bytes than autograd's.

Each operator is a plain formula, which is what runs without gradients, under `torch.compile` and in an export, and an
`autograd.Function` of the same value whose backward is written out by hand: on a CPU the attentions' time goes into
passes over feature maps, and autograd would make about three times as many. Tests hold each to autograd's gradient of
the plain formula, in float64.

Shape letters: G groups (windows or grid offsets, times batch), h heads, N positions or T tokens of a group, d channels
of a head. Norms, logits and softmax are float32 whatever the inputs and whatever autocast says.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["channel_attention", "rotate_normalised", "scale_add", "window_partition"]

EPSILON = 1e-12  # of norms, as in F.normalize


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off on x's device; devices without autocast (meta) have none to turn off."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def wants_gradient(*tensors: Tensor) -> bool:
    """Whether the written-out backward is to be used."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and any(t.requires_grad for t in tensors)


# ---------------------------------------------------------------------------------------------------------------------
# adaLN: shift + scale · x, and the residual x + gate · y


def scale_add(base: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """base + scale · x for a map x (B, C, H, W), scale (B, C, 1, 1), and a base of either shape."""
    return ScaleAdd.apply(base, scale, x) if wants_gradient(base, scale, x) else torch.addcmul(base, scale, x)


class ScaleAdd(torch.autograd.Function):
    """`torch.addcmul`, whose own backward also multiplies two maps by its `value` of 1."""

    @staticmethod
    def forward(ctx, base: Tensor, scale: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(scale, x)
        ctx.base = base.shape, base.dtype
        return torch.addcmul(base, scale, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, x = ctx.saved_tensors
        shape, dtype = ctx.base
        grad_base = grad.sum_to_size(shape).to(dtype)
        grad_scale = (grad * x).sum(dim=(2, 3), keepdim=True)
        return grad_base, grad_scale.to(scale.dtype), (grad * scale).to(x.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Windows of a map


def window_partition(qkv: Tensor, window: int, heads: int, margins: tuple[int | None, ...] = (None,)) -> list[Tensor]:
    """q, k and v of every window: (B, H, W, 3C) -> for each margin three (B·rows·columns, h, w², d).

    A margin m stands for the windows of the interior that is left when m rows and columns are cut at the top and left,
    and w - m at the bottom and right; None for those of the whole map. H and W are multiples of w.
    """
    if wants_gradient(qkv):
        return list(WindowPartition.apply(qkv, window, heads, margins))
    return [
        plane.reshape(-1, heads, window**2, plane.shape[-1])
        for margin in margins
        for plane in window_planes(qkv, window, heads, margin)
    ]


def window_planes(qkv: Tensor, window: int, heads: int, margin: int | None) -> tuple[Tensor, ...]:
    """q, k and v as views (B, rows, columns, h, w, w, d) of a map (B, H, W, 3C)."""
    batch, height, width, channels = qkv.shape
    if margin is not None:
        height, width = height - window, width - window
        qkv = qkv[:, margin : margin + height, margin : margin + width]
    rows, columns, head_dim = height // window, width // window, channels // (3 * heads)
    planes = qkv.view(batch, rows, window, columns, window, 3, heads, head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    return planes.unbind(0)


class WindowPartition(torch.autograd.Function):
    """`window_partition`, whose backward writes all gradients into one map, without stacking or padding them first."""

    @staticmethod
    def forward(ctx, qkv: Tensor, window: int, heads: int, margins: tuple[int | None, ...]) -> tuple[Tensor, ...]:
        ctx.geometry = qkv.shape, window, heads, margins
        with torch.no_grad():
            return tuple(window_partition(qkv, window, heads, margins))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        shape, window, heads, margins = ctx.geometry
        grad = grads[0].new_empty(shape) if margins[0] is None else grads[0].new_zeros(shape)
        for i, margin in enumerate(margins):
            planes = window_planes(grad, window, heads, margin)
            for plane, part in zip(planes, grads[3 * i : 3 * i + 3], strict=True):
                plane.copy_(part.view_as(plane)) if i == 0 else plane.add_(part.view_as(plane))
        return grad, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
# FCSA: softmax(τ q̂ᵀ k̂), the channels of a window


def channel_attention(q: Tensor, k: Tensor, v: Tensor, affine: Tensor, temperature: Tensor) -> Tensor:
    """v Aᵀ with A = softmax(τ q̂ᵀ k̂), q̂ = normalise_N(a·q), k̂ = normalise_N(a·k) (model.md §3).

    Neither q̂ nor k̂ is ever formed: with S = qᵀ diag(a²) k, the norms divide the d×d matrix S instead.

    Args:
        q, k, v: (G, h, N, d).
        affine: a, (h, N).
        temperature: τ, (h,).

    Returns:
        (G, h, N, d) in v's dtype.
    """
    with without_autocast(v):
        if wants_gradient(q, k, v, affine, temperature):
            return ChannelAttention.apply(q, k, v, affine, temperature)
        attention, _, _ = channel_attention_map(q.float(), k.float(), affine, temperature)
        return v @ attention.to(v.dtype).transpose(-2, -1)


def channel_attention_map(q: Tensor, k: Tensor, affine: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A (G, h, d, d), and 1/‖a·q‖ and 1/‖a·k‖ of every channel, (G, h, 1, d)."""
    weight = affine.float().square()  # a², (h, N)
    inverse_q = inverse_norm(weight[:, None] @ q.square())  # (G, h, 1, d)
    inverse_k = inverse_norm(weight[:, None] @ k.square())
    products = q.transpose(-2, -1) @ (k * weight[..., None])  # S, (G, h, d, d)
    scale_q = (inverse_q * temperature.float()[:, None, None]).transpose(-2, -1)  # (G, h, d, 1)
    return (products * scale_q * inverse_k).softmax(dim=-1), inverse_q, inverse_k


def inverse_norm(squared: Tensor) -> Tensor:
    return squared.clamp(min=EPSILON**2).rsqrt()


class ChannelAttention(torch.autograd.Function):
    """`channel_attention` with L = τ·S·inverse_q·inverse_k, A = softmax(L), out = v Aᵀ.

    With E = dL∘L, whose row and column sums are the gradients of the logarithms of the norms:

        dS = τ·dL·inverse_q·inverse_k       dq = a²·(k dSᵀ - q·inverse_q²·E 1)
        da = Σ_{G,d} (q·dq + k·dk) / a      dk = a²·(q dS - k·inverse_k²·1ᵀ E)
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, affine: Tensor, temperature: Tensor) -> Tensor:
        attention, inverse_q, inverse_k = channel_attention_map(q.float(), k.float(), affine, temperature)
        ctx.save_for_backward(q, k, v, affine, temperature, attention, inverse_q, inverse_k)
        return v @ attention.to(v.dtype).transpose(-2, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, affine, temperature, attention, inverse_q, inverse_k = ctx.saved_tensors
        dtype, tau = v.dtype, temperature.float()[:, None, None]
        with without_autocast(v):
            grad_v = grad @ attention.to(dtype)
            grad_attention = (grad.transpose(-2, -1) @ v).float()  # (G, h, d, d)
            grad_logits = torch._softmax_backward_data(grad_attention, attention, -1, torch.float32)
            q, k, weight = q.float(), k.float(), affine.float().square()[..., None]  # a², (h, N, 1)
            # S again: d×d, cheaper to make than to keep; then L without τ.
            cosines = (q.transpose(-2, -1) @ (k * weight)) * inverse_q.transpose(-2, -1) * inverse_k
            energy = grad_logits * cosines  # E / τ
            grad_temperature = energy.sum(dim=(0, 2, 3))
            grad_products = grad_logits * (inverse_q.transpose(-2, -1) * tau) * inverse_k  # dS
            decay_q = energy.sum(dim=-1).unsqueeze(-2) * -tau * inverse_q.square()  # (G, h, 1, d)
            decay_k = energy.sum(dim=-2).unsqueeze(-2) * -tau * inverse_k.square()
            # The products are new tensors, so adding to them in place loses nothing, whatever the layout of q and k.
            grad_q = (k @ grad_products.transpose(-2, -1)).addcmul_(q, decay_q)
            grad_k = (q @ grad_products).addcmul_(k, decay_k)
            grad_affine = torch.addcmul(q * grad_q, k, grad_k).sum(dim=0).sum(dim=-1)  # Σ (q·dq + k·dk) / a²
            grad_affine = grad_affine * affine.float()
            grad_q, grad_k = grad_q.mul_(weight).to(dtype), grad_k.mul_(weight).to(dtype)
        return grad_q, grad_k, grad_v, grad_affine.to(affine.dtype), grad_temperature.to(temperature.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# GGSA: rope(q̂), rope(k̂)


def rotate_normalised(tokens: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """s · rope(q/‖q‖), rope(k/‖k‖) and v: q and k of unit norm, turned by their token's position (model.md §4).

    Args:
        tokens: (G, T, 3, h, d): q, k and v of a token beside each other.
        scale: s, (h,).
        cos, sin: (T, d/2) of the angle of each pair of adjacent channels.

    Returns:
        Three (G, T, h, d) in the tokens' dtype.
    """
    scale = torch.stack((scale, torch.ones_like(scale)))[..., None]  # (2, h, 1): q's, and 1 for k
    if wants_gradient(tokens, scale):
        return RotateNormalised.apply(tokens, scale, cos, sin)
    qk, v = tokens.split((2, 1), dim=2)
    q, k = (rotate(qk.float(), cos, sin) * (scale / token_norm(qk))).to(tokens.dtype).unbind(2)
    return q, k, v.squeeze(2)


def token_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).clamp(min=EPSILON)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair of adjacent channels of x (G, T, 2, h, d), float32, by its angle; cos and sin are (T, d/2).

    As a product of complex numbers, one pass over x; compilers and exports, which fuse passes, know no complex numbers.
    """
    pairs, cos, sin = x.unflatten(-1, (-1, 2)), cos[:, None, None], sin[:, None, None]
    if torch.compiler.is_compiling() or torch.onnx.is_in_onnx_export():
        even, odd = pairs.unbind(-1)
        return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
    turn = torch.complex(cos, sin).expand(pairs.shape[1:-1]).contiguous()  # long rows: a faster product
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)


class RotateNormalised(torch.autograd.Function):
    """`rotate_normalised`; with u = x/‖x‖ and g the gradient turned back: dx = s/‖x‖·(g - u·(u·g)), ds = Σ u·g.

    The gradients of q, k and v go into one tensor, without stacking or adding.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qk = tokens[:, :, :2]
        norm = token_norm(qk)
        ctx.save_for_backward(tokens, scale, cos, sin, norm)
        q, k = rotate(qk.float(), cos, sin).mul_(scale / norm).to(tokens.dtype).unbind(2)
        return q, k, tokens[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        tokens, scale, cos, sin, norm = ctx.saved_tensors
        qk = tokens[:, :, :2].float()
        turned = rotate(torch.stack((grad_q, grad_k), dim=2).float(), cos, -sin)
        aligned = (turned * qk).sum(dim=-1, keepdim=True) / norm  # u·g, (G, T, 2, h, 1)
        grad = torch.empty_like(tokens)
        grad[:, :, :2] = turned.addcmul_(qk, aligned / norm, value=-1).mul_(scale / norm)
        grad[:, :, 2] = grad_v
        return grad, aligned.sum(dim=(0, 1)), None, None
