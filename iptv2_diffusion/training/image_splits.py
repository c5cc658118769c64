"""Load the training and the held-out images of a run."""

from __future__ import annotations

from pathlib import Path

import datasets
from accelerate import Accelerator

from iptv2_diffusion.data.images import load_train_and_heldout
from iptv2_diffusion.training.errors import user_errors
from iptv2_diffusion.training.image_options import ImageConfig


def load_splits(
    config: ImageConfig, accelerator: Accelerator, *, source: str | Path, label_column: str | None
) -> tuple[datasets.Dataset, datasets.Dataset | None]:
    """Training and held-out images, undecoded; None where nothing is held out.

    Args:
        config: names the splits and the column of the images.
        accelerator: one process of each machine prepares what `datasets` caches on the disk; the others find it there.
        source: folder, file or Hub name, as `load_image_dataset` takes it.
        label_column: column of the labels; None: find it; "ignore": no labels.

    Raises:
        UserError: the source cannot be read, or has no such split or column.
    """
    with user_errors(OSError, ValueError), accelerator.local_main_process_first():
        return load_train_and_heldout(
            source,
            train_split=config.train_split,
            heldout_split=config.heldout_split,
            heldout_fraction=config.heldout_fraction,
            seed=config.seed,
            image_column=config.image_column,
            label_column=label_column,
            revision=config.revision,
        )
