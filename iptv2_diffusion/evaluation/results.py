"""What a run leaves: folders that appear whole, weights in another precision."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn


@contextlib.contextmanager
def replaced(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once all is written; what was there stays till then."""
    temporary = folder.with_name(f".tmp-{folder.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(folder, ignore_errors=True)
    temporary.replace(folder)


def cast(model: nn.Module, dtype: str) -> nn.Module:
    """The model's parameters in another dtype, but for the parts that it wants in float32.

    (diffusers' `to` casts those too, and warns of it.)
    """
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, parameter in model.named_parameters():
        if not any(part in kept for part in name.split(".")):
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return model
