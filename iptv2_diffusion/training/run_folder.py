"""The output folder of a run, which is claimed before anything is written; dry runs; the command to resume."""

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
    """Claim a run's output folder. Raises a `ForeignFolderError`, a ValueError, for a folder with other files."""

    def made_before_records(folder: Path) -> list[str] | None:
        known = (folder / "config.yaml").is_file() and (folder / "metrics.jsonl").is_file()
        known = known or any(is_ours(path) for path in folder.glob("*checkpoint-*"))
        return [] if known else None

    return OwnFolder.claim(folder, "a training run", earlier=made_before_records)


RunConfig = TypeVar("RunConfig", bound=TrainingConfig)


def prepare_dry_run(config: RunConfig, **shorter: Any) -> RunConfig:
    """Shorten a configuration so that every stage runs once: two steps, a checkpoint and a preview after the first.

    Args:
        config: configuration of the whole run. The output folder of the dry run, OUTPUT_DIR/dry_run, is emptied here.
        shorter: options of the recipe that are also reduced.
    """
    folder = Path(config.output_dir) / "dry_run"
    if os.environ.get("RANK", "0") == "0":
        with user_errors(OSError, ValueError):
            claim_run_folder(folder.parent)
            claim_run_folder(folder)  # refuses a folder of this name that is not ours
        shutil.rmtree(folder, ignore_errors=True)
    changes: dict[str, Any] = dict.fromkeys(("checkpoint_every", "eval_every", "preview_every", "log_every"), 1)
    changes |= {"max_train_steps": 2, "max_train_minutes": None, "output_dir": str(folder)}
    changes |= {"report_to": "none", "push_to_hub": False}
    return dataclasses.replace(config, **{**changes, **shorter})


def preview_path(config: TrainingConfig, step: int) -> Path:
    """Return the path of the preview after a step. Its folder may not exist yet."""
    return Path(config.output_dir) / "previews" / f"step-{step:08d}.png"


def this_command() -> str:
    """Return the command that started the run, to copy: a console script by its name, others through accelerate."""
    program = sys.argv[0]
    return (
        Path(program).name if Path(program).name.startswith("iptv2-") else f"accelerate launch {shlex.quote(program)}"
    )


def run_command() -> str:
    """Return the command that started the run, with its options."""
    return " ".join([this_command(), *(shlex.quote(word) for word in sys.argv[1:])])


def command_to_train_longer(config: TrainingConfig, step: int) -> str:
    """Return this run's command for twice its `step` steps, without a time limit."""
    words = [run_command(), f"--max_train_steps {2 * step}"]
    words += ["--overwrite false"] if config.overwrite else []
    words += ["--max_train_minutes none"] if config.max_train_minutes else []
    return " ".join(words)
