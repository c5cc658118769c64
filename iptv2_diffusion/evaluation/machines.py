"""Rates of matrix products, bandwidth and launch overhead of some GPUs and of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["MACHINES", "Machine", "best_of", "measure_this_machine"]


@dataclass(frozen=True)
class Machine:
    """Rates that programs reach on a machine.

    Attributes:
        name: name of the machine.
        flops: rate of matrix products in FLOP/s by precision; a multiply–accumulate counts as two operations.
        vector_flops: rate in FLOP/s without tensor cores (depthwise convolutions).
        bandwidth: memory bandwidth in bytes per second.
        launch: overhead of a kernel in seconds when a recorded graph launches it.
    """

    name: str
    flops: dict[str, float]
    vector_flops: float
    bandwidth: float
    launch: float = 2e-6


def published(name: str, sixteen: float, tf32: float, single: float, bandwidth: float) -> Machine:
    """Make a GPU from its data sheet. Large products reach 0.6 of the published rate, and copies 0.9 of the bandwidth.

    Args:
        name: name of the GPU.
        sixteen: TFLOP/s in half precision, dense, with float32 accumulation.
        tf32: TFLOP/s in TF32, dense.
        single: TFLOP/s in float32.
        bandwidth: memory bandwidth in TB/s.
    """
    products = {"bfloat16": 0.6e12 * sixteen, "float16": 0.6e12 * sixteen, "tf32": 0.6e12 * tf32}
    return Machine(name, products | {"float32": 0.6e12 * single}, 0.6e12 * single, 0.9e12 * bandwidth)


MACHINES = {
    # NVIDIA H100 Tensor Core GPU data sheet, SXM5
    "h100": published("H100 SXM", 989, 495, 67, 3.35),
    # NVIDIA A100 Tensor Core GPU data sheet, SXM4 80 GB
    "a100": published("A100 SXM 80 GB", 312, 156, 19.5, 2.039),
    # NVIDIA Ada GPU architecture white paper, appendix A
    "rtx4090": published("RTX 4090", 165.2, 82.6, 82.6, 1.008),
}


def measure_this_machine(precision: str, rounds: int = 3) -> Machine:
    """Measure this machine's CPU: the best rates of matrix products and of copies that exceed the caches."""
    a, b = (torch.randn(size, 1024, dtype=getattr(torch, precision)) for size in (2048, 1024))
    flops = 2 * 2048 * 1024 * 1024 / best_of(rounds, lambda: a @ b)
    x, y = torch.empty(2, 1 << 25)
    bandwidth = 2 * x.nbytes / best_of(rounds, lambda: y.copy_(x))
    name = f"this machine, {torch.get_num_threads()} threads"
    return Machine(name, {precision: flops}, flops, bandwidth, launch=5e-6)


def best_of(rounds: int, function: Callable[[], Any]) -> float:
    """Return the seconds of the fastest call after a warm-up call."""
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])
