"""Location of a saved model (a folder, a pipeline's folder, or a name on the Hub) and of its other components."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from iptv2_diffusion.files import shipped
from iptv2_diffusion.messages import one_line

__all__ = ["SavedModel", "find_saved"]

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Classes of the trainable components, as in model_index.json
_TRAINED = ("IPTV2Transformer2DModel", "IPTV2RestorationModel", "DiTTransformer2DModel")


@dataclass(frozen=True)
class SavedModel:
    """A saved model.

    Attributes:
        folder: folder with config.json and the weights.
        home: folder of the pipeline that contains the model; None without a pipeline.
        index: model_index.json of that pipeline; empty without a pipeline.
    """

    folder: Path
    home: Path | None = None
    index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> Mapping[str, Any]:
        """Contents of the model's config.json; empty if there is none."""
        return _read_json(self.folder / "config.json")

    @property
    def scheduler_config(self) -> Mapping[str, Any]:
        """Configuration of the pipeline's scheduler; empty if there is none."""
        return _read_json(self.home / "scheduler" / "scheduler_config.json") if self.home else {}

    @property
    def id2label(self) -> dict[int, str]:
        """Class names by number; empty if unknown."""
        return {int(number): str(name) for number, name in (self.index.get("id2label") or {}).items()}

    @property
    def has_vae(self) -> bool:
        """Whether the pipeline has a VAE."""
        return self.home is not None and (self.home / "vae" / "config.json").is_file()


def find_saved(name: str) -> SavedModel | None:
    """Find a saved model by the folder of the model or its pipeline, or by a name on the Hub, and download it.

    Returns:
        The model; None if the name is neither a folder nor a possible name on the Hub.

    Raises:
        ValueError: the pipeline has no denoiser and no restorer, or the Hub does not have the name.
    """
    path = shipped(name)
    if not path.exists() and _HUB_NAME.fullmatch(name):
        path = _download(name)
    if not path.is_dir():
        return None
    if (path / "model_index.json").is_file():
        path = path / _component(path)
    index = _read_json(path.parent / "model_index.json")
    return SavedModel(path, path.parent, index) if path.name in index else SavedModel(path)


def _component(pipeline: Path) -> str:
    """Return the name of the trainable component of a pipeline."""
    index = _read_json(pipeline / "model_index.json")
    for name, kind in index.items():
        if name != "guidance_model" and isinstance(kind, list) and len(kind) == 2 and kind[1] in _TRAINED:
            return name
    raise ValueError(f"{pipeline} is a {index.get('_class_name')}; none of its parts is one of {', '.join(_TRAINED)}")


def _download(name: str) -> Path:
    """Download a repository of the Hub (all configurations, and only the weights of the model); return its folder."""
    from huggingface_hub import snapshot_download  # late: the import takes a while

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json"]))
        part = f"{_component(folder)}/" if (folder / "model_index.json").is_file() else ""
        snapshot_download(name, allow_patterns=["*.json", f"{part}*.safetensors"])
    except (OSError, ValueError) as error:
        reason = one_line(error, 300)
        raise ValueError(f"cannot load {name}: no such folder here, and from the Hub: {reason}") from error
    return folder


def _read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; empty if the file does not exist or is invalid, which loading the model reports."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}
