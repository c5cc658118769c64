"""Depthwise 3×3 and 5×5 convolutions of channels-last maps, with GELU before, bias and identity in the same pass.

    y = bias + Σ_taps w · f(x shifted) (+ f(x)),   f = GELU (exact) or nothing

Each program makes a block of positions and channels; its taps share cache lines, so that a map is loaded from memory
once. The gradient of x is the same convolution with the taps turned round, times f'(x). Those of the weight and
the bias are sums of each program, stored and added up by `torch.sum`: nothing is atomic.

With GELU each tap makes it anew, 25 times a value for a 5×5 kernel: that saves bytes and costs arithmetic, and by the
published rates of GPUs the arithmetic is then the limit. So no model uses this file yet: it is to be measured first.

Bytes a position, in elements: forward 2 C; backward 3 C for dx (2 C without GELU) and 2 C for dw and db.
Sums are float32.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from .registry import fast_forms_in_use
from .triton_common import DTYPES, block_of, device_of, is_usable, jit, tl

__all__ = ["depthwise", "supports"]

SIZES = (3, 5)
BLOCK_P = 64  # positions that a program holds at once
TILES = 8  # blocks of positions whose weight gradients one program adds up


@jit
def gelu(x):
    """x Φ(x)."""
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))


@jit
def gelu_slope(x):
    """Φ(x) + x φ(x)."""
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@jit
def load_shifted(x, p, dy, dx, c, positions, height, width, channels, GELU: tl.constexpr):
    """f(x) (positions, channels) of a contiguous map at positions p shifted by (dy, dx); zero outside of the map."""
    row, column = (p // width) % height + dy, p % width + dx
    inside = (p < positions) & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    source = (p + dy * width + dx).to(tl.int64)
    mask = inside[:, None] & (c < channels)[None, :]
    value = tl.load(x + source[:, None] * channels + c[None, :], mask=mask, other=0.0).to(tl.float32)
    return gelu(value) if GELU else value


@jit
def forward_kernel(
    x,
    weight,
    bias,
    slope_of,
    out,
    positions,
    height,
    width,
    channels,
    SIZE: tl.constexpr,
    BIAS: tl.constexpr,
    IDENTITY: tl.constexpr,
    GELU: tl.constexpr,
    TURNED: tl.constexpr,
    SLOPE: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The convolution; for dx with the taps TURNED round and, with SLOPE, times f' of the map `slope_of`."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    HALF: tl.constexpr = SIZE // 2
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    if BIAS:
        total += tl.load(bias + c, mask=c < channels, other=0.0)[None, :]
    for tap in range(SIZE * SIZE):  # unrolled, all loads would be in registers at once
        taken = SIZE * SIZE - 1 - tap if TURNED else tap
        w = tl.load(weight + c * (SIZE * SIZE) + taken, mask=c < channels, other=0.0)
        if IDENTITY:
            w += tl.where(tap == HALF * SIZE + HALF, 1.0, 0.0)
        value = load_shifted(x, p, tap // SIZE - HALF, tap % SIZE - HALF, c, positions, height, width, channels, GELU)
        total += w[None, :] * value
    if SLOPE:
        total *= gelu_slope(load_shifted(slope_of, p, 0, 0, c, positions, height, width, channels, False))
    offsets = p.to(tl.int64)[:, None] * channels + c[None, :]
    tl.store(out + offsets, total.to(out.dtype.element_ty), mask=(p < positions)[:, None] & (c < channels)[None, :])


@jit
def weight_kernel(
    x,
    grad,
    sums,
    positions,
    height,
    width,
    channels,
    SIZE: tl.constexpr,
    GELU: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of g·f(x shifted) for every tap, and of g, over a program's positions: `sums` (programs, k² + 1, C)."""
    first = tl.program_id(0) * (BLOCK_P * TILES)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    HALF: tl.constexpr = SIZE // 2
    sums += tl.program_id(0).to(tl.int64) * ((SIZE * SIZE + 1) * channels)
    for tap in range(SIZE * SIZE + 1):
        total = tl.zeros((BLOCK_C,), tl.float32)
        for tile in range(TILES):
            p = first + tile * BLOCK_P + tl.arange(0, BLOCK_P)
            g = load_shifted(grad, p, 0, 0, c, positions, height, width, channels, False)
            if tap < SIZE * SIZE:
                dy, dx = tap // SIZE - HALF, tap % SIZE - HALF
                g *= load_shifted(x, p, dy, dx, c, positions, height, width, channels, GELU)
            total += tl.sum(g, axis=0)
        tl.store(sums + tap * channels + c, total, mask=c < channels)


def blocks(x: Tensor) -> tuple[tuple[int, int, int, int], dict]:
    """Runtime numbers of a (B, H, W, C) map, and the block shape."""
    batch, height, width, channels = x.shape
    block_c = min(block_of(channels), 64)
    return (batch * height * width, height, width, channels), {
        "BLOCK_P": BLOCK_P,
        "BLOCK_C": block_c,
        "num_warps": 4,
        "num_stages": 1,
    }


def convolve(x, weight, bias, slope_of, identity: bool, gelu: bool, turned: bool) -> Tensor:
    """Launch `forward_kernel` on contiguous (B, H, W, C) maps and a float32 (C, k²) weight."""
    out = torch.empty_like(x)
    numbers, shape = blocks(x)
    size = 3 if weight.shape[-1] == 9 else 5
    constants = {"SIZE": size, "BIAS": bias is not None, "IDENTITY": identity, "GELU": gelu}
    constants |= {"TURNED": turned, "SLOPE": slope_of is not None, **shape}
    given = (x, weight, weight if bias is None else bias, x if slope_of is None else slope_of, out)
    grid = -(-numbers[0] // BLOCK_P), -(-numbers[3] // shape["BLOCK_C"])
    if x.numel():
        with device_of(x):
            forward_kernel[grid](*given, *numbers, **constants)
    return out


def as_rows(x: Tensor) -> Tensor:
    """A channels-last (B, C, H, W) map as a contiguous (B, H, W, C) one."""
    return x.permute(0, 2, 3, 1).contiguous()


def as_taps(weight: Tensor) -> Tensor:
    """(C, 1, k, k) as float32 (C, k²)."""
    return weight.detach().float().reshape(weight.shape[0], -1).contiguous()


@torch.library.custom_op(
    "iptv2::depthwise",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, bool identity, bool gelu) -> Tensor",
)
def convolution(x, weight, bias, identity, gelu):
    """The operator behind `depthwise`."""
    bias = None if bias is None else bias.detach().float().contiguous()
    return convolve(as_rows(x), as_taps(weight), bias, None, identity, gelu, False).permute(0, 3, 1, 2)


@convolution.register_fake
def _(x, weight, bias, identity, gelu):
    return x.new_empty(as_rows_shape(x)).permute(0, 3, 1, 2)


def as_rows_shape(x: Tensor) -> tuple[int, int, int, int]:
    batch, channels, height, width = x.shape
    return batch, height, width, channels


@torch.library.custom_op(
    "iptv2::depthwise_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor weight, bool identity, bool gelu) -> (Tensor, Tensor, Tensor)",
)
def convolution_backward(grad, x, weight, identity, gelu):
    """Gradients of x, weight and bias, the latter two float32."""
    x, grad = as_rows(x), as_rows(grad.to(x.dtype))
    grad_x = convolve(grad, as_taps(weight), None, x if gelu else None, identity, False, True)
    numbers, shape = blocks(x)
    size = weight.shape[-1]
    programs = -(-numbers[0] // (BLOCK_P * TILES))
    sums = x.new_empty(programs, size**2 + 1, numbers[3], dtype=torch.float32)
    if x.numel():
        with device_of(x):
            grid = programs, -(-numbers[3] // shape["BLOCK_C"])
            weight_kernel[grid](x, grad, sums, *numbers, SIZE=size, GELU=gelu, TILES=TILES, **shape)
    total = sums.sum(dim=0)
    return grad_x.permute(0, 3, 1, 2), total[:-1].t().reshape(weight.shape).contiguous(), total[-1].clone()


@convolution_backward.register_fake
def _(grad, x, weight, identity, gelu):
    grad_weight = weight.new_empty(weight.shape, dtype=torch.float32)
    return x.new_empty(as_rows_shape(x)).permute(0, 3, 1, 2), grad_weight, grad_weight.new_empty(weight.shape[0])


def save(ctx, inputs, output):
    """What the backward needs."""
    x, weight, bias, identity, gelu = inputs
    ctx.save_for_backward(x, weight)
    ctx.options, ctx.bias = (identity, gelu), None if bias is None else bias.dtype


def backward(ctx, grad):
    """Gradients of the inputs."""
    x, weight = ctx.saved_tensors
    grad_x, grad_weight, grad_bias = convolution_backward(grad, x, weight, *ctx.options)
    return grad_x, grad_weight.to(weight.dtype), None if ctx.bias is None else grad_bias.to(ctx.bias), None, None


convolution.register_autograd(backward, setup_context=save)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, identity: bool = False, gelu: bool = False) -> Tensor:
    """Depthwise convolution of f(x), plus bias, plus f(x) if `identity`; f is GELU or nothing. Differentiable once.

    Args:
        x: (B, C, H, W), channels-last memory (others are copied).
        weight: (C, 1, k, k), k 3 or 5, zero-padded to the same size.
        bias: (C,) or None.
        identity: add f(x).
        gelu: whether f is the exact GELU.

    Returns:
        (B, C, H, W) of x's dtype in channels-last memory.
    """
    return convolution(x, weight, bias, identity, gelu)


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether `depthwise` takes this map and kernel: by device, dtype and size."""
    if not fast_forms_in_use("depthwise_conv2d") or x.dim() != 4 or x.dtype not in DTYPES:
        return False
    size = weight.shape[-1]
    whole = weight.shape[0] == x.shape[1] and weight.shape[1] == 1 and weight.shape[2] == size
    return whole and size in SIZES and runs(x.device.type, x.device.index, x.dtype, size)


@torch.compiler.assume_constant_result
def runs(device_type: str, device_index: int | None, dtype: torch.dtype, size: int) -> bool:
    """Whether the kernels compile and run."""
    try_out = partial(probe, torch.device(device_type, device_index), dtype, size)
    return is_usable("depthwise", device_type, device_index, try_out, str(dtype), size)


def probe(device: torch.device, dtype: torch.dtype, size: int) -> None:
    """Run every kernel once, with and without GELU."""
    x = torch.zeros(1, 64, 4, 4, device=device, dtype=dtype)
    weight, bias = torch.zeros(64, 1, size, size, device=device), torch.zeros(64, device=device)
    for option in (False, True):
        out = convolution(x, weight, bias if option else None, option, option)
        convolution_backward(out, x, weight, option, option)
