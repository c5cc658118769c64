"""Partition of feature maps into windows and grid groups, its inverse, and the angles of the rotary embedding.

Feature maps are (B, H, W, C) here: the free view of a channels-last (B, C, H, W) map. Every function returns a view or
a new tensor and never writes into its arguments. Shape letters: h heads, d channels of a head, w window size, N = w²
positions of a window, p stride of a grid, T tokens of a grid group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "grid_merge",
    "grid_partition",
    "key_mask",
    "pad_to_multiple",
    "rotary_embedding",
    "window_merge",
    "window_partition",
    "window_views",
]


def pad_to_multiple(x: Tensor, height: int, width: int) -> Tensor:
    """Zero-pad a (B, H, W, C) map at the bottom and right to multiples of `height` and `width`."""
    _, map_height, map_width, _ = x.shape
    pad_height, pad_width = -map_height % height, -map_width % width
    return F.pad(x, (0, 0, 0, pad_width, 0, pad_height)) if pad_height or pad_width else x


def window_partition(qkv: Tensor, num_heads: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut q, k and v into windows: (B, H, W, 3C) -> three (B·H/w·W/w, h, N, d). H and W are multiples of w."""
    q, k, v = (view.flatten(4, 5).flatten(0, 2) for view in window_views(qkv, num_heads, window))
    return q, k, v


def window_views(qkv: Tensor, num_heads: int, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the windows of `window_partition` as views (B, H/w, W/w, h, w, w, d) of the map."""
    batch, height, width, channels = qkv.shape
    shape = (batch, height // window, window, width // window, window, 3, num_heads, channels // (3 * num_heads))
    q, k, v = qkv.view(shape).permute(5, 0, 1, 3, 6, 2, 4, 7).unbind(0)
    return q, k, v


def window_merge(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """Join windows into a map: (B·H/w·W/w, h, N, d) -> (B, H, W, C). Inverse of `window_partition` for one tensor."""
    _, num_heads, _, head_dim = x.shape
    x = x.reshape(-1, height // window, width // window, num_heads, window, window, head_dim)
    return x.permute(0, 1, 4, 2, 5, 3, 6).reshape(-1, height, width, num_heads * head_dim)


def grid_partition(x: Tensor, stride: tuple[int, int]) -> Tensor:
    """Group the tokens at the same offset in every p×p cell: (B, H, W, C) -> (B·p·p, H/p·W/p, C). No copy if p is 1."""
    batch, height, width, channels = x.shape
    rows, columns = height // stride[0], width // stride[1]
    x = x.view(batch, rows, stride[0], columns, stride[1], channels).permute(0, 2, 4, 1, 3, 5)
    return x.reshape(-1, rows * columns, channels)


def grid_merge(x: Tensor, stride: tuple[int, int], height: int, width: int) -> Tensor:
    """Put grid groups back in place: (B·p·p, H/p·W/p, C) -> (B, H, W, C). Inverse of `grid_partition`."""
    rows, columns = height // stride[0], width // stride[1]
    x = x.reshape(-1, *stride, rows, columns, x.shape[-1]).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(-1, height, width, x.shape[-1])


def key_mask(height: int, width: int, stride: tuple[int, int], device: torch.device) -> Tensor | None:
    """Return the mask of real (not padded) keys in each group of a padded H×W map, (p·p, 1, 1, T) bool.

    Returns None if the stride divides the map: then no key is padded.
    """
    if height % stride[0] == 0 and width % stride[1] == 0:
        return None
    real = torch.ones(1, height, width, 1, dtype=torch.bool, device=device)
    return grid_partition(pad_to_multiple(real, *stride), stride).transpose(1, 2)[:, None]


def rotary_embedding(
    rows: int, columns: int, head_dim: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Cosine and sine of the 2-D rotary angles, each (T, d/2), for T = rows·columns tokens in row-major order.

    Channel pair 2i turns by the angle column·10000^(-4i/d) and pair 2i+1 by row·10000^(-4i/d). Rows and columns are
    integer indices inside the group (model.md §4) [lineage].
    """
    pair = torch.arange(head_dim // 2, device=device)
    frequency = 10000.0 ** (-4 * torch.div(pair, 2, rounding_mode="floor").to(dtype) / head_dim)  # (d/2,)
    token = torch.arange(rows * columns, device=device)
    row = torch.div(token, columns, rounding_mode="floor")  # (T,)
    column = token - row * columns
    angle = torch.where(pair % 2 == 0, column[:, None], row[:, None]).to(dtype) * frequency  # (T, d/2)
    return angle.cos(), angle.sin()
