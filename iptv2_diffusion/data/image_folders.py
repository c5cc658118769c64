"""What a folder, or an archive, of images means: which files count, which are splits, which are classes.

As `datasets`' imagefolder and torchvision's ImageFolder read them: one sub-folder a class, perhaps under one folder a
split; or a metadata.csv, metadata.jsonl or metadata.parquet with a column file_name and one of labels. Hidden folders
and files, and those of tools (__MACOSX, @eaDir ...), do not count. Links are followed, each real folder once.
"""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from iptv2_diffusion.files import printable

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
# Suffixes of pictures that are not read, so that leaving them out is worth a word
OTHER_PICTURES = {
    ".jfif", ".jpe", ".pjpeg", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".ico", ".psd", ".tga",
    ".exr", ".hdr", ".pgm", ".pbm", ".pnm", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw", ".apng",
}  # fmt: skip
# Folder names of splits, in any case, by what they are called in `--train_split` and its kin
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


@dataclass
class Listing:
    """Files by their path inside a folder or archive.

    Attributes:
        files: images, by inner path, with what `read_bytes` takes.
        left_out: how many files were left out, by (reason, suffix).
        metadata: what the metadata files say, by inner path: (file, row).
    """

    files: dict[PurePosixPath, str] = field(default_factory=dict)
    left_out: Counter = field(default_factory=Counter)
    metadata: dict[PurePosixPath, tuple[str, Mapping[str, object]]] = field(default_factory=dict)

    def add(self, inner: PurePosixPath, source: str, suffixes: set[str]) -> None:
        """Take a file that is an image, count one that is not."""
        suffix = inner.suffix.lower()
        if any(is_of_tools(part) for part in inner.parts):
            self.left_out["hidden or of tools", suffix] += 1
        elif suffix not in suffixes:
            self.left_out["not of a suffix that is read", suffix] += 1
        elif not _is_utf8(source):
            self.left_out[f"with a name that is not UTF-8 ({printable(inner.name)})", suffix] += 1
        else:
            self.files[inner] = source

    @property
    def suffixes(self) -> set[str]:
        """Of all files, those that are no images included, those that are hidden not."""
        others = {suffix for reason, suffix in self.left_out if reason.startswith("not of a suffix")}
        return {inner.suffix.lower() for inner in self.files} | others

    def summary(self) -> str | None:
        """One line about images that were left out; None if there were none."""
        counts = {key: n for key, n in self.left_out.items() if key[1] in OTHER_PICTURES or "UTF-8" in key[0]}
        counts |= {key: n for key, n in self.left_out.items() if key[0].startswith(("no readable", "not in"))}
        if not counts:
            return None
        parts = [f"{n} {suffix or 'without suffix'} ({reason})" for (reason, suffix), n in sorted(counts.items())]
        return f"left out {sum(counts.values())} files: {', '.join(parts)}"


@dataclass
class Meaning:
    """What was understood.

    Attributes:
        files: images in order, with what `read_bytes` takes.
        labels: a class name or number for each; None without labels.
        text: the same in words, one line.
        from_folders: whether the labels are names of sub-folders.
        problem: why labels could not be determined although there are sub-folders; None otherwise.
    """

    files: list[str]
    labels: list[str | int] | None
    text: str
    from_folders: bool = False
    problem: str | None = None


def is_of_tools(name: str) -> bool:
    """Whether a file or folder is hidden or left by a tool."""
    return name.startswith(".") or name.casefold() in TOOL_NAMES


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def image_files(folder: Path, suffixes: set[str]) -> Iterator[Path]:
    """Image files under a folder, sorted, those hidden or of tools left out."""
    found = [p for p in _walk(folder) if p.suffix.lower() in suffixes]
    found = [p for p in found if not any(is_of_tools(part) for part in p.relative_to(folder).parts)]
    yield from sorted(found)


def _walk(folder: Path) -> Iterator[Path]:
    """Files below a folder; links are followed, but each real folder is entered once, by its real path first."""
    seen: set[str] = set()

    def visit(path: Path) -> Iterator[Path]:
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
            if is_of_tools(entry.name) and entry.is_dir():
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from visit(Path(entry.path))
            elif entry.is_dir():
                links.append(Path(entry.path))
            elif entry.is_file():
                yield Path(entry.path)
        for link in links:
            yield from visit(link)

    yield from visit(folder)


def list_folder(folder: Path, suffixes: set[str]) -> Listing:
    """All files of a folder, with what its metadata files say."""
    listing = Listing()
    for path in sorted(_walk(folder)):
        inner = PurePosixPath(path.relative_to(folder).as_posix())
        if path.name in METADATA:
            for name, row in _metadata_rows(path):
                where = PurePosixPath(os.path.normpath(inner.parent / name))
                listing.metadata[where] = (path.name, row)
        else:
            listing.add(inner, str(path), suffixes)
    return listing


def _metadata_rows(path: Path) -> list[tuple[str, Mapping[str, object]]]:
    """(file name, row) of a metadata file. Raises a ValueError that names it."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            rows = pyarrow.parquet.read_table(path).to_pylist()
        else:
            text = path.read_text(encoding="utf-8-sig")
            if path.suffix == ".csv":
                rows = list(csv.DictReader(text.splitlines()))
            else:
                rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        named = [(row.get("file_name", row.get("image_file_name")), row) for row in rows]
    except Exception as error:  # of csv, json and pyarrow
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())[:160]}") from error
    if not all(isinstance(name, str) for name, _ in named):
        raise ValueError(f"{path}: every row needs a file_name")
    return named


def split_of(folders: Mapping[str, bool], split: str, where: str) -> str | None:
    """The folder that holds a split; None where there are no split folders and "train" is everything.

    Args:
        folders: name of each folder below `where`, and whether it holds files that count.

    Raises:
        ValueError: no such split, or folders with files beside the splits: classes, one of which may be called "train".
    """
    splits = sorted(name for name, holds in folders.items() if holds and name.casefold() in SPLITS)
    if not splits:
        if split != "train":
            raise ValueError(f'{where}: no split "{split}"; without folders train/, test/ … all are the split "train"')
        return None
    beside = sorted(name for name, holds in folders.items() if holds and name not in splits)
    if beside:
        shown = ", ".join(map(printable, beside[:SHOWN])) + (" …" if len(beside) > SHOWN else "")
        raise ValueError(
            f"{where}: {', '.join(splits)} would be splits, but {shown} beside them would not: if all are classes, "
            "move them into a folder train/ of their own, else move the others away"
        )
    if split in splits:
        return split
    meant = SPLITS.get(split.casefold())
    fitting = [name for name in splits if meant is not None and SPLITS[name.casefold()] == meant]
    if len(fitting) > 1:
        raise ValueError(f'{where}: the split "{split}" may be any of {", ".join(fitting)}; name one of them')
    if not fitting:
        raise ValueError(f'{where}: no split "{split}"; there are: {", ".join(splits)}')
    return fitting[0]


def understand(
    listing: Listing,
    split: str,
    where: str,
    label_columns: Sequence[str],
    is_readable: Callable[[str], bool],
) -> Meaning:
    """Files and labels of a split of a listing.

    Args:
        listing: see there; what is left out is counted in it.
        split: its name.
        where: what the listing is of, for messages.
        label_columns: names of a metadata column with labels, the first that is there counts.
        is_readable: whether an image can be decoded: asked until each class has one.

    Raises:
        ValueError: no such split, or no image in it.
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
    told = _labels_of_metadata(listing, files, label_columns)
    if told is not None:
        return told
    depth = 0 if folder is None else 1
    inner = {path: path.parts[depth:] for path in files}
    loose = [path for path, parts in inner.items() if len(parts) == 1]
    if not loose:
        classes = {path: parts[0] for path, parts in inner.items()}
        files, classes = _readable_classes(listing, files, classes, is_readable)
        names = sorted(set(classes.values()))
        shown = ", ".join(map(printable, names[:8])) + (", …" if len(names) > 8 else "")
        text = f"{len(names)} class{'es' * (len(names) > 1)} from sub-folders: {shown}"
        return Meaning(list(files.values()), [classes[path] for path in files], text, from_folders=True)
    if len(loose) < len(files):
        problem = (
            f"no labels, because {len(loose)} of {len(files)} images ({printable(loose[0].name)} ...) lie beside the "
            "sub-folders; move them into one if the sub-folders are classes"
        )
        return Meaning(list(files.values()), None, problem, problem=problem)
    return Meaning(list(files.values()), None, "no labels: the images lie in no sub-folders")


def _labels_of_metadata(
    listing: Listing, files: Mapping[PurePosixPath, str], label_columns: Sequence[str]
) -> Meaning | None:
    """Labels by the metadata files; None if there are none, or no such column."""
    rows = {path: listing.metadata[path] for path in files if path in listing.metadata}
    names = {name for _, row in rows.values() for name in row}
    column = next((name for name in label_columns if name in names), None)
    if not rows or column is None:
        return None
    kept = {path: rows[path][1].get(column) for path in rows if rows[path][1].get(column) not in (None, "")}
    for path in files:
        if path not in kept:
            listing.left_out[f"not in {rows[next(iter(rows))][0]}", path.suffix.lower()] += 1
    values = list(kept.values())
    if all(isinstance(value, str) and value.isdecimal() for value in values):  # of a CSV, which has text only
        values = [int(value) for value in values]
    classes = sorted(set(values), key=str)
    shown = ", ".join(printable(str(value)) for value in classes[:8]) + (", …" if len(classes) > 8 else "")
    text = f"{len(classes)} classes from column {column!r} of {next(iter(rows.values()))[0]}: {shown}"
    return Meaning([files[path] for path in kept], values, text)


def _readable_classes(
    listing: Listing,
    files: Mapping[PurePosixPath, str],
    classes: Mapping[PurePosixPath, str],
    is_readable: Callable[[str], bool],
) -> tuple[dict[PurePosixPath, str], dict[PurePosixPath, str]]:
    """Without the classes of which no image can be read."""
    readable: dict[str, bool] = {}
    for path, name in classes.items():
        if not readable.get(name):
            readable[name] = is_readable(files[path])
    if not any(readable.values()):  # which is told, with the reason, where they are decoded
        return dict(files), dict(classes)
    for path, name in classes.items():
        if not readable[name]:
            listing.left_out[f"no readable image in {printable(name)}", path.suffix.lower()] += 1
    kept = {path: source for path, source in files.items() if readable[classes[path]]}
    return kept, {path: classes[path] for path in kept}
