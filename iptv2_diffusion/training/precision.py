"""Choice of the fastest autocast precision on this machine, for `mixed_precision: auto`."""

from __future__ import annotations

import functools
import time
from typing import Literal

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list

WORTH_IT = 1.5  # smallest speed-up of matrix products that outweighs the cost of the casts around them


@functools.cache
def fastest_precision() -> Literal["no", "bf16"]:
    """Return "bf16" if the device computes matrix products at least 1.5 times as fast as in float32, otherwise "no".

    A list of CPU features does not decide this. With AVX512-BF16, an AMD EPYC is 4 times as fast in bfloat16 as in
    float32, and an Intel Xeon without AMX 0.6 times. The first process therefore measures a CPU in 0.2 s, and the
    others use its result. All processes must call this.
    """
    state = PartialState()
    if state.device.type == "cpu":
        answer = ["bf16" if state.is_main_process and measured_gain() >= WORTH_IT else "no"]
    else:
        answer = ["bf16" if state.device.type == "cuda" and torch.cuda.is_bf16_supported(False) else "no"]
    return broadcast_object_list(answer)[0]


def measured_gain(rounds: int = 50) -> float:
    """Return the time of a float32 matrix product divided by that of a bfloat16 one on the CPU.

    Each is the minimum over its rounds, which other load affects least. One thread is used, because several threads
    wait for each other on a busy machine, and a resumed run must get the same result.
    """
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
    """Return the device for float64 sums: the CPU for a single process, because Apple's GPUs have no float64."""
    return accelerator.device if accelerator.num_processes > 1 else torch.device("cpu")
