"""ImageNet as it is handed out: a tar of one tar per class, read in place.

`ILSVRC2012_img_train.tar` holds n01440764.tar ..., each with its class's JPEG files. Tars are not compressed, so every
image is a piece of the outer file; one pass over the headers finds where, and nothing is unpacked.
"""

from __future__ import annotations

import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import fsspec

_PIECE = re.compile(r"^(?P<file>.+\.tar)::(?P<offset>\d+)\+(?P<size>\d+)::.+$")


WAITS = (0.5, 2.0)  # seconds before further attempts at what a network did not give


def is_nested_tar(path: Path) -> bool:
    """Whether the first file in a tar is a tar."""
    try:
        with tarfile.open(path, "r:") as archive:
            first = next((member for member in archive if member.isfile()), None)
    except tarfile.TarError:
        return False
    return first is not None and first.name.endswith(".tar")


def load_nested_tar(path: Path, suffixes: set[str], cache_dir: str | None = None) -> datasets.Dataset:
    """The images of a tar of tars: "image" (a piece of the file, undecoded) and "label", named by the inner tars.

    `datasets` keeps the list in its cache, under the file's name, size and time.
    """
    state = path.stat()
    with tarfile.open(path, "r:") as outer:
        names = sorted(Path(member.name).stem for member in outer if member.name.endswith(".tar"))
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)}
    return datasets.Dataset.from_generator(
        _pieces,
        features=datasets.Features(features),
        gen_kwargs={"path": str(path), "suffixes": sorted(suffixes), "state": (state.st_size, state.st_mtime_ns)},
        **({} if cache_dir is None else {"cache_dir": cache_dir}),
    )


def _pieces(path: str, suffixes: list[str], state: tuple[int, int]) -> Iterator[dict[str, Any]]:
    with tarfile.open(path, "r:") as outer:
        for member in (m for m in outer if m.name.endswith(".tar")):
            name = Path(member.name).stem
            with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                for image in (i for i in inner if i.isfile() and Path(i.name).suffix.lower() in suffixes):
                    offset = member.offset_data + image.offset_data
                    piece = f"{path}::{offset}+{image.size}::{name}/{image.name}"
                    yield {"image": {"bytes": None, "path": piece}, "label": name}


def file_of(path: str) -> Path:
    """The file on the disk that an image is, or is a piece of."""
    match = _PIECE.match(path)
    return Path(match["file"] if match else path)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its kind where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class FetchError(OSError):
    """What a URL names could not be fetched now."""


def fetch(url: str) -> bytes:
    """What an fsspec URL names, in `len(WAITS) + 1` attempts. FetchError if none succeeds."""
    for wait in (*WAITS, None):
        try:
            with fsspec.open(url, "rb") as file:
                return file.read()
        except (FileNotFoundError, ImportError, ValueError):  # another attempt would not help
            raise
        except Exception as error:  # fsspec's backends have errors of their own
            if wait is None:
                told = first_line(error)
                raise FetchError(f"{url} could not be fetched ({told}); start the same command again") from error
            time.sleep(wait)


def read_bytes(path: str) -> bytes:
    """The bytes of an image: a file, a piece of a tar, or what a URL of fsspec names (as of the Hub)."""
    match = _PIECE.match(path)
    if match is None and "://" in path:
        return fetch(path)
    if match is None:
        return Path(path).read_bytes()
    with open(match["file"], "rb") as file:
        file.seek(int(match["offset"]))
        return file.read(int(match["size"]))
