"""Shared helpers of the Triton kernels: checks before their use, fallback, and launch parameters.

Kernels run on CUDA and ROCm tensors, and on CPU tensors under Triton's interpreter (`TRITON_INTERPRET=1`, for tests).
Before the first use with a dtype and block shape, a kernel runs once on a tiny map. If this fails, a warning gives the
reason and the plain formula is used for the rest of the process.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU builds do not include it
    triton = tl = None

__all__ = [
    "INTERPRETED",
    "as_map",
    "block_of",
    "device_of",
    "dot",
    "dot_precision",
    "is_usable",
    "jit",
    "load_part",
    "tl",
]

MINIMUM_TRITON = (3, 2)  # version that torch 2.6 installs
MINIMUM_CAPABILITY = (8, 0)  # first with bfloat16 on tensor cores
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def jit(function: Callable) -> Callable:
    """Apply `triton.jit`. Without Triton, return the function itself; `is_usable` is False then."""
    return function if triton is None else triton.jit(function)


IN_INTERPRETER = None if triton is None else tl.constexpr(INTERPRETED)


@jit
def dot(a, b, PRECISION: tl.constexpr):
    """Matrix product a b with float32 accumulation."""
    if IN_INTERPRETER:  # the interpreter would read bfloat16 as integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


@jit
def load_part(base, y, x, stride_y, stride_x, channel, inside):
    """Load the channels of a map at the positions: (n, d), zero outside the map."""
    offsets = y.to(tl.int64)[:, None] * stride_y + (x * stride_x)[:, None] + channel[None, :]
    return tl.load(base + offsets, mask=inside, other=0.0)


# ---------------------------------------------------------------------------------------------------------------------
# Checks before the use of a kernel

_problems: dict[tuple, str | None] = {}  # kernel, device and constants -> error of the test run, None if it succeeded


def is_usable(name: str, device_type: str, device_index: int | None, probe: Callable[[], None], *key: object) -> bool:
    """Return whether the kernel `name` runs on a device, by a test run at the first call.

    Callers need the decorator `torch.compiler.assume_constant_result`, so that `torch.compile` sees only the result.

    Args:
        name: name of the kernel.
        device_type: type of the device, such as "cuda".
        device_index: index of the device.
        probe: function that runs the kernel once.
        *key: constants that the kernel is compiled for. The result is cached per key.
    """
    if INTERPRETED:
        return True
    reason = unsuitable(device_type, device_index)
    if reason is not None:
        if device_type == "cuda":  # users expect Triton kernels only here
            warn_once((device_type, device_index), f"Triton kernels are not used: {reason}")
        return False
    attempt = (name, device_index, *key)
    if attempt not in _problems:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # a capture may forbid compilation; warm-up steps precede it
        _problems[attempt] = None
        try:
            with torch.no_grad():
                probe()
            if torch.cuda.is_available():
                torch.cuda.synchronize(device_index)
        except Exception as error:  # Triton's compiler and driver raise many types
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            _problems[attempt] = first
            warn_once(
                attempt, f"the Triton kernel {name} does not run for {key}, so the plain formula is used: {first}"
            )
    return _problems[attempt] is None


def unsuitable(device_type: str, device_index: int | None) -> str | None:
    """Return the reason why no kernel can run on a device, or None."""
    if device_type != "cuda":  # ROCm devices have this type too
        return f"the device is {device_type}"
    if triton is None:
        return "Triton is not installed"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        return f"Triton is {triton.__version__}; {'.'.join(map(str, MINIMUM_TRITON))} or later is needed"
    if torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device_index)
        if capability < MINIMUM_CAPABILITY:
            have, need = (".".join(map(str, pair)) for pair in (capability, MINIMUM_CAPABILITY))
            return f"the GPU has compute capability {have}; {need} or later is needed"
    return None


_warned: set[object] = set()


def warn_once(key: object, message: str) -> None:
    """Warn once per process and key."""
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def device_of(x: Tensor) -> AbstractContextManager:
    """Return a context in which x's GPU is the current device. Triton launches on the current device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def block_of(size: int, least: int = 16) -> int:
    """Return the smallest power of two that is at least `size` and at least `least`, the minimum of tensor cores."""
    return max(least, 1 << (size - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """Return the precision of float32 products: TF32 only if the user allows it for PyTorch's own products."""
    allowed = torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None and not INTERPRETED
    return "tf32" if dtype == torch.float32 and allowed else "ieee"


def as_map(x: Tensor) -> Tensor:
    """Make the channels of a map contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()
