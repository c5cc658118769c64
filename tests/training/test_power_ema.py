"""Averages by power functions, compared with explicit sums; reconstructed averages, compared with direct ones."""

import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from test_loop import equal, rows, run, snapshot

from iptv2_diffusion.training.ema import ModelState
from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import TrainingConfig
from iptv2_diffusion.training.parsing import parse_config
from iptv2_diffusion.training.power_ema import PowerEMA, coefficients, find_snapshots, gamma_of, reconstruct


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.28])
def test_the_exponent_gives_the_relative_width_of_its_profile(sigma_rel):
    gamma = gamma_of(sigma_rel)
    assert gamma > 0
    assert math.sqrt(gamma + 1) / (gamma + 2) / math.sqrt(gamma + 3) == pytest.approx(sigma_rel)
    tau = (np.arange(1_000_000) + 0.5) / 1_000_000  # the profile itself, on [0, 1]
    profile = (gamma + 1) * tau**gamma
    mean = (tau * profile).mean()
    assert math.sqrt(((tau - mean) ** 2 * profile).mean()) == pytest.approx(sigma_rel, rel=1e-3)


def test_the_update_gives_each_step_its_share_of_the_profile():
    """The weights of step tau have the profile's integral over [tau - 1, tau] as a factor; the start has none."""
    parameter = torch.nn.Parameter(torch.full((3,), 1e6, dtype=torch.float64))
    average = PowerEMA([parameter], 0.1)
    values = torch.randn(50, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for value in values:
        parameter.data = value.clone()
        average.step([parameter])
    edges = (torch.arange(51, dtype=torch.float64) / 50) ** (average.gamma + 1)
    expected = (edges.diff()[:, None] * values).sum(0)
    torch.testing.assert_close(average.shadow_params[0], expected)


def test_inner_products_are_those_of_the_profiles():
    """The factors of one profile on another: the ratio of integrals, taken numerically."""
    (ta, sa), (tb, sb) = (70, 0.05), (100, 0.12)
    tau = (np.arange(1_000_000) + 0.5) / 10_000  # [0, 100]

    def profile(steps, sigma_rel):
        gamma = gamma_of(sigma_rel)
        return np.where(tau <= steps, (gamma + 1) / steps * (tau / steps) ** gamma, 0)

    a, b = profile(ta, sa), profile(tb, sb)
    factors, error = coefficients([(ta, sa)], tb, sb)
    assert factors[0] == pytest.approx((a * b).sum() / (a * a).sum(), rel=1e-4)
    missed = b - factors[0] * a
    assert error == pytest.approx(math.sqrt((missed**2).sum() / (b**2).sum()), rel=1e-3)


def wandering_run(folder, wanted, steps=1000, every=50):
    """Weights on a drifting random walk: (direct average of `wanted`, current weights, first track)."""
    accelerator = Accelerator()
    model = accelerator.prepare(torch.nn.Linear(40, 40))
    state = ModelState(accelerator, model, sigma_rels=(0.05, 0.1))
    direct = PowerEMA(model.parameters(), wanted)
    generator = torch.Generator().manual_seed(1)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator) + 1 / step)
        state.step()
        direct.step(model.parameters())
        if step % every == 0:
            state.write_snapshots(folder)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, direct.shadow_params, strict=True)), model.state_dict(), state.averaged_state_dict()


def distance(left, right):
    return math.sqrt(sum((left[name] - right[name]).square().sum().item() for name in right))


@pytest.mark.parametrize("wanted", [0.03, 0.075, 0.15])
def test_a_reconstructed_average_is_the_direct_long_run_one(tmp_path, wanted):
    direct, weights, track = wandering_run(tmp_path, wanted)
    snapshots = find_snapshots(tmp_path)
    assert len(snapshots) == 40
    made, error = reconstruct(snapshots, wanted)
    assert made.keys() == direct.keys()
    assert error < 0.03
    assert distance(made, direct) < 0.04 * distance(weights, direct)
    assert distance(made, direct) < 0.1 * distance(track, direct)
    sparse, coarse_error = reconstruct(snapshots[-4:], wanted)  # fewer snapshots: a larger error, which is reported
    assert coarse_error > error
    assert distance(sparse, direct) > distance(made, direct)


def test_a_track_at_a_snapshot_is_reconstructed_exactly(tmp_path):
    *_, track = wandering_run(tmp_path, 0.1, steps=200, every=20)
    made, error = reconstruct(find_snapshots(tmp_path), 0.05)
    assert error < 1e-6
    for name, value in track.items():
        torch.testing.assert_close(made[name], value, rtol=0, atol=1e-5)


def test_a_run_keeps_snapshots_resumes_exactly_and_forgets_those_beyond(tmp_path):
    power = {"ema": "power", "ema_snapshot_every": 2}
    whole = run(tmp_path, "whole", **power)
    assert [s.steps for s in find_snapshots(whole.snapshots)] == [2, 2, 4, 4, 6, 6, 8, 8]
    run(tmp_path, "half", max_train_steps=5, **power)
    assert [s.steps for s in find_snapshots(tmp_path / "half/ema")] == [2, 2, 4, 4, 5, 5]
    (tmp_path / "half/ema/00000007-0.0500.safetensors").write_bytes(b"of a run that was killed before its checkpoint")
    resumed = run(tmp_path, "half", **power)
    assert equal(snapshot(whole), snapshot(resumed))
    for left, right in zip(whole.state.averages, resumed.state.averages, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(left.shadow_params, right.shadow_params, strict=True))
    assert [r for r in rows(resumed) if "loss" in r] == [r for r in rows(whole) if "loss" in r]
    for snap in find_snapshots(whole.snapshots):
        other = resumed.snapshots / snap.path.name
        assert other.read_bytes() == snap.path.read_bytes()


def test_impossible_reconstructions_are_reported(tmp_path):
    with pytest.raises(ValueError, match="train with --ema power"):
        reconstruct([], 0.1)
    with pytest.raises(ValueError, match=r"sigma_rel is 0.3; it must be in \(0, 0.289\)"):
        gamma_of(0.3)
    wandering_run(tmp_path, 0.1, steps=20, every=10)
    with pytest.raises(ValueError, match=r"no snapshot up to step 5; the first is of step 10"):
        reconstruct(find_snapshots(tmp_path), 0.1, 5)
    cut = next(tmp_path.glob("*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-10])
    with pytest.raises(ValueError, match="not a complete snapshot"):
        find_snapshots(tmp_path)
    with pytest.raises(ConfigError, match=r"the two must differ"):
        parse_config(TrainingConfig, ["--ema", "power", "--ema_sigma_rels", "0.1,0.1"])
    with pytest.raises(ConfigError, match=r"each must be in \(0, 0.28\)"):
        parse_config(TrainingConfig, ["--ema", "power", "--ema_sigma_rels", "0.1,0.3"])
