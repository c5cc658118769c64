"""The output folder of a run, claimed before anything is written there; dry runs; the command that goes on."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path

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


def prepare_dry_run(config: TrainingConfig) -> None:
    """Shorten a configuration so that every stage runs once: two steps, a checkpoint and a preview after the first."""
    config.output_dir = str(Path(config.output_dir) / "dry_run")
    config.max_train_steps, config.max_train_minutes = 2, None
    config.checkpoint_every = config.eval_every = config.preview_every = config.log_every = 1
    config.report_to = "none"
    if os.environ.get("RANK", "0") == "0":
        with user_errors(OSError, ValueError):
            claim_run_folder(Path(config.output_dir).parent)
            claim_run_folder(Path(config.output_dir))  # refuses a folder of that name that is not ours
        shutil.rmtree(config.output_dir, ignore_errors=True)


def command_to_train_longer(config: TrainingConfig, step: int) -> str:
    """This run's command, for twice the `step` steps that it has done and for as long as they take."""
    words = ["accelerate launch", *(shlex.quote(word) for word in sys.argv), f"--max_train_steps {2 * step}"]
    words += ["--overwrite false"] if config.overwrite else []
    words += ["--max_train_minutes none"] if config.max_train_minutes else []
    return " ".join(words)
