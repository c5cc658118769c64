"""Forms of the operators for maps of symbolic size, while `torch.export` or `torch.jit.trace` records a model.

The formulas of `attention.py` and `backbone.py` depend on the size of the map: they skip padding that is not needed,
omit shifted windows on a map of one window, and limit the stride to the map's side. A recorded graph keeps the choices
of the example and would be wrong for other sizes. The forms below have no such choices. They always pad and mask what
the formulas omit, so one graph works at every size. tests/models/test_symbolic_sizes.py compares both.

Shape letters as in `attention.py`: B batch, C channels, H, W height and width, h heads, d = C/h, w window size, N = w²,
p stride, T tokens of a grid group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from iptv2_diffusion.kernels import symbolic_form, upcast, without_autocast
from iptv2_diffusion.kernels.geometry import rotary_embedding

from .attention import channel_attention

MASKED = -1e9  # logit of a padded key; finite, so that a group of padded queries and keys has no NaN


def cells(size: int, side: int) -> int:
    """⌈size/side⌉."""
    return (size + side - 1) // side


def pad_to(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad a (B, H, W, C) map at the bottom and right to `height` × `width`."""
    return F.pad(x, (0, 0, 0, width - x.shape[2], 0, height - x.shape[1]))


def arange(size: int, like: Tensor) -> Tensor:
    return torch.arange(size, device=like.device)


@symbolic_form("pad_replicate")
def pad_replicate_symbolic(x: Tensor, multiple: int) -> Tensor:
    """See `pad_replicate` in backbone.py: (B, C, H, W) -> (B, C, H', W')."""
    if multiple == 1:
        return x
    for dim in (2, 3):
        size = x.shape[dim]
        index = arange(cells(size, multiple) * multiple, x).clamp(max=size - 1)
        x = x.index_select(dim, index)
    return x


@symbolic_form("pixel_shuffle")
def pixel_shuffle_symbolic(x: Tensor, factor: int) -> Tensor:
    """See `pixel_shuffle` in layers.py."""
    batch, channels, height, width = x.shape
    planes = channels // factor**2
    x = x.reshape(batch, planes, factor, factor, height, width).permute(0, 1, 4, 2, 5, 3)
    return x.reshape(batch, planes, height * factor, width * factor)


@symbolic_form("pixel_unshuffle")
def pixel_unshuffle_symbolic(x: Tensor, factor: int) -> Tensor:
    """See `pixel_unshuffle` in layers.py."""
    batch, channels, height, width = x.shape
    rows, columns = height // factor, width // factor
    x = x.reshape(batch, channels, rows, factor, columns, factor).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(batch, channels * factor**2, rows, columns)


@symbolic_form("focal_attention")
def focal_attention_symbolic(
    qkv: Tensor, affine: Tensor, temperature: Tensor, merge_logits: Tensor | None, num_heads: int, window: int
) -> Tensor:
    """See `focal_attention` in attention.py: (B, H, W, 3C) -> (B, H, W, C).

    There are as many shifted windows as base windows. The last row and the last column of them have share 0.
    """
    _, map_height, map_width, channels = qkv.shape
    rows, columns = cells(map_height, window), cells(map_width, window)
    height, width = rows * window, columns * window
    out = attend_windows(pad_to(qkv, height, width), affine[0], temperature[0], num_heads, window, rows, columns)
    if merge_logits is not None:
        start, end = window // 2, window - window // 2
        moved = pad_to(qkv, height + start, width + start)[:, start:, start:]  # (B, H', W', 3C)
        shifted = attend_windows(moved, affine[1], temperature[1], num_heads, window, rows, columns)
        shifted = F.pad(shifted[:, : height - start, : width - start], (0, 0, start, 0, start, 0))  # (B, H', W', C)

        logits = upcast(merge_logits).unflatten(-1, (window, window))  # (2, h, w, w)
        share = (logits[1].roll((start, start), dims=(-2, -1)) - logits[0]).sigmoid().permute(1, 2, 0)  # (w, w, h)
        share = share.repeat_interleave(channels // (3 * num_heads), dim=-1).to(out.dtype)  # (w, w, C)
        y, x = arange(height, qkv), arange(width, qkv)
        inside = ((y >= start) & (y < height - end))[:, None] & ((x >= start) & (x < width - end))  # (H', W')
        share = share.repeat(rows, columns, 1) * inside[..., None].to(out.dtype)  # (H', W', C)
        out = out + share * (shifted - out)
    return out[:, :map_height, :map_width]


def attend_windows(
    qkv: Tensor, affine: Tensor, temperature: Tensor, num_heads: int, window: int, rows: int, columns: int
) -> Tensor:
    """Channel attention in `rows` × `columns` windows that cover the map: (B, H, W, 3C) -> (B, H, W, C)."""
    batch, _, _, channels = qkv.shape
    head_dim = channels // (3 * num_heads)
    qkv = qkv.reshape(batch, rows, window, columns, window, 3, num_heads, head_dim).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = qkv.reshape(3, batch * rows * columns, num_heads, window**2, head_dim).unbind(0)  # (G, h, N, d) each
    out = channel_attention(q, k, v, affine, temperature)
    out = out.reshape(batch, rows, columns, num_heads, window, window, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    return out.reshape(batch, rows * window, columns * window, num_heads * head_dim)


@symbolic_form("grid_attention")
def grid_attention_symbolic(qkv: Tensor, scale: Tensor, num_heads: int, stride: tuple[int, int]) -> Tensor:
    """See `grid_attention` in attention.py: (B, H, W, 3C) -> (B, H, W, C). A stride above H or W counts as H or W."""
    batch, map_height, map_width, channels = qkv.shape
    rows, columns = cells(map_height, stride[0]), cells(map_width, stride[1])
    height, width, cell = rows * stride[0], columns * stride[1], stride[0] * stride[1]
    head_dim, scale = channels // (3 * num_heads), upcast(scale)

    tokens = pad_to(qkv, height, width).reshape(
        batch, rows, stride[0], columns, stride[1], 3, num_heads, head_dim
    )  # (B, H/p, p, W/p, p, 3, h, d)
    tokens = tokens.permute(5, 0, 2, 4, 6, 1, 3, 7)  # (3, B, p, p, h, H/p, W/p, d)
    q, k, v = tokens.reshape(3, batch, cell, num_heads, rows * columns, head_dim).unbind(0)  # (B, p·p, h, T, d) each

    cos, sin = rotary_embedding(rows, columns, head_dim, q.device, scale.dtype)  # (T, d/2)
    with without_autocast(q):
        q = scale.reshape(num_heads, 1, 1) * rotate(F.normalize(upcast(q), dim=4), cos, sin)
        k = rotate(F.normalize(upcast(k), dim=4), cos, sin)

        y, x = arange(height, qkv) >= map_height, arange(width, qkv) >= map_width
        padded = y.reshape(rows, stride[0], 1, 1) | x.reshape(1, 1, columns, stride[1])  # (H/p, p, W/p, p)
        padded = padded.permute(1, 3, 0, 2).reshape(cell, 1, 1, rows * columns)  # (p·p, 1, 1, T)
        logits = q @ k.transpose(3, 4) + padded.to(q.dtype) * MASKED  # (B, p·p, h, T, T)
        out = logits.softmax(dim=4).to(v.dtype) @ v  # (B, p·p, h, T, d)
    out = out.reshape(batch, stride[0], stride[1], num_heads, rows, columns, head_dim).permute(0, 4, 1, 5, 2, 3, 6)
    return out.reshape(batch, height, width, num_heads * head_dim)[:, :map_height, :map_width]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `rope` in attention.py; x is (B, p·p, h, T, d). It uses indices: the tracing exporter loses ranks."""
    channel = torch.arange(x.shape[-1], device=x.device)
    pair = torch.div(channel, 2, rounding_mode="floor")  # 0 0 1 1 …
    sign = (channel % 2 * 2 - 1).to(x.dtype)  # -1 1 -1 1 …
    partner = channel - (channel % 2 * 2 - 1)  # 1 0 3 2 …
    return x * cos.index_select(1, pair) + x.index_select(4, partner) * (sin.index_select(1, pair) * sign)
