"""The two attentions of an FG block: focal (FCSA, channels inside windows) and global (GGSA, positions on a grid).

Modules take and return (B, C, H, W) maps in channels-last memory. Inside, the maps are (B, H, W, C), which is a free
view. Shape letters: B batch, C channels, H, W height and width, h heads, d = C/h channels of a head, w window size,
N = w² positions of a window, p stride, T tokens of a grid group, G windows or groups times batch.

`focal_attention` and `grid_attention` are the equations. `kernels/` has faster implementations of both. docs/model.md
specifies the model; [paper], [lineage] and [ours] name the source of a part, as on that page.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iptv2_diffusion.kernels import has_symbolic_sizes, operator, upcast, without_autocast
from iptv2_diffusion.kernels.geometry import (
    grid_merge,
    grid_partition,
    key_mask,
    pad_to_multiple,
    rotary_embedding,
    window_merge,
    window_partition,
)

from .layers import DepthwiseConv2d, Linear, add_depthwise

__all__ = ["FocalContextAttention", "GlobalGridAttention", "focal_attention", "grid_attention"]


# ---------------------------------------------------------------------------------------------------------------------
# FCSA: focal context self-attention (model.md §3)


class FocalContextAttention(nn.Module):
    """Focal context self-attention (FCSA): channel attention in windows and shifted windows [paper; details lineage].

        x → 1×1 (C→3C) → DW3×3 → q, k, v → channel attention in windows and in shifted windows, merged → 1×1

    Multiply–accumulates per position: 4·C² (projections) + 27·C (depthwise) + 2·C·d for each set of windows.

    Args:
        channels: C, a multiple of `num_heads`.
        num_heads: h.
        window_size: w.
        shifted: whether to use shifted windows. The backbone omits them if the map is a single window: their
            parameters would receive no gradient there, and DDP requires one for every parameter.
        bias: whether the projections have biases.
        temperature_init: initial value of the temperature τ; 1 in the lineage.

    Raises:
        ValueError: `channels` does not split into `num_heads` heads, or `window_size` is below 1.
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
        self.merge_logits: nn.Parameter | None
        self.register_parameter("merge_logits", nn.Parameter(torch.zeros(2, num_heads, positions)) if shifted else None)
        self.out_proj = Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to channels: (B, C, H, W) -> (B, C, H, W), any H and W."""
        qkv = self.qkv(x.permute(0, 2, 3, 1))  # 1×1: (B, H, W, 3C)
        qkv = self.qkv_depthwise(qkv.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # DW3×3: (B, H, W, 3C)
        out = focal_attention(
            qkv, self.spatial_affine, self.temperature, self.merge_logits, self.num_heads, self.window_size
        )  # (B, H, W, C)
        return self.out_proj(out).permute(0, 3, 1, 2)  # 1×1: (B, C, H, W)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, window_size={self.window_size}, shifted={self.shifted}"


@operator
def focal_attention(
    qkv: Tensor, affine: Tensor, temperature: Tensor, merge_logits: Tensor | None, num_heads: int, window: int
) -> Tensor:
    """Merge the channel attention of windows, o₁, and of shifted windows, o₂ [paper; details lineage].

        o = (s₁·o₁ + s₂·o₂) / (s₁ + s₂),   s = exp(merge_logits) > 0,   s₂ = 0 in the border

    The shifted windows tile the interior: the map without w/2 rows and columns on every side. There is no cyclic roll
    and no mask. The lineage leaves s unconstrained, which can divide by zero. Here s is positive and 1 at
    initialisation [ours]. If the map is at most one window high or wide, only o₁ is computed.

    Args:
        qkv: q, k and v of h heads each, concatenated: (B, H, W, 3C), any H and W.
        affine: a of the two sets of windows, (2, h, N); (1, h, N) without shifted windows.
        temperature: τ of the two sets of windows, (2, h) or (1, h).
        merge_logits: (2, h, N), or None without shifted windows.
        num_heads: h.
        window: w.

    Returns:
        (B, H, W, C).
    """
    _, map_height, map_width, channels = qkv.shape
    # The padding follows the last bias, so a padded position has q = k = v = 0: it changes neither q̂ᵀk̂ nor a norm
    # [ours].
    qkv = pad_to_multiple(qkv, window, window)  # (B, H', W', 3C)
    _, height, width, _ = qkv.shape
    out = attend_windows(qkv, affine[0], temperature[0], num_heads, window)  # o₁, (B, H', W', C)

    if merge_logits is not None and height > window and width > window:
        start, end = window // 2, window - window // 2
        interior = qkv[:, start : height - end, start : width - end]
        shifted = attend_windows(interior, affine[1], temperature[1], num_heads, window)  # o₂, (B, H'-w, W'-w, C)

        # share = s₂ / (s₁ + s₂), written as a sigmoid that cannot overflow. The interior starts at position (w/2, w/2)
        # of a base window, hence the roll of s₁.
        logits = upcast(merge_logits).unflatten(-1, (window, window))  # (2, h, w, w)
        share = (logits[1] - logits[0].roll((-start, -start), dims=(-2, -1))).sigmoid()
        share = share.repeat(1, height // window - 1, width // window - 1).permute(1, 2, 0)  # (H'-w, W'-w, h)
        share = share.repeat_interleave(channels // (3 * num_heads), dim=-1).to(out.dtype)  # (H'-w, W'-w, C)

        # In the border, share is 0 and o₁ remains.
        border = (0, 0, start, end, start, end)
        out = torch.lerp(out, F.pad(shifted, border), F.pad(share, border))  # o₁ + share · (o₂ - o₁)
    return out[:, :map_height, :map_width]


def attend_windows(qkv: Tensor, affine: Tensor, temperature: Tensor, num_heads: int, window: int) -> Tensor:
    """Channel attention in each window of a map: (B, H, W, 3C) -> (B, H, W, C). H and W are multiples of w."""
    _, height, width, _ = qkv.shape
    q, k, v = window_partition(qkv, num_heads, window)  # (G, h, N, d) each
    out = channel_attention(q, k, v, affine, temperature)  # (G, h, N, d)
    return window_merge(out, window, height, width)


def channel_attention(q: Tensor, k: Tensor, v: Tensor, affine: Tensor, temperature: Tensor) -> Tensor:
    """Attention over the channels of each window: (G, h, N, d) -> (G, h, N, d).

        q̂ = normalise(a·q),   k̂ = normalise(a·k),   A = softmax(τ q̂ᵀ k̂),   out = v Aᵀ

    q, k, v are (G, h, N, d), affine (a) is (h, N), temperature (τ) is (h,), A is (G, h, d, d). `normalise` divides by
    the L2 norm over the N positions. (model.md §3 has d×N matrices and writes A v.) Norms, logits and softmax are
    float32.
    """
    with without_autocast(v):
        a, tau = upcast(affine)[..., None], upcast(temperature)[:, None, None]
        # No negative dimensions: the tracing exporter to ONNX resolves them by a rank that it guesses.
        q_hat = F.normalize(a * upcast(q), dim=2)  # q̂, (G, h, N, d)
        k_hat = F.normalize(a * upcast(k), dim=2)  # k̂, (G, h, N, d)
        attention = (tau * (q_hat.transpose(2, 3) @ k_hat)).softmax(dim=3)  # A, (G, h, d, d)
        return v @ attention.to(v.dtype).transpose(2, 3)  # (G, h, N, d)


# ---------------------------------------------------------------------------------------------------------------------
# GGSA: global grid self-attention (model.md §4)


class GlobalGridAttention(nn.Module):
    """Global grid self-attention (GGSA): attention among positions p rows and columns apart [paper; details lineage].

        x → DW5×5 + identity → 1×1 (C→3C) → q, k, v → attention among the tokens at one offset of every p×p cell → 1×1

    The grid has two forms; give exactly one of `stride` and `grid_size`:

    - `stride` p [lineage]: p² groups of HW/p² tokens. The products cost 2·C·(HW)²/p² multiply–accumulates, which is
      quadratic in the number of pixels.
    - `grid_size` G [MaxViT's form]: about G² tokens in a group for any image, with stride ⌈H/G⌉ × ⌈W/G⌉. The products
      cost 2·C·HW·G², which is linear in the number of pixels. Use it for large images.

    The projections cost 4·C² per position in both forms.

    Args:
        channels: C, a multiple of `num_heads`. d = C/h must be a multiple of 4: two rotary axes of channel pairs.
        num_heads: h.
        stride: p.
        grid_size: G.
        bias: whether the projections have biases.

    Raises:
        ValueError: `channels` does not split into such heads, or not exactly one of `stride` and `grid_size` is given.
    """

    max_logit_scale = 100.0

    def __init__(
        self, channels: int, num_heads: int, stride: int | None = 2, grid_size: int | None = None, bias: bool = True
    ):
        super().__init__()
        check_heads(channels, num_heads, multiple=4)
        if (stride is None) == (grid_size is None) or (stride or grid_size or 0) < 1:
            raise ValueError(
                f"give exactly one of stride and grid_size, at least 1, not stride={stride}, grid_size={grid_size}"
            )
        self.num_heads, self.stride, self.grid_size = num_heads, stride, grid_size

        self.depthwise = DepthwiseConv2d(channels, 5, bias=bias)
        self.qkv = Linear(channels, 3 * channels, bias=bias)
        self.logit_scale = nn.Parameter(torch.full((num_heads,), math.log(10.0)))
        self.out_proj = Linear(channels, channels, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to positions: (B, C, H, W) -> (B, C, H, W), any H and W."""
        _, _, height, width = x.shape
        x = add_depthwise(x, self.depthwise)  # x + DW5×5(x): (B, C, H, W)
        qkv = self.qkv(x.permute(0, 2, 3, 1))  # 1×1: (B, H, W, 3C)
        scale = upcast(self.logit_scale).exp().clamp(max=self.max_logit_scale)  # s, (h,)
        stride = self.strides(height, width, clip=not has_symbolic_sizes(x))
        out = grid_attention(qkv, scale, self.num_heads, stride)  # (B, H, W, C)
        return self.out_proj(out).permute(0, 3, 1, 2)  # 1×1: (B, C, H, W)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, stride={self.stride}, grid_size={self.grid_size}"

    def strides(self, height: int, width: int, clip: bool = True) -> tuple[int, int]:
        """Vertical and horizontal stride on a map of this size; if `clip`, at most H and W, so no group is empty."""
        if self.grid_size is not None:
            return (height + self.grid_size - 1) // self.grid_size, (width + self.grid_size - 1) // self.grid_size
        assert self.stride is not None  # one of the two is set
        return (min(self.stride, height), min(self.stride, width)) if clip else (self.stride, self.stride)


@operator
def grid_attention(qkv: Tensor, scale: Tensor, num_heads: int, stride: tuple[int, int]) -> Tensor:
    """Attention over the tokens of each group of a grid [paper; details lineage].

        q̂ = q/‖q‖,   k̂ = k/‖k‖,   out = softmax(s · rope(q̂) rope(k̂)ᵀ) v

    A group has the tokens at the same offset in every p×p cell. If the stride does not divide the map, the map is
    padded and padded keys are masked [ours]. Norms and rotations are float32.

    Args:
        qkv: q, k and v of h heads each, concatenated: (B, H, W, 3C), any H and W.
        scale: s, (h,).
        num_heads: h.
        stride: p, vertical and horizontal.

    Returns:
        (B, H, W, C).
    """
    batch, map_height, map_width, _ = qkv.shape
    qkv, scale = pad_to_multiple(qkv, *stride), upcast(scale)  # (B, H', W', 3C)
    _, height, width, _ = qkv.shape
    tokens = grid_partition(qkv, stride).unflatten(-1, (3, num_heads, -1))  # (G, T, 3, h, d), G = B·p·p
    q, k, v = tokens.permute(2, 0, 3, 1, 4).unbind(0)  # (G, h, T, d) each

    rows, columns = height // stride[0], width // stride[1]
    cos, sin = rotary_embedding(rows, columns, q.shape[-1], q.device, scale.dtype)  # (T, d/2)
    with without_autocast(q):
        q = scale[:, None, None] * rope(F.normalize(upcast(q), dim=-1), cos, sin)  # s · rope(q̂)
        k = rope(F.normalize(upcast(k), dim=-1), cos, sin)  # rope(k̂)

    mask = key_mask(map_height, map_width, stride, qkv.device)  # (p·p, 1, 1, T)
    mask = None if mask is None else mask.repeat(batch, 1, 1, 1)
    # scale=1: s is part of q.
    out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, attn_mask=mask, scale=1.0)  # (G, h, T, d)
    out = out.transpose(1, 2).flatten(-2)  # (G, T, C)
    return grid_merge(out, stride, height, width)[:, :map_height, :map_width]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each pair of adjacent channels of x (G, h, T, d) by the angle of its token; cos and sin are (T, d/2)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def check_heads(channels: int, num_heads: int, multiple: int = 1) -> None:
    """Raise a ValueError unless `channels` split into `num_heads` heads whose width is a multiple of `multiple`."""
    if num_heads < 1:
        raise ValueError(f"num_heads is {num_heads}; an attention has at least 1 head")
    if channels % (num_heads * multiple):
        of_a_multiple = f" of a multiple of {multiple} channels" if multiple > 1 else ""
        raise ValueError(
            f"{channels} channels do not split into {num_heads} heads{of_a_multiple}; choose channels as a multiple of "
            f"{num_heads * multiple}"
        )
