"""What a run leaves: folders that appear whole, weights in another precision."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from iptv2_diffusion.data.own_folder import OwnFolder

# What we write into such folders: of a folder without a record these are replaced, all else is kept
_OURS = {".safetensors", ".json", ".yaml", ".bin", ".md"}


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once all is written; what was there stays till then.

    Files in it that were not written here are kept: they move into the new one, unless it has a file of their name.
    """
    temporary, old = (folder.with_name(f".tmp-{part}{folder.name}") for part in ("", "old-"))
    shutil.rmtree(temporary, ignore_errors=True)
    record = OwnFolder(folder.parent, "")
    yield temporary
    names = {path.relative_to(temporary).as_posix() for path in temporary.rglob("*") if path.is_file()}
    for name in foreign_files(folder, record, names):
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(folder / name, temporary / name)
    if record.is_claimed:
        for name in sorted(names):
            record.record(f"{folder.name}/{name}", (temporary / name).stat().st_size)
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.replace(old)  # two renames, so that a kill costs neither
    temporary.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def foreign_files(folder: Path, record: OwnFolder, names: set[str]) -> list[str]:
    """Files of a folder, by name inside it, that neither the record nor `names` knows as ours."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    known = any(f"{folder.name}/{name}" in record.files for name in found)
    ours = (
        (lambda name: f"{folder.name}/{name}" in record.files) if known else (lambda name: Path(name).suffix in _OURS)
    )
    return [name for name in found if name not in names and not ours(name)]


def cast(model: nn.Module, dtype: str) -> nn.Module:
    """The model's parameters in another dtype, but for the parts that it wants in float32.

    (diffusers' `to` casts those too, and warns of it.)
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model
