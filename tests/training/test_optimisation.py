"""Learning rate, AdamW groups and EMA weights."""

import itertools
import math

import pytest
import torch
from accelerate import Accelerator

from iptv2_diffusion.training.ema import ModelState
from iptv2_diffusion.training.optimisation import LearningRate, make_optimizer
from iptv2_diffusion.training.options import TrainingConfig


def schedule(**options):
    config = TrainingConfig(learning_rate=1.0, max_train_steps=100, **options)
    return LearningRate(make_optimizer(torch.nn.Linear(2, 2), config), config)


@pytest.mark.parametrize("name", ["constant", "cosine", "cosine_with_restarts", "linear"])
def test_warm_up_is_linear_and_starts_above_zero(name):
    rates = [schedule(lr_schedule=name, lr_warmup_steps=4).at(step) for step in range(5)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(1.0, abs=0.02)


def test_ends():
    assert schedule(lr_schedule="constant").at(99) == 1.0
    assert schedule(lr_schedule="cosine").at(50) == pytest.approx(0.5)
    assert schedule(lr_schedule="cosine").at(99) == pytest.approx(0.0, abs=1e-3)
    assert schedule(lr_schedule="linear").at(75) == pytest.approx(0.25)
    assert schedule(lr_schedule="cosine").at(500) == pytest.approx(0.0)


def test_cosine_restarts_are_equal_cosines():
    rate = schedule(lr_schedule="cosine_with_restarts", lr_cycles=4)
    first = [rate.at(step) for step in range(25)]
    assert first[0] == 1.0
    assert all(low < high for high, low in itertools.pairwise(first))
    assert first[-1] == pytest.approx(0.5 * (1 + math.cos(math.pi * 24 / 25)))
    for cycle in (1, 2, 3):
        assert [rate.at(25 * cycle + step) for step in range(25)] == pytest.approx(first)
    assert rate.at(10, 0.5) == pytest.approx(1.0)  # a time budget moves on to the third cycle
    assert rate.at(100) == 0.0


def test_a_time_budget_moves_the_schedule_on_but_not_the_warm_up():
    rate = schedule(lr_schedule="linear", lr_warmup_steps=4)
    assert rate.at(10, 0.8) == rate.at(80)
    assert rate.at(90, 0.8) == rate.at(90)
    assert rate.at(0, 0.3) == pytest.approx(0.25)


def test_set_writes_the_rate_into_every_group():
    config = TrainingConfig(learning_rate=2.0, lr_warmup_steps=2)
    optimizer = make_optimizer(torch.nn.Conv2d(2, 2, 3), config)
    assert LearningRate(optimizer, config).set(0) == 1.0
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 1.0]


def test_decay_is_on_matrices_and_kernels_only():
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 3), torch.nn.LayerNorm(2))
    optimizer = make_optimizer(model, TrainingConfig(weight_decay=0.1))
    decayed, plain = optimizer.param_groups
    assert [p.ndim for p in decayed["params"]] == [4]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert len(plain["params"]) == 3


def make_state(**options):
    accelerator = Accelerator()
    model = accelerator.prepare(torch.nn.Linear(3, 3))
    return model, ModelState(accelerator, model, **options)


def test_the_average_follows_its_formula():
    model, state = make_state(decay=0.5, power=0.75)
    expected = model.weight.detach().clone()
    for step in range(6):
        with torch.no_grad():
            model.weight.add_(step)
        state.step()
        decay = min(0.5, 1 - (1 + step) ** -0.75)
        expected = decay * expected + (1 - decay) * model.weight.detach()
        assert state.decay == pytest.approx(decay)
    assert torch.allclose(state.averaged_state_dict()["weight"], expected)


def test_averaged_weights_are_borrowed_and_given_back_bit_for_bit():
    model, state = make_state()
    state.step()
    with torch.no_grad():
        model.weight.mul_(3.3)
    before = model.weight.detach().clone()
    with state.averaged() as module:
        assert not module.training
        assert torch.equal(module.weight, state.averaged_state_dict()["weight"])
        assert not torch.equal(module.weight, before)
    assert model.training
    assert torch.equal(model.weight, before)


def test_without_averaging_the_weights_are_the_current_ones():
    model, state = make_state(decay=0)
    state.step()
    with torch.no_grad():
        model.weight.zero_()
    with state.averaged() as module:
        assert not module.weight.any()
    assert not state.averaged_state_dict()["weight"].any()
