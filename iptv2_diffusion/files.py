"""Files: written whole or not at all, their hashes, paths as users give them, names that stay inside a folder."""

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
    """Hexadecimal SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def user_path(text: str | os.PathLike) -> Path:
    """A path as a user gives it, in any option: ~ and ~name are home folders."""
    return Path(os.path.expanduser(os.fspath(text)))


_PACKAGE = Path(__file__).parent


def shipped(name: str | os.PathLike) -> Path:
    """A path as a user gives it; one under assets/, configs/ or data/ that is not here is looked for where the code is.

    That is the repository for a clone, and the package for a wheel, which carries the recipes and the small models.
    """
    path = user_path(name)
    if path.exists() or path.is_absolute() or path.parts[:1] not in (("assets",), ("configs",), ("data",)):
        return path
    clone = _PACKAGE.parent if (_PACKAGE.parent / "pyproject.toml").is_file() else _PACKAGE
    return next((home / path for home in (_PACKAGE, clone) if (home / path).exists()), path)


def inside(folder: Path, name: str | os.PathLike) -> Path:
    """`folder / name`. Raises a ValueError for a name that leaves the folder, is absolute or empty."""
    path = Path(os.path.normpath(folder / name))
    base = Path(os.path.normpath(folder))
    if "\0" in os.fspath(name) or Path(name).is_absolute() or path == base or base not in path.parents:
        raise ValueError(f"the name {os.fspath(name)!r} does not stay inside {folder}; choose another")
    return path


def printable(name: str | os.PathLike) -> str:
    """A name that any encoding can show: what is not UTF-8 in it, and control characters, become escapes."""
    text = os.fspath(name)
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)


def forgiving_streams() -> None:
    """Let standard output and error show as an escape what their encoding lacks, rather than fail."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            with contextlib.suppress(ValueError, OSError):  # a closed one
                reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def atomic(path: str | os.PathLike, *, durable: bool = True) -> Iterator[Path]:
    """Write a file whole or not at all.

        with atomic(path) as temporary:
            temporary.write_text(text)

    The temporary file lies beside `path` and has its suffix. It takes the place of `path` at the end of the block, and
    is removed if the block fails. Its name is short, and no other process or machine chooses the same one.

    Args:
        path: the file to write; its folder exists.
        durable: flush the bytes to the disk first, so that the file is whole after a crash of the machine as well.
            Leave it out for many small files that are checked when they are read.
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
        with contextlib.suppress(OSError):  # the error of the block matters, not this one
            temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file in UTF-8 by `atomic`."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_left_behind(path: Path) -> bool:
    """Whether this is a temporary file of `atomic` whose process, on this machine, no longer runs."""
    match = re.fullmatch(rf"\.tmp-{_host()}-(\d+)-[0-9a-f]{{8}}(\..*)?", path.name)
    return match is not None and not _is_running(int(match[1]))


def _host() -> str:
    """This machine as 8 hexadecimal digits: its name may be long."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_running(process: int) -> bool:
    import psutil  # late: the command line that restores pictures does not need it

    return psutil.pid_exists(process)


def flush_to_disk(path: Path) -> None:
    """Flush a file or folder to the disk by fsync. Windows cannot open folders, so they are skipped there."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # such a file system cannot
            raise
    finally:
        os.close(descriptor)
