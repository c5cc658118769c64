"""Which autocast precision is the fastest on this machine: what `mixed_precision: auto` means."""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

WORTH_IT = 1.5  # matrix products gain most from bfloat16; below this, what surrounds them eats the gain


@functools.cache
def fastest_precision() -> Literal["no", "bf16"]:
    """`bf16` where the device multiplies matrices so at least 1.5 times as fast as in float32, else `no`.

    On CPUs this cannot be read from a list of features: with AVX512-BF16, an AMD EPYC is 4 times as fast in bfloat16
    as in float32, an Intel Xeon without AMX 0.6 times. So a CPU is measured, in 0.2 s, by the first process, and the
    others take its answer. To be called by all processes.
    """
    state = PartialState()
    if state.device.type == "cpu":
        answer = ["bf16" if state.is_main_process and measured_gain() >= WORTH_IT else "no"]
    else:
        answer = ["bf16" if state.device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "no"]
    return broadcast_object_list(answer)[0]


def measured_gain(rounds: int = 50) -> float:
    """Seconds of a float32 matrix product over those of a bfloat16 one on the CPU, each the shortest of its rounds: a
    busy machine cuts into the others. On one thread: several wait for each other there, and a run that resumes must
    find what it found."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds: dict[torch.dtype, list[float]] = {}
    factors = {dtype: torch.ones(384, 384, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for _ in range(rounds):
        for dtype, factor in factors.items():
            start = time.perf_counter()
            factor @ factor
            seconds.setdefault(dtype, []).append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    return min(seconds[torch.float32]) / min(seconds[torch.bfloat16])


def device_of_sums(accelerator: Accelerator) -> torch.device:
    """Where float64 sums of a run are kept: a process alone needs no device for them, and Apple's has no float64."""
    return accelerator.device if accelerator.num_processes > 1 else torch.device("cpu")
