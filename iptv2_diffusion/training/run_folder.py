"""The output folder of a run, claimed before anything is written there; dry runs; the command that goes on."""

from __future__ import annotations

import dataclasses
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, TypeVar

from iptv2_diffusion.data.own_folder import OwnFolder
from iptv2_diffusion.training.checkpoint import is_ours
from iptv2_diffusion.training.errors import user_errors
from iptv2_diffusion.training.options import TrainingConfig


def claim_run_folder(folder: Path) -> OwnFolder:
    """A run's output folder with our record; a `ForeignFolderError`, a ValueError, for a folder of something else."""

    def made_before_records(folder: Path) -> list[str] | None:
        known = (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()
        known = known or any(is_ours(path) for path in folder.glob("*checkpoint-*"))
        return [] if known else None

    return OwnFolder.claim(folder, "a training run", earlier=made_before_records)


RunConfig = TypeVar("RunConfig", bound=TrainingConfig)


def prepare_dry_run(config: RunConfig, **shorter: Any) -> RunConfig:
    """Shorten a configuration so that every stage runs once: two steps, a checkpoint and a preview after the first.

    Args:
        config: the whole run. The output folder of its dry run, OUTPUT_DIR/dry_run, is emptied here.
        shorter: options of the recipe that are cut as well.
    """
    folder = Path(config.output_dir) / "dry_run"
    if os.environ.get("RANK", "0") == "0":
        with user_errors(OSError, ValueError):
            claim_run_folder(folder.parent)
            claim_run_folder(folder)  # refuses a folder of that name that is not ours
        shutil.rmtree(folder, ignore_errors=True)
    every = dict.fromkeys(("checkpoint_every", "eval_every", "preview_every", "log_every"), 1)
    length = {"max_train_steps": 2, "max_train_minutes": None}
    return dataclasses.replace(config, output_dir=str(folder), report_to="none", **length, **every, **shorter)


def this_command() -> str:
    """The command that was started, to copy: a console script by its name, anything else through accelerate."""
    program = sys.argv[0]
    return (
        Path(program).name if Path(program).name.startswith("iptv2-") else f"accelerate launch {shlex.quote(program)}"
    )


def command_to_train_longer(config: TrainingConfig, step: int) -> str:
    """This run's command, for twice the `step` steps that it has done and for as long as they take."""
    words = [this_command(), *(shlex.quote(word) for word in sys.argv[1:]), f"--max_train_steps {2 * step}"]
    words += ["--overwrite false"] if config.overwrite else []
    words += ["--max_train_minutes none"] if config.max_train_minutes else []
    return " ".join(words)
