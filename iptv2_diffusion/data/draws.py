"""Randomness without state: every random number of a training is a function of (seed, step, position in the batch).

* Data order: position i of the endless stream is item perm(seed, epoch)[i % N] of epoch i // N. Every epoch has each
  item once, for any number of processes. With weights, it has each item in proportion to its weight, rounded up or
  down at random.
* All other numbers of optimiser step n (flips, noise, timesteps, label drops) are drawn for the *whole* global batch
  from one CPU generator seeded with (seed, n). Each process and micro-batch takes its slice.

A resumed run therefore needs no random state, the loss curve does not depend on the number of processes, and gradient
accumulation equals the large batch. The cost is that each process draws the noise of the whole batch: about 1 ms for
64 latents of 16x16x4, 25 ms for 256 of 32x32x4.

`RunDraws` draws a step once. Sources that read ahead also draw ahead, and return each micro-batch together with its
pixels (`read_ahead`).
"""

from __future__ import annotations

import hashlib
import itertools
import math
import signal
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset


def derive_seed(seed: int, *parts: int | str) -> int:
    """Derive a 63-bit seed from the run's seed and a purpose, the same on every machine.

    The hash gives neighbouring steps or seeds unrelated streams (torch's CPU generator uses the low 32 bits).
    """
    text = "/".join(str(part) for part in (seed, *parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def generator_for(seed: int, *parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded by `derive_seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *parts))


class Order(ABC):
    """Interface of the order of the items."""

    seed: int

    @abstractmethod
    def items(self, start: int, count: int) -> Tensor:
        """Return the items (count,) int64 at positions start ... start + count - 1 of the endless stream."""


class DataOrder(Order):
    """The endless, shuffled, stateless stream of item numbers.

    Args:
        num_items: N, the size of an epoch.
        seed: seed of the run.
        weights: frequency of each item, (N,), not negative, up to a common factor (see `class_balanced_weights`); None
            for equal frequencies. An item is expected w N / sum(w) times an epoch. It comes this number of times,
            rounded up or down at random.
    """

    def __init__(self, num_items: int, seed: int, weights: Tensor | None = None) -> None:
        if num_items < 1:
            raise ValueError("the data set is empty; there is nothing to train on")
        self.num_items, self.seed = num_items, seed
        self._shares = None if weights is None else (weights.double() / weights.double().sum()).cumsum(0)
        self._epochs: dict[int, Tensor] = {}

    def permutation(self, epoch: int) -> Tensor:
        """Return the item numbers (N,) of an epoch. The last two epochs are cached."""
        if epoch not in self._epochs:
            generator = generator_for(self.seed, "order", epoch)
            order = torch.randperm(self.num_items, generator=generator)
            if self._shares is not None:  # systematic resampling: N equidistant points over the cumulative weights
                offset = torch.rand((), generator=generator, dtype=torch.float64)
                points = (torch.arange(self.num_items) + offset) / self.num_items
                order = torch.searchsorted(self._shares, points).clamp_(max=self.num_items - 1)[order]
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: order}
        return self._epochs[epoch]

    def items(self, start: int, count: int) -> Tensor:
        """Return the item numbers (count,) of positions start ... start + count - 1 of the stream."""
        pieces, end = [], start + count
        while start < end:
            epoch, offset = divmod(start, self.num_items)
            take = min(end - start, self.num_items - offset)
            pieces.append(self.permutation(epoch)[offset : offset + take])
            start += take
        return torch.cat(pieces)


def class_balanced_weights(labels: Tensor, balance: float) -> Tensor | None:
    """Return weights (N,) for `DataOrder` that draw a class of n images in proportion to n^(1 - balance).

    Args:
        labels: (N,) int64.
        balance: 0 keeps the frequencies of the data (and returns None), 1 makes all classes equally frequent.
    """
    return labels.bincount().double()[labels] ** -balance if balance else None


@dataclass(frozen=True)
class StepDraws:
    """Random numbers of one optimiser step. The first dimension of each is the global batch or a slice of it.

    Attributes:
        items: data items, int64.
        flips: whether to mirror the image, bool.
        timesteps: uniform numbers in [0, 1) for `DiffusionObjective.sample_timesteps`.
        label_drops: uniform numbers in [0, 1); a label is dropped where the number is below the drop probability.
        noise: standard normal diffusion noise, (B, C, H, W); None if the training needs none.
        posterior_noise: standard normal noise that samples the VAE's posterior; None for a deterministic VAE.
        crops: uniform numbers in [0, 1) that choose among the crops of an image.
    """

    items: Tensor
    flips: Tensor
    timesteps: Tensor
    label_drops: Tensor
    noise: Tensor | None
    posterior_noise: Tensor | None
    crops: Tensor

    def views(self, flips: bool, crops: int) -> Tensor:
        """Return the view of each image, int64. The order is crop 0 upright (and mirrored, with `flips`), crop 1 ..."""
        view = (self.crops * crops).long()
        return 2 * view + self.flips.long() if flips else view

    def __getitem__(self, part: slice) -> StepDraws:
        """Return the draws of a slice of the batch."""
        parts: list[Any] = [None if value is None else value[part] for value in vars(self).values()]
        return StepDraws(*parts)


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
    """Draw all random numbers of an optimiser step for the whole global batch.

    Args:
        order: order of the items, with the run's seed.
        step: optimiser step, counted from 0.
        batch_size: B.
        latent_shape: shape of the noise, (C, H, W).
        diffusion: whether to draw the diffusion noise. The other numbers do not depend on it.
        posterior: whether to draw the noise of the VAE's posterior.
        stratified: whether to draw one timestep number from each of B equal strata, in random order. Each is still
            uniform, but the mean loss of a small batch has a much smaller variance.
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
    """Advance the generator as `torch.randn(count)` does, without computing the normal numbers.

    For a count of 16 or more, torch uses one uniform number for each, and draws the last 16 again if the count is not a
    multiple of 16.
    """
    if count < 16:
        torch.randn(count, generator=generator)
    else:
        torch.rand(count + (16 if count % 16 else 0), generator=generator)


def own_slices(batch_size: int, num_processes: int, process: int, micro_batches: int = 1) -> list[slice]:
    """Return a process's parts of the global batch, one slice per micro-batch. All parts together cover it once."""
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
    """Random numbers of a run for one process: those of its micro-batches of every step.

    Attributes:
        order: order of the items, with the run's seed.
        batch_size: batch size B of an optimiser step, over all processes.
        latent_shape: shape of the noise, (C, H, W).
        slices: this process's parts of the global batch, one per micro-batch (see `own_slices`).
        diffusion, posterior, stratified: see `draw_step`.
    """

    order: Order
    batch_size: int
    latent_shape: Sequence[int]
    slices: Sequence[slice]
    diffusion: bool = True
    posterior: bool = True
    stratified: bool = True

    def micro_batches(self, step: int) -> Iterator[StepDraws]:
        """Return the draws of this process's micro-batches of a step."""
        options = {"diffusion": self.diffusion, "posterior": self.posterior, "stratified": self.stratified}
        draws = draw_step(self.order, step, self.batch_size, self.latent_shape, **options)
        for part in self.slices:
            yield draws[part]

    def starting_at(self, step: int) -> Iterator[StepDraws]:
        """Yield the draws of every micro-batch from `step` on, without end."""
        return itertools.chain.from_iterable(map(self.micro_batches, itertools.count(step)))


class StepBatches:
    """Batch sampler that yields this process's [(item, view), ...] of each micro-batch from optimiser step `start` on.

    As the `batch_sampler` of a DataLoader over images, it lets workers read ahead in the order of the run. The view
    (see `StepDraws.views`) is 1 for a mirrored image and 0 for an upright one, unless there are several crops.

    Attributes:
        waiting: draws whose pixels were requested and have not arrived, oldest first.
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
    """Yield each micro-batch of `dataset` from optimiser step `start` on, together with its draws.

    `dataset` maps (item, view) to a sample. `num_workers` processes read ahead.
    """
    sampler = StepBatches(draws, start=start, flip=flip, crops=crops)
    workers: dict[str, Any] = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_parent}
    loader = DataLoader(dataset, batch_sampler=sampler, **workers)  # keeps the sampler's order
    return ((batch, sampler.waiting.popleft()) for batch in iter(loader))


def leave_signals_to_parent(worker: int) -> None:
    """Ignore signals in a worker of a DataLoader (`worker_init_fn`): the parent handles them and needs its workers.

    Workers end when the parent ends.
    """
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
