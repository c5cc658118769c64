"""Device code of GGSA: attention among the tokens of a grid group, read from the map and stored to it.

The equation is that of `grid_attention` in models/attention.py (model.md §4). With u = x/‖x‖, R the rotation of a token
and g the gradient of the output:

    L = s · R(u_q) R(u_k)ᵀ      P = softmax(L)      out = P v
    dv = Pᵀ g        dL = P∘(g vᵀ - δ),  δ = Σ g∘out        ds = Σ dL∘L/s
    z_q = s · dL R(u_k)         dq = (Rᵀ(z_q) - u_q·(R(u_q)·z_q))/‖q‖,  and likewise for k with dLᵀ and R(u_q)

The softmax of the forward is online [FlashAttention], so that a program holds one block of logits. Norms, rotations,
softmax and sums are float32. Products run on tensor cores in the map's precision and accumulate in float32.
Letters: t tokens of a group, i tokens as queries, j tokens as keys, c channels of a head.
"""

from __future__ import annotations

from .triton_common import dot, jit, load_part, tl

__all__ = ["backward_kernel", "forward_kernel"]


@jit
def group_of(program, heads, blocks, step_y, step_x):
    """Return a program's head, block of tokens, group, batch index and offset in the cell. The head varies fastest."""
    head, index = program % heads, program // heads
    block, group = index % blocks, index // blocks
    left, cell = group % step_x, group // step_x
    return head, block, group, (cell // step_y).to(tl.int64), cell % step_y, left


@jit
def token_positions(t, top, left, step_y, step_x, columns, tokens, height, width):
    """Return the map positions of a group's tokens t, and a mask of those inside the map."""
    y, x = top + (t // columns) * step_y, left + (t % columns) * step_x
    return y, x, (t < tokens) & (y < height) & (x < width)


@jit
def swap_pairs(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Exchange the two channels of each adjacent pair: (ROWS, COLUMNS) -> (ROWS, COLUMNS)."""
    even, odd = tl.split(tl.reshape(x, (ROWS, COLUMNS // 2, 2)))
    return tl.reshape(tl.join(odd, even), (ROWS, COLUMNS))


@jit
def load_turn(cos, sin, t, tokens, channel, HEAD_DIM: tl.constexpr):
    """Load cosine and signed sine (t, c) of the angles. R(x) = x·cos + swap(x)·sin, and Rᵀ takes -sin."""
    offsets = t[:, None] * (HEAD_DIM // 2) + (channel // 2)[None, :]
    inside = (t < tokens)[:, None] & (channel < HEAD_DIM)[None, :]
    sign = tl.where(channel % 2 == 0, -1.0, 1.0)[None, :]
    return tl.load(cos + offsets, mask=inside, other=0.0), sign * tl.load(sin + offsets, mask=inside, other=0.0)


@jit
def unit_and_turned(x, turn_cos, turn_sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return u = x/‖x‖, R(u) and 1/‖x‖ in float32."""
    x = x.to(tl.float32)
    inverse = tl.rsqrt(tl.maximum(tl.sum(x * x, axis=1), 1e-24))
    unit = x * inverse[:, None]
    return unit, unit * turn_cos + swap_pairs(unit, ROWS, COLUMNS) * turn_sin, inverse


@jit
def load_turned(base, cos, sin, t, tokens, y, x, stride_y, stride_x, channel, inside, HEAD_DIM: tl.constexpr):
    """Load q or k of tokens t and return R(u) in the map's precision."""
    value = load_part(base, y, x, stride_y, stride_x, channel, inside)
    turn_cos, turn_sin = load_turn(cos, sin, t, tokens, channel, HEAD_DIM)
    _unit, turned, _inverse = unit_and_turned(value, turn_cos, turn_sin, value.shape[0], value.shape[1])
    return turned.to(value.dtype)


@jit
def store_gradient(base, offsets, inside, x, z, turn_cos, turn_sin, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Store dx of q or k, given z, the gradient of R(u). Return Σ_c R(u)·z."""
    unit, turned, inverse = unit_and_turned(x, turn_cos, turn_sin, ROWS, COLUMNS)
    aligned = tl.sum(turned * z, axis=1)
    along = tl.where(inverse < 1e12, aligned, 0.0)  # a norm at its lower limit does not depend on its vector
    back = z * turn_cos - swap_pairs(z, ROWS, COLUMNS) * turn_sin  # Rᵀ(z)
    grad = (back - unit * along[:, None]) * inverse[:, None]
    tl.store(base + offsets, grad.to(base.dtype.element_ty), mask=inside)
    return aligned


# ---------------------------------------------------------------------------------------------------------------------
# The kernels. One program computes a block of a group's tokens for one head.


@jit
def forward_kernel(
    qkv,
    scale,
    cos,
    sin,
    out,
    normaliser,
    stride_b,
    stride_y,
    stride_x,
    height,
    width,
    step_y,
    step_x,
    columns,
    tokens,
    blocks,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the output of a block of queries, and log Σ exp(L) of each: `normaliser` (groups, heads, tokens)."""
    head, block, group, batch, top, left = group_of(tl.program_id(0), heads, blocks, step_y, step_x)
    channels = heads * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    own = (channel < HEAD_DIM)[None, :]
    qkv += batch * stride_b + head * HEAD_DIM
    out += batch * (height * channels) * width + head * HEAD_DIM
    factor = tl.load(scale + head)

    i = block * BLOCK_T + tl.arange(0, BLOCK_T)
    y, x, valid = token_positions(i, top, left, step_y, step_x, columns, tokens, height, width)
    q = load_turned(qkv, cos, sin, i, tokens, y, x, stride_y, stride_x, channel, valid[:, None] & own, HEAD_DIM)
    largest = tl.full((BLOCK_T,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_T,), tl.float32)
    result = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        j = start + tl.arange(0, BLOCK_T)
        key_y, key_x, key = token_positions(j, top, left, step_y, step_x, columns, tokens, height, width)
        inside = key[:, None] & own
        k = load_turned(
            qkv + channels, cos, sin, j, tokens, key_y, key_x, stride_y, stride_x, channel, inside, HEAD_DIM
        )
        v = load_part(qkv + 2 * channels, key_y, key_x, stride_y, stride_x, channel, inside)
        logits = tl.where(key[None, :], factor * dot(q, tl.trans(k), PRECISION), float("-inf"))
        new = tl.maximum(largest, tl.max(logits, axis=1))  # finite: the first token of a group is inside the map
        weights = tl.exp(logits - new[:, None])
        decay = tl.exp(largest - new)
        total = total * decay + tl.sum(weights, axis=1)
        result = result * decay[:, None] + dot(weights.to(v.dtype), v, PRECISION)
        largest = new

    offsets = (y.to(tl.int64) * width + x)[:, None] * channels + channel[None, :]
    tl.store(out + offsets, (result / total[:, None]).to(out.dtype.element_ty), mask=valid[:, None] & own)
    rows = (group.to(tl.int64) * heads + head) * tokens
    tl.store(normaliser + rows + i, largest + tl.log(total), mask=i < tokens)


@jit
def weights_and_gradient(q, k, v, g, normaliser, delta, factor, valid, PRECISION: tl.constexpr):
    """Return P and dL of queries (rows) and keys (columns)."""
    logits = factor * dot(q, tl.trans(k), PRECISION)
    weights = tl.where(valid, tl.exp(logits - normaliser[:, None]), 0.0)
    return weights, weights * (dot(g, tl.trans(v), PRECISION) - delta[:, None])


@jit
def sweep_keys(
    q, g, delta, normaliser, valid, factor, qkv, cos, sin, stride_y, stride_x, channels, channel, own, top, left,
    step_y, step_x, columns, tokens, height, width, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum dL R(u_k) over all keys of the group for a block of queries."""
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        j = start + tl.arange(0, BLOCK_T)
        y, x, key = token_positions(j, top, left, step_y, step_x, columns, tokens, height, width)
        inside = key[:, None] & own
        k = load_turned(qkv + channels, cos, sin, j, tokens, y, x, stride_y, stride_x, channel, inside, HEAD_DIM)
        v = load_part(qkv + 2 * channels, y, x, stride_y, stride_x, channel, inside)
        both = valid[:, None] & key[None, :]
        _, grad_logits = weights_and_gradient(q, k, v, g, normaliser, delta, factor, both, PRECISION)
        total += dot(grad_logits.to(k.dtype), k, PRECISION)
    return total


@jit
def sweep_queries(
    k, v, valid, factor, qkv, grad, out, normaliser, cos, sin, stride_y, stride_x, channels, channel, own, top, left,
    step_y, step_x, columns, tokens, height, width, HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum dLᵀ R(u_q) and Pᵀ g over all queries of the group for a block of keys."""
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for start in range(0, tokens, BLOCK_T):
        i = start + tl.arange(0, BLOCK_T)
        y, x, query = token_positions(i, top, left, step_y, step_x, columns, tokens, height, width)
        inside = query[:, None] & own
        q = load_turned(qkv, cos, sin, i, tokens, y, x, stride_y, stride_x, channel, inside, HEAD_DIM)
        g, delta = load_gradient(grad, out, y, x, width * channels, channels, channel, inside)
        log_sum = tl.load(normaliser + i, mask=query, other=0.0)
        both = query[:, None] & valid[None, :]
        weights, grad_logits = weights_and_gradient(q, k, v, g, log_sum, delta, factor, both, PRECISION)
        total += dot(tl.trans(grad_logits.to(q.dtype)), q, PRECISION)
        grad_v += dot(tl.trans(weights.to(g.dtype)), g, PRECISION)
    return total, grad_v


@jit
def load_gradient(grad, out, y, x, stride_y, stride_x, channel, inside):
    """Load g of tokens, and compute δ = Σ g∘out."""
    g = load_part(grad, y, x, stride_y, stride_x, channel, inside)
    o = load_part(out, y, x, stride_y, stride_x, channel, inside)
    return g, tl.sum(g.to(tl.float32) * o.to(tl.float32), axis=1)


@jit
def backward_kernel(
    qkv,
    scale,
    cos,
    sin,
    out,
    normaliser,
    grad,
    grad_qkv,
    grad_scale,
    stride_b,
    stride_y,
    stride_x,
    height,
    width,
    step_y,
    step_x,
    columns,
    tokens,
    blocks,
    heads,
    HEAD_DIM: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute the gradients of a block of tokens, as queries and as keys and values of all tokens of the group.

    Each program stores its own sum of ds: `grad_scale` (programs,).
    """
    program = tl.program_id(0)
    head, block, group, batch, top, left = group_of(program, heads, blocks, step_y, step_x)
    channels = heads * HEAD_DIM
    channel = tl.arange(0, BLOCK_D)
    own = (channel < HEAD_DIM)[None, :]
    qkv += batch * stride_b + head * HEAD_DIM
    grad_qkv += batch * (height * 3 * channels) * width + head * HEAD_DIM
    out += batch * (height * channels) * width + head * HEAD_DIM
    grad += batch * (height * channels) * width + head * HEAD_DIM
    normaliser += (group.to(tl.int64) * heads + head) * tokens
    factor = tl.load(scale + head)

    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    y, x, valid = token_positions(t, top, left, step_y, step_x, columns, tokens, height, width)
    inside = valid[:, None] & own
    offsets = (y.to(tl.int64) * width + x)[:, None] * (3 * channels) + channel[None, :]

    q = load_turned(qkv, cos, sin, t, tokens, y, x, stride_y, stride_x, channel, inside, HEAD_DIM)
    g, delta = load_gradient(grad, out, y, x, width * channels, channels, channel, inside)
    log_sum = tl.load(normaliser + t, mask=valid, other=0.0)
    z = sweep_keys(
        q, g, delta, log_sum, valid, factor, qkv, cos, sin, stride_y, stride_x, channels, channel, own, top, left,
        step_y, step_x, columns, tokens, height, width, HEAD_DIM, BLOCK_T, BLOCK_D, PRECISION,
    )  # fmt: skip
    turn_cos, turn_sin = load_turn(cos, sin, t, tokens, channel, HEAD_DIM)
    raw = load_part(qkv, y, x, stride_y, stride_x, channel, inside)  # read from the cache
    aligned = store_gradient(grad_qkv, offsets, inside, raw, factor * z, turn_cos, turn_sin, BLOCK_T, BLOCK_D)
    tl.store(grad_scale + program, tl.sum(aligned, axis=0) / factor)

    k = load_turned(qkv + channels, cos, sin, t, tokens, y, x, stride_y, stride_x, channel, inside, HEAD_DIM)
    v = load_part(qkv + 2 * channels, y, x, stride_y, stride_x, channel, inside)
    z, grad_v = sweep_queries(
        k, v, valid, factor, qkv, grad, out, normaliser, cos, sin, stride_y, stride_x, channels, channel, own, top,
        left, step_y, step_x, columns, tokens, height, width, HEAD_DIM, BLOCK_T, BLOCK_D, PRECISION,
    )  # fmt: skip
    tl.store(grad_qkv + 2 * channels + offsets, grad_v.to(grad_qkv.dtype.element_ty), mask=inside)
    turn_cos, turn_sin = load_turn(cos, sin, t, tokens, channel, HEAD_DIM)
    raw = load_part(qkv + channels, y, x, stride_y, stride_x, channel, inside)
    store_gradient(grad_qkv + channels, offsets, inside, raw, factor * z, turn_cos, turn_sin, BLOCK_T, BLOCK_D)
