"""Triton kernels of FCSA: one operator from q, k, v to the merged output, without copies into windows.

The equation is that of `focal_attention` in models/attention.py (model.md §3). One program computes one window and
head. It loads its positions from the (B, H, W, 3C) map and stores to the (B, H, W, C) map. The base windows run first.
The shifted windows follow and merge their result into the output of the base windows. Windows of one set share no
positions, so no operation is atomic and results are deterministic. The backward recomputes the d×d matrices, which is
cheaper than storing them.

With S = Σ_n a² qᵀk, L = τ·S/(‖aq‖‖ak‖), A = softmax(L) and out = v Aᵀ, as in `channel_attention`:

    dv = g A        dA = gᵀ v        dL = A∘(dA - Σ_j dA∘A)        E = dL∘L
    u_q = (k̂ dLᵀ·τ - q̂·E 1)/‖aq‖     dq = a²·u_q      k̂ = k/‖ak‖
    u_k = (q̂ dL·τ  - k̂·1ᵀE)/‖ak‖     dk = a²·u_k      da = a·Σ (q·u_q + k·u_k)        dτ = Σ E/τ

The gradient g of a branch's output is the gradient of the merged output times the branch's share of the merge, which is
s₂/(s₁+s₂) for the shifted branch. The gradient of the share is Σ_i g_i (o₂ - o₁)_i. The identity Σ_i g_i o_i =
Σ_j v_j (g A)_j gives it without the outputs.

Norms, softmax and sums are float32. Products run on tensor cores in the map's precision and accumulate in float32.

Memory traffic in elements per position: forward 9 C (base 3 C + C, shifted 3 C + 2 C), backward 17 C (7 C and 10 C).
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .registry import fast_form, fast_forms_in_use
from .triton_common import DTYPES, block_of, device_of, dot, dot_precision, is_usable, jit, tl

__all__ = ["MAX_HEAD_DIM", "MAX_WINDOW", "focal_attention", "supports"]

MAX_WINDOW = 16
MAX_HEAD_DIM = 64  # the d×d matrices are in registers


# ---------------------------------------------------------------------------------------------------------------------
# Device functions. Letters: n positions of a window, i channels of q, j channels of k and v.


@jit
def window_corner(program, rows, columns, heads, start, WINDOW: tl.constexpr):
    """Return the head, the batch index and the top-left position of a program's window. The head varies fastest."""
    head = program % heads
    index = program // heads
    left = start + (index % columns) * WINDOW
    index = index // columns
    top = start + (index % rows) * WINDOW
    return head, (index // rows).to(tl.int64), top, left


@jit
def window_positions(n, top, left, height, width, WINDOW: tl.constexpr):
    """Return the map positions of a window's positions n, and a mask of those inside the map."""
    y, x = top + n // WINDOW, left + n % WINDOW
    return y, x, (n < WINDOW * WINDOW) & (y < height) & (x < width)


@jit
def load_part(base, y, x, stride_y, stride_x, channel, inside):
    """Load the channels of a map at the positions: (n, d), zero outside the map."""
    offsets = y.to(tl.int64)[:, None] * stride_y + (x * stride_x)[:, None] + channel[None, :]
    return tl.load(base + offsets, mask=inside, other=0.0)


@jit
def load_square(affine, n, WINDOW: tl.constexpr):
    """Load a² of a window's positions; zero beyond them."""
    a = tl.load(affine + n, mask=n < WINDOW * WINDOW, other=0.0)
    return a * a


@jit
def branch_share(logits, n, y, x, rows, columns, heads, head, SHIFTED: tl.constexpr, WINDOW: tl.constexpr):
    """Return the branch's share of the merge at a window's positions n, and a mask of those that both branches cover.

    The share of a shifted window is s₂ / (s₁ + s₂). The share of a base window is the rest, or 1 in the border of the
    map. `rows` and `columns` are the numbers of base windows; there is one shifted window fewer in each direction.
    Position (i, j) of a shifted window is position (i + w//2, j + w//2) modulo w of a base window.
    """
    HALF: tl.constexpr = WINDOW // 2
    i, j = n // WINDOW, n % WINDOW
    if SHIFTED:
        shifted = n
        base = ((i + HALF) % WINDOW) * WINDOW + (j + HALF) % WINDOW
    else:
        shifted = ((i + WINDOW - HALF) % WINDOW) * WINDOW + (j + WINDOW - HALF) % WINDOW
        base = n
    valid = n < WINDOW * WINDOW
    s1 = tl.load(logits + head * (WINDOW * WINDOW) + base, mask=valid, other=0.0)
    s2 = tl.load(logits + (heads + head) * (WINDOW * WINDOW) + shifted, mask=valid, other=0.0)
    if SHIFTED:
        return tl.sigmoid(s2 - s1), valid
    bottom, right = HALF + (rows - 1) * WINDOW, HALF + (columns - 1) * WINDOW
    interior = (y >= HALF) & (y < bottom) & (x >= HALF) & (x < right)
    return tl.where(interior, tl.sigmoid(s1 - s2), 1.0), interior


@jit
def attention_map(products, square_q, square_k, tau, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Compute A and L/τ, both (i, j), and 1/‖aq‖ and 1/‖ak‖ from S and the squared norms."""
    inverse_q = tl.rsqrt(tl.maximum(square_q, 1e-24))
    inverse_k = tl.rsqrt(tl.maximum(square_k, 1e-24))
    cosines = products * inverse_q[:, None] * inverse_k[None, :]
    logits = cosines * tau
    if HEAD_DIM < BLOCK_D:
        logits = tl.where(tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM, logits, float("-inf"))
    weights = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return weights / tl.sum(weights, axis=1)[:, None], cosines, inverse_q, inverse_k


# ---------------------------------------------------------------------------------------------------------------------
# The kernels


@jit
def forward_kernel(
    qkv,
    affine,
    temperature,
    logits,
    out,
    stride_b,
    stride_y,
    stride_x,
    height,
    width,
    rows,
    columns,
    heads,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute one window and head. A shifted window merges its result into `out`."""
    BRANCH: tl.constexpr = 1 if SHIFTED else 0
    CHUNKS: tl.constexpr = (WINDOW * WINDOW + BLOCK_N - 1) // BLOCK_N
    start = WINDOW // 2 if SHIFTED else 0
    head, batch, top, left = window_corner(tl.program_id(0), rows, columns, heads, start, WINDOW)
    channels = heads * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    own = channel < HEAD_DIM
    parameters = BRANCH * heads + head
    affine += parameters * (WINDOW * WINDOW)
    qkv += batch * stride_b + head * HEAD_DIM
    out += batch * (height * channels) * width + head * HEAD_DIM

    products = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    square_q = tl.zeros((BLOCK_D,), tl.float32)
    square_k = tl.zeros((BLOCK_D,), tl.float32)
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        y, x, valid = window_positions(n, top, left, height, width, WINDOW)
        inside = valid[:, None] & own[None, :]
        q = load_part(qkv, y, x, stride_y, stride_x, channel, inside)
        k = load_part(qkv + channels, y, x, stride_y, stride_x, channel, inside)
        weight = load_square(affine, n, WINDOW)[:, None]
        q32, weighted = q.to(tl.float32), k.to(tl.float32) * weight
        square_q += tl.sum(q32 * q32 * weight, axis=0)
        square_k += tl.sum(k.to(tl.float32) * weighted, axis=0)
        products += dot(tl.trans(q), weighted.to(q.dtype), PRECISION)

    tau = tl.load(temperature + parameters)
    attention, _, _, _ = attention_map(products, square_q, square_k, tau, HEAD_DIM, BLOCK_D)
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        y, x, valid = window_positions(n, top, left, height, width, WINDOW)
        inside = valid[:, None] & own[None, :]
        v = load_part(qkv + 2 * channels, y, x, stride_y, stride_x, channel, inside)
        result = dot(v, tl.trans(attention.to(v.dtype)), PRECISION)
        offsets = (y.to(tl.int64) * width + x)[:, None] * channels + channel[None, :]
        if SHIFTED:
            share, _interior = branch_share(logits, n, y, x, rows, columns, heads, head, True, WINDOW)
            base = tl.load(out + offsets, mask=inside, other=0.0).to(tl.float32)
            result = base + share[:, None] * (result - base)
        tl.store(out + offsets, result.to(out.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    qkv,
    affine,
    temperature,
    logits,
    grad,
    grad_qkv,
    grad_affine,
    grad_temperature,
    grad_share,
    stride_b,
    stride_y,
    stride_x,
    height,
    width,
    rows,
    columns,
    heads,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SHIFTED: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of one window and head. A shifted window adds its gradients to `grad_qkv`.

    For the parameters, each program stores its own sums: `grad_affine` (programs, w²), `grad_share` (programs, w²),
    which is Σ_i g_i o_i in the interior, and `grad_temperature` (programs,).
    """
    BRANCH: tl.constexpr = 1 if SHIFTED else 0
    CHUNKS: tl.constexpr = (WINDOW * WINDOW + BLOCK_N - 1) // BLOCK_N
    HALF: tl.constexpr = WINDOW // 2
    start = HALF if SHIFTED else 0
    program = tl.program_id(0)
    head, batch, top, left = window_corner(program, rows, columns, heads, start, WINDOW)
    channels = heads * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    own = channel < HEAD_DIM
    parameters = BRANCH * heads + head
    affine += parameters * (WINDOW * WINDOW)
    qkv += batch * stride_b + head * HEAD_DIM
    grad += batch * (height * channels) * width + head * HEAD_DIM
    grad_qkv += batch * (height * 3 * channels) * width + head * HEAD_DIM
    sums = program.to(tl.int64) * (WINDOW * WINDOW)

    products = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    grad_attention = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    square_q = tl.zeros((BLOCK_D,), tl.float32)
    square_k = tl.zeros((BLOCK_D,), tl.float32)
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        y, x, valid = window_positions(n, top, left, height, width, WINDOW)
        inside = valid[:, None] & own[None, :]
        q = load_part(qkv, y, x, stride_y, stride_x, channel, inside)
        k = load_part(qkv + channels, y, x, stride_y, stride_x, channel, inside)
        v = load_part(qkv + 2 * channels, y, x, stride_y, stride_x, channel, inside)
        g = load_part(grad, y, x, width * channels, channels, channel, inside)
        weight = load_square(affine, n, WINDOW)[:, None]
        q32, weighted = q.to(tl.float32), k.to(tl.float32) * weight
        square_q += tl.sum(q32 * q32 * weight, axis=0)
        square_k += tl.sum(k.to(tl.float32) * weighted, axis=0)
        products += dot(tl.trans(q), weighted.to(q.dtype), PRECISION)
        scaled = g
        if MERGED:
            share, _interior = branch_share(logits, n, y, x, rows, columns, heads, head, SHIFTED, WINDOW)
            scaled = (g.to(tl.float32) * share[:, None]).to(g.dtype)
        grad_attention += dot(tl.trans(scaled), v, PRECISION)

    tau = tl.load(temperature + parameters)
    attention, cosines, inverse_q, inverse_k = attention_map(products, square_q, square_k, tau, HEAD_DIM, BLOCK_D)
    grad_logits = attention * (grad_attention - tl.sum(grad_attention * attention, axis=1)[:, None])
    energy = grad_logits * cosines
    tl.store(grad_temperature + program, tl.sum(tl.sum(energy, axis=1), axis=0))
    decay_q, decay_k = tl.sum(energy, axis=1) * tau, tl.sum(energy, axis=0) * tau
    decay_q = tl.where(square_q > 1e-24, decay_q, 0.0)  # a norm at its lower limit does not follow its vector
    decay_k = tl.where(square_k > 1e-24, decay_k, 0.0)
    grad_logits = (grad_logits * tau).to(qkv.dtype.element_ty)
    attention = attention.to(qkv.dtype.element_ty)

    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        y, x, valid = window_positions(n, top, left, height, width, WINDOW)
        inside = valid[:, None] & own[None, :]
        g = load_part(grad, y, x, width * channels, channels, channel, inside)
        v = load_part(qkv + 2 * channels, y, x, stride_y, stride_x, channel, inside)
        offsets = (y.to(tl.int64) * width + x)[:, None] * (3 * channels) + channel[None, :]

        grad_v = dot(g, attention, PRECISION)
        if MERGED:
            share, interior = branch_share(logits, n, y, x, rows, columns, heads, head, SHIFTED, WINDOW)
            aligned = tl.where(interior, tl.sum(grad_v * v.to(tl.float32), axis=1), 0.0)
            tl.store(grad_share + sums + n, aligned, mask=n < WINDOW * WINDOW)
            grad_v = grad_v * share[:, None]
        store_part(grad_qkv + 2 * channels, offsets, grad_v, inside, SHIFTED)

        q = load_part(qkv, y, x, stride_y, stride_x, channel, inside)
        k = load_part(qkv + channels, y, x, stride_y, stride_x, channel, inside)
        unit_q, unit_k = q.to(tl.float32) * inverse_q[None, :], k.to(tl.float32) * inverse_k[None, :]
        grad_q = dot(unit_k.to(q.dtype), tl.trans(grad_logits), PRECISION)
        grad_q = (grad_q - unit_q * decay_q[None, :]) * inverse_q[None, :]
        grad_k = dot(unit_q.to(q.dtype), grad_logits, PRECISION)
        grad_k = (grad_k - unit_k * decay_k[None, :]) * inverse_k[None, :]
        a = tl.load(affine + n, mask=n < WINDOW * WINDOW, other=0.0)
        aligned = tl.sum(q.to(tl.float32) * grad_q + k.to(tl.float32) * grad_k, axis=1)
        tl.store(grad_affine + sums + n, a * aligned, mask=n < WINDOW * WINDOW)
        weight = (a * a)[:, None]
        store_part(grad_qkv, offsets, grad_q * weight, inside, SHIFTED)
        store_part(grad_qkv + channels, offsets, grad_k * weight, inside, SHIFTED)


@jit
def store_part(base, offsets, value, inside, ADD: tl.constexpr):
    """Store a value, or add it to the stored value."""
    if ADD:
        value += tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------------------------
# Launches


def window_counts(height: int, width: int, window: int) -> tuple[int, int]:
    """Return the numbers of rows and columns of base windows; windows at the border may exceed the map."""
    return -(-height // window), -(-width // window)


def branches(rows: int, columns: int, merge_logits: Tensor | None) -> tuple[bool, ...]:
    """Return the launches by whether they are shifted: base windows only, or base windows and then shifted ones."""
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


def as_map(x: Tensor) -> Tensor:
    """Make the channels of a map contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


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
    device = torch.device(device_type, device_index)
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
) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
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
