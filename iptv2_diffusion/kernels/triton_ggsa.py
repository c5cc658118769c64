"""GGSA as Triton kernels: one operator from q, k, v to the output, without copies into grid groups.

The device code and its equations are in `triton_ggsa_kernels.py`. A group has at most `MAX_TOKENS` tokens, whose keys
and values stay in the caches. Larger groups take the plain formula, which ends in `scaled_dot_product_attention`.

Memory traffic in elements per position: forward 4 C, backward 8 C (q, k, v, out, its gradient; three gradients), and
one float32 number of each token and head, which the forward stores for the backward.
"""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from .geometry import rotary_embedding
from .registry import fast_form, fast_forms_in_use
from .triton_common import DTYPES, as_map, block_of, device_of, dot_precision, is_usable
from .triton_ggsa_kernels import backward_kernel, forward_kernel

__all__ = ["MAX_HEAD_DIM", "MAX_TOKENS", "grid_attention", "supports"]

MAX_TOKENS = 256
MAX_HEAD_DIM = 64


def group_size(height: int, width: int, step_y: int, step_x: int) -> tuple[int, int]:
    """Return the rows and columns of a group; at the border, its last tokens may be outside the map."""
    return -(-height // step_y), -(-width // step_x)


def block_size(tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Return the number of tokens of a program, so that its matrices fit in registers."""
    return min(block_of(tokens), 16 if dtype == torch.float32 or head_dim <= 16 else 32)


def warps(block_d: int, hip: bool) -> int:
    """Return the number of warps of a program. No kernel spills then, for any head width; AMD's warps are 64 wide."""
    if block_d == 16:
        return 2
    return 4 if block_d == 32 or hip else 8


def geometry(qkv: Tensor, heads: int, step_y: int, step_x: int) -> tuple[tuple[int, ...], int, dict]:
    """Return the runtime arguments, the number of programs and the constants of a launch."""
    batch, height, width, channels = qkv.shape
    rows, columns = group_size(height, width, step_y, step_x)
    tokens, head_dim = rows * columns, channels // (3 * heads)
    block_t = block_size(tokens, head_dim, qkv.dtype)
    blocks, block_d = -(-tokens // block_t), block_of(head_dim)
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_T": block_t,
        "BLOCK_D": block_d,
        "PRECISION": dot_precision(qkv.dtype),
        "num_warps": warps(block_d, torch.version.hip is not None),
        "num_stages": 1,
    }
    numbers = (*qkv.stride()[:3], height, width, step_y, step_x, columns, tokens, blocks, heads)
    return numbers, batch * step_y * step_x * blocks * heads, constants


def angles(qkv: Tensor, heads: int, step_y: int, step_x: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine (T, d/2) of a group's rotations, float32. The table of a shape and device is computed once."""
    _, height, width, channels = qkv.shape
    rows, columns = group_size(height, width, step_y, step_x)
    capturing = qkv.is_cuda and torch.cuda.is_current_stream_capturing()  # a CUDA graph owns its memory
    table = angle_table.__wrapped__ if capturing else angle_table
    return table(rows, columns, channels // (3 * heads), qkv.device)


@lru_cache(maxsize=64)  # a table is 64 KB at most
def angle_table(rows: int, columns: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    cos, sin = rotary_embedding(rows, columns, head_dim, device, torch.float32)
    return cos.contiguous(), sin.contiguous()


@torch.library.custom_op(
    "iptv2::grid_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor scale, int heads, int step_y, int step_x) -> (Tensor, Tensor)",
)
def attend(qkv, scale, heads, step_y, step_x):
    """Forward operator of `grid_attention`; the second result is log Σ exp(L) of each token and head."""
    qkv, scale = as_map(qkv), scale.detach().float().contiguous()
    numbers, programs, constants = geometry(qkv, heads, step_y, step_x)
    out, normaliser = (torch.empty(s, dtype=d, device=qkv.device) for s, d in result_shapes(qkv, heads, step_y, step_x))
    if programs:
        with device_of(qkv):
            cos, sin = angles(qkv, heads, step_y, step_x)
            forward_kernel[(programs,)](qkv, scale, cos, sin, out, normaliser, *numbers, **constants)
    return out, normaliser


def result_shapes(qkv: Tensor, heads: int, step_y: int, step_x: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of the results of `attend`."""
    batch, height, width, channels = qkv.shape
    rows, columns = group_size(height, width, step_y, step_x)
    normaliser = (batch * step_y * step_x, heads, rows * columns)
    return [((batch, height, width, channels // 3), qkv.dtype), (normaliser, torch.float32)]


@attend.register_fake
def _(qkv, scale, heads, step_y, step_x):
    return tuple(qkv.new_empty(s, dtype=d) for s, d in result_shapes(qkv, heads, step_y, step_x))


@torch.library.custom_op(
    "iptv2::grid_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor scale, Tensor out, Tensor normaliser, int heads, int step_y, int step_x)"
    " -> (Tensor, Tensor)",
)
def attend_backward(grad, qkv, scale, out, normaliser, heads, step_y, step_x):
    """Compute the gradients of qkv and of scale (float32)."""
    qkv, grad, scale = as_map(qkv), grad.to(qkv.dtype).contiguous(), scale.detach().float().contiguous()
    numbers, programs, constants = geometry(qkv, heads, step_y, step_x)
    grad_qkv, sums = qkv.new_empty(qkv.shape), scale.new_empty(programs)
    if programs:
        with device_of(qkv):
            cos, sin = angles(qkv, heads, step_y, step_x)
            maps = (qkv, scale, cos, sin, out.contiguous(), normaliser.contiguous(), grad, grad_qkv, sums)
            backward_kernel[(programs,)](*maps, *numbers, **constants)
    return grad_qkv, sums.view(-1, heads).sum(dim=0)


@attend_backward.register_fake
def _(grad, qkv, scale, out, normaliser, heads, step_y, step_x):
    return qkv.new_empty(qkv.shape), scale.new_empty(scale.shape, dtype=torch.float32)


def save(ctx, inputs, output):
    """Save inputs and results for the backward."""
    qkv, scale, *ctx.numbers = inputs
    ctx.save_for_backward(qkv, scale, *output)
    ctx.set_materialize_grads(False)


def backward(ctx, grad, _grad_normaliser):
    """Return the gradients of the operator's inputs. The normaliser is for the backward only and has none."""
    if grad is None:
        return (None,) * 5
    qkv, scale, out, normaliser = ctx.saved_tensors
    grad_qkv, grad_scale = attend_backward(grad, qkv, scale, out, normaliser, *ctx.numbers)
    return grad_qkv, grad_scale.to(scale.dtype), None, None, None


attend.register_autograd(backward, setup_context=save)


# ---------------------------------------------------------------------------------------------------------------------
# Registration


def supports(qkv: Tensor, heads: int, stride: tuple[int, int]) -> bool:
    """Return whether the kernels support a map (B, H, W, 3C), by its device, dtype, head width and group size."""
    if not fast_forms_in_use("grid_attention") or not (head_dim := fits(qkv, heads, stride)):
        return False
    return runs(qkv.device.type, qkv.device.index, qkv.dtype, head_dim)


def fits(qkv: Tensor, heads: int, stride: tuple[int, int]) -> int:
    """Return the head width of a map if dtype, head width and group size are within the limits; 0 otherwise."""
    if qkv.dim() != 4 or qkv.dtype not in DTYPES:
        return 0
    rows, columns = group_size(qkv.shape[1], qkv.shape[2], *stride)
    if rows * columns > MAX_TOKENS:
        return 0
    # Comparisons yield a constant even if a compiler treats the number of channels as dynamic.
    return next((d for d in range(4, MAX_HEAD_DIM + 1, 4) if qkv.shape[-1] == 3 * heads * d), 0)


@torch.compiler.assume_constant_result
def runs(device_type: str, device_index: int | None, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether the kernels compile and run on a device, by a test run at the first call."""
    device = torch.device(device_type, device_index)  # type: ignore[arg-type]
    try_out = partial(probe, device, dtype, head_dim)
    return is_usable("grid_attention", device_type, device_index, try_out, str(dtype), head_dim)


def probe(device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """Run every kernel once for each block size."""
    for side in (4, 8):
        qkv = torch.zeros(1, side, side, 3 * head_dim, device=device, dtype=dtype)
        scale = torch.ones(1, device=device)
        out, normaliser = attend(qkv, scale, 1, 1, 1)
        attend_backward(out, qkv, scale, out, normaliser, 1, 1, 1)


def takes(qkv: Tensor, scale: Tensor, num_heads: int, stride: tuple[int, int]) -> bool:
    """Return `supports` for the operator's arguments."""
    return supports(qkv, num_heads, stride)


@fast_form("grid_attention", device="cuda", compiles=True, takes=takes)
def grid_attention(qkv: Tensor, scale: Tensor, num_heads: int, stride: tuple[int, int]) -> Tensor:
    """Attention over the tokens of each group of a grid; see `grid_attention` in models/attention.py.

    The function can be differentiated once.

    Args:
        qkv: q, k and v of h heads each, concatenated: (B, H, W, 3C), any H and W, up to `MAX_TOKENS` tokens per group.
        scale: s, (h,).
        num_heads: h. A head has at most `MAX_HEAD_DIM` channels, a multiple of 4.
        stride: p, vertical and horizontal, at most H and W.

    Returns:
        (B, H, W, C) in qkv's dtype.
    """
    return attend(qkv, scale, num_heads, *stride)[0]


def traffic(
    shape: tuple[int, int, int, int], itemsize: int, heads: int, stride: tuple[int, int]
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Count the multiply–accumulates, bytes and launches of the forward and of the backward.

    Keys and values that several programs of a group read are loaded once from memory. The backward computes seven
    products: logits and g vᵀ twice. A second launch sums ds.

    Args:
        shape: shape (B, H, W, 3C) of qkv.
        itemsize: bytes of an element.
        heads: h.
        stride: p, vertical and horizontal.
    """
    batch, height, width, channels = shape
    rows, columns = group_size(height, width, *stride)
    positions, channels = batch * height * width, channels // 3
    product, normaliser = positions * rows * columns * channels, 4 * heads * positions
    forward = 2 * product, 4 * positions * channels * itemsize + normaliser, 1
    return forward, (7 * product, 8 * positions * channels * itemsize + normaliser, 2)
