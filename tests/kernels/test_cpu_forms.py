"""Every fast form for CPUs against its plain formula: values and gradients for every layout, size and dtype.

The plain formulas are those in models/ (`operator.plain`), differentiated by autograd. tests/models compares the
formulas themselves with loop-written references.
"""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from torch import Tensor

from iptv2_diffusion.kernels import cpu_attention, force_form, use_fast_forms
from iptv2_diffusion.models import attention
from iptv2_diffusion.models.attention import focal_attention, grid_attention
from iptv2_diffusion.models.layers import depthwise_conv2d, scale_add

WINDOW, HEAD_DIM = 4, 4


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# Layouts of a tensor: a leaf, and the view of it that the operator receives.


def contiguous(shape):
    leaf = random(*shape)
    return leaf, leaf


def transposed(shape):
    leaf = random(*reversed(shape))
    return leaf, leaf.permute(*reversed(range(len(shape))))


def sliced(shape):
    """A part of a larger tensor, with gaps in every dimension."""
    leaf = random(*(2 * n + 1 for n in shape))
    return leaf, leaf[tuple(slice(1, 2 * n + 1, 2) for n in shape)]


def expanded(shape):
    """One sample for the whole batch: stride 0."""
    leaf = random(1, *shape[1:])
    return leaf, leaf.expand(shape)


def channels_last(shape):
    """(B, H, W, C) memory under a (B, C, H, W) tensor for operators that take such maps, and vice versa."""
    leaf = random(shape[0], *shape[2:], shape[1])
    return leaf, leaf.movedim(-1, 1)


LAYOUTS = [contiguous, transposed, sliced, expanded, channels_last]

# Gradients that autograd may hand to a backward: dense, of stride 0 (of a sum), transposed, and with gaps.
UPSTREAMS = {
    "dense": lambda out: (out * random(*out.shape, seed=9).to(out.dtype)).sum(),
    "of a sum": lambda out: out.sum() + (3 * out[..., :1]).sum(),
    "transposed": lambda out: (out.mT.contiguous() * random(*out.mT.shape, seed=9).to(out.dtype)).sum(),
    "with gaps": lambda out: (out[:, ::2] * random(*out[:, ::2].shape, seed=9).to(out.dtype)).sum(),
}

MAPS = {
    "one window": (4, 4),
    "one window wide": (12, 4),
    "one window high": (4, 12),
    "whole windows": (8, 12),
    "odd": (9, 7),
    "smaller than a window": (3, 2),
    "one position": (1, 1),
}


def focal_inputs(batch, size, heads, branches=2, dtype=torch.float64):
    """Shape of qkv, the parameters, and the operator's other arguments."""
    positive = random(branches, heads, WINDOW**2, seed=1).abs() + 0.5
    positive[0, 0, 3] = -positive[0, 0, 3]
    temperature = random(branches, heads, seed=2).abs() + 0.5
    logits = random(2, heads, WINDOW**2, seed=3)
    parameters = [positive, temperature, *([logits] if branches == 2 else [])]
    return (batch, *size, 3 * heads * HEAD_DIM), [p.to(dtype) for p in parameters], (heads, WINDOW)


def run_focal(form, qkv, parameters, heads, window):
    affine, temperature, *logits = parameters
    return form(qkv, affine, temperature, logits[0] if logits else None, heads, window)


def grid_inputs(batch, size, heads, dtype=torch.float64):
    return (batch, *size, 3 * heads * 2 * HEAD_DIM), [(random(heads, seed=1).abs() * 9 + 1).to(dtype)], (heads, (2, 3))


def run_grid(form, qkv, parameters, heads, stride):
    return form(qkv, parameters[0], heads, stride)


def depthwise_inputs(batch, size, channels, dtype=torch.float64):
    weight, bias = random(channels, 1, 5, 5, seed=1), random(channels, seed=2)
    return (batch, channels, *size), [weight.to(dtype), bias.to(dtype)], ()


def run_depthwise(form, x, parameters):
    return form(x, *parameters)


def scale_add_inputs(batch, size, channels, dtype=torch.float64):
    scale, shift = random(batch, channels, 1, 1, seed=1), random(batch, channels, 1, 1, seed=2)
    return (batch, channels, *size), [scale.to(dtype), shift.to(dtype)], ()


OPERATORS = {
    "focal": (focal_attention, focal_inputs, run_focal),
    "focal without shifted windows": (focal_attention, partial(focal_inputs, branches=1), run_focal),
    "grid": (grid_attention, grid_inputs, run_grid),
    "depthwise": (depthwise_conv2d, depthwise_inputs, run_depthwise),
    "scale and add": (scale_add, scale_add_inputs, run_depthwise),
}
every_operator = pytest.mark.parametrize("name", OPERATORS)


def gradients(name, leaf, view, parameters, constants, upstream, plain=False, wanted=None):
    """Output, and the gradients of the map's leaf and of the parameters."""
    form, _, call = OPERATORS[name]
    leaves = [leaf, *parameters] if wanted is None else wanted
    for tensor in (leaf, *parameters):
        tensor.requires_grad_(any(tensor is other for other in leaves))
    with use_fast_forms(not plain):
        out = call(form, view(), parameters, *constants)
        grads = torch.autograd.grad(upstream(out), leaves, allow_unused=True, materialize_grads=True)
        return [out.detach(), *grads]


def case(name, layout, batch, size, heads):
    """A leaf, a function that makes the operator's map of it (a new graph each time), parameters, constants."""
    shape, parameters, constants = OPERATORS[name][1](batch, size, heads)
    leaf, _ = layout(shape)
    leaf.requires_grad_()
    views = {
        contiguous: lambda: leaf,
        transposed: lambda: leaf.permute(*reversed(range(len(shape)))),
        sliced: lambda: leaf[tuple(slice(1, 2 * n + 1, 2) for n in shape)],
        expanded: lambda: leaf.expand(shape),
        channels_last: lambda: leaf.movedim(-1, 1),
    }
    return leaf, views[layout], parameters, constants


def assert_all_close(actual, expected, relative, context=""):
    """Each part relative to its largest value; a part that is zero but for rounding, relative to the others."""
    largest = max(part.abs().max().item() for part in expected)
    for i, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        scale = max(theirs.abs().max().item(), 0.01 * largest)
        error = (ours.double() - theirs.double()).abs().max().item() / scale
        assert error <= relative, f"{context}: part {i} is off by {error:.1e} of its largest value"


class TestInFloat64:
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
    @pytest.mark.parametrize("size", MAPS.values(), ids=MAPS)
    @every_operator
    def test_values_and_gradients_over_layouts(self, name, size, layout):
        for batch, heads, (kind, upstream) in itertools.product((1, 3), (1, 2), UPSTREAMS.items()):
            given = case(name, layout, batch, size, heads)
            actual = gradients(name, *given, upstream)
            expected = gradients(name, *given, upstream, plain=True)
            assert_all_close(actual, expected, 1e-10, f"batch {batch}, {heads} heads, gradient {kind}")

    @pytest.mark.parametrize("size", [(4, 4), (8, 4), (9, 10)], ids=str)
    @every_operator
    def test_gradcheck(self, name, size):
        form, make, call = OPERATORS[name]
        shape, parameters, constants = make(1, size, 2)
        leaves = [random(*shape).requires_grad_(), *(p.requires_grad_() for p in parameters)]

        def function(x, *given):
            return call(form, x, given, *constants)

        assert torch.autograd.gradcheck(function, leaves, fast_mode=True)

    @every_operator
    def test_twice_through_one_graph(self, name):
        """A backward must not change its arguments or its saved tensors."""
        form, make, call = OPERATORS[name]
        shape, parameters, constants = make(2, (8, 12), 2)
        leaves = [random(*shape).requires_grad_(), *(p.requires_grad_() for p in parameters)]
        out = call(form, leaves[0], leaves[1:], *constants)
        grad = random(*out.shape, seed=9)
        kept = grad.clone()
        first = torch.autograd.grad(out, leaves, grad, retain_graph=True)
        second = torch.autograd.grad(out, leaves, grad)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(grad, kept)

    @every_operator
    def test_inputs_are_left_as_they_are(self, name):
        form, make, call = OPERATORS[name]
        shape, parameters, constants = make(2, (8, 8), 2)
        given = [random(*shape), *parameters]
        before = [tensor.clone() for tensor in given]
        for gradient in (False, True):
            leaves = [tensor.requires_grad_(gradient) for tensor in given]
            call(form, leaves[0], leaves[1:], *constants).sum()
            assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))

    @every_operator
    def test_what_is_frozen_gets_no_gradient(self, name):
        """Any subset of the inputs may require gradients, and these are the same."""
        upstream = UPSTREAMS["dense"]
        given = case(name, contiguous, 2, (8, 12), 2)
        leaves = [given[0], *given[2]]
        whole = gradients(name, *given, upstream)[1:]
        for i, leaf in enumerate(leaves):
            (alone,) = gradients(name, *given, upstream, wanted=[leaf])[1:]
            torch.testing.assert_close(alone, whole[i], rtol=1e-12, atol=1e-12)

    def test_vectors_of_no_length(self):
        """A channel that is zero everywhere, as in padding, and a token of zeros: finite, and the plain gradient."""
        for name in ("focal", "grid"):
            leaf, view, parameters, constants = case(name, contiguous, 2, (8, 12), 2)
            with torch.no_grad():
                leaf[..., 1] = 0
                leaf[:, 2, 3] = 0
            given = leaf, view, parameters, constants
            actual = gradients(name, *given, UPSTREAMS["dense"])
            assert all(part.isfinite().all() for part in actual)
            assert_all_close(actual, gradients(name, *given, UPSTREAMS["dense"], plain=True), 1e-10, name)


class TestInOtherPrecisions:
    @pytest.mark.parametrize(("dtype", "relative"), [(torch.float32, 2e-5), (torch.bfloat16, 0.04)], ids=str)
    @pytest.mark.parametrize("size", MAPS.values(), ids=MAPS)
    @every_operator
    def test_within_its_rounding_of_float64(self, name, size, dtype, relative):
        shape, parameters, constants = OPERATORS[name][1](3, size, 2, dtype=dtype)
        leaf = random(*shape).to(dtype)
        actual = gradients(name, leaf, lambda: leaf, parameters, constants, UPSTREAMS["dense"])
        assert all(part.dtype == dtype for part in actual)
        exact = leaf.detach().double()
        doubles = [parameter.detach().double() for parameter in parameters]
        expected = gradients(name, exact, lambda: exact, doubles, constants, UPSTREAMS["dense"], plain=True)
        assert_all_close(actual, expected, relative, str(dtype))

    @every_operator
    def test_autocast_gives_float32_parameters_float32_gradients(self, name):
        """The values also agree with the plain formula under autocast, within bfloat16's rounding."""
        shape, parameters, constants = OPERATORS[name][1](2, (8, 4), 2, dtype=torch.float32)
        leaf = random(*shape).float()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            actual = gradients(name, leaf, lambda: leaf, parameters, constants, UPSTREAMS["dense"])
            expected = gradients(name, leaf, lambda: leaf, parameters, constants, UPSTREAMS["dense"], plain=True)
        assert all(part.dtype == torch.float32 for part in actual[1:])
        assert_all_close(actual, expected, 0.04)


class TestSteps:
    """The steps of the attentions in isolation, for the layouts that other code may pass."""

    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
    def test_channel_attention(self, layout):
        """q, k and v as views of one map: a product must not be added to a copy, where it would be lost."""
        q, k, v = (layout((3, 2, 16, 4))[0].detach() * (i + 1) for i in range(3))
        make = {contiguous: lambda x: x, transposed: lambda x: x.permute(3, 2, 1, 0)}.get(layout)
        if make is None:
            make = {
                sliced: lambda x: x[1:7:2, 1:5:2, 1:33:2, 1:9:2],
                expanded: lambda x: x.expand(3, 2, 16, 4),
                channels_last: lambda x: x.movedim(-1, 1),
            }[layout]
        assert make(q).shape == (3, 2, 16, 4)
        leaves = [x.requires_grad_() for x in (q, k, v, random(2, 16, seed=5).abs() + 0.5, random(2, seed=6).abs())]
        results = []
        for form in (cpu_attention.channel_attention, attention.channel_attention):
            out = form(*(make(x) for x in leaves[:3]), *leaves[3:])
            results.append([out.detach(), *torch.autograd.grad((out * random(*out.shape, seed=9)).sum(), leaves)])
        assert_all_close(*results, 1e-10)

    def test_products_and_softmax_are_float32_under_autocast(self):
        """bfloat16 does not round the attention map: it equals the float32 map of the rounded inputs."""
        q, k, v = (random(3, 2, 16, 4, seed=i).float() for i in range(3))
        affine, temperature = random(2, 16, seed=5).abs().float() + 0.5, random(2, seed=6).abs().float()
        q, k = q.bfloat16(), k.bfloat16()
        for form in (cpu_attention.channel_attention, attention.channel_attention):
            exact = form(q.float(), k.float(), v, affine, temperature)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                inside = form(q, k, v, affine, temperature)
            assert torch.equal(inside, exact)

    def test_the_complex_rotation_is_the_real_one(self):
        x, angle = random(3, 12, 2, 2, 8), random(12, 4, seed=5)
        turned = cpu_attention.rotate(x, angle.cos(), angle.sin())
        expected = attention.rope(x.permute(0, 2, 3, 1, 4), angle.cos(), angle.sin()).permute(0, 3, 1, 2, 4)
        torch.testing.assert_close(turned, expected, rtol=1e-12, atol=1e-12)


class TestLinearInference:
    """`linear` has a fast form only without gradients."""

    @pytest.mark.parametrize("gelu", [False, True])
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("layout", LAYOUTS, ids=lambda f: f.__name__)
    def test_values(self, layout, bias, gelu):
        from iptv2_diffusion.models.layers import linear

        _, x = layout((2, 5, 3, 24))
        weight, shift = random(40, 24, seed=1), random(40, seed=2) if bias else None
        exact = linear.plain(x, weight, shift, gelu)
        with torch.no_grad():
            given = x.float(), weight.float(), None if shift is None else shift.float()
            torch.testing.assert_close(linear(*given, gelu).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_forced_form_runs_on_every_device_until_the_block_ends():
    x, scale = torch.ones(1, 2, 3, 4), torch.full((1, 2, 1, 1), 2.0)
    with force_form("scale_add", lambda x, scale, base: x - scale):
        assert torch.equal(scale_add(x, scale, x), x - 2)
        with force_form("scale_add", lambda x, scale, base: base):
            assert scale_add(x, scale, x) is x
        assert torch.equal(scale_add(x, scale, x), x - 2)
    assert torch.equal(scale_add(x, scale, x), x * 2 + x)
