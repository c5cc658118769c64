"""GGSA's kernels under Triton's interpreter against the plain formula, forward and every gradient.

See interpreted_fcsa.py for how to run it.
"""

import pytest
import torch
from interpreted_fcsa import laid_out
from torch.utils.checkpoint import checkpoint

from iptv2_diffusion.kernels import triton_ggsa, use_fast_forms
from iptv2_diffusion.models.attention import grid_attention

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}

# (height, width), stride, heads, head width, dtype, layout: each value of each at least once
CASES = [
    ((8, 8), (2, 2), 2, 8, torch.float32, "contiguous"),
    ((7, 6), (2, 4), 1, 12, torch.float32, "sliced"),  # tokens outside the map, a head that fills no block
    ((5, 9), (3, 2), 2, 4, torch.float32, "NCHW"),
    ((3, 2), (3, 2), 1, 8, torch.float32, "channels-last NCHW"),  # one token per group
    ((9, 7), (1, 1), 1, 20, torch.float32, "contiguous"),  # several blocks, the last in part
    ((1, 33), (1, 2), 1, 16, torch.float32, "sliced"),
    ((8, 9), (1, 1), 1, 32, torch.bfloat16, "channels-last NCHW"),
    ((8, 6), (2, 2), 1, 36, torch.bfloat16, "sliced"),
    ((6, 6), (2, 1), 1, 64, torch.float16, "contiguous"),
]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def run(qkv, scale, heads, stride):
    return triton_ggsa.grid_attention(qkv, scale, heads, stride)


@pytest.mark.parametrize(("size", "stride", "heads", "head_dim", "dtype", "layout"), CASES)
def test_value_and_every_gradient(size, stride, heads, head_dim, dtype, layout):
    qkv = laid_out((2 if heads > 1 else 1, *size, 3 * heads * head_dim), layout, dtype).requires_grad_()
    scale = (2 + 8 * torch.rand(heads)).requires_grad_()
    grad = torch.randn(*qkv.shape[:3], heads * head_dim).to(dtype)
    assert triton_ggsa.supports(qkv, heads, stride)
    out = run(qkv, scale, heads, stride)
    assert out.dtype == dtype
    doubles = [t.detach().double().requires_grad_() for t in (qkv, scale)]
    exact = grid_attention.plain(*doubles, heads, stride)
    found = (out, *torch.autograd.grad(out, (qkv, scale), grad))
    theirs = (exact, *torch.autograd.grad(exact, doubles, grad.double()))
    one = size == stride  # a softmax over one token has no gradient: the differences are rounding
    for name, ours, expected in zip(("out", "qkv", "scale"), found, theirs, strict=True):
        # ds sums many terms of both signs, so in half precision its error does not follow its size
        least = 1.0 if one or (name == "scale" and dtype != torch.float32) else 0.0
        assert (ours - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max().clamp(min=least), name


@pytest.mark.parametrize("kind", ["zeros", "steep"])
def test_a_vector_of_zeros_and_a_steep_softmax(kind):
    """A norm of zero has the plain formula's gradient where it is finite; logits of ±100 do not overflow."""
    qkv, scale = torch.randn(1, 4, 4, 24), torch.full((1,), 100.0 if kind == "steep" else 5.0)
    if kind == "zeros":
        qkv[0, 1, 2, :16] = 0
    qkv.requires_grad_(), scale.requires_grad_()
    out, expected = (f(qkv, scale, 1, (2, 2)) for f in (run, grid_attention.plain))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    grad, exact = (torch.autograd.grad(o.square().sum(), qkv)[0] for o in (out, expected))
    used = slice(None) if kind == "steep" else qkv.detach().abs() > 0
    torch.testing.assert_close(grad[used], exact[used], rtol=1e-3, atol=1e-3)


def test_samples_do_not_mix():
    qkv, scale = torch.randn(3, 6, 4, 24), torch.ones(1)
    assert torch.equal(run(qkv, scale, 1, (2, 2))[1:2], run(qkv[1:2], scale, 1, (2, 2)))


def test_an_empty_batch():
    qkv, scale = torch.randn(0, 4, 4, 24, requires_grad=True), torch.ones(1, requires_grad=True)
    out = run(qkv, scale, 1, (2, 2))
    assert out.shape == (0, 4, 4, 8)
    assert torch.autograd.grad(out.sum(), scale)[0] == 0


def test_operator_contract():
    """Schema, autograd registration, fake tensors and static and dynamic tracing, by PyTorch's own checks."""
    qkv, scale = torch.randn(1, 4, 3, 24, requires_grad=True), torch.ones(1, requires_grad=True)
    torch.library.opcheck(torch.ops.iptv2.grid_attention, (qkv, scale, 1, 2, 2))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_in_one_graph(dynamic):
    qkv, scale = torch.randn(1, 4, 4, 24, requires_grad=True), torch.ones(1, requires_grad=True)

    def call(x):
        if triton_ggsa.supports(x, 1, (2, 2)):
            return run(2 * x, scale, 1, (2, 2)).square()
        return x

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    grads, expected = (torch.autograd.grad(f(qkv).sum(), (qkv, scale)) for f in (compiled, call))
    for ours, theirs in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_checkpointing_recomputes_the_same():
    qkv, scale = torch.randn(1, 4, 4, 24, requires_grad=True), torch.ones(1, requires_grad=True)

    def call(x):
        return run(x, scale, 1, (2, 2))

    kept = torch.autograd.grad(call(qkv).square().sum(), (qkv, scale))
    again = torch.autograd.grad(checkpoint(call, qkv, use_reentrant=False).square().sum(), (qkv, scale))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_what_it_does_not_take():
    qkv = torch.randn(1, 4, 4, 24)
    assert triton_ggsa.supports(qkv, 1, (2, 2))
    assert not triton_ggsa.supports(qkv.double(), 1, (2, 2))
    assert not triton_ggsa.supports(qkv, 4, (2, 2))  # 2 channels per head are too few for two axes of rotation
    assert triton_ggsa.supports(torch.empty(1, 16, 16, 24), 1, (1, 1))
    assert not triton_ggsa.supports(torch.empty(1, 17, 16, 24), 1, (1, 1))  # 272 tokens
    assert not triton_ggsa.supports(torch.empty(1, 4, 4, 3 * 68), 1, (2, 2))
    with use_fast_forms(False, "grid_attention"):
        assert not triton_ggsa.supports(qkv, 1, (2, 2))
