"""The two attentions of an FG block: focal (FCSA, channels inside windows) and global (GGSA, positions on a grid).

Feature maps are (B, C, H, W) in channels-last memory, so that `permute(0, 2, 3, 1)` is a free view on which a 1×1
convolution is one `nn.Linear` and a partition is one copy. Shape letters: B batch, C channels, H, W height and width,
h heads, d = C/h channels of a head, w window, N = w² positions of a window, p stride, T tokens of a grid group.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .depthwise import DepthwiseConv2d, add_depthwise
from .linear import Linear
from .operators import channel_attention, rotate_normalised, window_partition, without_autocast

__all__ = ["FocalContextAttention", "GlobalGridAttention"]


# ---------------------------------------------------------------------------------------------------------------------
# Maps into groups of positions, and back; into windows: see `window_partition` in operators.py


def pad_to_multiple(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad a (B, H, W, C) map at the bottom and right to multiples of `height` and `width`."""
    _, map_height, map_width, _ = x.shape
    pad_height, pad_width = -map_height % height, -map_width % width
    return F.pad(x, (0, 0, 0, pad_width, 0, pad_height)) if pad_height or pad_width else x


def window_merge(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """(B·H/w·W/w, h, w², d) -> (B, H, W, C), the inverse of `window_partition` for one of q, k, v."""
    _, heads, _, head_dim = x.shape
    x = x.view(-1, height // window, width // window, heads, window, window, head_dim).permute(0, 1, 4, 2, 5, 3, 6)
    return x.reshape(-1, height, width, heads * head_dim)


def grid_partition(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """(B, H, W, C) -> (B·p·p, H/p·W/p, C): tokens at one offset of every p×p cell form a group. No copy if p is 1."""
    batch, height, width, channels = x.shape
    rows, columns = height // stride[0], width // stride[1]
    x = x.view(batch, rows, stride[0], columns, stride[1], channels).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, rows * columns, channels)


def grid_merge(x: Tensor, stride: tuple[int, int], batch: int, height: int, width: int) -> Tensor:
    """(B·p·p, H/p·W/p, C) -> (B, H, W, C), the inverse of `grid_partition`."""
    channels = x.shape[-1]
    x = x.view(batch, *stride, height // stride[0], width // stride[1], channels).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(batch, height, width, channels)


# ---------------------------------------------------------------------------------------------------------------------
# Focal context self-attention (model.md §3)


class FocalContextAttention(nn.Module):
    """FCSA: channel self-attention inside windows, with a second, shifted set of windows [paper; details lineage].

    Per window and head, with q, k, v of shape (N, d) and a learned vector a of N positions:

        A   = softmax(τ · q̂ᵀ k̂)  of shape (d, d),   q̂ = normalise_N(a·q),  k̂ = normalise_N(a·k)
        out = v Aᵀ

    The shifted branch attends the interior, cut by w/2 on every side, with its own τ and a; then
    `(o₁·s₁ + o₂·s₂) / (s₁ + s₂)` per head and window position, s₂ = 0 outside of the interior. The lineage leaves s
    unconstrained, which can divide by zero; here s = exp(merge_logits), 1 at initialisation [ours].
    On a map of one window or less in either direction only the base branch runs.

    Cost per position: C² · 4 + 27 C (depthwise) + 2·C·d for each branch.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: h.
        window_size: w.
        shifted: whether the shifted branch exists. The backbone leaves it out where the map is one window, so that
            every parameter receives a gradient there (DDP demands it).
        bias: biases in the projections.
        temperature_init: τ at initialisation; 1 in the lineage.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        window_size: int = 8,
        shifted: bool = True,
        bias: bool = True,
        temperature_init: float = 1.0,
    ):
        super().__init__()
        check_heads(channels, num_heads)
        if window_size < 1:
            raise ValueError(f"window_size is {window_size}; a window has at least 1 position a side")
        self.num_heads, self.window_size, self.shifted = num_heads, window_size, shifted
        branches, positions = 2 if shifted else 1, window_size**2

        self.qkv = Linear(channels, 3 * channels, bias=bias)
        self.qkv_depthwise = DepthwiseConv2d(3 * channels, 3, bias=bias)
        self.temperature = nn.Parameter(torch.full((branches, num_heads), float(temperature_init)))
        self.spatial_affine = nn.Parameter(torch.ones(branches, num_heads, positions))
        if shifted:
            self.merge_logits = nn.Parameter(torch.zeros(branches, num_heads, positions))
        self.out_proj = Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), any H and W."""
        _, _, height, width = x.shape
        window = self.window_size
        qkv = self.qkv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # (B, 3C, H, W)
        qkv = self.qkv_depthwise(qkv).permute(0, 2, 3, 1)  # (B, H, W, 3C)
        # Padded after the last bias: a padded position has q = k = v = 0 and so adds nothing to q̂ᵀk̂ nor to a norm.
        qkv = pad_to_multiple(qkv, window, window)
        _, padded_height, padded_width, _ = qkv.shape

        if self.shifted and padded_height > window and padded_width > window:
            parts = window_partition(qkv, window, self.num_heads, margins=(None, window // 2))
            out = self.attend(*parts[:3], branch=0, size=(padded_height, padded_width))
            inner = self.attend(*parts[3:], branch=1, size=(padded_height - window, padded_width - window))
            out = self.merge(out, inner)
        else:
            parts = window_partition(qkv, window, self.num_heads)
            out = self.attend(*parts, branch=0, size=(padded_height, padded_width))  # (B, H', W', C)
        out = self.out_proj(out[:, :height, :width])
        return out.permute(0, 3, 1, 2)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, branch: int, size: tuple[int, int]) -> Tensor:
        """Channel attention in windows (windows, h, N, d) that tile a map of `size` -> (B, height, width, C)."""
        out = channel_attention(q, k, v, self.spatial_affine[branch], self.temperature[branch])
        return window_merge(out, self.window_size, *size)

    def merge(self, base: Tensor, inner: Tensor) -> Tensor:
        """Weighted mean of the base map (B, H, W, C) and the shifted branch's interior (B, H-w, W-w, C).

        The base map is overwritten.
        """
        _, height, width, channels = inner.shape
        window, heads = self.window_size, self.num_heads
        start = window // 2

        logits = self.merge_logits.float().view(2, heads, window, window).permute(0, 2, 3, 1)  # (2, w, w, h)
        # s₂ / (s₁ + s₂) as a sigmoid cannot overflow. The interior's first position is that of (w/2, w/2) in a base
        # window. In the border s₂ is 0: the base map stays.
        share = (logits[1] - logits[0].roll((-start, -start), dims=(0, 1))).sigmoid().to(base.dtype)
        share = share.repeat(height // window, width // window, 1)[..., None]  # (H-w, W-w, h, 1)

        split = (heads, channels // heads)
        interior = base[:, start : start + height, start : start + width].unflatten(-1, split)
        interior.lerp_(inner.unflatten(-1, split), share)
        return base


# ---------------------------------------------------------------------------------------------------------------------
# Global grid self-attention (model.md §4)


class GlobalGridAttention(nn.Module):
    """GGSA: spatial attention over a grid of positions that lie in different windows [paper; details lineage].

    A depthwise 5×5 with an identity shortcut, then, for each offset in a p×p cell, attention among the tokens at that
    offset of every cell:

        out = softmax(s · rope(q̂) rope(k̂)ᵀ) v,   q̂, k̂ of unit norm, s = min(exp(logit_scale), 100) per head

    Two forms of the grid, of which exactly one is given; the projections cost 4 C² per position either way:

    - `stride` p (lineage): p² groups of HW/p² tokens; the products cost 2·C·(HW)²/p², quadratic in the image.
    - `grid_size` G (MaxViT): about G² tokens a group whatever the image, stride ⌈H/G⌉ × ⌈W/G⌉; the products cost
      2·C·HW·G², linear in the image: what large images need.

    Args:
        channels: C, a multiple of `num_heads`; d = C/h must be a multiple of 4 (two rotary axes of channel pairs).
        num_heads: h.
        stride: p.
        grid_size: G.
        bias: biases in the projections.
    """

    max_logit_scale = 100.0

    def __init__(
        self, channels: int, num_heads: int, stride: int | None = 2, grid_size: int | None = None, bias: bool = True
    ):
        super().__init__()
        check_heads(channels, num_heads, multiple=4)
        if (stride is None) == (grid_size is None) or (grid_size if stride is None else stride) < 1:
            raise ValueError(
                f"give exactly one of stride and grid_size, at least 1, not stride={stride}, grid_size={grid_size}"
            )
        self.num_heads, self.stride, self.grid_size = num_heads, stride, grid_size

        self.depthwise = DepthwiseConv2d(channels, 5, bias=bias)
        self.qkv = Linear(channels, 3 * channels, bias=bias)
        self.logit_scale = nn.Parameter(torch.full((num_heads,), math.log(10.0)))
        self.out_proj = Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), any H and W."""
        batch, _, height, width = x.shape
        stride = self.strides(height, width)
        x = pad_to_multiple(add_depthwise((self.depthwise,), x).permute(0, 2, 3, 1), *stride)  # (B, H', W', C)
        _, padded_height, padded_width, _ = x.shape
        tokens = self.qkv(grid_partition(x, stride)).unflatten(-1, (3, self.num_heads, -1))  # (B·p·p, T, 3, h, d)

        scale = self.logit_scale.float().exp().clamp(max=self.max_logit_scale)
        cos, sin = rotary_embedding(
            padded_height // stride[0], padded_width // stride[1], tokens.shape[-1], tokens.device
        )
        q, k, v = (part.transpose(1, 2) for part in rotate_normalised(tokens, scale, cos, sin))  # (B·p·p, h, T, d)
        mask = None
        if (padded_height, padded_width) != (height, width):
            mask = key_mask(height, width, stride, x.device).repeat(batch, 1, 1, 1)  # (B·p·p, 1, 1, T)
        out = attend_tokens(q, k, v, mask).transpose(1, 2).flatten(-2)  # (B·p·p, T, C)

        out = grid_merge(out, stride, batch, padded_height, padded_width)[:, :height, :width]
        return self.out_proj(out).permute(0, 3, 1, 2)

    def strides(self, height: int, width: int) -> tuple[int, int]:
        """Vertical and horizontal stride on this map; never larger than the map, so that no group is empty."""
        if self.grid_size is not None:
            return math.ceil(height / self.grid_size), math.ceil(width / self.grid_size)
        return min(self.stride, height), min(self.stride, width)


def attend_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """softmax(q kᵀ) v for (…, T, d); `mask` is True at the keys that take part.

    That is `F.scaled_dot_product_attention` but for half precision on a CPU, where the backward of PyTorch's kernel is
    slow: 87 ms against 13 ms for the two products (bfloat16, 256 groups, 2 heads, 64 tokens, d = 32; one core). Logits
    are made in float32 there: rounded to bfloat16, one of 10 may be off by 0.03.
    """
    if v.device.type == "cpu" and v.dtype in (torch.bfloat16, torch.float16) and torch.is_grad_enabled():
        with without_autocast(q):
            logits = q.float() @ k.float().transpose(-2, -1)
        logits = logits if mask is None else logits.masked_fill(~mask, -math.inf)
        return logits.softmax(dim=-1).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=1.0)


def key_mask(height: int, width: int, stride: tuple[int, int], device: torch.device) -> Tensor:
    """Which keys are real, per group: (p·p, 1, 1, T) of bool for an H×W map padded to multiples of the stride."""
    real = torch.ones(1, height, width, 1, dtype=torch.bool, device=device)
    return grid_partition(pad_to_multiple(real, *stride), stride).transpose(1, 2)[:, None]


def rotary_embedding(rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 2-D rotary angles, each (T, d/2) float32, T = rows·columns in row-major order.

    Channel pair 2i turns by column·10000^(-4i/d), pair 2i+1 by row·10000^(-4i/d): integer indices inside the group.
    """
    frequency = 10000.0 ** (-torch.arange(0, head_dim, 4, dtype=torch.float32, device=device) / head_dim)  # (d/4,)
    row = torch.arange(rows, dtype=torch.float32, device=device)[:, None, None] * frequency  # (rows, 1, d/4)
    column = torch.arange(columns, dtype=torch.float32, device=device)[None, :, None] * frequency
    angle = torch.stack(torch.broadcast_tensors(column, row), dim=-1).reshape(rows * columns, head_dim // 2)
    return angle.cos(), angle.sin()


def check_heads(channels: int, num_heads: int, multiple: int = 1) -> None:
    """Raise a ValueError unless the channels split into heads of a multiple of `multiple` channels."""
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; an attention has at least 1 head")
    if channels % (num_heads * multiple):
        of_a_multiple = f" of a multiple of {multiple} channels" if multiple > 1 else ""
        raise ValueError(
            f"{channels} channels do not split into {num_heads} heads{of_a_multiple}; choose channels as a multiple of "
            f"{num_heads * multiple}"
        )
