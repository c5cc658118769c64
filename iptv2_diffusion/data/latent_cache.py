"""Cache of latents that are encoded once: a folder of shards, the same for any number of encoding processes.

For every view of every image (see `Encoding`) a cache stores the mean and the standard deviation of the VAE's
posterior, so that every epoch still draws new latents:  x0 = mean + deviation * noise.

    CACHE_DIR/<fingerprint>/
        shard-00000.safetensors images 0 ... 2047: mean, std (views, n, C, h, w); class_labels, items (n,) int64
        index.json              source, number of images, latent shape, size of every shard; written last

`std` is absent for a deterministic VAE. The fingerprint covers codec, data set, image size, views and dtype, so a cache
of other data is never used. A shard gets its name when it is complete, so a killed run resumes with the missing shards.
The cache is valid if index.json exists and every shard has the size that it states.
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
from iptv2_diffusion.files import atomic, inside, is_left_behind, write_text

if TYPE_CHECKING:
    from iptv2_diffusion.data.images import ImageTensors
    from iptv2_diffusion.latents import LatentCodec

_FORMAT = 2


class StoredLatents(ABC):
    """Interface of latents on disk, with random access.

    Attributes:
        latent_shape: shape of a latent, (C, h, w).
        has_spread: whether the posterior has a standard deviation. If not, `StepDraws.posterior_noise` can be None.
        class_labels: class labels, (N,) int64.
    """

    latent_shape: tuple[int, int, int]
    has_spread: bool
    class_labels: Tensor

    def __len__(self) -> int:
        return len(self.class_labels)

    @abstractmethod
    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Return the latents (B, C, h, w) float32 in model units of these draws, and the labels (B,) int64."""

    @abstractmethod
    def means(self, items: Tensor) -> Tensor:
        """Return the latents (B, C, h, w) float32 of items (B,), upright and without the posterior's noise."""

    def deviation(self, count: int = 256) -> float:
        """Return the standard deviation of at most `count` evenly spaced latents, about 1 in model units."""
        items = torch.linspace(0, len(self) - 1, min(count, len(self))).long()
        return self.means(items).std().item()


class LatentCache(StoredLatents):
    """A complete cache on disk. Shards are memory-mapped, so processes of one machine share the memory.

    Attributes:
        unreadable: errors of the images that were left out.
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
        """Return labels, and latents sampled with `draws.posterior_noise` (the posterior's mean if that is None)."""
        views = draws.views(self.flips, self.crops)
        latents = self._take("mean", draws.items, views)
        if self.has_spread and draws.posterior_noise is not None:
            latents = latents + self._take("std", draws.items, views) * draws.posterior_noise
        return latents, self.class_labels[draws.items]

    def means(self, items: Tensor) -> Tensor:
        """Return the latents of the first view, the upright centre crop."""
        return self._take("mean", items, torch.zeros_like(items))

    def _take(self, name: str, items: Tensor, views: Tensor) -> Tensor:
        """Return rows (B, C, h, w) float32 of a stored tensor."""
        out = torch.empty(len(items), *self.latent_shape)
        shard_of = torch.bucketize(items, self._starts, right=True) - 1
        for number in shard_of.unique().tolist():
            chosen = shard_of == number
            local = items[chosen] - self._starts[number]
            out[chosen] = self._shards[number][name][views[chosen], local].float()
        return out


class CachedLatents(LatentSource):
    """Latents of a run from disk, for any step at any time."""

    def __init__(self, cache: StoredLatents, draws: RunDraws) -> None:
        super().__init__(draws)
        self.cache = cache

    def micro_batches(self, step: int) -> Iterator[tuple[Tensor, Tensor, StepDraws]]:
        """Yield latents, labels and draws of each micro-batch."""
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
    """Open the cache of these images and this codec, after encoding its missing shards.

    Args:
        images: the images. Corrupt images are left out and reported every time, or raise an error if `images` is
            strict.
        codec: codec on the device that encodes.
        cache_dir: folder of caches, each in a sub-folder.
        encoding: views, dtype and precision.
        batch_size: number of images to encode together. Equal sizes give bit-identical results, others agree to
            rounding.
        num_workers: number of processes that decode images.
        shard_images: number of images per shard. A kill loses at most one shard, and processes divide the work by
            shards.
        share: (i, n) for process i of n that share the work on one disk. All must call this, and each waits for all.
        say: function that prints a message. Process 0 calls it.
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
    if not _is_whole(folder, description):
        parts = [range(first, min(first + shard_images, len(images))) for first in range(0, len(images), shard_images)]
        maker = _Maker(folder, images, codec, encoding, parts, batch_size=batch_size, num_workers=num_workers)
        try:
            maker.make_share(*share)
        except KeyboardInterrupt:
            whole = sum(_is_shard(path) for path in maker.paths)
            raise KeyboardInterrupt(
                f"stopped: {whole} of {len(maker.paths)} shards of latents in {folder} are complete; run the same "
                "command to encode the rest"
            ) from None
        if share[0] == 0:
            maker.finish(description, say)
    while not _is_whole(folder, description):  # not a barrier, because a barrier times out and a large set takes hours
        time.sleep(0.2)
    cache = LatentCache(folder)
    if cache.unreadable and images.strict:  # from a run that was not strict
        raise ValueError(f"{cache.unreadable[0]} (one of {len(cache.unreadable)} that {folder} lacks)")
    if cache.unreadable and share[0] == 0:
        shown = "; ".join(cache.unreadable[:5]) + ("; ..." if len(cache.unreadable) > 5 else "")
        say(f"left out {len(cache.unreadable)} of {len(images)} images that cannot be read: {shown}")
    return cache


def dataset_fingerprint(images: ImageTensors) -> str:
    """Return 16 hex digits that change with the images: file names, sizes and times, or the fingerprint of `datasets`.

    The fingerprint of `datasets` covers the source of a parquet or a Hub data set, but only the names of loose files.
    Only the names of images at URLs count, and those of the Hub contain the revision.
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


def _is_whole(folder: Path, description: dict[str, Any]) -> bool:
    """Return whether index.json is that of `description` and names the complete shards with their sizes."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        if not isinstance(index, dict) or any(index.get(name) != value for name, value in description.items()):
            return False
        shards, shape = index.get("shards"), index.get("latent_shape")
        if not isinstance(shards, dict) or not shards or not isinstance(shape, list):
            return False
        sizes = {name: inside(folder, name).stat().st_size for name in shards}
    except (OSError, ValueError):
        return False
    return sizes == shards and all(_is_shard(folder / name, shape) for name in shards)


class _Maker:
    """Writer of a cache's shards and, when all exist, its index."""

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
        """Encode the missing shards whose number is `process` modulo `processes`."""
        mine = [number for number in self.missing if number % processes == process]
        total = sum(len(self.parts[number]) for number in mine)
        with tqdm(total=total, desc="encoding images", unit="image", disable=process > 0) as bar:
            for number in mine:
                if _is_shard(self.paths[number]):  # written by another machine on a shared disk
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
                with atomic(self.paths[number]) as temporary:  # another run may encode the same shard
                    save_file(tensors, temporary, metadata=metadata)
                bar.update(len(self.parts[number]))

    def finish(self, description: dict[str, Any], say: Callable[[str], None]) -> None:
        """Wait for the shards of other processes, write the index and report the result."""
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
            f"({made * views / seconds:.0f} views/s, {sum(shards.values()) / count:.0f} bytes per image) into "
            f"{self.folder}"
        )


def _unreadable(path: Path) -> list[str]:
    """Return the errors of the images that a shard lacks (see `encode_shard`)."""
    with safe_open(path, framework="pt") as shard:
        return json.loads(shard.metadata()["unreadable"])


def _is_shard(path: Path, latent_shape: list[int] | None = None) -> bool:
    """Return whether a complete shard exists, of latents of this shape if it is given.

    safetensors checks the length of the file against its header. Raises a ValueError for a complete file that is not
    ours, which is neither used nor overwritten.
    """
    try:
        with safe_open(path, framework="pt") as shard:
            ours = "unreadable" in (shard.metadata() or {}) and {"mean", "class_labels", "items"} <= set(shard.keys())
            shapes: dict[str, list[int]] = {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118  (no dict)
            is_count = {name: shard.get_slice(name).get_dtype() == "I64" for name in shapes}
    except (OSError, SafetensorError):
        return False
    if not ours:
        raise ValueError(f"{path} holds no latents that were made here; move it away, or choose another cache_dir")
    _, count, *shape = [*shapes["mean"], -1, -1]
    return (
        len(shapes["mean"]) == 5
        and shapes.get("std", shapes["mean"]) == shapes["mean"]
        and all(is_count[name] and shapes[name] == [count] for name in ("class_labels", "items"))
        and latent_shape in (None, shape[:3])
    )
