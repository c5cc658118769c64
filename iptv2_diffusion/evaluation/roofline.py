"""Roofline model of a forward pass or a training step: bytes, multiply–accumulates, and the time that a machine needs.

The step runs on the meta device, where tensors have shapes but no data. A dispatch mode records every operator with the
buffers that it reads and writes. The kernels are then counted in one of three forms:

- eager: one kernel per operator.
- compiled: chains of pointwise operators and reductions are one kernel each, as `torch.compile` fuses them. Members of
  a chain iterate over the same elements. A sum over rows ends the pass over a row, and a sum over positions ends the
  kernel. A chain does not cross an operator that it both feeds and needs. Matrix products, convolutions and attention
  are separate kernels. A buffer that only one kernel uses costs nothing.
- kernels: as compiled, with this package's Triton kernels for FCSA and GGSA, counted by their own loads and stores.

The time of a kernel is its launch time plus the larger of two times: its products at the machine's rate, and its bytes
at the machine's bandwidth. This prediction is usually a lower bound: it ignores caches, tail effects, layouts and slow
library kernels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker

from iptv2_diffusion.evaluation.machines import Machine

__all__ = ["FORMS", "Cost", "Kernel", "Recorder", "count", "fuse"]

FORMS = ("eager", "compiled", "kernels")


# ---------------------------------------------------------------------------------------------------------------------
# Recording


ALONE = ("mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward")
ROWS = ("native_layer_norm", "native_layer_norm_backward", "_softmax", "_softmax_backward_data")
SUMS = ("sum", "mean", "linalg_vector_norm", "amax", "var_mean", "all", "any")
FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")

# Part of the model that an operator belongs to, by the class of its module. If modules are nested, the first entry of
# this list applies.
PARTS = {
    "FocalContextAttention": "FCSA",
    "GlobalGridAttention": "GGSA",
    "Attention": "attention",
    "RepLeFFN": "feed-forward",
    "FeedForward": "feed-forward",
    "AdaLayerNormZero2d": "norms and modulation",
    "AdaLayerNormZero": "norms and modulation",
    "LayerNorm2d": "norms and modulation",
    "LayerNorm": "norms and modulation",
    "Downsample": "sampling and skips",
    "Upsample": "sampling and skips",
    "SkipConnection": "sampling and skips",
    "FGBlock": "residuals",
    "BasicTransformerBlock": "residuals",
}


@dataclass(frozen=True)
class Access:
    """Part of a buffer: its number, its elements (offset, shape and strides) and its bytes."""

    buffer: int
    view: tuple
    nbytes: int


@dataclass
class Operator:
    """One recorded call of an operator."""

    name: str
    part: str
    kind: str  # "alone", "pointwise", "rows" (sums along rows) or "positions" (other sums)
    elements: int  # number of elements of its iteration
    results: int  # number of elements of its output
    macs: int
    vector: bool  # whether its products run without tensor cores
    reads: list[Access]
    writes: list[Access]
    launches: int = 1
    traffic: int | None = None  # bytes, if they differ from those of reads and writes
    needs: set[int] = field(default_factory=set)  # operators that wrote its inputs


class Recorder(TorchDispatchMode):
    """Dispatch mode that records every operator with its buffers and its data flow in `operators`.

    Args:
        model: model whose modules name the parts; None for no names.
        own: name of a custom operator -> function that returns its MACs, bytes and launches from its arguments.
    """

    def __init__(self, model: nn.Module | None = None, own: dict[str, Callable[..., tuple]] | None = None) -> None:
        super().__init__()
        self.own = own or {}
        self.operators: list[Operator] = []
        self.sizes: list[int] = []  # bytes of each buffer
        self.classes = {name: type(module).__name__ for name, module in model.named_modules()} if model else {}
        self.prefix = type(model).__name__ if model else ""
        self.tracker = ModuleTracker()
        self._numbers: dict[int, int] = {}
        self._kept: list[Any] = []  # keeps storages alive, so that no address is used twice
        self._writers: dict[int, list[int]] = {}

    def __enter__(self) -> Recorder:
        self.tracker.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.tracker.__exit__(*error)

    def access(self, tensor: Tensor) -> Access:
        """Return the part of a buffer that a tensor views. Expanded dimensions count once."""
        storage = tensor.untyped_storage()
        number = self._numbers.get(storage._cdata)
        if number is None:
            number = self._numbers[storage._cdata] = len(self.sizes)
            self._kept.append(storage)
            self.sizes.append(storage.nbytes())
        sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
        view = tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
        return Access(number, view, min(math.prod(sizes) * tensor.element_size(), self.sizes[number]))

    def part(self) -> str:
        """Return the part of the model that runs now."""
        open_modules = {self.classes.get(name.removeprefix(self.prefix + ".")) for name in self.tracker.parents}
        return next((part for name, part in PARTS.items() if name in open_modules), "stem, head and conditioning")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        if name in FREE or is_view(func):
            for tensor in tensors(out):
                self.access(tensor)
            return out
        given, results = list(tensors((args, list(kwargs.values())))), list(tensors(out))
        written = list(results)
        if name.endswith("_") and not name.endswith("__"):
            written = [args[0]]
            given = [t for t in given if t is not args[0]] if name in ("copy_", "fill_", "zero_") else given
        self.operators.append(self.describe(func, name, args, kwargs, out, given, written))
        return out

    def describe(self, func, name, args, kwargs, out, given, written) -> Operator:
        """Make the record of a call."""
        packet = func._overloadpacket
        flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
        if name == "convolution_backward":  # PyTorch's count ignores groups
            grad, _, weight = args[:3]
            flops = 2 * grad.numel() * weight[0].numel() * sum(out[i] is not None for i in range(2))
        kind, elements = classify(name.rstrip("_"), func.namespace, given, written)
        operator = Operator(
            name=name,
            part=self.part(),
            kind=kind,
            elements=elements,
            results=max((t.numel() for t in written), default=0),
            macs=flops // 2,
            vector=is_depthwise(name, args),
            reads=list(dict.fromkeys(self.access(t) for t in given)),
            writes=list(dict.fromkeys(self.access(t) for t in written)),
        )
        if name == "convolution_backward":
            operator.launches, operator.traffic = convolution_backward_traffic(args, out)
        if func.namespace in ("iptv2", "roofline"):
            operator.macs, operator.traffic, operator.launches = self.own[name](*args)
        for access in operator.reads:
            operator.needs.update(self._writers.get(access.buffer, ()))
        for access in operator.writes:  # earlier writers of other parts stay, because a reader of the whole needs all
            writers = self._writers.setdefault(access.buffer, [])
            operator.needs.update(writers)
            writers.append(len(self.operators))
        return operator


def tensors(values: Any) -> Iterator[Tensor]:
    """Iterate over the tensors in nested lists and tuples."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple)):
        for value in values:
            yield from tensors(value)


def is_view(func: Any) -> bool:
    """Return whether an operator returns a view of its input."""
    returns = func._schema.returns
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return aliases or func._schema.name in ("aten::_unsafe_view", "aten::_reshape_alias")


def is_depthwise(name: str, args: Any) -> bool:
    """Return whether a convolution, or its backward, has one group per channel."""
    position = {"convolution": 1, "convolution_backward": 2}.get(name)
    return position is not None and args[position].shape[1] == 1 and args[position].shape[0] > 1


def classify(name: str, namespace: str, given: list[Tensor], written: list[Tensor]) -> tuple[str, int]:
    """Return the kind of an operator and the number of elements of its iteration."""
    most = max((t.numel() for t in (*given, *written)), default=0)
    if name in ALONE or namespace != "aten":
        return "alone", most
    if name in ROWS:
        return "rows", most
    if name in SUMS and given:
        x, out = given[0], written[0]
        rows = out.numel() > 1 and reduces_innermost(x, out)
        return ("rows" if rows else "positions"), most
    return "pointwise", max((t.numel() for t in written), default=0)


def reduces_innermost(x: Tensor, out: Tensor) -> bool:
    """Return whether a sum is along x's contiguous axis, which is then missing or 1 in the output."""
    axis = min((s, i) for i, s in enumerate(x.stride()) if x.shape[i] > 1)[1]
    if x.dim() == out.dim():
        return out.shape[axis] == 1
    rest = [size for i, size in enumerate(x.shape) if i != axis]
    return list(out.shape) == rest


def convolution_backward_traffic(args: Any, out: Any) -> tuple[int, int]:
    """Return kernels and bytes. The gradients of input, weight and bias take one kernel each."""
    grad, x, weight = args[:3]
    needed = {0: (grad, weight), 1: (grad, x), 2: (grad,)}
    made = [i for i in range(3) if out[i] is not None]
    return len(made), sum(sum(t.nbytes for t in needed[i]) + out[i].nbytes for i in made)


# ---------------------------------------------------------------------------------------------------------------------
# Fusion of operators into kernels


@dataclass
class Kernel:
    """Operators that run as one kernel."""

    members: list[int]
    kind: str
    elements: int
    results: int = 0  # number of elements of its reductions
    ancestors: int = 0  # bit set of the kernels that must run before


def fuse(operators: list[Operator], enabled: bool) -> list[Kernel]:
    """Group operators into kernels, in the order of their first operators. Unless `enabled`, each is its own kernel.

    An operator joins a kernel that it reads from, unless another of its inputs must run after that kernel. Inductor
    fuses some more cases, for example siblings that read the same buffer.
    """
    kernels: list[Kernel] = []
    home: list[int] = []  # kernel of each operator
    for number, operator in enumerate(operators):
        needed = {home[i] for i in operator.needs}
        chosen = None
        if enabled:
            chosen = next((k for k in sorted(needed, reverse=True) if joins(operator, k, needed, kernels)), None)
        if chosen is None:
            chosen = len(kernels)
            kernels.append(Kernel([], operator.kind, operator.elements))
        kernel = kernels[chosen]
        kernel.members.append(number)
        home.append(chosen)
        kernel.elements = max(kernel.elements, operator.elements)
        if operator.kind in ("rows", "positions"):
            kernel.kind = operator.kind
            kernel.results = max(kernel.results, operator.results)
        if enabled:
            add_ancestors(kernels, chosen, needed - {chosen})
    return kernels


def add_ancestors(kernels: list[Kernel], k: int, needed: set[int]) -> None:
    """Add ancestors to kernel k and to all kernels that depend on it."""
    new = 0
    for other in needed:
        new |= kernels[other].ancestors | 1 << other
    if new & ~kernels[k].ancestors:
        kernels[k].ancestors |= new
        if len(kernels[k].members) > 1:  # a fresh kernel is needed by none
            for kernel in kernels:
                if kernel.ancestors >> k & 1:
                    kernel.ancestors |= new


def joins(operator: Operator, k: int, needed: set[int], kernels: list[Kernel]) -> bool:
    """Return whether an operator that depends on the kernels `needed` can run inside kernel k, one of them."""
    kernel = kernels[k]
    if "alone" in (operator.kind, kernel.kind) or kernel.kind == "positions":
        return False  # sums over positions are complete only at the end of the kernel
    if operator.kind == "positions" and kernel.kind == "rows":
        return False
    of_rows = kernel.kind == "rows" and operator.kind == "pointwise" and operator.elements == kernel.results
    halves = operator.kind == kernel.kind == "pointwise" and (  # RoPE splits pairs of channels and stacks them again
        operator.elements == 2 * kernel.elements or kernel.elements == 2 * operator.elements
    )
    if operator.elements != kernel.elements and not of_rows and not halves:
        return False
    return not any(kernels[other].ancestors >> k & 1 for other in needed)


@dataclass
class Cost:
    """Predicted cost of a step.

    Attributes:
        macs: multiply–accumulates.
        nbytes: bytes of memory traffic.
        launches: number of kernels.
        seconds: time of the step.
        parts: part of the model -> seconds.
        operators: name of an operator -> seconds.
    """

    macs: int
    nbytes: int
    launches: int
    seconds: float
    parts: dict[str, float]
    operators: dict[str, float]


def count(recorder: Recorder, form: str, machine: Machine, precision: str) -> Cost:
    """Predict the cost of a recorded step in one of the forms `FORMS` on a machine."""
    operators = recorder.operators
    kernels = fuse(operators, enabled=form != "eager")
    readers: dict[int, set[int]] = {}
    for k, kernel in enumerate(kernels):
        for i in kernel.members:
            for access in operators[i].reads:
                readers.setdefault(access.buffer, set()).add(k)
    cost = Cost(0, 0, 0, 0.0, Counter(), Counter())
    for k, kernel in enumerate(kernels):
        members = [operators[i] for i in kernel.members]
        nbytes = kernel_bytes(k, members, readers, recorder.sizes)
        macs = sum(m.macs for m in members)
        vector = any(m.vector for m in members)
        rate = machine.vector_flops if vector else machine.flops[precision]
        launches = members[0].launches if len(members) == 1 else 1
        seconds = max(2 * macs / rate, nbytes / machine.bandwidth) + launches * machine.launch
        cost.macs += macs
        cost.nbytes += nbytes
        cost.launches += launches
        cost.seconds += seconds
        weights = [1 + sum(a.nbytes for a in (*m.reads, *m.writes)) for m in members]
        for member, weight in zip(members, weights, strict=True):
            cost.parts[member.part] += seconds * weight / sum(weights)
            cost.operators[member.name] += seconds * weight / sum(weights)
    return cost


def kernel_bytes(k: int, members: list[Operator], readers: dict[int, set[int]], sizes: list[int]) -> int:
    """Count the bytes that a kernel loads from buffers of other kernels and stores to buffers that others read."""
    if len(members) == 1 and members[0].traffic is not None:
        return members[0].traffic
    loaded: dict[int, set[Access]] = {}
    stored: dict[int, set[Access]] = {}
    for member in members:
        for access in member.reads:
            if access.buffer not in stored:
                loaded.setdefault(access.buffer, set()).add(access)
        for access in member.writes:
            stored.setdefault(access.buffer, set()).add(access)
    total = 0
    for buffer, parts in loaded.items():
        total += min(sum(a.nbytes for a in parts), sizes[buffer])
    for buffer, parts in stored.items():
        if readers.get(buffer, set()) != {k}:  # other kernels read it, or none does: then it is a result of the step
            total += min(sum(a.nbytes for a in parts), sizes[buffer])
    return total
