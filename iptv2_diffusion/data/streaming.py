"""Images that are read as a stream, from the Hub or from shards on any disk: nothing is copied, nothing is skipped.

A stream has no random access, so the order is made of what it has: shards, each of them read from its start to its end.

    lanes    Every epoch the shards are shuffled and dealt out to L lanes. A lane is an endless stream, one epoch after
             the other, and fills the same B / L places of every batch of B. L depends on shards and batch alone, so
             the stream is the same for any number of processes; each reads only the lanes its places belong to. Where
             lanes are of unequal length an epoch ends earlier in one than in another, but still holds each image once.
    blocks   A lane is read in blocks of K images, which are shuffled. Image number c of the lane is in block c // K.

So image c of a lane is a pure function of (seed, c), and the position of a run is its step. To get there without
reading all that came before, a checkpoint holds for each lane where its block begins: `datasets`' own `state_dict` of
the shard (a shuffle buffer of `datasets` could not be resumed: it is lost with what it holds).
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets
import torch
from torch import Tensor

from iptv2_diffusion.data.archives import first_line
from iptv2_diffusion.data.draws import Order, RunDraws, StepDraws, generator_for
from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits
from iptv2_diffusion.data.image_tensors import decode_image, path_of, view_of
from iptv2_diffusion.data.latent_encoding import Encoding, LatentSource, expect_step, moments, sample_posterior

if TYPE_CHECKING:
    from iptv2_diffusion.latents import LatentCodec

MAX_LANES = 64  # more mix no better, and each is an open file
AHEAD = 2  # micro-batches that are read and decoded before they are asked for
SHOWN = 5  # unreadable images that are named; of the others only every hundredth is told


@dataclass(frozen=True)
class ImageStream:
    """What is streamed.

    Attributes:
        dataset: with "image" (undecoded) and perhaps "label", from `load_image_dataset(streaming=True)`.
        size: (height, width) of the images to be.
        strict: fail at an unreadable image instead of replacing it by the next of its block.
        block: K times L, images that all lanes together hold and shuffle.
        limits: how large an image may be.
    """

    dataset: datasets.IterableDataset
    size: tuple[int, int]
    strict: bool = False
    block: int = 4096
    limits: Limits = DEFAULT_LIMITS

    @property
    def labels(self) -> list[int]:
        """Empty: a stream's labels are known as they come."""
        return []


class StreamOrder(Order):
    """Places in the stream instead of items of a data set: batch n holds numbers nB ... nB + B - 1."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def items(self, start: int, count: int) -> Tensor:
        """The numbers themselves, (count,) int64."""
        return torch.arange(start, start + count)


class Lane:
    """An endless stream of undecoded images, block after block.

    Args:
        dataset: with all shards.
        number, lanes: this is lane `number` of `lanes`.
        seed: of the run.
        block_size: K.
        start: block to begin with, and its entry in `states` of another such lane; None for the beginning.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        number: int,
        lanes: int,
        *,
        seed: int,
        block_size: int,
        start: Sequence[Any] | None = None,
    ) -> None:
        self._dataset, self._number, self._lanes, self._seed = dataset, number, lanes, seed
        self.block_size = block_size
        self._next, state = start or (0, {"epoch": 0, "shard": 0, "state": None})
        self.states: dict[int, dict[str, Any]] = {self._next: dict(state)}  # where each block begins
        self._records = self._read(**state)
        self._block: list[Any] = []

    def block(self, number: int) -> list[Any]:
        """The shuffled images of a block: the one asked for last, or a later one."""
        if number < self._next - 1:
            raise RuntimeError(f"lane {self._number} was asked for block {number} after block {self._next - 1}")
        while self._next <= number:
            records = list(itertools.islice(self._records, self.block_size))
            generator = generator_for(self._seed, "lane", self._number, "block", self._next)
            order = torch.randperm(len(records), generator=generator)
            self._block = [records[i] for i in order.tolist()]
            self._next += 1
            self.states[self._next] = self._position()
        return self._block

    def forget_before(self, block: int) -> None:
        """Drop the states of blocks that are past."""
        self.states = {number: state for number, state in self.states.items() if number >= block}

    def _read(self, epoch: int, shard: int, state: Mapping[str, Any] | None) -> Iterator[Any]:
        shards = self._dataset.num_shards
        while True:
            seen = False
            order = torch.randperm(shards, generator=generator_for(self._seed, "shards", epoch)).tolist()
            own = order[self._number :: self._lanes]
            for index in range(shard, len(own)):
                source = self._dataset.shard(num_shards=shards, index=own[index])
                if state is not None:
                    source.load_state_dict(dict(state))
                self._at, seen, state = (epoch, index, source), seen or state is not None, None
                for record in _readable(source, own[index]):
                    seen = True
                    yield record
            if not seen:
                raise ValueError(f"{len(own)} of the stream's {shards} shards hold no image")
            epoch, shard = epoch + 1, 0

    def _position(self) -> dict[str, Any]:
        epoch, index, source = self._at
        return {"epoch": epoch, "shard": index, "state": source.state_dict()}


def _readable(source: datasets.IterableDataset, shard: int) -> Iterator[Any]:
    """The records of a shard; damage, as of a tar that is cut short, is a ValueError."""
    try:
        yield from source
    except OSError:
        raise
    except Exception as error:  # of tarfile, pyarrow and `datasets`
        raise ValueError(f"shard {shard} of the stream is damaged ({first_line(error)}); download it again") from error


def count_lanes(shards: int, batch_size: int) -> int:
    """L: the largest divisor of the batch that is not above the number of shards (nor above `MAX_LANES`)."""
    return max(n for n in range(1, min(shards, batch_size, MAX_LANES) + 1) if batch_size % n == 0)


class StreamedLatents(LatentSource):
    """Latents of a stream: images are read, decoded and encoded when they are needed.

    Steps must be asked for in the order of the run, beginning with step `start`; they are read ahead.

    Args:
        images: the stream.
        codec: on the device that encodes.
        draws: of the run, in the order of a `StreamOrder`.
        start: the first optimiser step.
        position: `join_positions` of what `position` gave at that step, in whatever number of processes. Without it, or
            with that of another layout, the stream is read through up to `start`.
        encoding: its flips, crops and precision count.
        num_workers: threads that decode; 0 reads and decodes when asked.
        num_classes: labels must be below this; None: unlabelled.
        say: prints a message of this process.
    """

    def __init__(
        self,
        images: ImageStream,
        codec: LatentCodec,
        draws: RunDraws,
        *,
        start: int,
        position: Mapping[str, Any] | None = None,
        encoding: Encoding = Encoding(),  # noqa: B008  (frozen)
        num_workers: int = 0,
        num_classes: int | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        super().__init__(draws)
        self._images, self._codec, self._encoding, self._say = images, codec, encoding, say
        self._batch_size, self._num_classes = draws.batch_size, num_classes
        shards = images.dataset.num_shards
        self.lanes = count_lanes(shards, draws.batch_size)
        self._share = draws.batch_size // self.lanes  # places of a batch that a lane fills
        block_size = max(1, images.block // self.lanes)
        self._block_size = block_size
        self._layout = {"lanes": self.lanes, "share": self._share, "block_size": block_size, "shards": shards}
        if position is None or position["layout"] != self._layout:
            if start:
                say(f"no position of this stream was saved: reading all that came before step {start}")
            position = {"lanes": {}, "skipped": 0}
        own = {place // self._share for part in draws.slices for place in range(part.start, part.stop)}
        self._lanes = {
            number: Lane(
                images.dataset,
                number,
                self.lanes,
                seed=draws.order.seed,
                block_size=block_size,
                start=position["lanes"].get(str(number)),
            )
            for number in sorted(own)
        }
        self._skipped_earlier: int = position["skipped"]
        self.skipped = 0  # unreadable images of this process since `start`
        self._next_step = start
        self._served = (start, 0)  # the step asked for last, and how many were skipped before it
        self._wanted = draws.starting_at(start)
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None
        self._reader = ThreadPoolExecutor(1) if num_workers else None
        self._ahead: deque[Future] = deque()

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, StepDraws]]:
        """Latents drawn from the posterior, labels (0 where there are none) and draws.

        Raises RuntimeError for any step but the next, ValueError or OSError for what cannot be read at all.
        """
        self._next_step = expect_step(step, self._next_step)
        self._served = (step, self.skipped)
        for _ in self.draws.slices:
            pixels, labels, draws, errors = self._next()
            self._count(errors)
            mean, std = moments(self._codec, pixels, self._encoding.precision)
            yield sample_posterior(mean, std, draws), labels, draws

    def position(self, step: int) -> dict[str, Any]:
        """Where this process's lanes are at the start of `step`, which was asked for last or comes next (as JSON)."""
        states = self._reader.submit(self._states, step).result() if self._reader else self._states(step)
        at, before = self._served
        skipped = self._skipped_earlier, before if at == step else self.skipped
        return {"layout": self._layout, "lanes": states, "skipped": skipped}

    def _states(self, step: int) -> dict[str, Any]:
        """[block, its state] by lane. Where a reader reads ahead, this is to be run by it."""
        block, states = self._block_of(step), {}
        for number, lane in self._lanes.items():
            if block not in lane.states:
                lane.block(block - 1)
            states[str(number)] = [block, lane.states[block]]
        return states

    # ----------------------------------------------------------------------------------------------------------------

    def _block_of(self, step: int) -> int:
        return step * self._share // self._block_size

    def _next(self) -> tuple[Tensor, Tensor, StepDraws, list[str]]:
        if self._reader is None:
            return self._load(next(self._wanted))
        while len(self._ahead) <= AHEAD:
            self._ahead.append(self._reader.submit(self._load, next(self._wanted)))
        return self._ahead.popleft().result()

    def _load(self, draws: StepDraws) -> tuple[Tensor, Tensor, StepDraws, list[str]]:
        """Pixels (b, 3, H, W) and labels (b,) of a micro-batch, its draws, what was wrong with replaced images."""
        views = draws.views(self._encoding.flips, self._encoding.crops)
        jobs = []
        for lane in self._lanes.values():
            lane.forget_before(self._block_of(self._served[0]))
        for item, view in zip(draws.items.tolist(), views.tolist(), strict=True):
            step, place = divmod(item, self._batch_size)
            block, first = divmod(step * self._share + place % self._share, self._block_size)
            jobs.append((self._lanes[place // self._share].block(block), first, item, view))
        done = list((self._pool.map if self._pool else map)(self._decode, jobs))
        pixels, labels, errors = zip(*done, strict=True)
        return torch.stack(pixels), torch.tensor(labels), draws, [e for some in errors for e in some]

    def _decode(self, job: tuple[list[Any], int, int, int]) -> tuple[Tensor, int, list[str]]:
        """An image of a block; the first of those after it that can be read (the same in any run) if it cannot."""
        records, first, item, view = job
        crop, flip = divmod(view, 2) if self._encoding.flips else (view, 0)
        errors: list[str] = []
        for record in records[first:] + records[:first]:
            try:
                name = path_of(record["image"]) or f"image {item} of the stream"
                image = decode_image(record["image"], name, self._images.limits)
            except ValueError as error:
                if self._images.strict:
                    raise
                errors.append(str(error))
                continue
            return view_of(image, self._images.size, item, bool(flip), crop), self._label(record), errors
        raise ValueError(f"none of {len(records)} images in a row can be read; the first: {errors[0]}")

    def _label(self, record: Mapping[str, Any]) -> int:
        label = record.get("label", 0)
        if self._num_classes is not None and (label is None or not 0 <= label < self._num_classes):
            raise ValueError(f"{path_of(record['image'])}: label {label}; labels are 0 to {self._num_classes - 1}")
        return label

    def _count(self, errors: Sequence[str]) -> None:
        for error in errors:
            self.skipped += 1
            count = self._skipped_earlier + self.skipped
            if count <= SHOWN or count % 100 == 0:
                self._say(f"{error}: the next one was taken instead ({count} so far)")


def join_positions(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The position of a run, from those of its processes: what `StreamedLatents` goes on from."""
    lanes = {number: state for part in parts for number, state in part["lanes"].items()}
    skipped = parts[0]["skipped"][0] + sum(part["skipped"][1] for part in parts)
    return {"layout": parts[0]["layout"], "lanes": lanes, "skipped": skipped}
