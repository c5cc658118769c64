"""Output folders with a record of our files, so that other files are never reused, counted or deleted.

    FOLDER/IPTV2_RECORD      lines of JSON: the kind of the folder, then the name and size of every file

A line is written before its file gets its name, so a kill leaves no file of ours unrecorded. With several processes,
each has its own record (IPTV2_RECORD-1 ...), and all records are read.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from iptv2_diffusion.data.image_folders import is_of_tools
from iptv2_diffusion.files import atomic, inside, printable

__all__ = ["RECORD", "ForeignFolderError", "OwnFolder"]

RECORD = "IPTV2_RECORD"
_LOGS = {".log", ".out", ".err"}  # files of shells and logs in a folder that looks empty to a user


class ForeignFolderError(ValueError):
    """Raised for a folder, or a file in it, that is not ours."""


class OwnFolder:
    """A folder with a record of our files.

    Args:
        folder: the folder; see `claim`.
        kind: description of its contents, such as "restored pictures".
        process: number of this process, if several write.
    """

    def __init__(self, folder: Path, kind: str, process: int = 0) -> None:
        self.folder, self.kind, self.process = Path(folder), kind, process
        self.files: dict[str, int | None] = {}  # size by name; None if it is unknown
        self._read()

    @classmethod
    def claim(
        cls,
        folder: Path,
        kind: str,
        *,
        process: int = 0,
        earlier: Callable[[Path], Iterable[str] | None] = lambda folder: None,
    ) -> OwnFolder:
        """Open the folder, and create it if it does not exist.

        Args:
            folder, kind, process: see the class.
            earlier: function that returns the names of the files that a version without records wrote to a folder, or
                None if it did not write to it.

        Raises:
            ForeignFolderError: the folder contains other files and has no record of ours of this kind.
            OSError: the folder cannot be created or written to.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        own = cls(folder, kind, process)
        if own._kinds:
            others = own._kinds - {kind}
            if others:
                raise ForeignFolderError(
                    f"{printable(folder)} holds {', '.join(sorted(others))}, not {kind}; choose another folder"
                )
        else:
            made = earlier(folder)
            strangers = [entry.name for entry in folder.iterdir() if not _is_dropping(entry.name)]
            if strangers and made is None:
                first = printable(min(strangers))
                raise ForeignFolderError(
                    f"{printable(folder)} has no record of {kind} and holds {len(strangers)} entries that were not "
                    f"made here, such as {first}; choose another folder, or empty this one"
                )
            own._append({"kind": kind})
            for name in made or ():
                own.record(name, None)
        return own

    @property
    def is_claimed(self) -> bool:
        """Return whether the folder has a record of ours."""
        return bool(self._kinds)

    def holds(self, name: str) -> bool:
        """Return whether a file of ours exists with its recorded size."""
        if name not in self.files:
            return False
        with contextlib.suppress(OSError):
            size = (self.folder / name).stat().st_size
            return self.files[name] in (None, size)
        return False

    def is_foreign(self, name: str) -> bool:
        """Return whether a file that is not ours has the name of one of our files."""
        return name not in self.files and os.path.lexists(self.folder / name)

    @contextlib.contextmanager
    def writing(self, name: str, *, durable: bool = True) -> Iterator[Path]:
        """Yield a temporary path to write; then record the file and give it the name `name`.

        Args:
            name: name of the file, inside the folder.
            durable: whether to flush it to the disk; see `atomic`.

        Raises:
            ForeignFolderError: a file of this name exists that is not ours.
            ValueError: the name leaves the folder.
        """
        path = inside(self.folder, name)
        if self.is_foreign(name):
            raise ForeignFolderError(f"{printable(path)} was not made here; move it away, or choose another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, durable=durable) as temporary:
            yield temporary
            self.record(name, temporary.stat().st_size)

    def record(self, name: str, size: int | None) -> None:
        """Record a file of ours before it gets its name."""
        if self.files.get(name, -1) != size:
            self._append({"file": name, "bytes": size})
            self.files[name] = size

    def delete(self, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Delete only the files of ours whose names are `wanted`."""
        for name in [name for name in self.files if wanted(name)]:
            with contextlib.suppress(FileNotFoundError, ValueError):
                inside(self.folder, name).unlink()
            del self.files[name]

    def _append(self, line: dict) -> None:
        suffix = f"-{self.process}" if self.process else ""
        with (self.folder / f"{RECORD}{suffix}").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _read(self) -> None:
        """Read all records. A kill may have cut their last lines."""
        self._kinds: set[str] = set()
        for path in sorted(self.folder.glob(f"{RECORD}*")) if self.folder.is_dir() else ():
            if path.name != RECORD and not path.name.removeprefix(f"{RECORD}-").isdigit():
                continue
            for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, AttributeError, RecursionError):
                    line = json.loads(text)
                    if isinstance(line.get("file"), str) and isinstance(line.get("bytes", ""), (int, type(None))):
                        self.files[line["file"]] = line["bytes"]
                    elif isinstance(line.get("kind"), str):
                        self._kinds.add(line["kind"])


def _is_dropping(name: str) -> bool:
    return is_of_tools(name) or Path(name).suffix in _LOGS
