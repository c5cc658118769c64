"""Tars that are read without unpacking: a tar of one tar per class, as ImageNet is distributed, and a tar of folders.

`ILSVRC2012_img_train.tar` contains n01440764.tar ..., each with the JPEG files of a class. Tars are not compressed, so
every image is a piece of the outer file. One pass over the headers finds these pieces.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import datasets
import fsspec

from iptv2_diffusion.data.image_folders import METADATA, Listing, is_of_tools
from iptv2_diffusion.messages import first_line

_PIECE = re.compile(r"^(?P<file>.+\.tar)::(?P<offset>\d+)\+(?P<size>\d+)::.+$")


LOOKED_AT = 64  # files of a tar that decide its kind
# Files next to the image in a sample of a WebDataset
SIDE_FILES = (".cls", ".cls2", ".txt", ".json", ".caption", ".npy", ".id", ".index", ".pyd")
WAITS = (0.5, 2.0)  # seconds to wait before each further attempt after a network error


def kind_of_tar(path: Path, suffixes: set[str]) -> str:
    """Return the kind of a tar by its first files: "tars" (one per class), "folders" (classes) or "samples".

    Class folders contain only images. Samples of a WebDataset have other files next to the image, or no folder.

    Raises:
        ValueError: the file is not a tar, or is damaged.
    """
    images = 0
    with opened_tar(path) as archive:
        files = list(itertools.islice((m for m in archive if m.isfile()), LOOKED_AT))
        for member in files:
            inner = PurePosixPath(member.name)
            if any(is_of_tools(part) for part in inner.parts):
                continue
            if inner.suffix == ".tar":
                return "tars"
            in_folder = len([part for part in inner.parts if part != "."]) > 1
            if inner.suffix.lower() in suffixes and in_folder:
                images += 1
            elif inner.name not in METADATA and inner.suffix.lower() in (*SIDE_FILES, *suffixes):
                return "samples"
    if not files:
        raise ValueError(f"{path}: holds no files; links are not followed")
    return "folders" if images else "samples"


def check_end(path: Path) -> None:
    """Raise a ValueError unless the file ends with the zeros that end a tar. Otherwise it is cut short or not a tar."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - tarfile.BLOCKSIZE))
        end = file.read()
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise ValueError(f"{path}: damaged, or not a tar (it is cut short); download it again")


def check_whole(path: str | Path, member: tarfile.TarInfo, end: int) -> None:
    """Raise a ValueError if a member extends beyond the `end` of its tar, in bytes."""
    if member.offset_data + member.size > end:
        raise ValueError(f"{path} is cut short inside {member.name}; download it again")


@contextlib.contextmanager
def opened_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """Open an uncompressed tar. Damage, at opening or later, raises a ValueError that names the file."""
    try:
        with tarfile.open(path, "r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError, UnicodeError, ValueError, OverflowError) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise
        raise ValueError(f"{path}: damaged, or not a tar ({first_line(error)}); download it again") from error


def list_tar(path: Path, listing: Listing, suffixes: set[str]) -> None:
    """Add the images of a tar of class folders to a listing, as pieces of the file.

    A single folder around all class folders is ignored. Raises a ValueError for a damaged tar.
    """
    end, found = path.stat().st_size, {}
    with opened_tar(path) as archive:
        for member in archive:
            inner = PurePosixPath(os.path.normpath(member.name))
            if member.isdir() or ".." in inner.parts or inner.is_absolute():
                continue
            if not member.isfile() or member.issparse():  # a piece of the file is not their content
                if inner.suffix.lower() in suffixes:
                    listing.left_out["link, device or sparse file in a tar", inner.suffix.lower()] += 1
                continue
            check_whole(path, member, end)
            found[inner] = f"{path}::{member.offset_data}+{member.size}::{member.name}"
    while found and len({p.parts[0] for p in found}) == 1 and all(len(p.parts) > 2 for p in found):
        found = {PurePosixPath(*p.parts[1:]): piece for p, piece in found.items()}
    for inner, piece in sorted(found.items()):
        listing.add(inner, piece, suffixes)


def load_nested_tar(path: Path, suffixes: set[str], cache_dir: str | None = None) -> datasets.Dataset:
    """Return the images of a tar of tars: "image" (an undecoded piece of the file) and "label" (named by inner tars).

    `datasets` caches the list under the file's name, size and time. Raises a ValueError for a damaged tar.
    """
    state = path.stat()
    with opened_tar(path) as outer:
        names = sorted(Path(member.name).stem for member in outer if _is_class(member))
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{path}: contains two tars called {twice}.tar; rename or remove one")
    features = {"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=names)}
    try:
        return datasets.Dataset.from_generator(
            _pieces,
            features=datasets.Features(features),
            gen_kwargs={"path": str(path), "suffixes": sorted(suffixes), "state": (state.st_size, state.st_mtime_ns)},
            **({} if cache_dir is None else {"cache_dir": cache_dir}),
        )
    except datasets.exceptions.DatasetGenerationError as error:  # hides our error
        cause = error.__cause__ or error
        raise ValueError(first_line(cause)) from error
    except ValueError as error:  # of `datasets`
        if "no data" not in str(error):
            raise
        raise ValueError(f"{path}: its inner tars hold no images ({' '.join(sorted(suffixes))})") from error


def _is_class(member: tarfile.TarInfo) -> bool:
    inner = PurePosixPath(member.name)
    return member.isfile() and inner.suffix == ".tar" and not any(is_of_tools(part) for part in inner.parts)


def _pieces(path: str, suffixes: list[str], state: tuple[int, int]) -> Iterator[dict[str, Any]]:
    end = state[0]
    with opened_tar(Path(path)) as outer:
        for member in (m for m in outer if _is_class(m)):
            name = Path(member.name).stem
            check_whole(path, member, end)
            try:
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for image in (i for i in inner if i.isfile() and not i.issparse()):
                        if Path(image.name).suffix.lower() not in suffixes:
                            continue
                        offset = member.offset_data + image.offset_data
                        piece = f"{path}::{offset}+{image.size}::{name}/{image.name}"
                        yield {"image": {"bytes": None, "path": piece}, "label": name}
            except (tarfile.TarError, EOFError, UnicodeError) as error:
                raise ValueError(
                    f"{path}: its inner tar {member.name} is damaged ({first_line(error)}); download it again"
                ) from error


def file_of(path: str) -> Path:
    """Return the file that an image is, or is a piece of."""
    match = _PIECE.match(path)
    return Path(match["file"] if match else path)


class FetchError(OSError):
    """Raised if a URL could not be fetched, which may succeed later."""


def fetch(url: str) -> bytes:
    """Fetch the bytes of an fsspec URL in `len(WAITS) + 1` attempts. Raises a FetchError if none succeeds."""
    for wait in (*WAITS, None):
        try:
            with fsspec.open(url, "rb") as file:
                return file.read()
        except (FileNotFoundError, ImportError, ValueError):  # a further attempt would not help
            raise
        except Exception as error:  # fsspec's backends have their own errors
            if wait is None:
                reason = first_line(error)
                raise FetchError(f"{url} could not be fetched ({reason}); run the same command again") from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")


def read_bytes(path: str, limit: int | None = None) -> bytes:
    """Return the bytes of an image: a file, a piece of a tar, or an fsspec URL (such as one of the Hub).

    Raises:
        ValueError: the image has more than `limit` bytes, or the piece extends beyond the end of its tar.
    """
    match = _PIECE.match(path)
    if match is None and "://" in path:
        return fetch(path)
    size = Path(path).stat().st_size if match is None else int(match["size"])
    if limit is not None and size > limit:
        raise ValueError(f"it has {size} bytes, above the limit of {limit}; raise max_pixels to read it")
    if match is None:
        return Path(path).read_bytes()
    with open(match["file"], "rb") as file:
        file.seek(int(match["offset"]))
        content = file.read(size)
    if len(content) < size:
        raise ValueError("its archive is cut short")
    return content
