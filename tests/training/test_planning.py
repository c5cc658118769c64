"""Memory plans, compared with arithmetic and with a real run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from iptv2_diffusion.models.activations import LiveStorages
from iptv2_diffusion.training.options import TrainingConfig
from iptv2_diffusion.training.planning import estimate_memory

ROOT = Path(__file__).parents[2]


def two_layers():
    return torch.nn.Sequential(torch.nn.Linear(100, 200, bias=False), torch.nn.Tanh(), torch.nn.Linear(200, 50, False))


def squared(model, batch):
    return model(batch).square()


def test_live_storages_follow_what_is_freed():
    with LiveStorages() as live:
        a = torch.ones(100)
        b = a.view(10, 10) + 1
        assert live.bytes == 800  # a view has no storage of its own
        del b
        assert (live.bytes, live.peak) == (400, 800)
        del a
    assert live.bytes == 0


def test_memory_of_two_layers_is_what_arithmetic_says():
    memory = estimate_memory(two_layers, squared, (64, 100), TrainingConfig())
    weights = 4 * (100 * 200 + 200 * 50)
    assert (memory.weights, memory.gradients, memory.average) == (weights,) * 3
    assert memory.optimizer == 2 * weights
    kept = 4 * 64 * (100 + 200 + 50)  # input, tanh's output and the output, which square keeps
    assert memory.activations == pytest.approx(kept, abs=8)
    assert memory.peak >= 4 * weights + kept


def test_sharding_divides_the_state():
    whole, zero2, zero3 = (
        estimate_memory(two_layers, squared, (4, 100), TrainingConfig(sharding=form), processes=4)
        for form in ("none", "zero2", "zero3")
    )
    assert [m.weights for m in (whole, zero2, zero3)] == [120_000, 120_000, 30_000]
    assert [m.optimizer for m in (whole, zero2, zero3)] == [240_000, 60_000, 60_000]
    assert whole.peak > zero2.peak > zero3.peak


@pytest.mark.slow
@pytest.mark.parametrize("form", [["no"], ["bf16"], ["no", "--gradient_checkpointing"]], ids=" ".join)
def test_plan_is_within_a_fifth_of_the_measured_peak(form):
    """By default glibc's heap keeps up to a third more than the tensors; here it returns freed memory.

    The libraries' own 50 MB (code, kernels compiled at run time) are not part of the plan, so the model is not tiny.
    """
    command = [sys.executable, "train/train_ldm.py", "--config", "configs/emoji64.yaml", "--model", "emoji64"]
    command += ["--plan", "--num_threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MALLOC_MMAP_THRESHOLD_": "65536"}
    result = subprocess.run(
        [*command, "--mixed_precision", *form], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    planned = re.search(r"^peak +([\d,]+) +([\d,]+)", result.stdout, re.MULTILINE)
    measured = re.search(r"per step, peak ([\d,]+) MB", result.stdout)
    planned = int(planned[2 if "--gradient_checkpointing" in form else 1].replace(",", ""))
    measured = int(measured[1].replace(",", ""))
    print(f"planned {planned} MB, measured {measured} MB")
    assert planned == pytest.approx(measured, rel=0.2)
