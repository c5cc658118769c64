"""Published latents: folders and tars of .npy files in the layout in which fast-DiT and U-DiT store ImageNet.

    imagenet_feature/
        imagenet256_features/0.npy ...   (1, C, h, w) float: one latent, sampled from the posterior, in model units
        imagenet256_labels/0.npy ...     (1,) int: its class

The tar contains the same files inside one folder. Both projects encode each image once, randomly mirrored, sample from
the posterior and multiply by the VAE's scaling factor. A file therefore has one view and no standard deviation.

Latents are read when they are needed. An index stores the file of each item and all labels, so that a directory of a
million files is listed once, and a tar is read by offsets.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from iptv2_diffusion.data.archives import LOOKED_AT, check_end, opened_tar, read_bytes
from iptv2_diffusion.data.draws import StepDraws, derive_seed
from iptv2_diffusion.data.latent_cache import StoredLatents
from iptv2_diffusion.files import atomic, printable
from iptv2_diffusion.messages import one_line

__all__ = ["FeatureFolder", "holds_features"]

FEATURES, LABELS = "_features", "_labels"  # suffixes of the names of the two folders
SHOWN = 3  # number of names in a message


def holds_features(path: Path) -> bool:
    """Return whether a folder or tar holds latents, in a sub-folder *_features or *_labels of .npy files."""
    if path.is_dir():
        folders = (child for child in path.iterdir() if child.is_dir() and _part(child.name) is not None)
        return any(
            child.suffix == ".npy" for folder in folders for child in itertools.islice(folder.iterdir(), LOOKED_AT)
        )
    if path.suffix.lower() != ".tar" or not path.is_file():
        return False
    with opened_tar(path) as archive:
        files = itertools.islice((member.name for member in archive if member.isfile()), LOOKED_AT)
        return any(_place(name) is not None for name in files)


@dataclasses.dataclass(frozen=True)
class _Index:
    """Location of each item's latent, in the order of the items.

    Attributes:
        names: (N, width) uint8, the file names, padded with zeros.
        pieces: (N, 2) int64, offset and size in the tar; empty for a folder.
        labels: (N,) int64, or empty without labels.
    """

    names: Tensor
    pieces: Tensor
    labels: Tensor


class FeatureFolder(StoredLatents):
    """Latents of a folder or tar of .npy files, or a subset of them, read when they are needed.

    Args:
        path: the folder or the tar.
        cache_dir: folder for the index.
        labelled: whether to read the labels; otherwise all labels are 0.
        num_workers: number of threads that read the files of a batch; 0 reads them one by one.

    Raises:
        ValueError: labels or latents are missing, or a file or the tar is damaged or has other contents.
    """

    has_spread = False

    def __init__(self, path: str | Path, cache_dir: str | Path, *, labelled: bool = True, num_workers: int = 0) -> None:
        self.path, self.labelled = Path(path), labelled
        self._pool = ThreadPoolExecutor(num_workers) if num_workers else None
        is_tar = self.path.is_file()
        if is_tar:
            check_end(self.path)
        self._folders = None if is_tar else _find_folders(self.path, labelled)
        self._index = _stored_index(self.path, self._folders, Path(cache_dir).expanduser(), labelled)
        count = len(self._index.names)
        self._chosen = torch.arange(count)
        self.class_labels = self._index.labels if labelled else torch.zeros(count, dtype=torch.long)
        channels, height, width = self._read(0).shape
        self.latent_shape = (channels, height, width)

    def select(self, items: Sequence[int]) -> FeatureFolder:
        """Return the latents of these items only."""
        some = object.__new__(FeatureFolder)
        some.__dict__.update(self.__dict__)
        chosen = torch.as_tensor(items, dtype=torch.long)
        some._chosen, some.class_labels = self._chosen[chosen], self.class_labels[chosen]
        return some

    @property
    def kind(self) -> str:
        """Prefix of the name of the folder of latents, such as "imagenet256"."""
        name = self._folders[0].name if self._folders else PurePosixPath(self._name(0)).parent.name
        return name[: -len(FEATURES)]

    @property
    def labels(self) -> list[int]:
        """Labels as a list, empty without labels."""
        return self.class_labels.tolist() if self.labelled else []

    def batch(self, draws: StepDraws) -> tuple[Tensor, Tensor]:
        """Read the latents (B, C, h, w) float32 and the labels (B,) of a batch."""
        return self.means(draws.items), self.class_labels[draws.items]

    def means(self, items: Tensor) -> Tensor:
        """Read the latents (B, C, h, w) float32 of items.

        Raises:
            ValueError: a file is damaged, has NaN, or differs in shape from the first.
        """
        chosen = self._chosen[items].tolist()
        read = map(self._read, chosen) if self._pool is None else self._pool.map(self._read, chosen)
        latents = []
        for item, latent in zip(chosen, read, strict=True):
            if tuple(latent.shape) != self.latent_shape:
                raise ValueError(
                    f"{self._source(item)}: has shape {tuple(latent.shape)}, but the first latent has "
                    f"{self.latent_shape}; encode all at one size"
                )
            latents.append(latent)
        return torch.stack(latents)

    def _name(self, item: int) -> str:
        return bytes(self._index.names[item].numpy()).rstrip(b"\0").decode()

    def _source(self, item: int) -> str:
        """Return the argument of `read_bytes` for an item."""
        name = self._name(item)
        if self._folders:
            return str(self._folders[0] / name)
        offset, size = self._index.pieces[item].tolist()
        return f"{self.path}::{offset}+{size}::{name}"

    def _read(self, item: int) -> Tensor:
        """Read a latent (C, h, w) float32."""
        source = self._source(item)
        array = _parse(_bytes_of(source), source)
        shape = array.shape[1:] if array.ndim == 4 and len(array) == 1 else array.shape
        if len(shape) != 3 or 0 in shape or array.dtype.kind != "f":
            raise ValueError(f"{source}: is {array.dtype} of shape {array.shape}; a latent is float, (1, C, h, w)")
        latent = torch.from_numpy(array.astype(np.float32).reshape(shape))
        if not latent.isfinite().all():
            raise ValueError(f"{source}: the latent is NaN or infinite; encode it again, or remove it and its label")
        return latent


# ---------------------------------------------------------------------------------------------------------------------
# The index


def _part(folder: str) -> str | None:
    """Return which of the two folders has this name."""
    return next((part for part in (FEATURES, LABELS) if folder.endswith(part)), None)


def _place(name: str) -> tuple[str, str] | None:
    """Return which of the two folders contains a file of a tar, and its name there; None for other files."""
    inner = PurePosixPath(name)
    part = _part(inner.parent.name) if inner.suffix == ".npy" and inner.name[0] != "." else None
    return None if part is None else (part, inner.name)


def _find_folders(path: Path, labelled: bool) -> list[Path]:
    """Return the folder of the latents and, if `labelled`, the folder of the labels."""
    found = []
    for part in (FEATURES, LABELS)[: 1 + labelled]:
        folders = [child for child in sorted(path.iterdir()) if child.is_dir() and child.name.endswith(part)]
        if len(folders) != 1:
            names = ", ".join(folder.name for folder in folders[:SHOWN]) or "none"
            hint = "; --label_column ignore trains without labels" if part == LABELS and not folders else ""
            raise ValueError(f"{path}: needs one folder *{part} of .npy files, but has {names}{hint}")
        found += folders
    return found


def _stored_index(path: Path, folders: list[Path] | None, cache_dir: Path, labelled: bool) -> _Index:
    """Load the index from the cache, or build and cache it if it is missing or the files have changed."""
    states = [(str(p.resolve()), s.st_size, s.st_mtime_ns) for p in folders or [path] for s in [p.stat()]]
    key = f"{derive_seed(0, json.dumps([2, labelled, states])):016x}"
    file = cache_dir / f"features-{key}.safetensors"
    with contextlib.suppress(OSError, SafetensorError):  # missing or damaged
        stored = load_file(file)
        if set(stored) == {field.name for field in dataclasses.fields(_Index)}:  # otherwise it is not an index
            return _Index(**stored)
    index = _make_index(path, folders, labelled)
    cache_dir.mkdir(parents=True, exist_ok=True)
    with atomic(file) as temporary:
        save_file(dataclasses.asdict(index), temporary)
    return index


def _make_index(path: Path, folders: list[Path] | None, labelled: bool) -> _Index:
    """Find the files and read all labels."""
    latents: dict[str, tuple[str, tuple[int, int]]] = {}  # by file name: name inside the tar, piece
    labels: dict[str, int | None] = {}  # by file name
    with tqdm(desc=f"reading labels of {printable(path.name)}", unit="file", delay=5) as bar:
        for part, name, inner, piece, content in _files(path, folders, labelled):
            bar.update()
            if part == FEATURES:
                latents[name] = (inner, piece)
            elif labelled:
                labels[name] = _label(content, f"{path}: {inner}")
    if labelled:
        _check_pairs(path, latents, labels)
    if not latents:
        raise ValueError(f"{path}: holds no latents (.npy files in a folder *{FEATURES})")
    order = sorted(latents, key=lambda name: ([int(number) for number in re.findall(r"\d+", name)], name))
    names = np.array([latents[name][0].encode() for name in order])
    return _Index(
        names=torch.from_numpy(names.view(np.uint8).reshape(len(names), -1).copy()),
        pieces=torch.tensor([latents[name][1] for name in order]),
        labels=torch.tensor([labels[name] for name in order] if labelled else [], dtype=torch.long),
    )


def _files(
    path: Path, folders: list[Path] | None, labelled: bool
) -> Iterator[tuple[str, str, str, tuple[int, int], bytes]]:
    """Yield for each .npy file: folder, name, name inside the tar, (offset, size) there, and the content of a label."""
    if folders is not None:
        for part, folder in zip((FEATURES, LABELS), folders, strict=False):
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".npy") and not entry.name.startswith("."):
                        content = _bytes_of(entry.path) if part == LABELS else b""
                        yield part, entry.name, entry.name, (0, 0), content
        return
    end = path.stat().st_size
    with opened_tar(path) as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # tarfile would keep a kilobyte for each of millions of files
            place = _place(member.name) if member.isfile() else None
            if place is None:
                continue
            if member.offset_data + member.size > end:
                raise ValueError(f"{path} is cut short inside {member.name}; download it again")
            content = b""
            if labelled and place[0] == LABELS:
                archive.fileobj.seek(member.offset_data)
                content = archive.fileobj.read(member.size)
            yield *place, member.name, (member.offset_data, member.size), content


def _check_pairs(path: Path, latents: Iterable[str], labels: Iterable[str]) -> None:
    """Raise a ValueError unless each latent has a label of the same name, and each label a latent."""
    latents, labels = set(latents), set(labels)
    for alone, what, other in ((latents - labels, "latents", "label"), (labels - latents, "labels", "latent")):
        if alone:
            shown = ", ".join(sorted(alone)[:SHOWN]) + (", ..." if len(alone) > SHOWN else "")
            raise ValueError(
                f"{path}: {len(alone)} of {len(latents if other == 'label' else labels)} {what} have no {other} of "
                f"the same name ({shown}); download or extract the rest, or remove these"
            )


def _bytes_of(source: str) -> bytes:
    try:
        return read_bytes(source)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _parse(content: bytes, name: str) -> np.ndarray:
    """Return the array of a .npy file, read-only. Objects are never unpickled."""
    try:
        start = 10 + int.from_bytes(content[8:10], "little")  # magic (6), version (2), length of the header (2)
        dtype, shape = _header(content[:start])
        return np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)
    except Exception as error:  # NumPy raises several types, depending on the contents
        reason = one_line(error, 120)
        raise ValueError(f"{name}: not a .npy file, or damaged ({reason})") from error


@functools.lru_cache(maxsize=64)
def _header(content: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Parse dtype and shape from the header of a .npy file of version 1. Cached: NumPy is slow, and headers repeat."""
    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version {version[0]}.{version[1]} of the format, not 1.0")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError("Object arrays are not read" if dtype.hasobject else "in Fortran's order")
    return dtype, shape


def _label(content: bytes, name: str) -> int:
    array: Any = _parse(content, name)
    if array.size != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{name}: is {array.dtype} of shape {array.shape}; a label is one whole number, (1,)")
    label = int(array.reshape(()))
    if label < 0:
        raise ValueError(f"{name}: the label is {label}; labels start at 0")
    return label
