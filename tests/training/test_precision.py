"""`mixed_precision: auto`: bf16 where this machine multiplies faster with it, float32 elsewhere."""

import time

import pytest
import torch
from accelerate import PartialState

from iptv2_diffusion.training import precision
from iptv2_diffusion.training.accelerator import start_accelerator
from iptv2_diffusion.training.options import TrainingConfig


@pytest.fixture(autouse=True)
def measured_anew():
    precision.fastest_precision.cache_clear()
    yield
    precision.fastest_precision.cache_clear()


@pytest.mark.parametrize(("gain", "expected"), [(0.6, "no"), (1.49, "no"), (1.5, "bf16"), (4.0, "bf16")])
def test_bf16_is_taken_where_it_pays(monkeypatch, gain, expected):
    monkeypatch.setattr(precision, "measured_gain", lambda: gain)
    assert PartialState().device.type == "cpu"
    assert precision.fastest_precision() == expected


def test_the_measured_gain_is_that_of_this_machine():
    """Against a longer measurement of our own, within what a shared machine allows."""

    def seconds(dtype):
        factor, taken = torch.ones(384, 384, dtype=dtype), []
        for _ in range(100):
            start = time.perf_counter()
            factor @ factor
            taken.append(time.perf_counter() - start)
        return min(taken)

    expected = seconds(torch.float32) / seconds(torch.bfloat16)
    assert 0.4 < precision.measured_gain() / expected < 2.5


def test_the_accelerator_gets_what_was_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(precision, "measured_gain", lambda: 4.0)
    config = TrainingConfig(output_dir=str(tmp_path), mixed_precision="auto", report_to="none", num_threads=1)
    accelerator = start_accelerator(config)
    assert accelerator.mixed_precision == "bf16"
