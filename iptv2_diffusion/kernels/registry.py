"""One place that decides, call by call, whether a plain formula or a faster form of it runs.

A model writes the formula and marks it; a kernel names the formula that it replaces and the device it is for:

    @operator                                         @fast_form("focal_attention", device="cpu")
    def focal_attention(qkv, …): …                    def focal_attention_cpu(qkv, …): …

The tests in tests/kernels hold each pair together: values and gradients, over layouts, sizes and dtypes.
"""

import functools
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["fast_form", "fast_forms_in_use", "operator", "upcast", "use_fast_forms", "wants_gradient"]

P, R = ParamSpec("P"), TypeVar("R")


@dataclass(frozen=True)
class FastForm:
    """A faster form of an operator.

    Attributes:
        run: takes the operator's arguments and returns its value.
        device: type of device that it is for.
        compiles: whether `torch.compile` can trace it; if not, compiled code gets the plain formula.
        takes: whether it takes these arguments; it sees what `run` would get.
    """

    run: Callable[..., Any]
    device: str
    compiles: bool
    takes: Callable[..., bool]


_FORMS: dict[str, list[FastForm]] = defaultdict(list)
_off: set[str] = {"all"} if os.environ.get("IPTV2_KERNELS", "auto") == "off" else set()


def operator(plain: Callable[P, R]) -> Callable[P, R]:
    """Let fast forms stand in for a plain formula, whose first argument is a tensor; `.plain` stays the formula."""
    name = plain.__name__

    @functools.wraps(plain)
    def dispatch(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        for form in _FORMS[name]:
            if is_usable(form, name, x) and form.takes(x, *args, **kwargs):
                return form.run(x, *args, **kwargs)
        return plain(x, *args, **kwargs)

    dispatch.plain = plain
    return dispatch


def fast_form(
    name: str, device: str, compiles: bool = False, takes: Callable[..., bool] = lambda *args, **kwargs: True
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register a function as the fast form of the operator `name` on one type of device, see `FastForm`."""

    def register(run: Callable[P, R]) -> Callable[P, R]:
        _FORMS[name].append(FastForm(run, device, compiles, takes))
        return run

    return register


def is_usable(form: FastForm, name: str, x: Tensor) -> bool:
    if x.device.type != form.device or "all" in _off or name in _off:
        return False
    return form.compiles or not (torch.compiler.is_compiling() or torch.jit.is_tracing())


def fast_forms_in_use(name: str | None = None) -> bool:
    """Whether fast forms may be chosen, in general or for one operator."""
    return "all" not in _off and name not in _off


@contextmanager
def use_fast_forms(enabled: bool, *names: str) -> Iterator[None]:
    """Turn fast forms on or off inside a `with` statement: those of the named operators, or all of them.

    With all off, every model computes its plain formulas; results agree to rounding. The environment variable
    `IPTV2_KERNELS=off` does the same for a whole process. Beside the operators' names there is "merged_weights": linear
    layers of a feed-forward that `models/layers.py` merges while training.
    """
    global _off
    before, changed = _off, set(names or ("all",))
    if unknown := changed - {"all", "merged_weights", *_FORMS}:
        raise ValueError(f"no operator is called {', '.join(sorted(unknown))}; there are {', '.join(sorted(_FORMS))}")
    _off = (set() if "all" in changed else before - changed) if enabled else before | changed
    try:
        yield
    finally:
        _off = before


# ---------------------------------------------------------------------------------------------------------------------
# What plain formulas and fast forms share


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether autograd will ask for a gradient of any of these."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def upcast(x: Tensor) -> Tensor:
    """x in float32 if it is in half precision, else x itself: the precision of norms, logits and softmax."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def without_autocast(x: Tensor) -> AbstractContextManager:
    """Autocast off on x's device; devices without autocast (meta) have none to turn off."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
