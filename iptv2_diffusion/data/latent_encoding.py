"""Encoding of images to latents, as shards of a cache or when they are needed.

A shard of a cache is a function of (images, codec, options, shard number), because batches are cut from the shard and
not from the run. Any number of processes therefore writes the same files.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iptv2_diffusion.data.draws import DataOrder, RunDraws, StepDraws, read_ahead

if TYPE_CHECKING:
    from iptv2_diffusion.data.images import ImageTensors
    from iptv2_diffusion.latents import LatentCodec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Encoding:
    """Settings of the encoding of images to cached latents.

    Attributes:
        flips: whether to store the mirror image of every view too.
        crops: number of crops of an image. 1 is ADM's centre crop, more adds random crops.
        dtype: dtype on disk, "float16" or "float32".
        precision: precision of the encoder, "float32" or "bfloat16" (autocast, twice as fast and 0.4 % less exact).
    """

    flips: bool = True
    crops: int = 1
    dtype: str = "float16"
    precision: str = "float32"

    @property
    def views(self) -> int:
        """Number of latents per image."""
        return self.crops * (2 if self.flips else 1)


def encode_shard(
    images: ImageTensors,
    codec: LatentCodec,
    encoding: Encoding,
    part: range,
    *,
    batch_size: int,
    num_workers: int = 0,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of the shard of images `part`, without images that cannot be read.

    The tensors are mean and, unless the VAE is deterministic, std, (views, n, C, h, w), and class_labels and items,
    (n,) int64. "unreadable" in the metadata is a JSON list of the errors of the other images.
    """
    loader = DataLoader(
        _Views(images, encoding, part), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate
    )
    stored, batches, unreadable = DTYPES[encoding.dtype], [], []
    for pixels, labels, items, errors in loader:
        unreadable.extend(errors)
        if len(items):
            mean, std = moments(codec, pixels.flatten(0, 1), encoding.precision)
            shape = (len(pixels), len(items), *mean.shape[1:])
            check_finite(mean.to(stored), std.to(stored), items, encoding)
            batch = {"mean": mean.view(shape).to("cpu", stored), "class_labels": labels, "items": items}
            batches.append({**batch, "std": std.view(shape).to("cpu", stored)} if std.any() else batch)
    if not batches:
        latent = (codec.latent_channels, *codec.latent_size(*images.size))
        none = torch.empty(0, dtype=torch.long)
        batches = [{"mean": torch.empty(encoding.views, 0, *latent, dtype=stored), "class_labels": none, "items": none}]
    axis = {"mean": 1, "std": 1, "class_labels": 0, "items": 0}
    tensors = {name: torch.cat([b[name] for b in batches], dim=axis[name]).contiguous() for name in batches[0]}
    return tensors, {"unreadable": json.dumps(unreadable)}


def check_finite(mean: Tensor, std: Tensor, items: Tensor, encoding: Encoding) -> None:
    """Raise a ValueError for latents that are NaN or infinite, which would affect every epoch."""
    if not (mean.isfinite().all() and std.isfinite().all()):
        raise ValueError(
            f"latents of images {int(items[0])} to {int(items[-1])} are NaN or infinite, computed in "
            f"{encoding.precision} and stored in {encoding.dtype}; use --encode_precision float32 --cache_dtype "
            "float32, or another VAE"
        )


def moments(codec: LatentCodec, pixels: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """Return the codec's moments of pixels (B, 3, H, W). Channels-last is a third faster on a CPU."""
    device = next(codec.vae.parameters()).device
    dtype = DTYPES[precision]
    pixels = pixels.to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return codec.encode_moments(pixels)


class LatentSource(ABC):
    """Source of the latents of a run. It returns each micro-batch together with its draws.

    Attributes:
        draws: random numbers of the run, which include the order of the images.
    """

    def __init__(self, draws: RunDraws) -> None:
        self.draws = draws

    @property
    def images(self) -> int | None:
        """Number of images; None for a stream."""
        return self.draws.order.num_items if isinstance(self.draws.order, DataOrder) else None

    @abstractmethod
    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, StepDraws]]:
        """Yield latents (b, C, h, w) float32 in model units, labels (b,) int64 and draws of each micro-batch of a step.

        They are on the CPU or the codec's device. Sources that read ahead accept steps only in order.
        """

    def position(self, step: int) -> Mapping[str, Any] | None:
        """Return this process's position in the data at the start of `step`, as JSON; None if `step` suffices."""
        return None


class EncodedLatents(LatentSource):
    """Latents that are encoded when they are needed, in every epoch, without using the disk.

    Steps must be requested in order, from optimiser step `start` on, because workers read ahead.

    Args:
        images, codec, num_workers: see `cached_latents`. All images are first decoded once to find corrupt ones.
        draws: random numbers of the run.
        start: first optimiser step.
        encoding: settings of which flips, crops and precision are used.
    """

    def __init__(
        self,
        images: ImageTensors,
        codec: LatentCodec,
        draws: RunDraws,
        *,
        start: int,
        encoding: Encoding = Encoding(),
        num_workers: int = 0,
    ) -> None:
        super().__init__(draws)
        self._codec, self._precision, self._next_step = codec, encoding.precision, start
        single = _Single(images, images.valid_indices(), encoding.flips)
        views: dict[str, Any] = {"flip": encoding.flips, "crops": encoding.crops}
        self._pixels = read_ahead(single, draws, start=start, num_workers=num_workers, **views)

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, StepDraws]]:
        """Yield latents, labels and draws of each micro-batch. Raises a RuntimeError for any step but the next."""
        self._next_step = expect_step(step, self._next_step)
        for _ in self.draws.slices:
            (pixels, labels), draws = next(self._pixels)
            yield sample_posterior(*moments(self._codec, pixels, self._precision), draws), labels, draws


def expect_step(step: int, expected: int) -> int:
    """Return the step after `step`. Raises a RuntimeError if `step` is not the `expected` one."""
    if step != expected:
        raise RuntimeError(f"step {step} was requested out of order: the next step is {expected}")
    return step + 1


def sample_posterior(mean: Tensor, std: Tensor, draws: StepDraws) -> Tensor:
    """Return mean + std * `draws.posterior_noise`, or the mean if the noise is None."""
    return mean if draws.posterior_noise is None else mean + std * draws.posterior_noise.to(mean.device)


class _Views(Dataset):
    """Return the pixels (views, 3, H, W) of an image, its label and its number, or a message if it is corrupt."""

    def __init__(self, images: ImageTensors, encoding: Encoding, part: range) -> None:
        self.images, self.encoding, self.part = images, encoding, part

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int] | str:
        number = self.part[i]
        try:
            samples = [self.images.get(number, crop=crop) for crop in range(self.encoding.crops)]
        except ValueError as error:
            if self.images.strict:
                raise
            return str(error)
        return torch.stack(list(self._forms(samples))), samples[0]["class_labels"], number

    def _forms(self, samples: Sequence[dict[str, Tensor]]) -> Iterator[Tensor]:
        for sample in samples:
            yield sample["pixel_values"]
            if self.encoding.flips:
                yield sample["pixel_values"].flip(-1)


class _Single(Dataset):
    """Map (item, view) to the pixels and the label of one view of an image. Items count the readable images."""

    def __init__(self, images: ImageTensors, readable: Sequence[int], flips: bool) -> None:
        self.images, self.readable, self.flips = images, readable, flips

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        item, view = key
        crop, flip = divmod(view, 2) if self.flips else (view, 0)
        sample = self.images.get(self.readable[item], flip=bool(flip), crop=crop)
        return sample["pixel_values"], sample["class_labels"]


def _collate(samples: list[tuple[Tensor, int, int] | str]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Return pixels (views, b, 3, H, W), labels (b,) and items (b,) of readable images, and messages of the others."""
    errors = [sample for sample in samples if isinstance(sample, str)]
    good = [sample for sample in samples if not isinstance(sample, str)]
    if not good:
        return torch.empty(0), torch.empty(0), torch.empty(0), errors
    pixels, labels, items = zip(*good, strict=True)
    return torch.stack(pixels, dim=1), torch.tensor(labels), torch.tensor(items), errors
