"""Checkpoints that are complete or absent: temporary folder, fsync, manifest with SHA-256, atomic rename, last k kept.

    output_dir/checkpoint-00001000/
        manifest.json           step, config, progress, SHA-256 and size of every file; written last
        model.safetensors       + ema.safetensors, optimizer.bin, random_states_*.pkl: accelerate's save_state
        sharded/                instead of these, where every process writes its part: torch.distributed.checkpoint

A checkpoint counts only under its final name, with a manifest whose hashes match. A damaged one is renamed to
`damaged-checkpoint-*`, and the previous one is used. A checkpoint of another configuration is refused with the fields
that differ. If the disk fills up, the incomplete checkpoint is removed. Older checkpoints are deleted only after the
new one is complete.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from iptv2_diffusion.files import file_sha256, flush_to_disk
from iptv2_diffusion.messages import one_line
from iptv2_diffusion.training.errors import UserError, system_error

if TYPE_CHECKING:
    from iptv2_diffusion.training.ema import ModelState

MANIFEST = "manifest.json"
SHARDED = "sharded"
TEMPORARY = (".tmp-checkpoint-*", ".tmp-delete-checkpoint-*")
_NAME = re.compile(r"^checkpoint-(\d{8,})$")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: its path and its manifest."""

    path: Path
    step: int
    progress: dict[str, Any]
    config: dict[str, Any]


class CheckpointManager:
    """Saves and finds the checkpoints of one run.

    Args:
        output_dir: the run's folder.
        accelerator: holds the prepared model and optimiser and the objects registered for checkpointing.
        config: the fields that must agree on resumption (`config.frozen_fields`).
        defaults: values of the fields that a checkpoint of an older version does not have.
        accept_changes: whether to resume with another configuration and report the difference, instead of refusing.
        keep_last: number of checkpoints to keep.
        say: function that prints a message (by default on the main process).
        state: the model's state, which reads and writes sharded checkpoints.
        sharded: whether to write sharded checkpoints.
    """

    def __init__(
        self,
        output_dir: str | Path,
        accelerator: Accelerator,
        config: Mapping[str, Any],
        *,
        defaults: Mapping[str, Any] | None = None,
        accept_changes: bool = False,
        keep_last: int = 2,
        say: Callable[[str], None] | None = None,
        state: ModelState | None = None,
        sharded: bool = False,
    ) -> None:
        self.state, self.sharded = state, sharded
        self.output_dir = Path(output_dir)
        self.accelerator = accelerator
        self.config = json.loads(json.dumps(dict(config)))
        self.defaults = json.loads(json.dumps(dict(defaults or {})))
        self.accept_changes = accept_changes
        self.keep_last = keep_last
        self.say = say or accelerator.print

    # ----------------------------------------------------------------------------------------------------------------
    # Saving

    def save(self, step: int, progress: Mapping[str, Any] | None = None) -> Path:
        """Write checkpoint `step`, then delete the oldest ones beyond `keep_last`. All processes call this together."""
        try:
            return self._save(step, progress)
        except KeyboardInterrupt:  # the second signal; the first one requested this save
            if self.accelerator.is_main_process:
                self._clean(f".tmp-checkpoint-{step:08d}")
                whole = ", ".join(path.name for path in self._folders() if is_ours(path)) or "none yet"
                self.say(f"saving checkpoint {step} was interrupted; complete checkpoints: {whole}")
            raise

    def _save(self, step: int, progress: Mapping[str, Any] | None) -> Path:
        final = self.output_dir / f"checkpoint-{step:08d}"
        temporary = self.output_dir / f".tmp-checkpoint-{step:08d}"
        failure: str | None = None
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        try:
            temporary.mkdir(parents=True, exist_ok=True)
            if self.sharded:
                self.state.save_sharded(temporary / SHARDED)
            else:
                self.accelerator.save_state(str(temporary))
        except (OSError, RuntimeError, SafetensorError, CheckpointException) as error:
            failure = _reason(error)
        if self._first_failure(failure) is None and self.accelerator.is_main_process:
            try:
                self._seal(temporary, final, step, dict(progress or {}))
            except OSError as error:
                failure = _reason(error)
        failure = self._first_failure(failure)
        if failure is not None:
            self._give_up(temporary, step, failure)
        if self.accelerator.is_main_process:
            self._rotate()
        return final

    def _seal(self, temporary: Path, final: Path, step: int, progress: dict[str, Any]) -> None:
        """Hash and flush every file, write the manifest, and give the folder its name."""
        files = {}
        for path in sorted(p for p in temporary.rglob("*") if p.is_file()):
            files[path.relative_to(temporary).as_posix()] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
            flush_to_disk(path)
        manifest = {"format": 1, "step": step, "progress": progress, "config": self.config, "files": files}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        flush_to_disk(temporary / MANIFEST)
        flush_to_disk(temporary)
        if final.exists():  # the same step again, as after a resumption: the new checkpoint replaces the old one
            self._set_aside(final)
        os.replace(temporary, final)
        flush_to_disk(self.output_dir)
        self._clean(f".tmp-delete-{final.name}")

    def _give_up(self, temporary: Path, step: int, failure: str) -> None:
        if self.accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        left = [path.name for path in self._folders()]
        free = shutil.disk_usage(self.output_dir).free / 2**20
        raise UserError(
            f"cannot save checkpoint {step} in {self.output_dir}: {failure} ({free:.0f} MB free); older checkpoints "
            f"are complete ({', '.join(left) or 'none yet'}): make room and run the same command again"
        )

    def _first_failure(self, failure: str | None) -> str | None:
        """Return the failure of any process, so that all processes act in the same way."""
        if self.accelerator.num_processes == 1:
            return failure
        flag = torch.tensor([1.0 if failure else 0.0], device=self.accelerator.device)
        if self.accelerator.reduce(flag, "sum").item() == 0:
            return None
        return failure or "another process could not write its part"

    def _rotate(self) -> None:
        for path in [path for path in self._folders() if is_ours(path)][: -self.keep_last]:
            self._delete(path)

    def _delete(self, path: Path) -> None:
        """Remove a checkpoint. Files that its manifest does not name move to left-of-checkpoint-*."""
        self._set_aside(path)
        self._clean(f".tmp-delete-{path.name}")

    def _set_aside(self, path: Path) -> None:
        """Rename a checkpoint before its deletion, so that a kill leaves no folder that looks like a checkpoint."""
        if not is_ours(path):  # a folder that is not ours
            os.replace(path, _free_name(path.with_name(f"left-of-{path.name}")))
            return
        for name in foreign_files(path):
            kept = path.with_name(f"left-of-{path.name}") / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path / name, _free_name(kept))
        doomed = path.with_name(f".tmp-delete-{path.name}")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(path, doomed)

    # ----------------------------------------------------------------------------------------------------------------
    # Finding and loading

    def latest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, or None. Sets damaged ones aside and refuses other configurations."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                self._clean()
                found[0] = self._newest_whole()
            except UserError as error:
                found[0] = error
        if self.accelerator.num_processes > 1:
            broadcast_object_list(found)
        if isinstance(found[0], UserError):
            raise found[0]
        return found[0]

    def load(self, checkpoint: Checkpoint) -> None:
        """Load the checkpoint's state into the accelerator's objects. All processes call this together."""
        try:
            if (checkpoint.path / SHARDED).is_dir():
                self.state.load_sharded(checkpoint.path / SHARDED)
            else:
                self.accelerator.load_state(str(checkpoint.path))
                if self.state is not None:
                    self.state.lay_out_optimizer()
        except (RuntimeError, KeyError, ValueError, FileNotFoundError, CheckpointException) as error:
            raise UserError(
                f"{checkpoint.path} does not fit this model ({_reason(error)[:200]}); choose another --output_dir"
            ) from error

    def delete_all(self) -> None:
        """Remove every checkpoint of the run (`--overwrite`)."""
        if self.accelerator.is_main_process:
            self._clean()
            for path in filter(is_ours, self._folders()):
                self._delete(path)
        self.accelerator.wait_for_everyone()

    def _newest_whole(self) -> Checkpoint | None:
        for path in reversed(self._folders()):
            try:
                manifest = verify(path)
            except DamagedCheckpointError as error:
                aside = _free_name(path.with_name(f"damaged-{path.name}"))
                os.replace(path, aside)
                self.say(f"{path.name} is damaged ({error}); renamed to {aside.name}; trying the previous one")
                continue
            differing = differing_fields({**self.defaults, **manifest["config"]}, self.config)
            if differing and not self.accept_changes:
                raise UserError(
                    f"{path} is from another configuration: {'; '.join(differing)}. Restore these values, choose "
                    "another --output_dir, start again with --overwrite, or continue anyway with --accept_changes"
                )
            if differing:
                self.say(f"continuing from {path.name} with another configuration: {'; '.join(differing)}")
            return Checkpoint(path, manifest["step"], manifest["progress"], manifest["config"])
        return None

    def _folders(self) -> list[Path]:
        """Checkpoint folders, oldest first."""
        if not self.output_dir.is_dir():
            return []
        named = [(int(m[1]), p) for p in self.output_dir.iterdir() if (m := _NAME.match(p.name)) and p.is_dir()]
        return [path for _, path in sorted(named)]

    def _clean(self, *names: str) -> None:
        """Remove the incomplete files of a killed run, or the named ones."""
        for pattern in names or TEMPORARY:
            for path in self.output_dir.glob(pattern):
                shutil.rmtree(path, ignore_errors=True)


def is_ours(path: Path) -> bool:
    """Return whether a folder is one of our checkpoints, complete or damaged: it has our manifest."""
    return _read_manifest(path) is not None


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """Return the manifest of a checkpoint; None if it is missing, cannot be read, or is not ours."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("step"), int):
        return None
    files = manifest.get("files")
    is_whole = isinstance(files, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("bytes"), int) and isinstance(entry.get("sha256"), str)
        for entry in files.values()
    )
    has_dicts = all(isinstance(manifest.get(name), dict) for name in ("config", "progress"))
    return manifest if is_whole and has_dicts else None


def foreign_files(path: Path) -> list[str]:
    """Files of a checkpoint's folder that its manifest does not name."""
    files = json.loads((path / MANIFEST).read_text(encoding="utf-8"))["files"]
    found = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    return [name for name in found if name != MANIFEST and name not in files]


class DamagedCheckpointError(Exception):
    """Raised for a checkpoint whose files do not match its manifest."""


def verify(path: Path) -> dict[str, Any]:
    """Check every file against the manifest and return the manifest. Raises `DamagedCheckpointError`."""
    manifest = _read_manifest(path)
    if manifest is None:
        raise DamagedCheckpointError(f"its {MANIFEST} cannot be read")
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise DamagedCheckpointError(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise DamagedCheckpointError(f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}")
        if file_sha256(file) != expected["sha256"]:
            raise DamagedCheckpointError(f"the SHA-256 of {name} does not match")
    return manifest


def differing_fields(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return 'name is A there, B here' for every field that differs. A missing field counts as None."""
    names = sorted(set(saved) | set(wanted))
    return [
        f"{name} is {saved.get(name)!r} there, {wanted.get(name)!r} here"
        for name in names
        if saved.get(name) != wanted.get(name)
    ]


def _reason(error: BaseException) -> str:
    """Return the plainest reason of a failed write. torch hides or loses the operating system's error."""
    cause: BaseException | None = error
    while cause is not None:
        number = system_error(cause)
        if number is not None:
            return os.strerror(number)
        cause = cause.__cause__ or cause.__context__
    if "inline_container" in str(error):  # an error of torch.save, which names only a place in its own code
        return "a file could not be written to its end"
    return one_line(error)


def _free_name(path: Path) -> Path:
    candidate, number = path, 1
    while candidate.exists():
        candidate, number = path.with_name(f"{path.name}-{number}"), number + 1
    return candidate
