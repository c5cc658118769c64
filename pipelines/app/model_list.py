"""Pipelines that the page offers. They are found by their folders and loaded at their first use."""

from __future__ import annotations

import argparse
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iptv2_diffusion.files import printable
from iptv2_diffusion.messages import one_line

from ..command_line import CommandError
from ..restore_cli import load, pipeline_class

__all__ = ["ModelList", "find_models"]

GENERATOR, RESTORER = "IPTV2Pipeline", "IPTV2RestorationPipeline"


@dataclass
class ModelList:
    """Pipeline folders by the name that the page shows.

    Attributes:
        generators, restorers: name -> folder.
        device: device that the pipelines run on.
    """

    generators: dict[str, Path]
    restorers: dict[str, Path]
    device: str = "cpu"
    _loaded: dict[str, Any] = field(default_factory=dict)
    _loading: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, name: str | None) -> Any:
        """Return the pipeline of a name. Raises a CommandError if it cannot be loaded."""
        with self._loading:  # several handlers call this at once when the page opens
            return self._load(name)

    def _load(self, name: str | None) -> Any:
        if name not in self._loaded:
            if name in self.restorers:
                options = {"tile": "auto", "overlap": None, "memory": 0.5, "sigma": None, "device": self.device}
                pipeline = load(argparse.Namespace(model=str(self.restorers[name]), **options))
            elif name in self.generators:
                pipeline = load_generator(self.generators[name], self.device)
            else:
                raise CommandError("choose a model")
            pipeline.set_progress_bar_config(disable=True)
            self._loaded[name] = pipeline
        return self._loaded[name]


def load_generator(folder: Path, device: str) -> Any:
    """Load an `IPTV2Pipeline`, whose denoiser may be a DiT."""
    from ..pipeline_iptv2 import IPTV2Pipeline

    try:
        pipeline = IPTV2Pipeline.from_pretrained(folder)
    except Exception as error:  # from diffusers and its libraries, for any content of the folder
        raise CommandError(f"cannot load {printable(folder)}: {one_line(error, 500)}") from error
    try:
        return pipeline.to(device)
    except (RuntimeError, AssertionError) as error:
        raise CommandError(f"--device {device}: {str(error).splitlines()[0][:160]}") from error


def find_models(folders: Iterable[Path], device: str = "cpu") -> ModelList:
    """Find the pipelines that folders are or contain. Raises a CommandError for a folder without one."""
    found: dict[str, dict[str, Path]] = {GENERATOR: {}, RESTORER: {}}
    for folder in folders:
        inner = sorted(path for path in folder.glob("*") if path.is_dir()) if folder.is_dir() else []
        kinds = {path: pipeline_class(path) for path in (folder, *inner)}
        pipelines = {path: kind for path, kind in kinds.items() if kind in found}
        if not pipelines:
            what = "contains no pipeline folder" if folder.is_dir() else "is not a folder"
            raise CommandError(f"{printable(folder)} {what}; give a folder with a model_index.json")
        for path, kind in pipelines.items():
            name = path.resolve().name
            if any(name in names and names[name].resolve() != path.resolve() for names in found.values()):
                name = str(path)  # pipelines of the same name are shown by their paths
            found[kind][name] = path
    return ModelList(found[GENERATOR], found[RESTORER], device)
