"""Images that are read as a stream, from the Hub or from shards on any disk, without copies and without losses.

A stream has no random access. Each shard is read from start to end, and the order of the images is built from shards:

    lanes    Every epoch the shards are shuffled and distributed over L lanes. A lane is an endless stream of epochs and
             fills the same B / L positions of every batch of B. L depends only on shards and batch, so the stream is
             the same for any number of processes. Each process reads only the lanes of its positions. If lanes have
             different lengths, an epoch ends earlier in one than in another, but still has each image once.
    blocks   A lane is read in blocks of K images, which are shuffled. Image number c of the lane is in block c // K.

Image c of a lane is therefore a function of (seed, c), and the position of a run is its step. To resume without reading
the stream from its beginning, a checkpoint stores the start of each lane's block as the `state_dict` that `datasets`
has of the shard. (A shuffle buffer of `datasets` loses its contents and cannot be resumed.)
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

from iptv2_diffusion.data.draws import Order, RunDraws, StepDraws, generator_for
from iptv2_diffusion.data.image_files import DEFAULT_LIMITS, Limits
from iptv2_diffusion.data.image_tensors import decode_image, path_of, view_of
from iptv2_diffusion.data.latent_encoding import Encoding, LatentSource, expect_step, moments, sample_posterior
from iptv2_diffusion.messages import first_line

if TYPE_CHECKING:
    from iptv2_diffusion.latents import LatentCodec

MAX_LANES = 64  # more lanes do not mix better, and each is an open file
AHEAD = 2  # number of micro-batches that are read and decoded in advance
SHOWN = 5  # number of unreadable images that are reported each; of the others, every hundredth is reported


@dataclass(frozen=True)
class ImageStream:
    """A stream of images.

    Attributes:
        dataset: data set with "image" (undecoded) and, if labelled, "label", from `load_image_dataset(streaming=True)`.
        size: (height, width) of the decoded images.
        strict: whether to fail at an unreadable image instead of replacing it by the next image of its block.
        block: number of images that all lanes together hold and shuffle, K times L.
        limits: largest size of an image.
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
    """Order of positions in the stream instead of items of a data set: batch n has numbers nB ... nB + B - 1."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def items(self, start: int, count: int) -> Tensor:
        """Return the numbers themselves, (count,) int64."""
        return torch.arange(start, start + count)


class Lane:
    """An endless stream of undecoded images, block after block.

    Args:
        dataset: data set with all shards.
        number, lanes: number of this lane, and number of all lanes.
        seed: seed of the run.
        block_size: K.
        start: first block, and its entry in the `states` of an earlier lane; None for the beginning.
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
        self._next: int
        self._next, state = start or (0, {"epoch": 0, "shard": 0, "state": None})
        self.states: dict[int, dict[str, Any]] = {self._next: dict(state)}  # start of each block
        self._records = self._read(**state)
        self._block: list[Any] = []

    def block(self, number: int) -> list[Any]:
        """Return the shuffled images of a block: the block of the last request or a later one."""
        if number < self._next - 1:
            raise RuntimeError(f"lane {self._number}: block {number} was requested after block {self._next - 1}")
        while self._next <= number:
            records = list(itertools.islice(self._records, self.block_size))
            generator = generator_for(self._seed, "lane", self._number, "block", self._next)
            order = torch.randperm(len(records), generator=generator)
            self._block = [records[i] for i in order.tolist()]
            self._next += 1
            self.states[self._next] = self._position()
        return self._block

    def forget_before(self, block: int) -> None:
        """Drop the states of earlier blocks."""
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
    """Yield the records of a shard. Raises a ValueError for damage, such as a tar that is cut short."""
    try:
        yield from source
    except OSError:
        raise
    except Exception as error:  # tarfile, pyarrow and `datasets` raise several types
        raise ValueError(f"shard {shard} of the stream is damaged ({first_line(error)}); download it again") from error


def count_lanes(shards: int, batch_size: int) -> int:
    """Return L, the largest divisor of the batch that is at most the number of shards and `MAX_LANES`."""
    return max(n for n in range(1, min(shards, batch_size, MAX_LANES) + 1) if batch_size % n == 0)


class StreamedLatents(LatentSource):
    """Latents of a stream, whose images are read, decoded and encoded when they are needed.

    Steps must be requested in order, from step `start` on, because they are read ahead.

    Args:
        images: the stream.
        codec: codec on the device that encodes.
        draws: random numbers of the run, with a `StreamOrder`.
        start: first optimiser step.
        position: `join_positions` of the results of `position` at this step, from any number of processes. Without it,
            or with that of another layout, the stream is read from its beginning to `start`.
        encoding: settings of which flips, crops and precision are used.
        num_workers: number of threads that decode; 0 reads and decodes on request.
        num_classes: number of classes, above all labels; None without labels.
        say: function that prints a message of this process.
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
        self._share = draws.batch_size // self.lanes  # number of positions of a batch that a lane fills
        block_size = max(1, images.block // self.lanes)
        self._block_size = block_size
        self._layout = {"lanes": self.lanes, "share": self._share, "block_size": block_size, "shards": shards}
        if position is None or position["layout"] != self._layout:
            if start:
                say(f"no position of this stream was saved: reading it from the beginning to step {start}")
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
        self._served = (start, 0)  # the last requested step, and the number of skipped images before it
        self._wanted = draws.starting_at(start)
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None
        self._reader = ThreadPoolExecutor(1) if num_workers else None
        self._ahead: deque[Future] = deque()

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, StepDraws]]:
        """Yield latents, labels (0 if there are none) and draws of each micro-batch.

        Raises a RuntimeError for any step but the next, and a ValueError or OSError if the stream cannot be read.
        """
        self._next_step = expect_step(step, self._next_step)
        self._served = (step, self.skipped)
        for _ in self.draws.slices:
            pixels, labels, draws, errors = self._next()
            self._count(errors)
            mean, std = moments(self._codec, pixels, self._encoding.precision)
            yield sample_posterior(mean, std, draws), labels, draws

    def position(self, step: int) -> dict[str, Any]:
        """Return the positions of this process's lanes, as JSON, at the start of the last requested or next step."""
        states = self._reader.submit(self._states, step).result() if self._reader else self._states(step)
        at, before = self._served
        skipped = self._skipped_earlier, before if at == step else self.skipped
        return {"layout": self._layout, "lanes": states, "skipped": skipped}

    def _states(self, step: int) -> dict[str, Any]:
        """Return [block, its state] by lane. If a reader reads ahead, the reader must run this."""
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
        """Return pixels (b, 3, H, W), labels (b,) and draws of a micro-batch, and the errors of replaced images."""
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
        """Return an image of a block, or the first readable one after it. The result is the same in any run."""
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
                self._say(f"{error}: used the next image instead ({count} so far)")


def join_positions(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Join the positions of the processes to the position of the run, from which `StreamedLatents` resumes."""
    lanes = {number: state for part in parts for number, state in part["lanes"].items()}
    skipped = parts[0]["skipped"][0] + sum(part["skipped"][1] for part in parts)
    return {"layout": parts[0]["layout"], "lanes": lanes, "skipped": skipped}
