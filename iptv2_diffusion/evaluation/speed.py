"""Timing, peak memory and operator profile of functions, with tables and plots.

Functions under comparison take turns in one process, so that other load on the machine slows all of them equally.
"""

from __future__ import annotations

import contextlib
import csv
import ctypes
import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode

Step = Callable[[], Any]
Row = dict[str, Any]

# Kinds of operators, by substrings of ATen names; the first match applies.
OPERATOR_KINDS = {
    "attention": ("scaled_dot_product", "flash_attention"),
    "convolutions": ("convolution", "conv2d"),
    "matrix products": ("addmm", ".mm.", "bmm", "linear_pointwise", ".mv.", ".dot."),
    "norms": ("layer_norm", "group_norm", "batch_norm", "vector_norm"),
    "GELU, SiLU, softmax": ("gelu", "silu", "softmax", "sigmoid"),
    "copies": ("copy_", "cat", "clone", "contiguous", "pad", "fill_", "zero_", "pixel_", "roll", "repeat"),
    "sums": ("sum", "mean"),
    "products and sums by element": ("mul", "add", "sub", "div", "lerp", "pow", "sqrt", "neg", "exp", "clamp"),
}


def time_interleaved(
    steps: dict[str, Step], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time functions that take turns, for a number of rounds after one warm-up round.

    Args:
        steps: name -> function.
        rounds: number of timed rounds.
        clock: function that returns seconds. On a shared core, use `time.process_time`: it counts CPU time, summed over
            all threads.

    Returns:
        name -> seconds in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(rounds + 1):
        for name, step in steps.items():
            start = clock()
            step()
            if number > 0:
                seconds[name].append(clock() - start)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, reference: str) -> float:
    """Return the median over the rounds of the ratio of the times of `name` and `reference`."""
    return statistics.median(a / b for a, b in zip(seconds[name], seconds[reference], strict=True))


def summary(values: Sequence[float]) -> Row:
    """Return the median, the minimum and the maximum of times in seconds."""
    return {"median_s": statistics.median(values), "min_s": min(values), "max_s": max(values)}


def matmul_rate(
    rounds: int,
    precision: str = "float32",
    clock: Callable[[], float] = time.perf_counter,
    device: str = "cpu",
) -> float:
    """Measure the machine's peak rate of matrix products in GFLOP/s, the best of the rounds.

    The product is 2048×1024 by 1024×1024 on a CPU. It is 8192×8192 by 8192×8192 on a GPU, where kernel launches would
    dominate a small product.
    """
    rows, inner = (2048, 1024) if device == "cpu" else (8192, 8192)
    a, b = (torch.randn(size, inner, device=device, dtype=getattr(torch, precision)) for size in (rows, inner))
    seconds = time_interleaved({"matmul": lambda: [torch.mm(a, b) for _ in range(10)]}, rounds, clock)["matmul"]
    return 10 * 2 * rows * inner * inner / min(seconds) / 1e9


class PeakMemory:
    """Context manager that measures the peak resident memory inside it, relative to the memory before it.

    On entry, freed memory returns to the system (glibc only). Otherwise its reuse would not be counted.

    Attributes:
        bytes: the increase, available after the context ends.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        with contextlib.suppress(AttributeError, OSError):  # other C libraries
            ctypes.CDLL(None).malloc_trim(0)
        self._process, self._stop = psutil.Process(), threading.Event()
        self._before = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self._peak = max(self._peak, self._process.memory_info().rss)

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._process.memory_info().rss)  # on a busy machine the thread may not run
        self.bytes = max(0, self._peak - self._before)


def describe_machine() -> dict[str, str]:
    """Describe the processor and the versions of Python and torch, to report with a result."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    name = next(names, platform.processor() or platform.machine())
    return {"machine": f"{os.cpu_count()} x {name}", "python": platform.python_version(), "torch": torch.__version__}


class OperatorClock(TorchDispatchMode):
    """Dispatch mode that sums the seconds of operators by kind."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__()
        self.clock, self.seconds = clock, dict.fromkeys([*OPERATOR_KINDS, "other"], 0.0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = self.clock()
        result = func(*args, **(kwargs or {}))
        elapsed = self.clock() - start
        kind = next((kind for kind, parts in OPERATOR_KINDS.items() if any(p in str(func) for p in parts)), "other")
        self.seconds[kind] += elapsed
        return result


def operator_times(step: Step, rounds: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Measure the seconds of one call by kind of operator, after a warm-up.

    Time between operators (Python, autograd) is excluded. torch.profiler offers only wall time, which includes the work
    of other processes on a shared core.
    """
    step()
    with OperatorClock(clock) as counter:
        for _ in range(rounds):
            step()
    return {kind: value / rounds for kind, value in sorted(counter.seconds.items(), key=lambda item: -item[1])}


# --------------------------------------------------------------------------------------------------------------------
# Output


def format_cell(value: Any) -> str:
    """Format a table cell: floats with four significant digits, None as an empty string."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def to_markdown(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """Format rows as a Markdown table with these columns."""
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    lines += [f"| {' | '.join(format_cell(row.get(column)) for column in columns)} |" for row in rows]
    return "\n".join(lines) + "\n"


def save_rows(rows: Sequence[Row], folder: Path) -> None:
    """Write rows.csv and rows.md with the union of all columns."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    (folder / "rows.md").write_text(to_markdown(rows, columns), encoding="utf-8")


def save_plot(rows: Sequence[Row], x: str, y: str, labels: tuple[str, str], path: Path) -> None:
    """Plot `y` over `x` on logarithmic axes, with one line per model and setting."""
    from matplotlib.figure import Figure

    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row.get(x) and row.get(y):
            settings = ("model", "what", "form", "precision", "threads", "batch", "tile")
            name = ", ".join(str(row[key]) for key in settings if key in row and (key != "batch" or x != "gmacs"))
            lines.setdefault(name, []).append((row[x], row[y]))
    if not lines:
        return
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel=labels[0], ylabel=labels[1])
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
