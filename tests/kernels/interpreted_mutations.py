"""The comparisons of the interpreted kernels detect errors: each term of both backwards is removed in turn.

A mutated copy of the device code replaces the real kernel under Triton's interpreter, which reads the source from a
file. `test_triton_training.py` runs it; see interpreted_fcsa.py.
"""

import importlib.util
import itertools
import sys
from pathlib import Path

import interpreted_fcsa as fcsa
import pytest
import torch

from iptv2_diffusion.kernels import triton_fcsa, triton_ggsa
from iptv2_diffusion.models.attention import focal_attention, grid_attention

# Module, the code, and its replacement.
MUTATIONS = {
    "FCSA: dq without its product": (
        triton_fcsa,
        "(grad_q - unit_q * decay_q[None, :])",
        "(-unit_q * decay_q[None, :])",
    ),
    "FCSA: dq without its norm": (triton_fcsa, "(grad_q - unit_q * decay_q[None, :])", "grad_q"),
    "FCSA: dk without its product": (
        triton_fcsa,
        "(grad_k - unit_k * decay_k[None, :])",
        "(-unit_k * decay_k[None, :])",
    ),
    "FCSA: dk without its norm": (triton_fcsa, "(grad_k - unit_k * decay_k[None, :])", "grad_k"),
    "FCSA: dq without a squared": (triton_fcsa, "grad_q * weight,", "grad_q,"),
    "FCSA: dk without a squared": (triton_fcsa, "grad_k * weight,", "grad_k,"),
    "FCSA: da without q": (triton_fcsa, "q.to(tl.float32) * grad_q + k.to(tl.float32) * grad_k", "k * grad_k"),
    "FCSA: da without k": (triton_fcsa, "q.to(tl.float32) * grad_q + k.to(tl.float32) * grad_k", "q * grad_q"),
    "FCSA: da without a": (triton_fcsa, "a * aligned", "aligned"),
    "FCSA: dL without its mean": (
        triton_fcsa,
        "(grad_attention - tl.sum(grad_attention * attention, axis=1)[:, None])",
        "grad_attention",
    ),
    "FCSA: dL without τ": (triton_fcsa, "return grad_logits * tau, total", "return grad_logits, total"),
    "FCSA: E 1 and 1ᵀ E exchanged": (
        triton_fcsa,
        "tl.sum(energy, axis=1), tl.sum(energy, axis=0)",
        "tl.sum(energy, axis=0), tl.sum(energy, axis=1)",
    ),
    "FCSA: dA without the share": (triton_fcsa, "g = (g.to(tl.float32) * share[:, None]).to(g.dtype)", "pass"),
    "FCSA: dv without the share": (triton_fcsa, "grad_v = grad_v * share[:, None]", "pass"),
    "FCSA: ds of the border": (triton_fcsa, "tl.where(interior, tl.sum(grad_v", "tl.where(valid, tl.sum(grad_v"),
    "FCSA: dv untransposed": (triton_fcsa, "dot(g, attention, PRECISION)", "dot(g, tl.trans(attention), PRECISION)"),
    "FCSA: shifted windows overwrite": (triton_fcsa, "    if ADD:\n", "    if ADD and False:\n"),
    "GGSA: dL without δ": (triton_ggsa, " - delta[:, None])", ")"),
    "GGSA: dL without P": (triton_ggsa, "weights * (dot(g, tl.trans(v)", "(dot(g, tl.trans(v)"),
    "GGSA: z without s": (
        triton_ggsa,
        "raw, factor * z, turn_cos, turn_sin, BLOCK_T, BLOCK_D)\n    tl",
        "raw, z, turn_cos, turn_sin, BLOCK_T, BLOCK_D)\n    tl",
    ),
    "GGSA: dx along x stays": (triton_ggsa, "(back - unit * along[:, None])", "back"),
    "GGSA: dx without 1/‖x‖": (triton_ggsa, "along[:, None]) * inverse[:, None]", "along[:, None])"),
    "GGSA: the rotation is not turned back": (
        triton_ggsa,
        "- swap_pairs(z, ROWS, COLUMNS) * turn_sin",
        "+ swap_pairs(z, ROWS, COLUMNS) * turn_sin",
    ),
    "GGSA: dk of the first keys alone": (
        triton_ggsa,
        "total += dot(tl.trans(grad_logits",
        "total = dot(tl.trans(grad_logits",
    ),
    "GGSA: dq of the last keys alone": (
        triton_ggsa,
        "total += dot(grad_logits.to(k.dtype)",
        "total = dot(grad_logits.to(k.dtype)",
    ),
    "GGSA: dv of the last queries alone": (triton_ggsa, "grad_v += dot(", "grad_v = dot("),
    "GGSA: dk by dL untransposed": (
        triton_ggsa,
        "dot(tl.trans(grad_logits.to(q.dtype)), q",
        "dot(grad_logits.to(q.dtype), q",
    ),
    "GGSA: ds times s": (triton_ggsa, "tl.sum(aligned, axis=0) / factor", "tl.sum(aligned, axis=0)"),
    "GGSA: keys outside the map": (
        triton_ggsa,
        "both = valid[:, None] & key[None, :]",
        "both = valid[:, None] & (j < tokens)[None, :]",
    ),
}
KERNELS = ("forward_kernel", "backward_kernel")


def compare(module: object) -> None:
    """Gradients of a module's operator on a few tiny maps against those of the plain formula."""
    torch.manual_seed(0)
    if module is triton_fcsa:
        cases = [((5, 4), *fcsa.parameters(1, 2))]
        ours, plain, options = triton_fcsa.focal_attention, focal_attention.plain, (1, 2)
    else:
        cases = [((5, 4), torch.full((1,), 5.0)), ((1, 18), torch.full((1,), 5.0)), ((1, 3), torch.full((1,), 100.0))]
        ours, plain, options = triton_ggsa.grid_attention, grid_attention.plain, None
    for size, *given in cases:
        rest = options or (1, (min(2, size[0]), 1 if size == (1, 18) else 2))
        qkv = torch.randn(1, *size, 12)
        if size == (1, 3):  # a token alone with its opposite: its logit is -100, that of a key outside the map is 0
            qkv[..., :4] = -qkv[..., 4:8]
        inputs = [t.requires_grad_() for t in (qkv, *given)]
        grad = torch.randn(1, *size, 4)
        found, expected = (torch.autograd.grad(f(*inputs, *rest), inputs, grad) for f in (ours, plain))
        for a, b in zip(found, expected, strict=True):
            least = 1.0 if size == (1, 3) else 0.0  # the gradient of one token is 0, and ours is rounding
            assert (a - b).abs().max() <= 1e-4 * b.abs().max().clamp(min=least)


def replace_kernels(module, code, mutant, folder, monkeypatch):
    """Load a copy of the device code in which `mutant` replaces `code`, and let the operator launch it."""
    path = Path(sys.modules[module.backward_kernel.fn.__module__].__file__)
    source = path.read_text(encoding="utf-8")
    assert source.count(code) == 1
    copy = folder / "mutant.py"
    copy.write_text(source.replace(code, mutant), encoding="utf-8")
    spec = importlib.util.spec_from_file_location(f"iptv2_diffusion.kernels.mutant_{next(NUMBER)}", copy)
    mutated = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, mutated)
    spec.loader.exec_module(mutated)
    for name in KERNELS:
        monkeypatch.setattr(module, name, getattr(mutated, name))


NUMBER = itertools.count()


@pytest.mark.parametrize("module", [triton_fcsa, triton_ggsa], ids=["FCSA", "GGSA"])
def test_the_code_as_it_is_passes(module, tmp_path, monkeypatch):
    replace_kernels(module, "def backward_kernel(", "def backward_kernel(", tmp_path, monkeypatch)
    compare(module)


@pytest.mark.parametrize(("module", "code", "mutant"), MUTATIONS.values(), ids=MUTATIONS)
def test_an_error_is_noticed(module, code, mutant, tmp_path, monkeypatch):
    replace_kernels(module, code, mutant, tmp_path, monkeypatch)
    with pytest.raises(AssertionError):
        compare(module)
