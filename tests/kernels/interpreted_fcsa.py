"""FCSA's kernels under Triton's interpreter against the equation of model.md §3, forward and every gradient.

`test_triton_fcsa.py` runs it in a separate process, because `TRITON_INTERPRET=1` must be set before Triton is imported.

    TRITON_INTERPRET=1 python -m pytest -n 0 tests/kernels/interpreted_fcsa.py
"""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from iptv2_diffusion.kernels import triton_fcsa, use_fast_forms

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def windows(qkv, heads, window, start, rows, columns):
    """(3, B, rows, columns, h, w², d) of the windows that begin at `start`; zeros outside of the map."""
    batch, height, width, channels = qkv.shape
    far = start + rows * window, start + columns * window
    qkv = torch.nn.functional.pad(qkv, (0, 0, 0, max(0, far[1] - width), 0, max(0, far[0] - height)))
    qkv = qkv[:, start : far[0], start : far[1]]
    qkv = qkv.reshape(batch, rows, window, columns, window, 3, heads, channels // (3 * heads))
    return qkv.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6)


def branch(qkv, affine, temperature, heads, window, start, rows, columns):
    """One branch's output (B, rows·w, columns·w, h, d)."""
    q, k, v = windows(qkv, heads, window, start, rows, columns)
    q, k = (torch.nn.functional.normalize(x * affine[:, :, None], dim=-2, eps=1e-12) for x in (q, k))
    attention = (temperature[:, None, None] * (q.transpose(-2, -1) @ k)).softmax(dim=-1)
    out = (v @ attention.transpose(-2, -1)).unflatten(4, (window, window))  # (B, rows, columns, h, w, w, d)
    return out.permute(0, 1, 4, 2, 5, 3, 6).flatten(1, 2).flatten(2, 3)


def plain(qkv, affine, temperature, merge_logits, heads, window):
    """FCSA without its projections: (B, H, W, 3C) -> (B, H, W, C)."""
    batch, height, width, _ = qkv.shape
    rows, columns = -(-height // window), -(-width // window)
    out = branch(qkv, affine[0], temperature[0], heads, window, 0, rows, columns)
    if merge_logits is not None and rows > 1 and columns > 1:
        half = window // 2
        shifted = branch(qkv, affine[1], temperature[1], heads, window, half, rows - 1, columns - 1)
        s1, s2 = (s.view(heads, window, window).permute(1, 2, 0)[..., None] for s in merge_logits.exp())
        s1 = s1.repeat(rows, columns, 1, 1)
        padded = [torch.zeros(rows * window, columns * window, *s.shape[2:], dtype=s.dtype) for s in (s2, shifted[0])]
        inner = slice(half, half + (rows - 1) * window), slice(half, half + (columns - 1) * window)
        share = padded[0].index_put(
            tuple(torch.meshgrid(*(torch.arange(s.start, s.stop) for s in inner), indexing="ij")),
            s2.repeat(rows - 1, columns - 1, 1, 1),
        )
        margins = (0, 0, 0, 0, half, columns * window - inner[1].stop, half, rows * window - inner[0].stop)
        out = (out * s1 + torch.nn.functional.pad(shifted, margins) * share) / (s1 + share)
    return out[:, :height, :width].flatten(3).reshape(batch, height, width, -1)


def laid_out(shape, layout, dtype):
    """A map (B, H, W, 3C) of random values in one of the layouts that a model may pass."""
    batch, height, width, channels = shape
    if layout == "sliced":  # a part of a larger map, as after a crop
        return torch.randn(batch, height + 3, width + 1, channels + 5).to(dtype)[:, 1:-2, 1:, 2:-3]
    if layout == "channels-last NCHW":
        whole = torch.randn(batch, channels, height, width).to(dtype)
        return whole.to(memory_format=torch.channels_last).permute(0, 2, 3, 1)
    if layout == "NCHW":  # channels are not adjacent in memory
        return torch.randn(batch, channels, height, width).to(dtype).permute(0, 2, 3, 1)
    return torch.randn(shape).to(dtype)


def parameters(heads, window, branches=2):
    return (
        1 + 0.5 * torch.randn(branches, heads, window**2),
        2 + torch.randn(branches, heads),
        torch.randn(2, heads, window**2) if branches == 2 else None,
    )


# (height, width), window, heads, head width, dtype, layout: each value of each at least once
CASES = [
    ((8, 8), 4, 2, 8, torch.float32, "contiguous"),
    ((7, 6), 4, 1, 25, torch.float32, "sliced"),
    ((9, 9), 5, 1, 34, torch.float32, "channels-last NCHW"),
    ((3, 2), 4, 2, 8, torch.float32, "NCHW"),  # smaller than a window
    ((8, 8), 8, 1, 8, torch.float32, "contiguous"),  # one window
    ((4, 12), 4, 1, 8, torch.float32, "sliced"),  # one window high
    ((2, 2), 1, 2, 8, torch.float32, "contiguous"),
    ((5, 6), 3, 1, 8, torch.float32, "NCHW"),  # an odd window
    ((18, 13), 12, 1, 16, torch.float32, "contiguous"),  # a window in several parts
    ((12, 9), 8, 1, 34, torch.bfloat16, "channels-last NCHW"),
    ((8, 8), 4, 1, 25, torch.bfloat16, "sliced"),
    ((8, 5), 4, 1, 8, torch.float16, "contiguous"),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize(("size", "window", "heads", "head_dim", "dtype", "layout"), CASES)
def test_value_and_every_gradient(size, window, heads, head_dim, dtype, layout):
    batch = 2 if heads > 1 else 1
    qkv = laid_out((batch, *size, 3 * heads * head_dim), layout, dtype).requires_grad_()
    given = [p.requires_grad_() for p in parameters(heads, window)]
    grad = torch.randn(batch, *size, heads * head_dim).to(dtype)
    assert triton_fcsa.supports(qkv, heads, window)
    out = triton_fcsa.focal_attention(qkv, *given, heads, window)
    assert out.dtype == dtype
    grads = torch.autograd.grad(out, [qkv, *given], grad, allow_unused=True)

    doubles = [t.detach().double().requires_grad_() for t in (qkv, *given)]
    expected = plain(*doubles, heads, window)
    expected_grads = torch.autograd.grad(expected, doubles, grad.double(), allow_unused=True)
    compare({"out": (out, expected), **pairs(grads, expected_grads)}, TOLERANCE[dtype], one=window == 1)


def pairs(grads, expected):
    return dict(zip(("qkv", "affine", "temperature", "merge_logits"), zip(grads, expected, strict=True), strict=True))


def compare(found, tolerance, one=False):
    """Largest difference against the largest value; on windows of one position q̂ is ±1 and gradients are small."""
    for name, (ours, exact) in found.items():
        assert (ours is None) == (exact is None), name
        if ours is not None:
            scale = exact.abs().max().clamp(min=1.0 if one else 0.0)
            assert (ours - exact).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("branches", [1, 2])
def test_without_a_merge_the_base_windows_run_alone(branches):
    qkv = torch.randn(1, 8, 8, 24).requires_grad_()
    affine, temperature, _ = (None if p is None else p.requires_grad_() for p in parameters(1, 4, branches))
    out = triton_fcsa.focal_attention(qkv, affine, temperature, None, 1, 4)
    expected = plain(qkv, affine, temperature, None, 1, 4)
    grads, exact = (torch.autograd.grad(o.square().sum(), (qkv, affine, temperature)) for o in (out, expected))
    for ours, theirs in zip((out, *grads), (expected, *exact), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_extreme_merge_logits_give_one_branch_and_finite_gradients():
    qkv = torch.randn(1, 8, 8, 24).requires_grad_()
    affine, temperature, logits = parameters(1, 4)
    logits = torch.stack((torch.full_like(logits[0], 200.0), torch.full_like(logits[1], -200.0))).requires_grad_()
    out = triton_fcsa.focal_attention(qkv, affine, temperature, logits, 1, 4)
    torch.testing.assert_close(out, plain(qkv, affine, temperature, None, 1, 4), rtol=1e-4, atol=1e-5)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (qkv, logits)))


def test_samples_do_not_mix():
    qkv, given = torch.randn(3, 8, 8, 24), parameters(1, 4)
    whole = triton_fcsa.focal_attention(qkv, *given, 1, 4)
    assert torch.equal(whole[1:2], triton_fcsa.focal_attention(qkv[1:2], *given, 1, 4))


def test_an_empty_batch():
    qkv, given = torch.randn(0, 8, 8, 24, requires_grad=True), [p.requires_grad_() for p in parameters(1, 4)]
    out = triton_fcsa.focal_attention(qkv, *given, 1, 4)
    assert out.shape == (0, 8, 8, 8)
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), given))


@pytest.mark.parametrize("merged", [True, False])
def test_operator_contract(merged):
    """Schema, autograd registration, fake tensors and static and dynamic tracing, by PyTorch's own checks."""
    affine, temperature, logits = (p.requires_grad_() for p in parameters(1, 2))
    qkv = torch.randn(1, 4, 3, 24, requires_grad=True)
    torch.library.opcheck(torch.ops.iptv2.focal_attention, (qkv, affine, temperature, logits if merged else None, 1, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    qkv, given = torch.randn(1, 4, 4, 24, requires_grad=True), [p.requires_grad_() for p in parameters(1, 2)]

    def run(x):
        if triton_fcsa.supports(x, 1, 2):
            return triton_fcsa.focal_attention(2 * x, *given, 1, 2).square()
        return x

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    grads, expected = (torch.autograd.grad(f(qkv).sum(), (qkv, *given)) for f in (compiled, run))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_recomputes_the_same():
    qkv, given = torch.randn(1, 4, 4, 24, requires_grad=True), [p.requires_grad_() for p in parameters(1, 2)]

    def run(x):
        return triton_fcsa.focal_attention(x, *given, 1, 2)

    kept = torch.autograd.grad(run(qkv).square().sum(), (qkv, *given))
    again = torch.autograd.grad(checkpoint(run, qkv, use_reentrant=False).square().sum(), (qkv, *given))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_what_it_does_not_take():
    qkv = torch.randn(1, 4, 4, 24)
    assert triton_fcsa.supports(qkv, 1, 2)
    assert not triton_fcsa.supports(qkv.double(), 1, 2)
    assert not triton_fcsa.supports(qkv, 3, 2)  # 8 channels do not split into 3 heads
    assert not triton_fcsa.supports(qkv, 1, 17)
    assert not triton_fcsa.supports(torch.empty(1, 4, 4, 3 * 80), 1, 2)
    with use_fast_forms(False):
        assert not triton_fcsa.supports(qkv, 1, 2)
    assert triton_fcsa.supports(qkv, 1, 2)
