"""A restorer as one self-describing safetensors file, for programs that load weights without a configuration.

Besides the weights, the tensor `iptv2_restorer` contains the bytes of a JSON text in UTF-8: {"config", "sigma",
"task"}. Without it, `infer_config` derives the configuration from the names and shapes of the weights. This does not
work with grid attention, because the weights do not depend on its stride.
"""

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from iptv2_diffusion.files import atomic
from iptv2_diffusion.models.backbone import fit_window
from iptv2_diffusion.models.restoration_iptv2 import IPTV2RestorationModel

__all__ = ["DESCRIPTION", "build_restorer", "infer_config", "save_single_file"]

DESCRIPTION = "iptv2_restorer"  # name of the tensor


def save_single_file(
    model: IPTV2RestorationModel, path: Path, sigma: float | None = None, task: int | None = None
) -> None:
    """Write a fused restorer as one safetensors file, completely or not at all.

    Args:
        model: an `IPTV2RestorationModel`.
        path: file to write.
        sigma: noise level on the 0–255 scale for a model that takes one; None to estimate it for each image.
        task: index of the task for a model that has several.

    Raises:
        ValueError: the model is not a restorer, or `sigma` or `task` is missing, not supported or out of range.
    """
    if not isinstance(model, IPTV2RestorationModel):
        raise ValueError(f"a {type(model).__name__} is not a restorer; only restorers become single files")
    takes_sigma = model.config.sigma_conditioning is not None
    model.check_conditions((25.0 if sigma is None else sigma) if takes_sigma else sigma, task)
    if sigma is not None and not 0 <= sigma <= 255:
        raise ValueError(f"sigma is {sigma:g}; it must be in [0, 255], the standard deviation on that scale")
    model = model.fuse()
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    text = json.dumps({"config": config, "sigma": sigma, "task": task})
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    weights[DESCRIPTION] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    with atomic(path) as temporary:
        save_file(weights, temporary)


def build_restorer(weights: dict[str, Tensor]) -> tuple[IPTV2RestorationModel, float | None, int | None]:
    """Return the model that fits the weights, its σ (None: to be estimated, or not taken) and its task.

    The weights are not loaded into the model.

    Raises:
        ValueError: the weights do not determine a valid configuration.
    """
    if DESCRIPTION not in weights:
        return IPTV2RestorationModel(**infer_config(weights)), None, None
    try:
        description = json.loads(bytes(weights[DESCRIPTION].to(torch.uint8).flatten().tolist()))
    except ValueError:
        description = None
    if not isinstance(description, dict) or not isinstance(description.get("config"), dict):
        raise ValueError(f"the tensor {DESCRIPTION} holds no description of a restorer; export the file again")
    model = IPTV2RestorationModel.from_config(description["config"])
    return model, description.get("sigma"), description.get("task")


def infer_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    """Return the arguments of `IPTV2RestorationModel` that give weights of these names and shapes.

    Raises:
        ValueError: the weights have grid attention, or are not those of a restorer.
    """
    try:
        return _infer_config(weights)
    except (KeyError, IndexError, StopIteration) as error:
        raise ValueError(f"these weights of an IPTV2RestorationModel are incomplete: {error} is missing") from error


def _infer_config(weights: dict[str, Tensor]) -> dict[str, Any]:
    def count(prefix: str) -> int:
        found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", name) for name in weights)
        return max((int(match[1]) + 1 for match in found if match), default=0)

    depth = count("backbone.downsamples")
    stages = [
        *(f"backbone.encoder.{i}" for i in range(depth)),
        "backbone.bottleneck",
        *(f"backbone.decoder.{i}" for i in range(depth)),
    ]
    first = f"{stages[0]}.0"
    channels, planes = weights["stem.weight"].shape[0], weights["head.weight"].shape[0]
    in_channels, unshuffle = next((c, u) for c in (1, 3) for u in (1, 2, 4) if c * u * u == planes)
    attentions = range(0, count(f"{first}.layers"), 2)
    if any(f"{first}.layers.{i}.logit_scale" in weights for i in attentions):
        raise ValueError(
            "the weights have grid attention, whose stride cannot be inferred; export the model with "
            "iptv2-export --format spandrel"
        )
    windows, shifted, heads = [], [], []
    for stage in stages:
        branches, num_heads, positions = weights[f"{stage}.0.layers.0.spatial_affine"].shape
        windows.append(round(positions**0.5))
        shifted.append(branches == 2)
        heads.append(num_heads)

    fused = f"{first}.layers.1.expand.weight" in weights
    hidden = weights[f"{first}.layers.1.{'expand' if fused else 'expand_out'}.weight"].shape[0]
    vector = f"{first}.norms.0.linear.weight"
    tasks = weights.get("embedder.task_embedder.weight")
    sigma = "map" if weights["stem.weight"].shape[1] == planes + 1 else None
    sigma = "vector" if "embedder.sigma_embedder.0.weight" in weights else sigma
    return {
        "in_channels": in_channels,
        "unshuffle": unshuffle,
        "channels": channels,
        "layers_per_stage": tuple(count(stage) for stage in stages),
        "num_attention_heads": tuple(heads),
        "attention_pattern": ("focal",) * len(attentions),
        "window_size": max(windows),
        "ffn_ratio": (hidden + 0.5) / channels if int(channels * (hidden / channels)) < hidden else hidden / channels,
        "norm_bias": f"{first}.norms.0.bias" in weights or vector in weights,
        "sigma_conditioning": sigma,
        "num_tasks": None if tasks is None else tasks.shape[0],
        "conditioning_dim": weights[vector].shape[1] if vector in weights else 128,
        "sample_size": _sample_size(windows[: depth + 1], shifted[: depth + 1], unshuffle),
        "fused": fused,
    }


def _sample_size(windows: list[int], shifted: list[bool], unshuffle: int) -> int | None:
    """Return the smallest `sample_size` that gives these windows at each level; None if no level limits its window."""
    levels = len(windows)
    if all(shifted) and len(set(windows)) == 1:
        return None
    for side in range(1, 2 ** (levels - 1) * (max(windows) + 1) + 1):
        fitted = [fit_window(max(windows), level, levels, (side, side)) for level in range(levels)]
        if fitted == list(zip(windows, shifted, strict=True)):
            return side * unshuffle
    raise ValueError(f"no image size gives windows of {windows} positions at the levels")
