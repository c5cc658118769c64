"""Files: atomic writing, hashes, paths of users, and names that stay inside a folder."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "DISK_ERRORS",
    "atomic",
    "file_sha256",
    "flush_to_disk",
    "forgiving_streams",
    "inside",
    "is_left_behind",
    "printable",
    "shipped",
    "user_path",
    "write_text",
]

DISK_ERRORS = {errno.ENOSPC, errno.EFBIG, errno.EROFS, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CHUNK = 8 << 20


def file_sha256(path: str | Path) -> str:
    """Return the hexadecimal SHA-256 of a file, which is read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def user_path(text: str | os.PathLike) -> Path:
    """Convert a user's path: ~ and ~name are home folders."""
    return Path(os.path.expanduser(os.fspath(text)))


_PACKAGE = Path(__file__).parent


def shipped(name: str | os.PathLike) -> Path:
    """Convert a user's path. If a path under assets/, configs/ or data/ does not exist, look for it next to the code.

    That is the repository in a clone, and the package in a wheel, which contains the recipes and the small models.
    """
    path = user_path(name)
    if path.exists() or path.is_absolute() or path.parts[:1] not in (("assets",), ("configs",), ("data",)):
        return path
    clone = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else _PACKAGE
    return next((home / path for home in (_PACKAGE, clone) if (home / path).exists()), path)


def inside(folder: Path, name: str | os.PathLike) -> Path:
    """Return `folder / name`. Raises a ValueError if the name leaves the folder, is absolute or empty."""
    path = Path(os.path.normpath(folder / name))
    base = Path(os.path.normpath(folder))
    if "\0" in os.fspath(name) or Path(name).is_absolute() or path == base or base not in path.parents:
        raise ValueError(f"the name {os.fspath(name)!r} does not stay inside {folder}; choose another")
    return path


def printable(name: str | os.PathLike) -> str:
    """Return a name that any encoding can show. Invalid UTF-8 and control characters become escapes."""
    text = os.fspath(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def forgiving_streams() -> None:
    """Let standard output and error escape characters that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(ValueError, OSError):  # a closed stream
                reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def atomic(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Write a file completely or not at all.

        with atomic(path) as temporary:
            temporary.write_text(text)

    The temporary file is in the same folder as `path` and has the same suffix. It replaces `path` at the end of the
    block and is removed if the block fails. Its name is short and unique over processes and machines.

    Args:
        path: file to write, in an existing folder.
        durable: whether to flush the bytes to the disk first, so that the file survives a crash of the machine. It is
            not needed for many small files that are checked when they are read.
    """
    path = Path(path)
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    temporary = path.with_name(f".tmp-{_host()}-{os.getpid()}-{digest}{path.suffix[:16]}")
    try:
        yield temporary
        if durable:
            flush_to_disk(temporary)
        temporary.replace(path)
        if durable:
            flush_to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):  # the error of the block is more important
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 by `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_left_behind(path: Path) -> bool:
    """Return whether this is a temporary file of `atomic` whose process, on this machine, has ended."""
    match = re.fullmatch(rf"\.tmp-{_host()}-(\d+)-[0-9a-f]{{8}}(\..*)?", path.name)
    return match is not None and not _is_running(int(match[1]))


def _host() -> str:
    """Return 8 hexadecimal digits for this machine, whose name can be long."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    import psutil  # late: the command line for restoration does not need it

    return psutil.pid_exists(process)


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk by fsync. Windows cannot open folders, so they are skipped there."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # the file system does not support it
            raise
    finally:
        os.close(descriptor)
