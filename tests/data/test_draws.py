"""Randomness is a pure function of (seed, step, position): order, slices, draws."""

import pytest
import torch

from iptv2_diffusion.data.draws import (
    DataOrder,
    RunDraws,
    StepBatches,
    class_balanced_weights,
    derive_seed,
    draw_step,
    own_slices,
    read_ahead,
)


def test_every_item_once_an_epoch_and_epochs_differ():
    order = DataOrder(10, seed=3)
    epochs = [order.items(10 * epoch, 10) for epoch in range(3)]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])


def test_the_stream_does_not_depend_on_how_it_is_cut():
    whole = DataOrder(7, seed=0).items(0, 50)
    order = DataOrder(7, seed=0)
    pieces = [order.items(start, 5) for start in range(45, -1, -5)][::-1]
    assert torch.equal(torch.cat(pieces), whole)


def test_batches_larger_than_the_data_set_wrap_around():
    assert DataOrder(3, seed=0).items(1, 100).bincount().tolist() == pytest.approx([33, 33, 33], abs=1)


@pytest.mark.parametrize("balance", [0.25, 0.5, 1.0])
def test_a_balanced_epoch_has_each_class_by_its_power_and_its_images_equally(balance):
    sizes = torch.tensor([600, 0, 90, 7])
    labels = torch.repeat_interleave(torch.arange(4), sizes)[torch.randperm(697, generator=torch.manual_seed(0))]
    order = DataOrder(697, 5, class_balanced_weights(labels, balance))
    expected = 697 * sizes.double() ** (1 - balance) * (sizes > 0) / (sizes[sizes > 0].double() ** (1 - balance)).sum()
    times = torch.stack([order.permutation(epoch).bincount(minlength=697) for epoch in range(3)])
    assert not torch.equal(times[0], times[1])
    for seen in times:
        assert seen.sum() == 697
        for label, share in enumerate(expected.tolist()):
            each = seen[labels == label]
            assert each.sum().item() == pytest.approx(share, rel=0.15, abs=3)
            assert not len(each) or each.max() - each.min() <= 1  # the integer part of the expected count, or one more
    assert times.double().mean(0)[labels == 0].mean() == pytest.approx(float(expected[0]) / 600, rel=0.05)


def test_a_balanced_stream_does_not_depend_on_how_it_is_cut():
    weights = class_balanced_weights(torch.tensor([0, 0, 0, 0, 1, 1, 2]), 0.5)
    whole = DataOrder(7, 0, weights).items(0, 50)
    order = DataOrder(7, 0, weights)
    pieces = [order.items(start, 5) for start in range(45, -1, -5)][::-1]
    assert torch.equal(torch.cat(pieces), whole)


def test_no_balance_leaves_the_order_as_it_was():
    assert class_balanced_weights(torch.tensor([0, 0, 1]), 0.0) is None


def test_an_empty_data_set_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        DataOrder(0, seed=0)


def test_draws_depend_on_seed_and_step_only():
    draw = {key: draw_step(DataOrder(100, key[0]), key[1], 8, (2, 3, 3)) for key in [(0, 0), (0, 1), (1, 0)]}
    again = draw_step(DataOrder(100, 0), 1, 8, (2, 3, 3))
    for name, value in vars(draw[0, 1]).items():
        assert torch.equal(value, getattr(again, name))
        if name not in ("flips", "items"):
            assert not torch.equal(value, getattr(draw[0, 0], name))
            assert not torch.equal(value, getattr(draw[1, 0], name))


def test_small_draws_do_not_depend_on_the_latents():
    left, right = (draw_step(DataOrder(100, 0), 5, 8, shape) for shape in ((4, 2, 2), (16, 8, 8)))
    for name in ("items", "flips", "timesteps", "label_drops"):
        assert torch.equal(getattr(left, name), getattr(right, name))


def test_stratified_timesteps_fill_every_stratum_and_stay_below_one():
    for step in range(200):
        numbers = draw_step(DataOrder(9, 0), step, 64, (0,)).timesteps
        assert (numbers * 64).long().sort().values.tolist() == list(range(64))
        assert numbers.max() < 1
    plain = torch.cat([draw_step(DataOrder(9, 0), s, 64, (0,), stratified=False).timesteps for s in range(50)])
    assert plain.mean() == pytest.approx(0.5, abs=0.02)


def test_strata_are_not_tied_to_positions():
    first = torch.stack([draw_step(DataOrder(9, 0), step, 16, (0,)).timesteps[0] for step in range(400)])
    assert first.mean() == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("processes", "micro_batches"), [(1, 1), (1, 4), (2, 1), (2, 2), (4, 3)])
def test_slices_cover_the_global_batch_once(processes, micro_batches):
    slices = [part for p in range(processes) for part in own_slices(24, processes, p, micro_batches)]
    assert torch.cat([torch.arange(24)[part] for part in slices]).tolist() == list(range(24))
    assert len({part.stop - part.start for part in slices}) == 1


def test_slices_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="10 does not divide over 4 processes x 1"):
        own_slices(10, 4, 0)


def test_a_slice_of_the_draws_is_the_draws_of_the_slice():
    draws = draw_step(DataOrder(50, 0), 2, 8, (1, 2, 2), posterior=False)
    part = draws[2:4]
    assert torch.equal(part.noise, draws.noise[2:4])
    assert part.posterior_noise is None


def test_the_batch_sampler_reads_in_the_order_of_the_draws():
    order = DataOrder(20, seed=4)
    batches = StepBatches(RunDraws(order, 8, (4, 2, 2), own_slices(8, 2, 1, 2)), start=3, flip=True)
    sampler = iter(batches)
    for step in (3, 4):
        draws = draw_step(order, step, 8, (4, 2, 2))
        for part in own_slices(8, 2, 1, 2):
            pairs = next(sampler)
            assert [item for item, _ in pairs] == draws.items[part].tolist()
            assert [flip for _, flip in pairs] == draws.flips[part].tolist()
            assert_equal_draws(batches.waiting.popleft(), draws[part])


def assert_equal_draws(left, right):
    for name, value in vars(left).items():
        other = getattr(right, name)
        assert value is other is None or torch.equal(value, other), name


class Named(torch.utils.data.Dataset):
    """Samples that name themselves."""

    def __getitem__(self, key):
        return torch.tensor(key)


@pytest.mark.parametrize("workers", [0, 2])
def test_samples_that_are_read_ahead_arrive_with_the_draws_that_they_were_read_for(workers):
    run = RunDraws(DataOrder(20, seed=4), 8, (4, 2, 2), own_slices(8, 2, 1, 2), stratified=False)
    reading = read_ahead(Named(), run, start=3, flip=True, crops=3, num_workers=workers)
    for step in range(3, 8):
        whole = draw_step(run.order, step, 8, (4, 2, 2), stratified=False)
        for part in run.slices:
            samples, draws = next(reading)
            assert_equal_draws(draws, whole[part])
            assert samples.tolist() == torch.stack([draws.items, draws.views(True, 3)], dim=1).tolist()


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 3, 3), (1, 5, 1), (1, 1, 1)])
def test_without_diffusion_noise_everything_else_is_the_same(shape):
    """Latent shapes of a VAE; the values of 8 samples are a multiple of 16, not a multiple, or fewer than 16."""
    with_noise, without = (draw_step(DataOrder(9, 0), 2, 8, shape, diffusion=drawn) for drawn in (True, False))
    assert without.noise is None
    for name, value in vars(without).items():
        assert value is None or torch.equal(value, getattr(with_noise, name)), name


def test_seeds_are_fixed_for_all_time():
    """A changed derivation would silently change every run, and break resumption across versions."""
    assert derive_seed(0, "step", 1) == 1578201625287471526
    assert DataOrder(5, 0).items(0, 5).tolist() == [2, 3, 4, 1, 0]
