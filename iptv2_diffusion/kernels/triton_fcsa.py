"""FCSA as Triton kernels: one operator from q, k, v to the merged output, without copies into windows.

The device code and its equations are in `triton_fcsa_kernels.py`. The base windows run first. The shifted windows
follow and merge their result into the output of the base windows. Windows of one set share no positions, so no
operation is atomic and results are deterministic.

Memory traffic in elements per position: forward 9 C (base 3 C + C, shifted 3 C + 2 C), backward 17 C (7 C and 10 C).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .registry import fast_form, fast_forms_in_use
from .triton_common import DTYPES, as_map, block_of, device_of, dot_precision, is_usable
from .triton_fcsa_kernels import backward_kernel, forward_kernel

__all__ = ["MAX_HEAD_DIM", "MAX_WINDOW", "focal_attention", "supports"]

MAX_WINDOW = 16
MAX_HEAD_DIM = 64  # the d×d matrices are in registers


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def window_counts(height: int, width: int, window: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of base windows; windows at the border may exceed the map."""
    return -(-height // window), -(-width // window)


def branches(rows: int, columns: int, merge_logits: Tensor | bool | None) -> tuple[bool, ...]:
    """Return whether each launch is shifted: base windows only, or base windows and then shifted ones."""
    return (False, True) if merge_logits is not None and rows > 1 and columns > 1 else (False,)


def geometry(qkv: Tensor, heads: int, window: int, shifted: bool) -> tuple[tuple[int, ...], int, dict]:
    """Return the runtime arguments, the number of programs and the constants of the launch of one set of windows."""
    batch, height, width, channels = qkv.shape
    rows, columns = window_counts(height, width, window)
    own_rows, own_columns = (rows - 1, columns - 1) if shifted else (rows, columns)
    head_dim = channels // (3 * heads)
    block_d = block_of(head_dim)
    # Block sizes that fit in registers. float32 products and a loop over parts of a window need more registers.
    if qkv.element_size() == 2:
        most = 64 if window <= 8 else 32
    else:
        most = 32 if window <= 8 and block_d <= 32 else 16
    block_n = min(block_of(window**2), most)
    constants = {
        "HEAD_DIM": head_dim,
        "WINDOW": window,
        "SHIFTED": shifted,
        "BLOCK_N": block_n,
        "BLOCK_D": block_d,
        "PRECISION": dot_precision(qkv.dtype),
        "num_warps": 4 if block_d <= 32 and window <= 8 else 8,
        "num_stages": 1,  # many small programs hide the memory latency, so software pipelining is not needed
    }
    numbers = (*qkv.stride()[:3], height, width, own_rows, own_columns, heads)
    return numbers, batch * own_rows * own_columns * heads, constants


def as_parameters(*tensors: Tensor | None) -> list[Tensor | None]:
    """Convert parameters to contiguous float32, as the kernels require."""
    return [None if tensor is None else tensor.detach().float().contiguous() for tensor in tensors]


@torch.library.custom_op(
    "iptv2::focal_attention",
    mutates_args=(),
    schema="(Tensor qkv, Tensor affine, Tensor temperature, Tensor? merge_logits, int heads, int window) -> Tensor",
)
def attend(qkv, affine, temperature, merge_logits, heads, window):
    """Forward operator of `focal_attention`."""
    qkv = as_map(qkv)
    batch, height, width, channels = qkv.shape
    out = qkv.new_empty(batch, height, width, channels // 3)
    affine, temperature, merge_logits = as_parameters(affine, temperature, merge_logits)
    with device_of(qkv):
        for shifted in branches(*window_counts(height, width, window), merge_logits):
            numbers, programs, constants = geometry(qkv, heads, window, shifted)
            logits = affine if merge_logits is None else merge_logits  # a placeholder that is not read
            if programs:
                forward_kernel[(programs,)](qkv, affine, temperature, logits, out, *numbers, **constants)
    return out


@attend.register_fake
def _(qkv, affine, temperature, merge_logits, heads, window):
    batch, height, width, channels = qkv.shape
    return qkv.new_empty(batch, height, width, channels // 3)


@torch.library.custom_op(
    "iptv2::focal_attention_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor qkv, Tensor affine, Tensor temperature, Tensor? merge_logits, int heads, int window)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
def attend_backward(grad, qkv, affine, temperature, merge_logits, heads, window):
    """Compute the gradients of qkv, affine, temperature and merge_logits ((0,) without shifted windows).

    The gradients of the parameters are float32.
    """
    qkv, grad = as_map(qkv), grad.to(qkv.dtype).contiguous()
    _, height, width, _ = qkv.shape
    grad_qkv = qkv.new_empty(qkv.shape)
    affine, temperature, merge_logits = as_parameters(affine, temperature, merge_logits)
    which = branches(*window_counts(height, width, window), merge_logits)
    logits = affine if merge_logits is None else merge_logits
    grad_affine, grad_temperature = torch.zeros_like(affine), torch.zeros_like(temperature)
    aligned = []
    with device_of(qkv):
        for shifted in which:
            numbers, programs, constants = geometry(qkv, heads, window, shifted)
            sums = affine.new_empty(2, programs, window**2)
            sums_temperature = affine.new_empty(programs)
            given = (qkv, affine, temperature, logits, grad, grad_qkv, sums[0], sums_temperature, sums[1])
            if programs:
                backward_kernel[(programs,)](*given, *numbers, MERGED=len(which) > 1, **constants)
            grad_affine[int(shifted)] = sums[0].view(-1, heads, window**2).sum(dim=0)
            grad_temperature[int(shifted)] = sums_temperature.view(-1, heads).sum(dim=0)
            aligned.append(sums[1].view(-1, heads, window**2).sum(dim=0) if len(which) > 1 else None)
    if len(which) == 1:
        return grad_qkv, grad_affine, grad_temperature, affine.new_empty(0)
    return grad_qkv, grad_affine, grad_temperature, merge_gradient(merge_logits, *aligned, window)


def merge_gradient(logits: Tensor, base: Tensor, shifted: Tensor, window: int) -> Tensor:
    """Compute the gradient (2, h, w²) of the merge logits from Σ g·o (h, w²) of the base and the shifted windows."""

    def roll(x: Tensor, by: int) -> Tensor:
        return x.view(-1, window, window).roll((by, by), dims=(1, 2)).view(x.shape)

    half = window // 2
    share = (logits[1] - roll(logits[0], -half)).sigmoid()
    grad = (shifted - roll(base, -half)) * share * (1 - share)
    return torch.stack((-roll(grad, half), grad))


@attend_backward.register_fake
def _(grad, qkv, affine, temperature, merge_logits, heads, window):
    _, height, width, _ = qkv.shape
    which = branches(*window_counts(height, width, window), merge_logits)
    grads = (affine.new_empty(t.shape, dtype=torch.float32) for t in (affine, temperature))
    merged = affine.new_empty(merge_logits.shape if len(which) > 1 else (0,), dtype=torch.float32)
    return qkv.new_empty(qkv.shape), *grads, merged


def save(ctx, inputs, output):
    """Save the inputs for the backward, which needs no other map."""
    qkv, affine, temperature, merge_logits, heads, window = inputs
    ctx.save_for_backward(qkv, affine, temperature, merge_logits)
    ctx.heads, ctx.window = heads, window


def backward(ctx, grad):
    """Return the gradients of the operator's inputs."""
    qkv, affine, temperature, merge_logits = ctx.saved_tensors
    grads = attend_backward(grad, qkv, affine, temperature, merge_logits, ctx.heads, ctx.window)
    grad_merge = grads[3].to(merge_logits.dtype) if grads[3].numel() else None
    return grads[0], grads[1].to(affine.dtype), grads[2].to(temperature.dtype), grad_merge, None, None


attend.register_autograd(backward, setup_context=save)


# ---------------------------------------------------------------------------------------------------------------------
# Registration


def supports(qkv: Tensor, heads: int, window: int) -> bool:
    """Return whether the kernels support a map (B, H, W, 3C), by its device, dtype, window size and head width."""
    if (
        not fast_forms_in_use("focal_attention")
        or qkv.dim() != 4
        or qkv.dtype not in DTYPES
        or not 1 <= window <= MAX_WINDOW
    ):
        return False
    # Comparisons yield a constant even if a compiler treats the number of channels as dynamic.
    head_dims = [d for d in range(1, MAX_HEAD_DIM + 1) if qkv.shape[-1] == 3 * heads * d]
    return bool(head_dims) and runs(qkv.device.type, qkv.device.index, qkv.dtype, head_dims[0], window)


@torch.compiler.assume_constant_result
def runs(device_type: str, device_index: int | None, dtype: torch.dtype, head_dim: int, window: int) -> bool:
    """Return whether the kernels compile and run on a device, by a test run at the first call."""
    device = torch.device(device_type, device_index)  # type: ignore[arg-type]
    try_out = partial(probe, device, dtype, head_dim, window)
    return is_usable("focal_attention", device_type, device_index, try_out, str(dtype), head_dim, window)


def probe(device: torch.device, dtype: torch.dtype, head_dim: int, window: int) -> None:
    """Run every kernel once on a map of 2×2 windows."""
    qkv = torch.zeros(1, 2 * window, 2 * window, 3 * head_dim, device=device, dtype=dtype)
    affine, temperature = (torch.ones(2, 1, *shape, device=device) for shape in ((window**2,), ()))
    for logits in (None, affine):
        out = attend(qkv, affine, temperature, logits, 1, window)
        attend_backward(out, qkv, affine, temperature, logits, 1, window)


def takes(
    qkv: Tensor, affine: Tensor, temperature: Tensor, merge_logits: Tensor | None, num_heads: int, window: int
) -> bool:
    """Return `supports` for the operator's arguments."""
    return supports(qkv, num_heads, window)


@fast_form("focal_attention", device="cuda", compiles=True, takes=takes)
def focal_attention(
    qkv: Tensor, affine: Tensor, temperature: Tensor, merge_logits: Tensor | None, num_heads: int, window: int
) -> Tensor:
    """Merge the channel attention of windows and shifted windows; see `focal_attention` in models/attention.py.

    The function can be differentiated once.

    Args:
        qkv: q, k and v of h heads each, concatenated: (B, H, W, 3C), any H and W.
        affine: a, (branches, h, w²).
        temperature: τ, (branches, h).
        merge_logits: logarithms of s₁ and s₂, (2, h, w²); None for base windows only. If the map is at most one window
            high or wide, only base windows run, and the gradient of this argument is None.
        num_heads: h.
        window: w.

    Returns:
        (B, H, W, C) in qkv's dtype.
    """
    return attend(qkv, affine, temperature, merge_logits, num_heads, window)


def traffic(
    shape: tuple[int, int, int, int], itemsize: int, heads: int, window: int, merged: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Count the multiply–accumulates, bytes and launches of the forward and of the backward.

    Each program loads its part of the map once from memory; its second pass reads from the cache. The parameters are
    small and not counted, but the programs' sums of their gradients are.

    Args:
        shape: shape (B, H, W, 3C) of qkv.
        itemsize: bytes of an element.
        heads: h.
        window: w.
        merged: whether the shifted windows exist.
    """
    batch, height, width, channels = shape
    head_dim, channels = channels // (3 * heads), channels // 3
    rows, columns = window_counts(height, width, window)
    forward, backward = [0, 0, 0], [0, 0, 0]
    for shifted in branches(rows, columns, merged or None):
        covered = batch * height * width
        if shifted:
            half, sides = window // 2, ((height, rows), (width, columns))
            covered = batch
            for side, count in sides:
                covered *= max(0, min(side, half + (count - 1) * window) - half)
        sums = 2 * 2 * 4 * heads * covered  # a store and a load of the float32 sums of affine and share
        for total, products, elements, rest in ((forward, 2, 4 + shifted, 0), (backward, 5, 7 + 3 * shifted, sums)):
            total[0] += products * covered * channels * head_dim
            total[1] += elements * covered * channels * itemsize + rest
            total[2] += 1
    return tuple(forward), tuple(backward)
