"""What the Triton kernels share: whether they may run, and what happens when one does not compile.

A kernel runs on CUDA and ROCm tensors, and on CPU tensors under Triton's interpreter (`TRITON_INTERPRET=1`, for tests).
Before its first use with a data type and block shape it is run once on a tiny map. If that fails, one warning says why
and the plain formula is used from then on.
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
except ImportError:  # torch's CPU builds come without it
    triton = tl = None

__all__ = [
    "INTERPRETED",
    "block_of",
    "device_of",
    "dot",
    "dot_precision",
    "is_usable",
    "jit",
    "tl",
]

MINIMUM_TRITON = (3, 2)  # what torch 2.6 brings
MINIMUM_CAPABILITY = (8, 0)  # bfloat16 on the matrix units
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

INTERPRETED = triton is not None and os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")


def jit(function: Callable) -> Callable:
    """`triton.jit`; without Triton the function is left as it is, and `is_usable` is False."""
    return function if triton is None else triton.jit(function)


IN_INTERPRETER = None if triton is None else tl.constexpr(INTERPRETED)


@jit
def dot(a, b, PRECISION: tl.constexpr):
    """a b with float32 accumulation."""
    if IN_INTERPRETER:  # it takes the bits of bfloat16 for integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision=PRECISION)


# ---------------------------------------------------------------------------------------------------------------------
# Whether a kernel may run

_problems: dict[tuple, str | None] = {}  # what was tried -> why it failed, None if it ran


def is_usable(name: str, device_type: str, device_index: int | None, probe: Callable[[], None], *key: object) -> bool:
    """Whether the kernel `name` runs on this device.

    `probe` runs it once for each `key`, the constants that it is compiled for.
    Callers mark their question with `assume_constant_result`, so that `torch.compile` sees only the answer.
    """
    if INTERPRETED:
        return True
    reason = unsuitable(device_type, device_index)
    if reason is not None:
        if device_type == "cuda":  # nobody expects a kernel on other devices
            warn_once((device_type, device_index), f"Triton kernels are not used: {reason}")
        return False
    attempt = (name, device_index, *key)
    if attempt not in _problems:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return False  # compiling may be forbidden now; warm-up steps come before a capture
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
                attempt, f"the Triton kernel {name} does not run for {key} and the plain formula is used: {first}"
            )
    return _problems[attempt] is None


def unsuitable(device_type: str, device_index: int | None) -> str | None:
    """Why no kernel can run on a device, or None."""
    if device_type != "cuda":  # ROCm devices are called so too
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
    """Warn of each thing once a process."""
    if key not in _warned:
        _warned.add(key)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


# ---------------------------------------------------------------------------------------------------------------------
# Launching


def device_of(x: Tensor) -> AbstractContextManager:
    """x's GPU as the current one, on which Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def block_of(size: int, least: int = 16) -> int:
    """The power of two that holds `size`, at least what the matrix units take."""
    return max(least, 1 << (size - 1).bit_length())


def dot_precision(dtype: torch.dtype) -> str:
    """How float32 products are made: as PyTorch's own, TF32 only where the user allows it."""
    allowed = torch.backends.cuda.matmul.allow_tf32 and torch.version.hip is None and not INTERPRETED
    return "tf32" if dtype == torch.float32 and allowed else "ieee"
