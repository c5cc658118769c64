"""FCSA and GGSA on CPUs: the formulas of models/attention.py with fewer passes over the feature maps.

On a CPU, passes over the maps dominate the time of the attentions, and autograd makes about three times as many as
necessary. Each step below is therefore an `autograd.Function` with an explicit backward. No step assumes a layout of
its inputs or of the incoming gradients. In-place writes go only into tensors made in the same function, and only
through views (`view`, `permute`, slices). `reshape` and `flatten` may copy and are not used for this.

Shape letters: G groups (windows or grid offsets, times batch), h heads, N positions or T tokens of a group, d channels
of a head. Norms, logits and softmax are at least float32 for every input dtype and under autocast.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .geometry import (
    grid_merge,
    grid_partition,
    key_mask,
    pad_to_multiple,
    rotary_embedding,
    window_merge,
    window_views,
)
from .registry import fast_form, upcast, wants_gradient, without_autocast

EPSILON = 1e-12  # smallest norm, as in F.normalize


# ---------------------------------------------------------------------------------------------------------------------
# FCSA


@fast_form("focal_attention", device="cpu")
def focal_attention_cpu(
    qkv: Tensor, affine: Tensor, temperature: Tensor, merge_logits: Tensor | None, num_heads: int, window: int
) -> Tensor:
    """See `focal_attention` in models/attention.py: (B, H, W, 3C) -> (B, H, W, C)."""
    _, map_height, map_width, _ = qkv.shape
    qkv = pad_to_multiple(qkv, window, window)
    _, height, width, _ = qkv.shape
    if merge_logits is None or height == window or width == window:
        q, k, v = partition_windows(qkv, num_heads, window, shifted=False)
        out = window_merge(channel_attention(q, k, v, affine[0], temperature[0]), window, height, width)
    else:
        q, k, v, *shifted = partition_windows(qkv, num_heads, window, shifted=True)
        out = window_merge(channel_attention(q, k, v, affine[0], temperature[0]), window, height, width)
        inner = channel_attention(shifted[0], shifted[1], shifted[2], affine[1], temperature[1])
        out = merge_branches(out, window_merge(inner, window, height - window, width - window), merge_logits, window)
    return out[:, :map_height, :map_width]


def merge_branches(base: Tensor, inner: Tensor, merge_logits: Tensor, window: int) -> Tensor:
    """Merge the two sets of windows: base + s₂/(s₁ + s₂)·(inner - base) in the interior, base in the border of w/2.

    base is (B, H, W, C), inner is (B, H-w, W-w, C); returns (B, H, W, C).
    """
    _, height, width, channels = inner.shape
    num_heads, start = merge_logits.shape[1], window // 2
    logits = upcast(merge_logits).unflatten(-1, (window, window)).permute(0, 2, 3, 1)  # (2, w, w, h)
    # The interior starts at position (w/2, w/2) of a base window.
    share = (logits[1] - logits[0].roll((-start, -start), dims=(0, 1))).sigmoid().to(base.dtype)
    share = share.repeat(height // window, width // window, 1)[..., None]  # (H-w, W-w, h, 1)
    border = (0, 0, 0, 0, start, window - start, start, window - start)
    split = (num_heads, channels // num_heads)
    inner, share = F.pad(inner.unflatten(-1, split), border), F.pad(share, border)
    return torch.lerp(base.unflatten(-1, split), inner, share).flatten(-2)


def partition_windows(qkv: Tensor, num_heads: int, window: int, shifted: bool) -> list[Tensor]:
    """Cut q, k, v of a map (B, H, W, 3C) into windows, each (G, h, N, d); if `shifted`, also into shifted windows.

    The shifted windows tile the interior: the map without the first w/2 and the last w - w/2 rows and columns.
    """
    if wants_gradient(qkv):
        return list(PartitionWindows.apply(qkv, num_heads, window, shifted))
    return [
        plane.reshape(-1, num_heads, window**2, plane.shape[-1]) for plane in planes(qkv, num_heads, window, shifted)
    ]


def planes(qkv: Tensor, num_heads: int, window: int, shifted: bool) -> tuple[Tensor, ...]:
    """Return the windows of `partition_windows` as views (B, rows, columns, h, w, w, d) of the map."""
    base = window_views(qkv, num_heads, window)
    if not shifted:
        return base
    _, height, width, _ = qkv.shape
    start, end = window // 2, window - window // 2
    return base + window_views(qkv[:, start : height - end, start : width - end], num_heads, window)


class PartitionWindows(torch.autograd.Function):
    """`partition_windows` with a backward that writes all gradients directly into one map."""

    @staticmethod
    def forward(ctx, qkv: Tensor, num_heads: int, window: int, shifted: bool) -> tuple[Tensor, ...]:
        ctx.geometry = qkv.shape, num_heads, window, shifted
        copies = (
            plane.clone(memory_format=torch.contiguous_format) for plane in planes(qkv, num_heads, window, shifted)
        )
        return tuple(copy.view(-1, num_heads, window**2, copy.shape[-1]) for copy in copies)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        shape, num_heads, window, shifted = ctx.geometry
        grad = grads[0].new_empty(shape)  # contiguous; the base windows cover it entirely
        for i, plane in enumerate(planes(grad, num_heads, window, shifted)):
            part = grads[i].reshape(plane.shape)
            plane.copy_(part) if i < 3 else plane.add_(part)
        return grad, None, None, None


def channel_attention(q: Tensor, k: Tensor, v: Tensor, affine: Tensor, temperature: Tensor) -> Tensor:
    """v Aᵀ with A = softmax(τ q̂ᵀ k̂), q̂ = normalise_N(a·q), k̂ = normalise_N(a·k) (model.md §3).

    q̂ and k̂ are never formed. With S = qᵀ diag(a²) k, the norms divide the d×d matrix S instead.

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
        attention, _, _ = channel_attention_map(upcast(q), upcast(k), affine, temperature)
        return v @ attention.to(v.dtype).transpose(-2, -1)


def channel_attention_map(q: Tensor, k: Tensor, affine: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (G, h, d, d), and 1/‖a·q‖ and 1/‖a·k‖ of every channel, each (G, h, 1, d)."""
    weight = upcast(affine).square()  # a², (h, N)
    inverse_q = inverse_norm(weight[:, None] @ q.square())  # (G, h, 1, d)
    inverse_k = inverse_norm(weight[:, None] @ k.square())
    products = q.transpose(-2, -1) @ (k * weight[..., None])  # S, (G, h, d, d)
    scale_q = (inverse_q * upcast(temperature)[:, None, None]).transpose(-2, -1)  # (G, h, d, 1)
    return (products * scale_q * inverse_k).softmax(dim=-1), inverse_q, inverse_k


def inverse_norm(squared: Tensor) -> Tensor:
    return squared.clamp(min=EPSILON**2).rsqrt()


def norm_decay(energy: Tensor, inverse: Tensor) -> Tensor:
    """Factor E·inverse² of the term that a norm subtracts from a gradient; 0 where the norm is clamped to EPSILON."""
    return (energy * inverse.square()).masked_fill(inverse >= 1 / EPSILON, 0)


class ChannelAttention(torch.autograd.Function):
    """`channel_attention` with an explicit backward: L = τ·S·inverse_q·inverse_k, A = softmax(L), out = v Aᵀ.

    The row and column sums of E = dL∘L are the gradients of the logarithms of the inverse norms:

        dS = τ·dL·inverse_q·inverse_k       dq = a²·(k dSᵀ - q·inverse_q²·E 1)
        da = Σ_{G,d} (q·dq + k·dk) / a      dk = a²·(q dS - k·inverse_k²·1ᵀ E)
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, affine: Tensor, temperature: Tensor) -> Tensor:
        attention, inverse_q, inverse_k = channel_attention_map(upcast(q), upcast(k), affine, temperature)
        ctx.save_for_backward(q, k, v, affine, temperature, attention, inverse_q, inverse_k)
        return v @ attention.to(v.dtype).transpose(-2, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, ...]:
        q, k, v, affine, temperature, attention, inverse_q, inverse_k = ctx.saved_tensors
        dtype, tau = v.dtype, upcast(temperature)[:, None, None]
        with without_autocast(v):
            grad_v = grad @ attention.to(dtype)
            grad_attention = upcast(grad.transpose(-2, -1) @ v)  # (G, h, d, d)
            grad_logits = torch._softmax_backward_data(grad_attention, attention, -1, attention.dtype)
            q, k, weight = upcast(q), upcast(k), upcast(affine).square()[..., None]  # a², (h, N, 1)
            # S is d×d and cheaper to recompute than to keep. The cosines are L without τ.
            cosines = (q.transpose(-2, -1) @ (k * weight)) * inverse_q.transpose(-2, -1) * inverse_k
            energy = grad_logits * cosines  # E / τ
            grad_temperature = energy.sum(dim=(0, 2, 3))
            grad_products = grad_logits * (inverse_q.transpose(-2, -1) * tau) * inverse_k  # dS
            decay_q = norm_decay(energy.sum(dim=-1).unsqueeze(-2) * tau, inverse_q)  # (G, h, 1, d)
            decay_k = norm_decay(energy.sum(dim=-2).unsqueeze(-2) * tau, inverse_k)
            # A product is a new tensor, so in-place addition is safe for any layout of q and k.
            grad_q = (k @ grad_products.transpose(-2, -1)).addcmul_(q, decay_q, value=-1)
            grad_k = (q @ grad_products).addcmul_(k, decay_k, value=-1)
            grad_affine = torch.addcmul(q * grad_q, k, grad_k).sum(dim=0).sum(dim=-1)  # Σ (q·dq + k·dk) / a²
            grad_affine = grad_affine * upcast(affine)
            grad_q, grad_k = grad_q.mul_(weight).to(dtype), grad_k.mul_(weight).to(dtype)
        return grad_q, grad_k, grad_v, grad_affine.to(affine.dtype), grad_temperature.to(temperature.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# GGSA


@fast_form("grid_attention", device="cpu")
def grid_attention_cpu(qkv: Tensor, scale: Tensor, num_heads: int, stride: tuple[int, int]) -> Tensor:
    """See `grid_attention` in models/attention.py: (B, H, W, 3C) -> (B, H, W, C)."""
    batch, map_height, map_width, _ = qkv.shape
    qkv, scale = pad_to_multiple(qkv, *stride), upcast(scale)
    _, height, width, _ = qkv.shape
    tokens = grid_partition(qkv, stride).unflatten(-1, (3, num_heads, -1))  # (B·p·p, T, 3, h, d)
    cos, sin = rotary_embedding(height // stride[0], width // stride[1], tokens.shape[-1], tokens.device, scale.dtype)
    q, k, v = (part.transpose(1, 2) for part in rotate_normalised(tokens, scale, cos, sin))  # (B·p·p, h, T, d)
    mask = key_mask(map_height, map_width, stride, qkv.device)
    mask = None if mask is None else mask.repeat(batch, 1, 1, 1)  # (B·p·p, 1, 1, T)
    out = attend_tokens(q, k, v, mask).transpose(1, 2).flatten(-2)  # (B·p·p, T, C)
    return grid_merge(out, stride, height, width)[:, :map_height, :map_width]


def attend_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ) v for (…, T, d); `mask` is True at the keys that take part.

    In half precision with gradients, the products are explicit because the backward of PyTorch's kernel is slow: 87 ms
    against 13 ms (bfloat16, 256 groups, 2 heads, 64 tokens, d = 32; one core of an Intel Xeon). The logits are
    float32: rounding a logit of 10 to bfloat16 can change it by 0.03.
    """
    if v.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        with without_autocast(q):
            logits = q.float() @ k.float().transpose(-2, -1)
        logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
        return logits.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def rotate_normalised(tokens: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s · rope(q/‖q‖), rope(k/‖k‖) and v: unit-norm q and k, rotated by their token's position (model.md §4).

    Args:
        tokens: q, k and v of each token, stacked: (G, T, 3, h, d).
        scale: s, (h,).
        cos, sin: cosine and sine of the angle of each pair of adjacent channels, (T, d/2).

    Returns:
        Three (G, T, h, d) in the tokens' dtype.
    """
    scale = torch.stack((scale, torch.ones_like(scale)))[..., None]  # (2, h, 1): s for q, 1 for k
    if wants_gradient(tokens, scale):
        return RotateNormalised.apply(tokens, scale, cos, sin)
    qk, v = tokens.split((2, 1), dim=2)
    q, k = (rotate(upcast(qk), cos, sin) * (scale / token_norm(qk))).to(tokens.dtype).unbind(2)
    return q, k, v.squeeze(2)


def token_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(upcast(x), dim=-1, keepdim=True).clamp(min=EPSILON)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels of x (G, T, 2, h, d) by its angle; cos and sin are (T, d/2).

    The rotation is a product of complex numbers: one pass over x, into a new tensor.
    """
    pairs = x.unflatten(-1, (-1, 2)).contiguous()  # view_as_complex needs adjacent real and imaginary parts
    turn = torch.complex(cos, sin)[:, None, None].expand(pairs.shape[1:-1]).contiguous()  # faster than broadcasting
    return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)


class RotateNormalised(torch.autograd.Function):
    """`rotate_normalised` with an explicit backward.

    With u = x/‖x‖ and g the gradient rotated back: dx = s/‖x‖·(g - u·(u·g)), ds = Σ u·g. The gradients of q, k and v
    are written directly into one tensor.
    """

    @staticmethod
    def forward(ctx, tokens: Tensor, scale: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qk = tokens[:, :, :2]
        norm = token_norm(qk)
        ctx.save_for_backward(tokens, scale, cos, sin, norm)
        q, k = (rotate(upcast(qk), cos, sin) * (scale / norm)).to(tokens.dtype).unbind(2)
        return q, k, tokens[:, :, 2]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_q: Tensor, grad_k: Tensor, grad_v: Tensor) -> tuple[Tensor, Tensor, None, None]:
        tokens, scale, cos, sin, norm = ctx.saved_tensors
        qk = upcast(tokens[:, :, :2])
        turned = rotate(upcast(torch.stack((grad_q, grad_k), dim=2)), cos, -sin)
        aligned = (turned * qk).sum(dim=-1, keepdim=True) / norm  # u·g, (G, T, 2, h, 1)
        along = (aligned / norm).masked_fill(norm <= EPSILON, 0)  # a clamped norm does not depend on its vector
        grad = tokens.new_empty(tokens.shape)
        grad[:, :, :2] = torch.addcmul(turned, qk, along, value=-1).mul_(scale / norm)
        grad[:, :, 2] = grad_v
        return grad, aligned.sum(dim=(0, 1)), None, None
