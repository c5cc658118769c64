"""The tests of the fast forms detect errors: each term of every explicit backward is removed in turn.

A mutated copy of a kernel's module replaces the real one, and the comparison of test_cpu_forms.py must fail.
"""

from __future__ import annotations

import itertools
import types
from collections import defaultdict
from pathlib import Path

import pytest
import test_cpu_forms as forms

from iptv2_diffusion.kernels import cpu_attention, cpu_depthwise, cpu_scale_add, registry

# Module, the code, and its replacement.
MUTATIONS = {
    "the product is added to a copy and lost": (  # the flattened map may be a copy
        cpu_attention,
        "grad_q = (k @ grad_products.transpose(-2, -1)).addcmul_(q, decay_q, value=-1)",
        "grad_q = q * -decay_q; grad_q.flatten(0, 1).baddbmm_("
        "k.flatten(0, 1), grad_products.transpose(-2, -1).flatten(0, 1))",
    ),
    "dq without its product": (
        cpu_attention,
        "(k @ grad_products.transpose(-2, -1)).addcmul_(q, decay_q, value=-1)",
        "-q * decay_q",
    ),
    "dq without its norm": (cpu_attention, ".addcmul_(q, decay_q, value=-1)", ""),
    "dk without its product": (cpu_attention, "(q @ grad_products).addcmul_(k, decay_k, value=-1)", "-k * decay_k"),
    "dk without its norm": (cpu_attention, ".addcmul_(k, decay_k, value=-1)", ""),
    "dq without a squared": (cpu_attention, "grad_q.mul_(weight)", "grad_q"),
    "dk without a squared": (cpu_attention, "grad_k.mul_(weight)", "grad_k"),
    "da without q": (cpu_attention, "torch.addcmul(q * grad_q, k, grad_k)", "(k * grad_k)"),
    "da without k": (cpu_attention, "torch.addcmul(q * grad_q, k, grad_k)", "(q * grad_q)"),
    "da without a": (cpu_attention, "grad_affine = grad_affine * upcast(affine)", "pass"),
    "dv untransposed": (cpu_attention, "grad @ attention.to(dtype)", "grad @ attention.to(dtype).mT"),
    "dS without τ": (cpu_attention, "(inverse_q.transpose(-2, -1) * tau) * inverse_k", "inverse_q.mT * inverse_k"),
    "dS without the norm of k": (
        cpu_attention,
        "(inverse_q.transpose(-2, -1) * tau) * inverse_k",
        "(inverse_q.mT * tau)",
    ),
    "E 1 and 1ᵀ E exchanged": (
        cpu_attention,
        "decay_q = norm_decay(energy.sum(dim=-1)",
        "decay_q = norm_decay(energy.sum(dim=-2)",
    ),
    "dτ of one window": (cpu_attention, "energy.sum(dim=(0, 2, 3))", "energy[0].sum(dim=(1, 2))"),
    "shifted windows overwrite the gradient": (
        cpu_attention,
        "plane.copy_(part) if i < 3 else plane.add_(part)",
        "plane.copy_(part)",
    ),
    "the gradient of the shifted windows goes missing": (
        cpu_attention,
        "plane.copy_(part) if i < 3 else plane.add_(part)",
        "plane.copy_(part) if i < 3 else None",
    ),
    "the rotation is not turned back": (cpu_attention, "dim=2)), cos, -sin)", "dim=2)), cos, sin)"),
    "dx along x stays": (cpu_attention, "torch.addcmul(turned, qk, along, value=-1)", "turned.clone()"),
    "dx without s/‖x‖": (cpu_attention, ".mul_(scale / norm)\n        grad[:, :, 2]", "\n        grad[:, :, 2]"),
    "ds without the norm": (cpu_attention, "keepdim=True) / norm  # u·g", "keepdim=True)  # u·g"),
    "dv of the tokens goes missing": (cpu_attention, "grad[:, :, 2] = grad_v", "grad[:, :, 2] = 0"),
    "taps of even pixels alone": (
        cpu_depthwise,
        "torch.add(far[:channels], far[channels:], out=result[..., ::2])",
        "result[..., ::2] = far[:channels]",
    ),
    "taps of the middle exchanged": (cpu_depthwise, "= near[..., ::2]", "= near[..., ::2].flip(-1)"),
    "an odd column left out": (
        cpu_depthwise,
        "x, grad = F.pad(x, (0, 1)), F.pad(grad, (0, 1))",
        "x, grad = x[..., :-1], grad[..., :-1]",
    ),
    "dx of another kernel": (
        cpu_depthwise,
        "convolution_backward(grad, x, weight, padding=(2, 2), wanted=0)",
        "convolution_backward(grad, x, weight.flip(-1), padding=(2, 2), wanted=0)",
    ),
    "db of one sample": (cpu_depthwise, "grad.sum(dim=(0, 2, 3))", "grad[0].sum(dim=(1, 2))"),
    "dx without scale": (cpu_scale_add, "(grad * scale)", "(grad + 0 * scale)"),
    "dscale without x": (cpu_scale_add, "(grad * x)", "(grad + 0 * x)"),
    "dbase not summed": (cpu_scale_add, "grad.sum_to_size(shape).to(dtype)", "grad[..., :1, :1].to(dtype)"),
}


def compare_all() -> None:
    """Run a part of test_cpu_forms.py, which takes a second."""
    sizes = [(4, 4), (12, 4), (8, 12), (9, 7)]
    for name, layout, size in itertools.product(forms.OPERATORS, (forms.contiguous, forms.sliced), sizes):
        given = forms.case(name, layout, 3, size, 2)
        upstream = forms.UPSTREAMS["dense"]
        actual = forms.gradients(name, *given, upstream)
        forms.assert_all_close(actual, forms.gradients(name, *given, upstream, plain=True), 1e-10)
    for layout in forms.LAYOUTS:
        forms.TestSteps().test_channel_attention(layout)


def replace_module(module: types.ModuleType, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the module's source with a separate registry, and let the tests use its definitions."""
    monkeypatch.setattr(registry, "_FORMS", defaultdict(list))
    namespace = {"__name__": module.__name__, "__package__": module.__package__}
    exec(compile(source, module.__file__, "exec"), namespace)
    for name in ("channel_attention", "rotate"):
        if module is cpu_attention:
            monkeypatch.setattr(module, name, namespace[name])


@pytest.mark.parametrize("module", [cpu_attention, cpu_depthwise, cpu_scale_add], ids=lambda m: m.__name__)
def test_the_code_as_it_is_passes(module, monkeypatch):
    replace_module(module, Path(module.__file__).read_text(encoding="utf-8"), monkeypatch)
    compare_all()


@pytest.mark.parametrize(("module", "code", "mutant"), MUTATIONS.values(), ids=MUTATIONS)
def test_an_error_is_noticed(module, code, mutant, monkeypatch):
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(code) == 1
    replace_module(module, source.replace(code, mutant), monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        compare_all()
