"""Latents encoded once: a folder of shards that any number of processes make together, the same for any number.

A cache holds, for every view of every image (see `Encoding`), the mean and the deviation of the VAE's posterior, so
that every epoch still draws its own latents:  x0 = mean + deviation * noise.

    CACHE_DIR/<fingerprint>/
        shard-00000.safetensors images 0 ... 2047: mean, std (views, n, C, h, w); class_labels, items (n,) int64
        index.json              what it was made from, image count, latent shape, size of every shard; written last

`std` is absent for a VAE without spread. The fingerprint covers codec, data set, image size, views and dtype: a cache
of anything else is never used. A shard gets its name when it is whole, so a killed run goes on with the missing ones;
the cache counts once index.json is there and every shard has the size that it says.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from iptv2_diffusion.data.archives import file_of
from iptv2_diffusion.data.draws import RunDraws, StepDraws, derive_seed
from iptv2_diffusion.data.latent_encoding import Encoding, LatentSource, encode_shard
from iptv2_diffusion.files import atomic, is_left_behind, write_text

if TYPE_CHECKING:
    from iptv2_diffusion.data.images import ImageTensors
    from iptv2_diffusion.latents import LatentCodec

_FORMAT = 2


class StoredLatents(ABC):
    """Latents on the disk, any of them at any time.

    Attributes:
        latent_shape: (C, h, w).
        has_spread: whether the posterior has a deviation (else `StepDraws.posterior_noise` may be None).
        class_labels: (N,) int64.
    """

    latent_shape: tuple[int, int, int]
    has_spread: bool
    class_labels: Tensor

    def __len__(self) -> int:
        return len(self.class_labels)

    @abstractmethod
    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Latents (B, C, h, w) float32 in model units, as drawn, and labels (B,) int64."""

    @abstractmethod
    def means(self, items: Tensor) -> Tensor:
        """Latents (B, C, h, w) float32 of items (B,), upright and without the posterior's noise."""

    def deviation(self, count: int = 256) -> float:
        """Standard deviation of the latents, over at most `count` items spread over all; about 1 in model units."""
        items = torch.linspace(0, len(self) - 1, min(count, len(self))).long()
        return self.means(items).std().item()


class LatentCache(StoredLatents):
    """A cache that is complete on the disk; shards are memory-mapped, so processes of one machine share the memory.

    Attributes:
        unreadable: what was wrong with the images that were left out.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = json.loads((self.folder / "index.json").read_text(encoding="utf-8"))
        self._shards = [load_file(self.folder / name) for name in index["shards"]]
        self.unreadable: list[str] = [text for name in index["shards"] for text in _unreadable(self.folder / name)]
        self.latent_shape: tuple[int, int, int] = tuple(index["latent_shape"])
        self.flips: bool = index["flips"]
        self.crops: int = index["crops"]
        self.has_spread: bool = any("std" in shard for shard in self._shards)
        self.class_labels = torch.cat([shard["class_labels"] for shard in self._shards])
        self._starts = torch.tensor([0] + [len(shard["class_labels"]) for shard in self._shards]).cumsum(0)

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Latents drawn from the posterior with `draws.posterior_noise` (its mean where that is None), and labels."""
        views = draws.views(self.flips, self.crops)
        latents = self._take("mean", draws.items, views)
        if self.has_spread and draws.posterior_noise is not None:
            latents = latents + self._take("std", draws.items, views) * draws.posterior_noise
        return latents, self.class_labels[draws.items]

    def means(self, items: Tensor) -> Tensor:
        """Latents of the first view, the upright centre crop."""
        return self._take("mean", items, torch.zeros_like(items))

    def _take(self, name: str, items: Tensor, views: Tensor) -> Tensor:
        """Rows (B, C, h, w) float32 of a stored tensor."""
        out = torch.empty(len(items), *self.latent_shape)
        shard_of = torch.bucketize(items, self._starts, right=True) - 1
        for number in shard_of.unique().tolist():
            chosen = shard_of == number
            local = items[chosen] - self._starts[number]
            out[chosen] = self._shards[number][name][views[chosen], local].float()
        return out


class CachedLatents(LatentSource):
    """The latents of a run from the disk: any step at any time."""

    def __init__(self, cache: StoredLatents, draws: RunDraws) -> None:
        super().__init__(draws)
        self.cache = cache

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, StepDraws]]:
        """Latents drawn from the posterior, labels and draws."""
        for draws in self.draws.micro_batches(step):
            yield *self.cache.batch(draws), draws


def cached_latents(
    images: ImageTensors,
    codec: LatentCodec,
    cache_dir: str | Path,
    encoding: Encoding = Encoding(),  # noqa: B008  (frozen)
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    shard_images: int = 2048,
    share: tuple[int, int] = (0, 1),
    say: Callable[[str], None] = print,
) -> LatentCache:
    """Open the cache of these images under this codec, making first what is missing of it.

    Args:
        images: the images; corrupt ones are left out and told (or raise, as `images` was told), every time.
        codec: on the device that is to encode.
        cache_dir: folder of caches, one sub-folder each.
        encoding: views, dtype and precision.
        batch_size: images encoded at a time; results agree bit for bit for equal sizes, to rounding for others.
        num_workers: processes that decode images.
        shard_images: images a shard: what a kill can cost, and the unit that is shared out to processes.
        share: (i, n): this is process i of n that share the work, on one disk. All must call; each waits for all.
        say: prints a message; called by process 0.
    """
    description = {
        "format": _FORMAT,
        "codec": codec.fingerprint(),
        "dataset": dataset_fingerprint(images),
        "size": list(images.size),
        **dataclasses.asdict(encoding),
    }
    key = f"{derive_seed(0, json.dumps(description, sort_keys=True)):016x}"
    folder = Path(cache_dir).expanduser() / key
    if not _is_whole(folder):
        parts = [range(first, min(first + shard_images, len(images))) for first in range(0, len(images), shard_images)]
        maker = _Maker(folder, images, codec, encoding, parts, batch_size=batch_size, num_workers=num_workers)
        try:
            maker.make_share(*share)
        except KeyboardInterrupt:
            whole = sum(_is_shard(path) for path in maker.paths)
            raise KeyboardInterrupt(
                f"stopped: {whole} of {len(maker.paths)} shards of latents are in {folder}, whole; the same command "
                "encodes the rest"
            ) from None
        if share[0] == 0:
            maker.finish(description, say)
    while not _is_whole(folder):  # not a barrier: those time out, and a large set takes hours
        time.sleep(0.2)
    cache = LatentCache(folder)
    if cache.unreadable and images.strict:  # of a run that was not strict
        raise ValueError(f"{cache.unreadable[0]} (one of {len(cache.unreadable)} that {folder} lacks)")
    if cache.unreadable and share[0] == 0:
        shown = "; ".join(cache.unreadable[:5]) + ("; ..." if len(cache.unreadable) > 5 else "")
        say(f"left out {len(cache.unreadable)} of {len(images)} images that cannot be read: {shown}")
    return cache


def dataset_fingerprint(images: ImageTensors) -> str:
    """16 hex digits that change with the images: file names, sizes and times, or `datasets`' own fingerprint.

    (`datasets` knows what a parquet or a Hub data set was made from, but of loose files only the names.) Of images
    behind URLs the names alone count; those of the Hub hold the revision.
    """
    dataset = images.dataset
    digest = hashlib.sha256(f"{len(dataset)} {images.labels}".encode())
    first = dataset[0]["image"]
    if first is None or first["bytes"] is not None:
        digest.update(dataset._fingerprint.encode())
    else:
        for record in filter(None, dataset.select_columns("image")[:]["image"]):
            digest.update(record["path"].encode())
            if "://" not in record["path"]:
                state = file_of(record["path"]).stat()
                digest.update(f" {state.st_size} {state.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _is_whole(folder: Path) -> bool:
    """Whether index.json exists and every shard has the size that it says."""
    try:
        shards: dict[str, int] = json.loads((folder / "index.json").read_text(encoding="utf-8"))["shards"]
        return all((folder / name).stat().st_size == size for name, size in shards.items())
    except (OSError, ValueError, KeyError):
        return False


class _Maker:
    """Makes a cache's shards, and its index when all are there."""

    def __init__(
        self,
        folder: Path,
        images: ImageTensors,
        codec: LatentCodec,
        encoding: Encoding,
        parts: list[range],
        *,
        batch_size: int,
        num_workers: int,
    ) -> None:
        self.folder, self.images, self.codec, self.encoding = folder, images, codec, encoding
        self.batch_size, self.num_workers = batch_size, num_workers
        self.started = time.perf_counter()
        self.parts = parts
        self.paths = [folder / f"shard-{part.start:08d}-{part.stop:08d}.safetensors" for part in parts]
        folder.mkdir(parents=True, exist_ok=True)
        self.missing = [number for number, path in enumerate(self.paths) if not _is_shard(path)]

    def make_share(self, process: int, processes: int) -> None:
        """Make the missing shards whose number is `process` modulo `processes`."""
        mine = [number for number in self.missing if number % processes == process]
        total = sum(len(self.parts[number]) for number in mine)
        with tqdm(total=total, desc="encoding images", unit="image", disable=process > 0) as bar:
            for number in mine:
                if _is_shard(self.paths[number]):  # by another machine, on a common disk
                    bar.update(len(self.parts[number]))
                    continue
                tensors, metadata = encode_shard(
                    self.images,
                    self.codec,
                    self.encoding,
                    self.parts[number],
                    batch_size=self.batch_size,
                    num_workers=self.num_workers,
                )
                with atomic(self.paths[number]) as temporary:  # another run may make the same shard
                    save_file(tensors, temporary, metadata=metadata)
                bar.update(len(self.parts[number]))

    def finish(self, description: dict[str, Any], say: Callable[[str], None]) -> None:
        """Wait for the others' shards, write the index, and tell what was made."""
        while not all(_is_shard(path) for path in self.paths):
            time.sleep(0.2)
        count, shape = 0, ()
        for path in self.paths:
            with safe_open(path, framework="pt") as shard:
                _, items, *shape = shard.get_slice("mean").get_shape()
                count += items
        if count == 0:
            first = _unreadable(self.paths[0])[0]
            raise ValueError(f"none of the {len(self.images)} images can be read; the first: {first}")
        shards = {path.name: path.stat().st_size for path in self.paths}
        index = {**description, "count": count, "latent_shape": shape, "shards": shards}
        write_text(self.folder / "index.json", json.dumps(index, indent=1))
        for path in self.folder.glob(".tmp-*"):
            if is_left_behind(path):
                path.unlink(missing_ok=True)
        seconds, views = time.perf_counter() - self.started, self.encoding.views
        made = sum(len(self.parts[number]) for number in self.missing)
        say(
            f"encoded {made} images of {len(self.images)}, {views} view{'s' * (views > 1)} each, in {seconds:.0f} s "
            f"({made * views / seconds:.0f} views/s, {sum(shards.values()) / count:.0f} bytes an image) into "
            f"{self.folder}"
        )


def _unreadable(path: Path) -> list[str]:
    """What was wrong with the images that a shard lacks, see `encode_shard`."""
    with safe_open(path, framework="pt") as shard:
        return json.loads(shard.metadata()["unreadable"])


def _is_shard(path: Path) -> bool:
    """Whether a whole shard lies there: safetensors checks the file's length against its header.

    Raises ValueError for a whole file of somebody else's, which is neither used nor overwritten.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            ours = "unreadable" in (shard.metadata() or {}) and {"mean", "class_labels", "items"} <= set(shard.keys())
    except (OSError, SafetensorError):
        return False
    if not ours:
        raise ValueError(f"{path} holds no latents that were made here; move it away, or choose another cache_dir")
    return True
