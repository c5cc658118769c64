"""From images to latents: the shards of a cache, and latents encoded when they are needed.

A shard of a cache is a pure function of (images, codec, options, shard number): the batches that are encoded together
are cut from the shard, not from the run. So any number of processes makes the same files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from iptv2_diffusion.data.draws import DataOrder, StepBatches, StepDraws, leave_signals_to_parent

if TYPE_CHECKING:
    from iptv2_diffusion.data.images import ImageTensors
    from iptv2_diffusion.latents import LatentCodec

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True)
class Encoding:
    """How images become cached latents.

    Attributes:
        flips: the mirror image of every view too.
        crops: views of an image: 1 is ADM's centre crop, more adds random crops.
        dtype: stored, "float16" or "float32".
        precision: computed in, "float32" or "bfloat16" (autocast: twice as fast, 0.4 % less exact).
    """

    flips: bool = True
    crops: int = 1
    dtype: str = "float16"
    precision: str = "float32"

    @property
    def views(self) -> int:
        """Latents stored for an image."""
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
    """The tensors and the metadata of the shard that holds images `part`; images that cannot be read are left out.

    mean and, where the posterior has one, std: (views, n, C, h, w); class_labels, items: (n,) int64. The metadata's
    "unreadable" is a JSON list of what was wrong with the others.
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
            batch = {"mean": mean.view(shape).to("cpu", stored), "class_labels": labels, "items": items}
            batches.append({**batch, "std": std.view(shape).to("cpu", stored)} if std.any() else batch)
    if not batches:
        latent = (codec.latent_channels, *codec.latent_size(*images.size))
        none = torch.empty(0, dtype=torch.long)
        batches = [{"mean": torch.empty(encoding.views, 0, *latent, dtype=stored), "class_labels": none, "items": none}]
    axis = {"mean": 1, "std": 1, "class_labels": 0, "items": 0}
    tensors = {name: torch.cat([b[name] for b in batches], dim=axis[name]).contiguous() for name in batches[0]}
    return tensors, {"unreadable": json.dumps(unreadable)}


def moments(codec: LatentCodec, pixels: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The codec's moments of (B, 3, H, W) pixels. Channels-last is a third faster on a CPU."""
    device = next(codec.vae.parameters()).device
    dtype = DTYPES[precision]
    pixels = pixels.to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return codec.encode_moments(pixels)


class EncodedLatents:
    """Latents encoded when they are needed: no disk, a new encoding of every image every epoch.

    Micro-batches must be asked for in the order of the run, beginning with optimiser step `start`: workers read ahead.

    Args:
        images, codec, num_workers: as for `cached_latents`. All images are decoded once beforehand, to find corrupt
            ones.
        encoding: its flips, crops and precision count.
        order, batch_size, slices: the run's data order, global batch and this process's parts of it.
        start: the first optimiser step.
    """

    def __init__(
        self,
        images: ImageTensors,
        codec: LatentCodec,
        *,
        order: DataOrder,
        batch_size: int,
        slices: Sequence[slice],
        start: int,
        encoding: Encoding = Encoding(),
        num_workers: int = 0,
    ) -> None:
        self._images, self._codec, self._precision = images, codec, encoding.precision
        sampler = StepBatches(order, batch_size, slices, start=start, flip=encoding.flips, crops=encoding.crops)
        single = _Single(images, images.valid_indices(), encoding.flips)
        workers = {"num_workers": num_workers, "worker_init_fn": leave_signals_to_parent}
        self._batches = iter(DataLoader(single, batch_sampler=sampler, **workers))

    def __len__(self) -> int:
        return len(self._images.valid_indices())

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Latents drawn from the posterior with `draws.posterior_noise`, and labels."""
        pixels, labels, items = next(self._batches)
        if not torch.equal(items, draws.items):
            raise RuntimeError("micro-batches were asked for in another order than the run's")
        mean, std = moments(self._codec, pixels, self._precision)
        if draws.posterior_noise is not None:
            mean = mean + std * draws.posterior_noise.to(mean.device)
        return mean, labels


class _Views(Dataset):
    """(views, 3, H, W) pixels of an image, its label and its number; a message if it is corrupt."""

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
    """One view of an image by (item, view); items count the readable images."""

    def __init__(self, images: ImageTensors, readable: Sequence[int], flips: bool) -> None:
        self.images, self.readable, self.flips = images, readable, flips

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        item, view = key
        crop, flip = divmod(view, 2) if self.flips else (view, 0)
        sample = self.images.get(self.readable[item], flip=bool(flip), crop=crop)
        return sample["pixel_values"], sample["class_labels"], item


def _collate(samples: list[tuple[Tensor, int, int] | str]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Pixels (views, b, 3, H, W), labels (b,) and items (b,) of the readable images, messages of the others."""
    errors = [sample for sample in samples if isinstance(sample, str)]
    good = [sample for sample in samples if not isinstance(sample, str)]
    if not good:
        return torch.empty(0), torch.empty(0), torch.empty(0), errors
    pixels, labels, items = zip(*good, strict=True)
    return torch.stack(pixels, dim=1), torch.tensor(labels), torch.tensor(items), errors
