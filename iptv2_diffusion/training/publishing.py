"""Upload of a training's result to the Hub. A missing token or network is reported before the training."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token

from iptv2_diffusion.training.errors import ConfigError, UserError, user_errors
from iptv2_diffusion.training.options import TrainingConfig

__all__ = ["create_repository", "upload"]


def create_repository(config: TrainingConfig) -> str | None:
    """Create the repository that `push_to_hub` names, unless it exists.

    Returns:
        Its name with the owner, on the main process; None on the others, without `push_to_hub`, and in a dry run,
        which uploads nothing.

    Raises:
        ConfigError: the Hub is disabled or unreachable, there is no token, or the token has no write access.
    """
    if not config.push_to_hub:
        return None
    if constants.HF_HUB_OFFLINE:
        raise ConfigError("push_to_hub needs the Hub, but HF_HUB_OFFLINE is set; unset it, or leave push_to_hub out")
    if get_token() is None:
        raise ConfigError(
            "push_to_hub needs a token of the Hub; run `hf auth login`, or set HF_TOKEN, or leave push_to_hub out"
        )
    if os.environ.get("RANK", "0") != "0":
        return None
    wanted = Path(config.output_dir).resolve().name if config.push_to_hub is True else config.push_to_hub
    try:
        with user_errors(Exception):  # a bad name, the network or the Hub: several libraries raise many types
            name = HfApi().create_repo(wanted, exist_ok=True, private=config.hub_private).repo_id
    except UserError as error:
        raise ConfigError(f"push_to_hub cannot write to {wanted}: {str(error)[:300]}") from error
    return None if config.dry_run else name


def upload(folder: Path, repository: str | None, *, step: int) -> None:
    """Upload a folder, with its card, to a repository; nothing for None.

    Raises:
        UserError: the upload failed. The message has the command that repeats it.
    """
    if repository is None:
        return
    try:
        with user_errors(Exception):
            done = HfApi().upload_folder(
                repo_id=repository, folder_path=folder, commit_message=f"Training, {step} steps"
            )
    except UserError as error:
        again = f"hf upload {repository} {shlex.quote(str(folder))}"
        raise UserError(
            f"the result is in {folder}, but its upload failed: {str(error)[:300]}; to repeat it, run {again}"
        ) from error
    print(f"uploaded {folder} to {done.commit_url.split('/commit/')[0]}")
