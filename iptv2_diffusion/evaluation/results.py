"""Output of a run: the model to save, casting of its weights, and atomic replacement of folders."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.training.adapters import adapter_state_dict, add_lora, merge_lora
from iptv2_diffusion.training.errors import user_errors

# Suffixes of the files that we write. In a folder without a record, these files are replaced and all others are kept.
_OURS = {".safetensors", ".json", ".yaml", ".bin", ".md"}


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """Context manager that yields a temporary folder and replaces `folder` with it on success.

    Until then `folder` does not change. Files in `folder` that a user added are kept: they are copied to the new folder
    unless it has a file of the same name.
    """
    temporary, old = (folder.with_name(f".tmp-{part}{folder.name}") for part in ("", "old-"))
    shutil.rmtree(temporary, ignore_errors=True)
    if old.exists() and not folder.exists():  # a process was killed between the two renames below
        old.replace(folder)
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
        folder.replace(old)  # with two renames, a killed process loses neither folder
    temporary.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def foreign_files(folder: Path, record: OwnFolder, names: set[str]) -> list[str]:
    """Return the files of a folder, by relative name, that are neither in the record nor in `names`."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    known = any(f"{folder.name}/{name}" in record.files for name in found)
    ours = (
        (lambda name: f"{folder.name}/{name}" in record.files) if known else (lambda name: Path(name).suffix in _OURS)
    )
    return [name for name in found if name not in names and not ours(name)]


def trained_model(
    module: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    lora_rank: int | None,
    lora_folder: Path,
    save_lora_weights: Callable[[Path, dict[str, Tensor]], None],
) -> nn.Module:
    """Return a new model of the configuration of `module` with these weights. An adapter is written and then merged.

    Args:
        module: the bare model of the run.
        weights: its averaged weights, those of an adapter included.
        lora_rank: rank of the adapter; None without one.
        lora_folder: folder for the adapter.
        save_lora_weights: that of the pipeline's class.

    Raises:
        UserError: the adapter cannot be written.
    """
    model = type(module).from_config(module.config)
    if lora_rank:
        add_lora(model, lora_rank)
    model.load_state_dict(weights)
    if lora_rank:
        with user_errors(OSError), replaced(lora_folder) as temporary:
            save_lora_weights(temporary, adapter_state_dict(model))
        merge_lora(model)
    return model


def cast(model: nn.Module, dtype: str) -> nn.Module:
    """Cast the parameters of a model in place, except those of `_keep_in_fp32_modules`, and return the model.

    diffusers' `to` would cast these as well, with a warning.
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model
