"""Where the training loop gets latents from: encoded once into a cache, or on the fly.

A cache folder holds, for every image with and without mirroring, the mean and the deviation of the VAE's posterior, so
that every epoch still draws its own latents:  x0 = mean + deviation * noise.

    CACHE_DIR/<fingerprint>/
        index.json              what it was made from, image count, latent shape, size of every shard
        shard-00000.safetensors mean, std (views, n, C, h, w) in float16 or float32; class_labels, items (n,) int64

`std` is absent for a VAE without spread. The fingerprint covers codec, data set, image size, mirroring and dtype: a
cache of anything else is never used. It is written to a temporary folder and renamed, so it is whole or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from iptv2_diffusion.data.sampling import DataOrder, StepBatches, StepDraws, derive_seed

if TYPE_CHECKING:
    from iptv2_diffusion.data.images import ImageTensors
    from iptv2_diffusion.latents import LatentCodec

_FORMAT = 1
_SHARD_ITEMS = 32_768
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class LatentSource(Protocol):
    """Latents and labels for the draws of a micro-batch."""

    def __len__(self) -> int:
        """Number of images."""

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) float32 in model units, labels (B,) int64; on the CPU or the codec's device."""


# --------------------------------------------------------------------------------------------------------------------
# Cached


class LatentCache:
    """A cache that is complete on the disk; shards are memory-mapped, so processes of one machine share the memory.

    Attributes:
        latent_shape: (C, h, w).
        has_spread: whether the posterior has a deviation (else `StepDraws.posterior_noise` may be None).
        class_labels: (N,) int64.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        self._shards = [load_file(self.folder / name) for name in index["shards"]]
        self.latent_shape: tuple[int, int, int] = tuple(index["latent_shape"])
        self.views: int = index["views"]
        self.has_spread: bool = "std" in self._shards[0]
        self.class_labels = torch.cat([shard["class_labels"] for shard in self._shards])
        self._starts = torch.tensor([0] + [len(shard["class_labels"]) for shard in self._shards]).cumsum(0)

    def __len__(self) -> int:
        return len(self.class_labels)

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Latents drawn from the posterior with `draws.posterior_noise` (its mean where that is None), and labels."""
        views = draws.flips.long() if self.views == 2 else torch.zeros_like(draws.items)
        latents = self._take("mean", draws.items, views)
        if self.has_spread and draws.posterior_noise is not None:
            latents = latents + self._take("std", draws.items, views) * draws.posterior_noise
        return latents, self.class_labels[draws.items]

    def _take(self, name: str, items: Tensor, views: Tensor) -> Tensor:
        """Rows (B, C, h, w) float32 of a stored tensor."""
        if len(self._shards) == 1:
            return self._shards[0][name][views, items].float()
        out = torch.empty(len(items), *self.latent_shape)
        shard_of = torch.bucketize(items, self._starts, right=True) - 1
        for number in shard_of.unique().tolist():
            chosen = shard_of == number
            local = items[chosen] - self._starts[number]
            out[chosen] = self._shards[number][name][views[chosen], local].float()
        return out


def cached_latents(
    images: ImageTensors,
    codec: LatentCodec,
    cache_dir: str | Path,
    *,
    flips: bool = True,
    dtype: str = "float16",
    precision: str = "float32",
    batch_size: int = 64,
    num_workers: int = 0,
    builder: bool = True,
    say: Callable[[str], None] = print,
) -> LatentCache:
    """Open the cache of these images under this codec, making it first if there is none.

    Args:
        images: the images; corrupt ones are left out (or raise, as `images` was told).
        codec: on the device that is to encode.
        cache_dir: folder of caches, one sub-folder each.
        flips: store the mirrored images too.
        dtype: stored, "float16" or "float32".
        precision: computed in, "float32" or "bfloat16" (autocast: twice as fast, 0.4 % less exact).
        batch_size: images encoded at a time.
        num_workers: processes that decode images.
        builder: whether this process makes the cache; the others of a machine wait for it.
        say: prints a message.
    """
    description = {
        "format": _FORMAT,
        "codec": codec.fingerprint(),
        "dataset": dataset_fingerprint(images),
        "size": list(images.size),
        "flips": flips,
        "dtype": dtype,
        "precision": precision,
    }
    key = f"{derive_seed(0, json.dumps(description, sort_keys=True)):016x}"
    folder = Path(cache_dir).expanduser() / key
    if builder and not _is_whole(folder):
        started = time.perf_counter()
        count, failures = _build(folder, images, codec, description, batch_size=batch_size, num_workers=num_workers)
        if failures:
            shown = "; ".join(failures[:5]) + ("; ..." if len(failures) > 5 else "")
            say(f"left out {len(failures)} of {len(images)} images that cannot be read: {shown}")
        seconds = time.perf_counter() - started
        size = sum(path.stat().st_size for path in folder.iterdir())
        say(
            f"encoded {count} images{' and their mirror images' if flips else ''} in {seconds:.0f} s "
            f"({count * (1 + flips) / seconds:.0f} images/s, {size / count:.0f} bytes an image) into {folder}"
        )
    while not _is_whole(folder):  # not a barrier: those time out, and a large set takes hours
        time.sleep(0.2)
    return LatentCache(folder)


def dataset_fingerprint(images: ImageTensors) -> str:
    """16 hex digits that change with the images: file names, sizes and times, or `datasets`' own fingerprint.

    (`datasets` knows what a parquet or a Hub data set was made from, but of loose files only the names.)
    """
    dataset = images.dataset
    digest = hashlib.sha256(f"{len(dataset)} {images.labels}".encode())
    if dataset[0]["image"]["bytes"] is not None:
        digest.update(dataset._fingerprint.encode())
    else:
        for record in dataset.select_columns("image")[:]["image"]:
            state = Path(record["path"]).stat()
            digest.update(f"{record['path']} {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    """Whether index.json exists (the rename put it there) and every shard has the size that it says."""
    try:
        shards: dict[str, int] = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
        return all((folder / name).stat().st_size == size for name, size in shards.items())
    except (OSError, ValueError, KeyError):
        return False


def _build(
    folder: Path,
    images: ImageTensors,
    codec: LatentCodec,
    description: dict[str, Any],
    *,
    batch_size: int,
    num_workers: int,
) -> tuple[int, list[str]]:
    """Make the cache; returns how many images are in it, and what was wrong with the others."""
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    views, failures = 1 + description["flips"], []
    try:
        loader = DataLoader(_Views(images, views), batch_size=batch_size, num_workers=num_workers, collate_fn=_collate)
        encoded = _encode_all(loader, codec, description["dtype"], description["precision"], failures)
        shards, count, shape = {}, 0, (0, 0, 0)
        for tensors in _shards(encoded):
            path = temporary / f"shard-{len(shards):05d}.safetensors"
            save_file(tensors, path)
            shards[path.name] = path.stat().st_size
            count += len(tensors["items"])
            shape = tuple(tensors["mean"].shape[2:])
        if count == 0:
            raise ValueError(f"none of the {len(images)} images can be read; the first: {failures[0]}")
        index = {**description, "views": views, "count": count, "latent_shape": shape, "shards": shards}
        (temporary / "index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, or one of another run that was as quick
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return count, failures


def _encode_all(
    loader: DataLoader, codec: LatentCodec, dtype: str, precision: str, failures: list[str]
) -> Iterator[dict[str, Tensor]]:
    """Batches of mean, std (views, b, C, h, w), class_labels and items (b,), in the order of the images."""
    stored = _DTYPES[dtype]
    with tqdm(total=len(loader.dataset), desc="encoding images", unit="image") as bar:
        for pixels, labels, items, errors in loader:
            bar.update(len(items) + len(errors))
            failures.extend(errors)
            if not len(items):
                continue
            mean, std = _moments(codec, pixels.flatten(0, 1), precision)
            shape = (len(pixels), len(items), *mean.shape[1:])
            batch = {"mean": mean.view(shape).to("cpu", stored), "class_labels": labels, "items": items}
            if std.any():
                batch["std"] = std.view(shape).to("cpu", stored)
            yield batch


def _moments(codec: LatentCodec, pixels: Tensor, precision: str) -> tuple[Tensor, Tensor]:
    """The codec's moments of (B, 3, H, W) pixels. Channels-last is a third faster on a CPU."""
    device = next(codec.vae.parameters()).device
    dtype = _DTYPES[precision]
    pixels = pixels.to(device, memory_format=torch.channels_last)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
        return codec.encode_moments(pixels)


def _shards(batches: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Batches joined into shards of at least `_SHARD_ITEMS` images (the last may be smaller)."""
    held: list[dict[str, Tensor]] = []
    for batch in batches:
        held.append(batch)
        if sum(len(b["items"]) for b in held) >= _SHARD_ITEMS:
            yield _join(held)
            held = []
    if held:
        yield _join(held)


def _join(batches: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    axis = {"mean": 1, "std": 1, "class_labels": 0, "items": 0}
    return {name: torch.cat([b[name] for b in batches], dim=axis[name]).contiguous() for name in batches[0]}


# --------------------------------------------------------------------------------------------------------------------
# On the fly


class EncodedLatents:
    """Latents encoded when they are needed: no disk, a new encoding of every image every epoch.

    Micro-batches must be asked for in the order of the run, beginning with optimiser step `start`: workers read ahead.

    Args:
        images, codec, precision, num_workers: as for `cached_latents`. All images are decoded once beforehand, to find
            corrupt ones.
        order, batch_size, slices: the run's data order, global batch and this process's parts of it.
        start: the first optimiser step.
        flips: mirror where the draws say so.
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
        flips: bool = True,
        precision: str = "float32",
        num_workers: int = 0,
    ) -> None:
        self._images, self._codec, self._precision = images, codec, precision
        sampler = StepBatches(order, batch_size, slices, start=start, flip=flips)
        loader = DataLoader(_Single(images, images.valid_indices()), batch_sampler=sampler, num_workers=num_workers)
        self._batches = iter(loader)

    def __len__(self) -> int:
        return len(self._images.valid_indices())

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Latents drawn from the posterior with `draws.posterior_noise`, and labels."""
        pixels, labels, items = next(self._batches)
        if not torch.equal(items, draws.items):
            raise RuntimeError("micro-batches were asked for in another order than the run's")
        mean, std = _moments(self._codec, pixels, self._precision)
        if draws.posterior_noise is not None:
            mean = mean + std * draws.posterior_noise.to(mean.device)
        return mean, labels


class _Views(Dataset):
    """(views, 3, H, W) pixels of an image and its mirror image, its label and its number; a message if corrupt."""

    def __init__(self, images: ImageTensors, views: int) -> None:
        self.images, self.views = images, views

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, int, int] | str:
        try:
            sample = self.images.get(i)
        except ValueError as error:
            if self.images.strict:
                raise
            return str(error)
        pixels = sample["pixel_values"]
        both = [pixels] if self.views == 1 else [pixels, pixels.flip(-1)]
        return torch.stack(both), sample["class_labels"], i


class _Single(Dataset):
    """An image, mirrored or not, by (item, flip); items count the readable images."""

    def __init__(self, images: ImageTensors, readable: Sequence[int]) -> None:
        self.images, self.readable = images, readable

    def __getitem__(self, key: tuple[int, bool]) -> tuple[Tensor, int, int]:
        item, flip = key
        sample = self.images.get(self.readable[item], flip=flip)
        return sample["pixel_values"], sample["class_labels"], item


def _collate(samples: list[tuple[Tensor, int, int] | str]) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Pixels (views, b, 3, H, W), labels (b,) and items (b,) of the readable images, messages of the others."""
    errors = [sample for sample in samples if isinstance(sample, str)]
    good = [sample for sample in samples if not isinstance(sample, str)]
    if not good:
        return torch.empty(0), torch.empty(0), torch.empty(0), errors
    pixels, labels, items = zip(*good, strict=True)
    return torch.stack(pixels, dim=1), torch.tensor(labels), torch.tensor(items), errors
