"""Interpretation of a folder or an archive of images: images, splits and classes.

The rules are those of `datasets`' imagefolder and torchvision's ImageFolder. There is one sub-folder per class,
optionally inside one folder per split, or a metadata.csv, metadata.jsonl or metadata.parquet with a column file_name
and a column of labels. Hidden files and folders and those of tools (__MACOSX, @eaDir ...) are ignored. Links are
followed, each real folder once.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from iptv2_diffusion.files import printable
from iptv2_diffusion.messages import one_line

__all__ = ["Listing", "Meaning", "image_files", "is_of_tools", "list_folder", "split_of", "understand"]

TOOL_NAMES = {
    "__macosx",
    "@eadir",
    "#recycle",
    "$recycle.bin",
    "system volume information",
    "lost+found",
    "__pycache__",
    "thumbs.db",
    "desktop.ini",
    "icon\r",
}
METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
# Suffixes of images that cannot be read. The summary reports that they are left out.
OTHER_PICTURES = {
    ".jfif", ".jpe", ".pjpeg", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".ico", ".psd", ".tga",
    ".exr", ".hdr", ".pgm", ".pbm", ".pnm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".apng",
}  # fmt: skip
# Folder names of splits, in upper or lower case, by their name in options such as `--train_split`
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "heldout": "heldout",
    "held-out": "heldout",
}
SHOWN = 5
_FRACTION = re.compile(r"-?\d+\.\d*")  # as tables write class numbers where a label is missing


@dataclass
class Listing:
    """Files by their path inside a folder or archive.

    Attributes:
        files: images, by inner path, with the argument of `read_bytes`.
        left_out: number of files that were left out, by (reason, suffix).
        metadata: rows of the metadata files, by inner path: (file, row).
    """

    files: dict[PurePosixPath, str] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)
    metadata: dict[PurePosixPath, tuple[str, Mapping[str, object]]] = field(default_factory=dict)

    def add(self, inner: PurePosixPath, source: str, suffixes: set[str], *, is_link_to_nothing: bool = False) -> None:
        """Add a file that is an image, and count a file that is not, or a link whose file is missing."""
        suffix = inner.suffix.lower()
        if any(is_of_tools(part) for part in inner.parts):
            self.left_out["hidden, or of a tool", suffix] += 1
        elif suffix not in suffixes:
            self.left_out["unsupported suffix", suffix] += 1
        elif is_link_to_nothing:
            self.left_out["broken link", suffix] += 1
        elif not _is_utf8(source):
            self.left_out[f"with a name that is not UTF-8 ({printable(inner.name)})", suffix] += 1
        else:
            self.files[inner] = source

    @property
    def suffixes(self) -> set[str]:
        """Suffixes of all files, including those that are not images and excluding hidden files."""
        others = {suffix for reason, suffix in self.left_out if reason.startswith("unsupported suffix")}
        return {inner.suffix.lower() for inner in self.files} | others

    def summary(self) -> str | None:
        """Return one line about images that were left out; None if there are none."""
        counts = {key: n for key, n in self.left_out.items() if key[1] in OTHER_PICTURES or "UTF-8" in key[0]}
        problems = ("no readable", "without", "link", "broken link")
        counts |= {key: n for key, n in self.left_out.items() if key[0].startswith(problems)}
        if not counts:
            return None
        parts = [f"{n} {suffix or 'without suffix'} ({reason})" for (reason, suffix), n in sorted(counts.items())]
        return f"left out {sum(counts.values())} files: {', '.join(parts)}"


@dataclass
class Meaning:
    """Images and labels of a folder or archive.

    Attributes:
        files: images in order, with the argument of `read_bytes`.
        labels: a class name or number for each image; None without labels.
        text: one line that describes the labels.
        from_folders: whether the labels are names of sub-folders.
        problem: reason why there are no labels although there are sub-folders; None otherwise.
    """

    files: list[str]
    labels: list[str | int] | None
    text: str
    from_folders: bool = False
    problem: str | None = None


def is_of_tools(name: str) -> bool:
    """Return whether a file or folder is hidden or belongs to a tool."""
    return name.startswith(".") or name.casefold() in TOOL_NAMES


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def image_files(folder: Path, suffixes: set[str]) -> Iterator[Path]:
    """Return the image files under a folder, sorted, without those that are hidden or belong to tools.

    Links to nothing are among them, so that a caller that reads them can report them.
    """
    found = [Path(entry.path) for entry in _walk(folder)]
    found = [p for p in found if p.suffix.lower() in suffixes]
    found = [p for p in found if not any(is_of_tools(part) for part in p.relative_to(folder).parts)]
    yield from sorted(found)


def _walk(folder: Path) -> Iterator[os.DirEntry]:
    """Yield the files below a folder, and the broken links.

    Links are followed. Each real folder is entered once, by its real path first. Pipes, sockets and devices are left
    out, because reading them may never end.
    """
    seen: set[str] = set()

    def visit(path: str | Path) -> Iterator[os.DirEntry]:
        real = os.path.realpath(path)
        if real in seen:
            return
        seen.add(real)
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except PermissionError:
            return
        links = []
        for entry in entries:
            leads_nowhere = is_link_to_nothing(entry)
            if not leads_nowhere and entry.is_dir():
                if is_of_tools(entry.name):
                    continue
                if entry.is_symlink():
                    links.append(entry.path)
                else:
                    yield from visit(entry.path)
            elif leads_nowhere or entry.is_file():
                yield entry
        for link in links:
            yield from visit(link)

    yield from visit(folder)


def is_link_to_nothing(entry: os.DirEntry) -> bool:
    """Return whether an entry is a link whose file is missing, or one of a circle of links."""
    return entry.is_symlink() and not os.path.exists(entry.path)


def list_folder(folder: Path, suffixes: set[str]) -> Listing:
    """List all files of a folder and the rows of its metadata files."""
    listing = Listing()
    for entry in sorted(_walk(folder), key=lambda entry: Path(entry.path)):
        path = Path(entry.path)
        inner = PurePosixPath(path.relative_to(folder).as_posix())
        if path.name in METADATA:
            for name, row in _metadata_rows(path):
                where = PurePosixPath(os.path.normpath(inner.parent / name))
                before = listing.metadata.setdefault(where, (path.name, row))[1]
                if before != row:
                    raise ValueError(f"{path}: has two rows for {printable(name)}, which differ; remove one")
        else:
            listing.add(inner, str(path), suffixes, is_link_to_nothing=is_link_to_nothing(entry))
    return listing


def _metadata_rows(path: Path) -> list[tuple[str, Mapping[str, object]]]:
    """Yield (file name, row) of a metadata file. Raises a ValueError that names the file."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".csv":
                rows = list(csv.DictReader(io.StringIO(text, newline="")))
            else:
                rows = [json.loads(line) for line in text.split("\n") if line.strip()]
        named = [(row.get("file_name", row.get("image_file_name")), row) for row in rows]
    except Exception as error:  # errors of csv, json and pyarrow
        raise ValueError(f"{path} cannot be read: {one_line(error, 160)}") from error
    if not all(isinstance(name, str) for name, _ in named):
        columns = ", ".join(sorted({printable(str(name)) for row in rows for name in row})[:SHOWN])
        hint = "; separate the columns by commas" if ";" in columns or "\\t" in columns else ""
        raise ValueError(f"{path}: every row needs a file_name, but the columns are {columns}{hint}")
    return named


def split_of(folders: Mapping[str, bool], split: str, where: str) -> str | None:
    """Return the folder of a split; None if there are no split folders and "train" is everything.

    Args:
        folders: name of each folder in `where`, and whether it contains files that count.

    Raises:
        ValueError: the split does not exist, or other folders with files are next to the splits. These may be classes,
            of which one is called "train".
    """
    splits = sorted(name for name, holds in folders.items() if holds and name.casefold() in SPLITS)
    if not splits:
        if split != "train":
            raise ValueError(f'{where}: no split "{split}"; without folders train/, test/ … all are the split "train"')
        return None
    others = sorted(name for name, holds in folders.items() if holds and name not in splits)
    if others:
        shown = ", ".join(map(printable, others[:SHOWN])) + (" …" if len(others) > SHOWN else "")
        raise ValueError(
            f"{where}: {', '.join(splits)} are names of splits, but {shown} next to them are not; if all are classes, "
            "move them into one folder train/, otherwise move the others away"
        )
    if split in splits:
        return split
    meant = SPLITS.get(split.casefold())
    fitting = [name for name in splits if meant is not None and SPLITS[name.casefold()] == meant]
    if len(fitting) > 1:
        raise ValueError(f'{where}: the split "{split}" may be any of {", ".join(fitting)}; name one of them')
    if not fitting:
        raise ValueError(f'{where}: no split "{split}"; the splits are: {", ".join(splits)}')
    return fitting[0]


def understand(
    listing: Listing,
    split: str,
    where: str,
    label_columns: Sequence[str],
    is_readable: Callable[[str], bool],
) -> Meaning:
    """Return the files and the labels of a split of a listing.

    Args:
        listing: see `Listing`. Files that are left out are counted there.
        split: name of the split.
        where: name of the folder or archive, for messages.
        label_columns: possible names of a metadata column with labels; the first one that exists counts.
        is_readable: predicate whether an image can be decoded. It is called until each class has a readable image.

    Raises:
        ValueError: the split does not exist or has no images.
    """
    holds: dict[str, bool] = {}
    for inner in listing.files:
        if len(inner.parts) > 1:
            holds[inner.parts[0]] = True
    folder = split_of(holds, split, where)
    files = {i: s for i, s in listing.files.items() if folder is None or i.parts[0] == folder}
    if folder is not None:
        where = f"{where}/{folder}"
    if not files:
        raise ValueError(f"{where}: no images")
    from_metadata = _labels_of_metadata(listing, files, label_columns, where)
    if from_metadata is not None:
        return from_metadata
    depth = 0 if folder is None else 1
    below = {path: path.parts[depth:] for path in files}
    loose = [path for path, parts in below.items() if len(parts) == 1]
    if not loose:
        classes = {path: parts[0] for path, parts in below.items()}
        files, classes = _readable_classes(listing, files, classes, is_readable)
        names = sorted(set(classes.values()))
        shown = ", ".join(map(printable, names[:8])) + (", …" if len(names) > 8 else "")
        text = f"{len(names)} class{'es' * (len(names) > 1)} from sub-folders: {shown}"
        return Meaning(list(files.values()), [classes[path] for path in files], text, from_folders=True)
    if len(loose) < len(files):
        problem = (
            f"no labels, because {len(loose)} of {len(files)} images ({printable(loose[0].name)} ...) are next to the "
            "sub-folders; if the sub-folders are classes, move these images into one"
        )
        return Meaning(list(files.values()), None, problem, problem=problem)
    text = "no labels: the images are not in sub-folders"
    if listing.metadata:
        name, (file, _) = next(iter(listing.metadata.items()))
        if not listing.metadata.keys() & files.keys():
            text = f"no labels: {file} names none of the images, but {printable(str(name))}"
            return Meaning(list(files.values()), None, text, problem=text)
    return Meaning(list(files.values()), None, text)


def _labels_of_metadata(
    listing: Listing, files: Mapping[PurePosixPath, str], label_columns: Sequence[str], where: str
) -> Meaning | None:
    """Return the labels from the metadata files; None if there are no such files or no such column.

    Raises a ValueError for a label that is neither an integer nor text.
    """
    rows = {path: listing.metadata[path] for path in files if path in listing.metadata}
    names = {name for _, row in rows.values() for name in row}
    column = next((name for name in label_columns if name in names), None)
    if not rows or column is None:
        return None
    file = next(iter(rows.values()))[0]
    kept = {path: rows[path][1].get(column) for path in rows if rows[path][1].get(column) not in (None, "")}
    for path in files:
        if path not in kept:
            listing.left_out[f"without a label in {file}", path.suffix.lower()] += 1
    values: list[Any] = list(kept.values())
    odd = next((value for value in values if not _is_label(value)), None)
    if odd is None and all(isinstance(value, str) and _FRACTION.fullmatch(value) for value in values):
        odd = values[0]
    if odd is not None:
        raise ValueError(
            f'{where}: column "{column}" of {file} has the label {str(odd)[:40]}, neither a class number nor a name; '
            'label_column "ignore" leaves it out'
        )
    if all(isinstance(value, str) and re.fullmatch(r"-?\d{1,18}", value) for value in values):  # a CSV has only text
        values = [int(value) for value in values]
    classes = sorted(set(values), key=str)
    shown = ", ".join(printable(str(value)) for value in classes[:8]) + (", …" if len(classes) > 8 else "")
    text = f"{len(classes)} classes from column {column!r} of {file}: {shown}"
    return Meaning([files[path] for path in kept], values, text)


def _is_label(value: object) -> bool:
    """Return whether a value of a metadata file is a class name, or a number that a data set can hold."""
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63)


def _readable_classes(
    listing: Listing,
    files: Mapping[PurePosixPath, str],
    classes: Mapping[PurePosixPath, str],
    is_readable: Callable[[str], bool],
) -> tuple[dict[PurePosixPath, str], dict[PurePosixPath, str]]:
    """Remove the classes without a readable image."""
    readable: dict[str, bool] = {}
    for path, name in classes.items():
        if not readable.get(name):
            readable[name] = is_readable(files[path])
    if not any(readable.values()):  # the decoder reports this with the reason
        return dict(files), dict(classes)
    for path, name in classes.items():
        if not readable[name]:
            listing.left_out[f"no readable image in {printable(name)}", path.suffix.lower()] += 1
    kept = {path: source for path, source in files.items() if readable[classes[path]]}
    return kept, {path: classes[path] for path in kept}
