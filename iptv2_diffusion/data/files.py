"""Files: their bytes, paths as users give them, names that fit and stay where they belong."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["DISK_ERRORS", "file_sha256", "forgiving_streams", "inside", "printable", "user_path", "written_whole"]

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
def written_whole(path: Path) -> Iterator[Path]:
    """A file to write, beside `path` and with its suffix, that takes its place once all is written.

    Its name is short whatever the name of `path` is; it is removed if anything fails.
    """
    digest = hashlib.sha256(os.fsencode(path.name)).hexdigest()[:8]
    temporary = path.with_name(f".tmp-{os.getpid()}-{digest}{path.suffix[:16]}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
