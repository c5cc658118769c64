"""Timing and tables: the order of runs, what is counted, and what is written."""

import csv
import math
import subprocess
import sys
import time

import pytest
import torch

from iptv2_diffusion.evaluation import speed


def test_functions_take_turns_and_the_first_round_does_not_count():
    calls = []
    ticks = iter(range(100))
    steps = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    seconds = speed.time_interleaved(steps, rounds=3, clock=lambda: next(ticks))
    assert "".join(calls) == "abababab"
    assert seconds == {"a": [1, 1, 1], "b": [1, 1, 1]}


def test_ratio_is_of_pairs_of_rounds():
    """A machine that is slow for one whole round does not change it."""
    seconds = {"a": [2.0, 20.0, 2.0], "b": [1.0, 10.0, 4.0]}
    assert speed.ratio(seconds, "a", "b") == 2.0
    assert speed.summary(seconds["a"]) == {"median_s": 2.0, "min_s": 2.0, "max_s": 20.0}


def test_operator_times_name_what_runs():
    a, x = torch.randn(600, 600), torch.randn(2, 8, 64, 64)
    conv = torch.nn.Conv2d(8, 8, 3)
    with torch.no_grad():
        times = speed.operator_times(lambda: (a @ a, conv(x), torch.nn.functional.gelu(x)), rounds=2)
    assert {"matrix products", "convolutions", "GELU, SiLU, softmax"} <= set(times)
    assert list(times.values()) == sorted(times.values(), reverse=True)


def test_matmul_rate_is_that_of_the_clock():
    ticks = iter(range(0, 100, 2))  # two seconds per call
    rate = speed.matmul_rate(2, clock=lambda: next(ticks))
    assert math.isclose(rate, 10 * 2048 * 1024 * 1024 / 1e9)


def test_the_peak_inside_a_with_is_what_it_took():
    with speed.PeakMemory() as memory:
        held = torch.ones((256 << 20) // 4)  # new pages, regardless of what the process held before
        time.sleep(0.1)
    assert 250 << 20 <= memory.bytes < 400 << 20
    assert held[-1] == 1


def test_the_peak_does_not_depend_on_what_was_freed_before():
    program = """
import torch
from iptv2_diffusion.evaluation.speed import PeakMemory
from iptv2_diffusion.memory import keep_freed_memory

keep_freed_memory()  # for the rest of a process
for _ in range(2):
    with PeakMemory() as memory:
        parts = [torch.ones(1 << 18) for _ in range(200)]  # 200 MB
    print(memory.bytes)
    del parts
"""
    child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, second = map(int, child.stdout.split())
    assert first > 190 << 20
    assert second > 0.95 * first


def test_rows_are_written_with_every_column(tmp_path):
    rows = [{"model": "a", "median_s": 0.123456}, {"model": "b", "median_s": 1.0, "peak_mb": 7}]
    speed.save_rows(rows, tmp_path)
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        assert list(csv.DictReader(file)) == [
            {"model": "a", "median_s": "0.123456", "peak_mb": ""},
            {"model": "b", "median_s": "1.0", "peak_mb": "7"},
        ]
    table = (tmp_path / "rows.md").read_text(encoding="utf-8").splitlines()
    assert table == ["| model | median_s | peak_mb |", "|---|---|---|", "| a | 0.1235 |  |", "| b | 1 | 7 |"]


@pytest.mark.parametrize("x", ["latent", "megapixels"])
def test_a_plot_needs_its_columns(x, tmp_path):
    rows = [{"model": "a", "latent": side, "median_s": float(side)} for side in (32, 64)]
    speed.save_plot(rows, x, "median_s", (x, "seconds"), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").exists() == (x == "latent")
