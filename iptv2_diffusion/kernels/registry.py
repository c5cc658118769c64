"""Dispatch between the plain formula of an operator and its fast forms, decided at each call.

A model defines the formula and marks it. A kernel names the formula that it replaces and the device that it runs on:

    @operator                                         @fast_form("focal_attention", device="cpu")
    def focal_attention(qkv, …): …                    def focal_attention_cpu(qkv, …): …

The tests in tests/kernels compare the values and gradients of each pair over layouts, sizes and dtypes.
"""

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

__all__ = [
    "fast_form",
    "fast_forms_in_use",
    "force_form",
    "has_symbolic_sizes",
    "is_quantized",
    "is_recording",
    "operator",
    "symbolic_form",
    "upcast",
    "use_fast_forms",
    "wants_gradient",
]

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class FastForm:
    """A faster implementation of an operator for one type of device.

    Attributes:
        run: function with the arguments and the result of the operator.
        device: type of device that `run` supports, such as "cpu".
        compiles: whether `torch.compile` can trace `run`. If not, compiled code uses the plain formula.
        takes: predicate with the arguments of `run`; returns whether `run` supports them.
    """

    run: Callable[..., Any]
    device: str
    compiles: bool
    takes: Callable[..., bool]


_FORMS: dict[str, list[FastForm]] = defaultdict(list)
_SYMBOLIC_FORMS: dict[str, Callable[..., Any]] = {}
_forced: dict[str, Callable[..., Any]] = {}
_off: set[str] = {"all"} if os.environ.get("IPTV2_KERNELS", "auto") == "off" else set()


def operator(plain: Callable[P, R]) -> Callable[P, R]:
    """Decorate a plain formula so that fast forms can replace it at a call.

    The first argument of the formula must be a tensor, because its device selects the form. The attribute `plain` of
    the decorated function is the formula itself.
    """
    name = plain.__name__
    formula: Callable[..., R] = plain

    @functools.wraps(plain)
    def dispatch(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if has_symbolic_sizes(x):
            return _SYMBOLIC_FORMS.get(name, formula)(x, *args, **kwargs)
        if name in _forced:
            return _forced[name](x, *args, **kwargs)
        for form in _FORMS[name]:
            if may_run(form, name, x) and form.takes(x, *args, **kwargs):
                return form.run(x, *args, **kwargs)
        return formula(x, *args, **kwargs)

    dispatch.plain = plain  # type: ignore[attr-defined]
    return cast("Callable[P, R]", dispatch)


def fast_form(
    name: str, device: str, compiles: bool = False, takes: Callable[..., bool] = lambda *args, **kwargs: True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as a fast form of the operator `name`. See `FastForm` for the arguments."""

    def register(run: Callable[P, R]) -> Callable[P, R]:
        _FORMS[name].append(FastForm(run, device, compiles, takes))
        return run

    return register


def symbolic_form(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as the form of the operator `name` for maps of symbolic size.

    A recorded graph is valid for sizes other than the example's only if no Python branch depends on a size. A plain
    formula that has such branches needs this form.
    """

    def register(run: Callable[P, R]) -> Callable[P, R]:
        _SYMBOLIC_FORMS[name] = run
        return run

    return register


def is_recording() -> bool:
    """Return whether `torch.export` or `torch.jit.trace` is recording, as the exporters to ONNX do."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def has_symbolic_sizes(x: Tensor) -> bool:
    """Return whether x is being recorded (`is_recording`) with a size that is not a plain number.

    Under `torch.jit.trace` every size is symbolic.
    """
    return is_recording() and not all(type(size) is int for size in x.shape)


def may_run(form: FastForm, name: str, x: Tensor) -> bool:
    """Return whether the form is for x's device, enabled, and traceable where a graph is being traced."""
    if x.device.type != form.device or "all" in _off or name in _off:
        return False
    return form.compiles or not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def fast_forms_in_use(name: str | None = None) -> bool:
    """Return whether fast forms are enabled, in general or for the operator `name`."""
    return "all" not in _off and name not in _off


@contextmanager
def use_fast_forms(enabled: bool, *names: str) -> Iterator[None]:
    """Enable or disable fast forms inside a `with` statement, for the named operators or for all of them.

    With all forms disabled, every model computes its plain formulas. The results agree up to rounding. The environment
    variable `IPTV2_KERNELS=off` disables all forms for a whole process.

    Args:
        enabled: whether the forms may run.
        *names: names of operators; without names, all of them. "merged_weights" means the layers whose weights
            `models/layers.py` merges during training.

    Raises:
        ValueError: a name is neither an operator's nor "merged_weights".
    """
    global _off
    before, changed = _off, set(names or ("all",))
    if unknown := changed - {"all", "merged_weights", *_FORMS}:
        known = ", ".join(sorted({"merged_weights", *_FORMS}))
        raise ValueError(f"no operator is called {', '.join(sorted(unknown))}; use one of {known}")
    _off = (set() if "all" in changed else before - changed) if enabled else before | changed
    try:
        yield
    finally:
        _off = before


@contextmanager
def force_form(name: str, form: Callable[..., Any]) -> Iterator[None]:
    """Compute an operator by `form` inside a `with` statement, on every device. `form` may call the plain formula.

    Args:
        name: name of the operator.
        form: function with the arguments and the result of the operator.
    """
    before = _forced.get(name)
    _forced[name] = form
    try:
        yield
    finally:
        if before is None:
            del _forced[name]
        else:
            _forced[name] = before


# ---------------------------------------------------------------------------------------------------------------------
# Helpers that plain formulas and fast forms share


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Return whether autograd records operations on any of these tensors."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def is_quantized(weight: Tensor) -> bool:
    """Return whether torchao has quantised a weight. Only PyTorch's own operators accept such a tensor.

    Such a tensor wraps others and, unlike a DTensor, has no placements. `torch.compile` can trace both checks.
    """
    return hasattr(weight, "__tensor_flatten__") and not hasattr(weight, "placements")


def upcast(x: Tensor) -> Tensor:
    """Cast x to float32 if it is in half precision. Norms, logits and softmax are computed in this precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Return a context manager that disables autocast on x's device; a null context on devices without autocast."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
