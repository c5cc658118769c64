"""Device code of FCSA: channel attention in windows, read from the map and stored to it.

The equation is that of `focal_attention` in models/attention.py (model.md §3). One program computes one window and
head. It loads its positions from the (B, H, W, 3C) map and stores to the (B, H, W, C) map. The backward recomputes the
d×d matrices, which is cheaper than storing them.

With S = Σ_n a² qᵀk, L = τ·S/(‖aq‖‖ak‖), A = softmax(L) and out = v Aᵀ, as in `channel_attention`:

    dv = g A        dA = gᵀ v        dL = A∘(dA - Σ_j dA∘A)        E = dL∘L
    u_q = (k̂ dLᵀ·τ - q̂·E 1)/‖aq‖     dq = a²·u_q      k̂ = k/‖ak‖
    u_k = (q̂ dL·τ  - k̂·1ᵀE)/‖ak‖     dk = a²·u_k      da = a·Σ (q·u_q + k·u_k)        dτ = Σ E/τ

The gradient g of a branch's output is the gradient of the merged output times the branch's share of the merge, which is
s₂/(s₁+s₂) for the shifted branch. The gradient of the share is Σ_i g_i (o₂ - o₁)_i. The identity Σ_i g_i o_i =
Σ_j v_j (g A)_j gives it without the outputs.

Norms, softmax and sums are float32. Products run on tensor cores in the map's precision and accumulate in float32.
"""

from __future__ import annotations

from .triton_common import dot, jit, load_part, tl

__all__ = ["backward_kernel", "forward_kernel"]


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
def channel_products(
    qkv, affine, stride_y, stride_x, top, left, height, width, channels, channel, WINDOW: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum S = Σ_n a² qᵀk, (i, j), and the squared norms of aq and ak over the positions of a window."""
    CHUNKS: tl.constexpr = (WINDOW * WINDOW + BLOCK_N - 1) // BLOCK_N
    own = channel < HEAD_DIM
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
    return products, square_q, square_k


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


@jit
def store_part(base, offsets, value, inside, ADD: tl.constexpr):
    """Store a value, or add it to the stored value."""
    if ADD:
        value += tl.load(base + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(base + offsets, value.to(base.dtype.element_ty), mask=inside)


@jit
def logit_gradient(attention, cosines, grad_attention, tau, square_q, square_k):
    """Return τ·dL, the sum of E/τ, and the row and column sums of E."""
    grad_logits = attention * (grad_attention - tl.sum(grad_attention * attention, axis=1)[:, None])
    energy = grad_logits * cosines
    decay_q, decay_k = tl.sum(energy, axis=1), tl.sum(energy, axis=0)
    total = tl.sum(decay_q, axis=0)
    decay_q = tl.where(square_q > 1e-24, decay_q * tau, 0.0)  # a norm at its lower limit does not depend on its vector
    decay_k = tl.where(square_k > 1e-24, decay_k * tau, 0.0)
    return grad_logits * tau, total, decay_q, decay_k


@jit
def vector_gradients(q, k, inverse_q, inverse_k, decay_q, decay_k, grad_logits, PRECISION: tl.constexpr):
    """Return u_q and u_k of a window's positions; `grad_logits` is τ·dL."""
    unit_q, unit_k = q.to(tl.float32) * inverse_q[None, :], k.to(tl.float32) * inverse_k[None, :]
    grad_q = dot(unit_k.to(q.dtype), tl.trans(grad_logits), PRECISION)
    grad_q = (grad_q - unit_q * decay_q[None, :]) * inverse_q[None, :]
    grad_k = dot(unit_q.to(q.dtype), grad_logits, PRECISION)
    return grad_q, (grad_k - unit_k * decay_k[None, :]) * inverse_k[None, :]


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

    products, square_q, square_k = channel_products(
        qkv, affine, stride_y, stride_x, top, left, height, width, channels, channel, WINDOW, HEAD_DIM, BLOCK_N,
        BLOCK_D, PRECISION,
    )  # fmt: skip

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
    qkv, affine, temperature, logits, grad, grad_qkv, grad_affine, grad_temperature, grad_share,
    stride_b, stride_y, stride_x, height, width, rows, columns, heads,
    HEAD_DIM: tl.constexpr, WINDOW: tl.constexpr, SHIFTED: tl.constexpr, MERGED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
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

    products, square_q, square_k = channel_products(
        qkv, affine, stride_y, stride_x, top, left, height, width, channels, channel, WINDOW, HEAD_DIM, BLOCK_N,
        BLOCK_D, PRECISION,
    )  # fmt: skip
    grad_attention = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for chunk in range(CHUNKS):
        n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
        y, x, valid = window_positions(n, top, left, height, width, WINDOW)
        inside = valid[:, None] & own[None, :]
        v = load_part(qkv + 2 * channels, y, x, stride_y, stride_x, channel, inside)
        g = load_part(grad, y, x, width * channels, channels, channel, inside)
        if MERGED:
            share, _interior = branch_share(logits, n, y, x, rows, columns, heads, head, SHIFTED, WINDOW)
            g = (g.to(tl.float32) * share[:, None]).to(g.dtype)
        grad_attention += dot(tl.trans(g), v, PRECISION)

    tau = tl.load(temperature + parameters)
    attention, cosines, inverse_q, inverse_k = attention_map(products, square_q, square_k, tau, HEAD_DIM, BLOCK_D)
    grad_logits, energy, decay_q, decay_k = logit_gradient(attention, cosines, grad_attention, tau, square_q, square_k)
    tl.store(grad_temperature + program, energy)
    grad_logits = grad_logits.to(qkv.dtype.element_ty)
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
        grad_q, grad_k = vector_gradients(q, k, inverse_q, inverse_k, decay_q, decay_k, grad_logits, PRECISION)
        a = tl.load(affine + n, mask=n < WINDOW * WINDOW, other=0.0)
        aligned = tl.sum(q.to(tl.float32) * grad_q + k.to(tl.float32) * grad_k, axis=1)
        tl.store(grad_affine + sums + n, a * aligned, mask=n < WINDOW * WINDOW)
        weight = (a * a)[:, None]
        store_part(grad_qkv, offsets, grad_q * weight, inside, SHIFTED)
        store_part(grad_qkv + channels, offsets, grad_k * weight, inside, SHIFTED)
