"""Randomness without state: everything random in training is a pure function of (seed, step, position in the batch).

* Data order: position i of the endless stream is epoch i // N, item perm(seed, epoch)[i % N]. Every item is seen once
  an epoch, whatever the number of processes; with weights, as often as its weight says, up to one time.
* Everything else of optimiser step n (flips, noise, timesteps, label drops) is drawn for the *whole* global batch from
  one CPU generator seeded with (seed, n); each process and micro-batch takes its slice.

So a resumed run needs no random state, the loss curve does not depend on the number of processes, and gradient
accumulation equals the large batch. The price is that each process draws the whole batch's noise: about 1 ms for 64
latents of 16x16x4, 25 ms for 256 of 32x32x4.

A step is drawn once, by `RunDraws`. Sources that read ahead draw ahead, and hand each micro-batch out together with its
pixels (`read_ahead`): nothing is derived a second time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def derive_seed(seed: int, *parts: int | str) -> int:
    """A 63-bit seed from the run's seed and what it is for, equal on every machine.

    Hashed, so that neighbouring steps or seeds have unrelated streams (torch's CPU generator uses the low 32 bits).
    """
    text = "/".join(str(part) for part in (seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator_for(seed: int, *parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


class DataOrder:
    """The endless, shuffled, stateless stream of item numbers.

    Args:
        num_items: N, the size of an epoch.
        seed: of the run.
        weights: (N,), not negative: how often each item comes, in proportion (see `class_balanced_weights`). None:
            all alike. Of w N / sum(w) expected times an item comes the whole ones, and once more by chance.
    """

    def __init__(self, num_items: int, seed: int, weights: Tensor | None = None) -> None:
        if num_items < 1:
            raise ValueError("the data set is empty: there is nothing to train on")
        self.num_items, self.seed = num_items, seed
        self._shares = None if weights is None else (weights.double() / weights.double().sum()).cumsum(0)
        self._epochs: dict[int, Tensor] = {}

    def permutation(self, epoch: int) -> Tensor:
        """Item numbers (N,) of an epoch; the last two asked for are remembered."""
        if epoch not in self._epochs:
            generator = generator_for(self.seed, "order", epoch)
            order = torch.randperm(self.num_items, generator=generator)
            if self._shares is not None:  # systematic resampling: N points at equal distances over the weights
                offset = torch.rand((), generator=generator, dtype=torch.float64)
                points = (torch.arange(self.num_items) + offset) / self.num_items
                order = torch.searchsorted(self._shares, points).clamp_(max=self.num_items - 1)[order]
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: order}
        return self._epochs[epoch]

    def items(self, start: int, count: int) -> Tensor:
        """Item numbers (count,) of positions start ... start + count - 1 of the stream."""
        pieces, end = [], start + count
        while start < end:
            epoch, offset = divmod(start, self.num_items)
            take = min(end - start, self.num_items - offset)
            pieces.append(self.permutation(epoch)[offset : offset + take])
            start += take
        return torch.cat(pieces)


def class_balanced_weights(labels: Tensor, balance: float) -> Tensor | None:
    """Weights (N,) for `DataOrder` by which a class of n images comes in proportion to n^(1 - balance).

    Args:
        labels: (N,) int64.
        balance: 0: as often as the data has it (None is returned); 1: every class as often as any other.
    """
    return labels.bincount().double()[labels] ** -balance if balance else None


@dataclass(frozen=True)
class StepDraws:
    """What is random at one optimiser step; the first dimension of each is the (slice of the) global batch.

    Attributes:
        items: data items, int64.
        flips: mirror the image?, bool.
        timesteps: uniform numbers in [0, 1) for `DiffusionObjective.sample_timesteps`.
        label_drops: uniform numbers in [0, 1); a label is dropped where the number is below the drop probability.
        noise: standard normal (B, C, H, W), the diffusion noise; None where nothing is diffused.
        posterior_noise: likewise, to sample the VAE's posterior; None where it has no spread.
        crops: uniform numbers in [0, 1) that choose among the crops of an image, where there are several.
    """

    items: Tensor
    flips: Tensor
    timesteps: Tensor
    label_drops: Tensor
    noise: Tensor | None
    posterior_noise: Tensor | None
    crops: Tensor

    def views(self, flips: bool, crops: int) -> Tensor:
        """Which stored or decoded form of each image, int64: crop 0 upright (and mirrored, with `flips`), crop 1 ..."""
        view = (self.crops * crops).long()
        return 2 * view + self.flips.long() if flips else view

    def __getitem__(self, part: slice) -> StepDraws:
        """The same for a slice of the batch."""
        return StepDraws(*(None if value is None else value[part] for value in vars(self).values()))


class Order(Protocol):
    """Which items the batches are made of."""

    seed: int

    def items(self, start: int, count: int) -> Tensor:
        """Items (count,) int64 of places start ... start + count - 1 of the endless stream."""


def draw_step(
    order: Order,
    step: int,
    batch_size: int,
    latent_shape: Sequence[int],
    *,
    diffusion: bool = True,
    posterior: bool = True,
    stratified: bool = True,
) -> StepDraws:
    """Everything random at optimiser step `step` (from 0), for the whole global batch.

    Args:
        order: which items the batches are made of; it holds the run's seed.
        step: the optimiser step.
        batch_size: B.
        latent_shape: (C, H, W) of the noise.
        diffusion: draw the diffusion noise. Without it the other numbers are the same.
        posterior: draw the noise of the VAE's posterior.
        stratified: the batch's timestep numbers fall one into each of B equal strata, in random order: each is still
            uniform, but the mean loss of a small batch scatters much less.
    """
    generator = generator_for(order.seed, "step", step)
    flips = torch.rand(batch_size, generator=generator) < 0.5
    timesteps = torch.rand(batch_size, generator=generator)
    strata = torch.randperm(batch_size, generator=generator)
    if stratified:  # clamped because (B - 1 + 0.99999997) / B rounds to 1 in float32
        timesteps = ((strata + timesteps) / batch_size).clamp(max=1 - 2**-24)
    label_drops = torch.rand(batch_size, generator=generator)
    shape, noise, posterior_noise = (batch_size, *latent_shape), None, None
    if diffusion:
        noise = torch.randn(shape, generator=generator)
    elif posterior:
        _pass_over_normals(math.prod(shape), generator)
    if posterior:
        posterior_noise = torch.randn(shape, generator=generator)
    items = order.items(step * batch_size, batch_size)
    crops = torch.rand(batch_size, generator=generator_for(order.seed, "crop", step))
    return StepDraws(items, flips, timesteps, label_drops, noise, posterior_noise, crops)


def _pass_over_normals(count: int, generator: torch.Generator) -> None:
    """Bring the generator to where it is after `torch.randn(count)`, without the normal numbers.

    From 16 on, torch makes each from one uniform number, and the last 16 anew where 16 does not divide the count.
    """
    if count < 16:
        torch.randn(count, generator=generator)
    else:
        torch.rand(count + (16 if count % 16 else 0), generator=generator)


def own_slices(batch_size: int, num_processes: int, process: int, micro_batches: int = 1) -> list[slice]:
    """The parts of the global batch that a process takes, one slice a micro-batch; together they cover it once."""
    parts = num_processes * micro_batches
    if batch_size % parts:
        raise ValueError(
            f"batch size {batch_size} does not divide over {num_processes} processes x {micro_batches} micro-batches"
        )
    size = batch_size // parts
    first = process * micro_batches
    return [slice((first + i) * size, (first + i + 1) * size) for i in range(micro_batches)]


@dataclass(frozen=True)
class RunDraws:
    """What is random in a run, as one process sees it: its micro-batches of every step.

    Attributes:
        order: which items the batches are made of; it holds the run's seed.
        batch_size: B, of an optimiser step over all processes.
        latent_shape: (C, H, W) of the noise.
        slices: this process's parts of the global batch, one a micro-batch (see `own_slices`).
        diffusion, posterior, stratified: as for `draw_step`.
    """

    order: Order
    batch_size: int
    latent_shape: Sequence[int]
    slices: Sequence[slice]
    diffusion: bool = True
    posterior: bool = True
    stratified: bool = True

    def micro_batches(self, step: int) -> Iterator[StepDraws]:
        """The draws of this process's micro-batches of a step."""
        options = {"diffusion": self.diffusion, "posterior": self.posterior, "stratified": self.stratified}
        draws = draw_step(self.order, step, self.batch_size, self.latent_shape, **options)
        for part in self.slices:
            yield draws[part]

    def starting_at(self, step: int) -> Iterator[StepDraws]:
        """The draws of every micro-batch from `step` on, without end."""
        return itertools.chain.from_iterable(map(self.micro_batches, itertools.count(step)))


class StepBatches:
    """A batch sampler: this process's [(item, view), ...] of each micro-batch from optimiser step `start` on.

    For a DataLoader over images (`batch_sampler=`), so that workers read ahead in the very order of the run. The view
    (see `StepDraws.views`) is 1 for a mirrored image and 0 for an upright one, unless there are several crops.

    Attributes:
        waiting: the draws whose pixels were asked for and have not arrived, oldest first.
    """

    def __init__(self, draws: RunDraws, *, start: int, flip: bool, crops: int = 1) -> None:
        self.draws, self.start, self.flip, self.crops = draws, start, flip, crops
        self.waiting: deque[StepDraws] = deque()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for draws in self.draws.starting_at(self.start):
            self.waiting.append(draws)
            views = draws.views(self.flip, self.crops)
            yield list(zip(draws.items.tolist(), views.tolist(), strict=True))


def read_ahead(
    dataset: Dataset, draws: RunDraws, *, start: int, flip: bool, crops: int = 1, num_workers: int = 0
) -> Iterator[tuple[Any, StepDraws]]:
    """Each micro-batch of `dataset` from optimiser step `start` on, with the draws that it was read for.

    `dataset` maps (item, view) to a sample; `num_workers` processes read ahead.
    """
    sampler = StepBatches(draws, start=start, flip=flip, crops=crops)
    workers: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_parent}
    loader = DataLoader(dataset, batch_sampler=sampler, **workers)  # which keeps the sampler's order
    return ((batch, sampler.waiting.popleft()) for batch in iter(loader))


def leave_signals_to_parent(worker: int) -> None:
    """`worker_init_fn` of a DataLoader: a signal to all processes of a run asks the parent to save, and needs it alive.

    Workers end when the parent does.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
