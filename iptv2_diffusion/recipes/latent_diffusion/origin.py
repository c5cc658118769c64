"""Properties that a run inherits from the saved model that it starts from: training target, VAE and classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers

from iptv2_diffusion.models.adaptation import match_classes
from iptv2_diffusion.models.presets import find_weights
from iptv2_diffusion.models.saved import SavedModel
from iptv2_diffusion.objectives import FLOW, PREDICTION_TYPES, noise_schedule_of, prediction_of
from iptv2_diffusion.training.adapters import needs_weights
from iptv2_diffusion.training.errors import ConfigError, user_errors

if TYPE_CHECKING:
    from iptv2_diffusion.recipes.latent_diffusion.config import LDMConfig

SHIPPED_VAE = "assets/vae-emoji64"


def resolved_options(config: LDMConfig) -> dict[str, Any]:
    """Return values for the options that are None: those of the saved model, or the defaults of a new model.

    Raises:
        ConfigError: an option contradicts the saved model, or no training target fits its scheduler.
    """
    with user_errors(OSError, ValueError):
        saved = find_weights(config.model)
    found = {} if saved is None else _target(saved)
    for name, value in found.items():
        given = getattr(config, name)
        if name != "flow_shift" and given not in (None, value):
            raise ConfigError(
                f"{name} is {_said(given)}, but {config.model} was trained with {_said(value)}; leave --{name} out, or "
                f"set --model {saved.folder / 'config.json'} to start from random weights"
            )
    options = {"objective": "epsilon", "learned_variance": False, "flow_shift": 1.0} | found
    options = {name: value for name, value in options.items() if getattr(config, name) is None}
    if config.vae is None:
        own = saved is not None and saved.has_vae
        options |= {"vae": str(saved.home), "vae_subfolder": "vae"} if own else {"vae": SHIPPED_VAE}
    return options


def noise_schedule(config: LDMConfig) -> dict[str, Any]:
    """Return arguments of the training scheduler: the noise schedule of the saved model; empty for a new model."""
    saved = find_weights(config.model)
    scheduler = None if saved is None else _scheduler(saved)
    return (scheduler is not None and noise_schedule_of(scheduler)) or {}


def classes_of_base(config: LDMConfig, names: list[str]) -> tuple[int | None, list[str], list[int]]:
    """Match the data's labels to the classes of the model that an adapter changes. An adapter adds no classes.

    Args:
        config: configuration of the run, with a `lora_rank`.
        names: names of the data's classes; empty for data without labels.

    Returns:
        Number of the model's classes, their names, and the model's class for each label of the data. Data without
        labels have the null label.

    Raises:
        ConfigError: there is no saved model, or a class of the data is not among its classes.
    """
    saved = find_weights(config.model)
    needs_weights(saved)
    number = saved.config.get("num_class_embeds")
    if number is None:
        return None, [], [0]
    own = [saved.id2label.get(label, str(label)) for label in range(number)]
    kept = match_classes(names, saved.id2label, number)
    absent = [name for label, name in enumerate(names) if label not in kept]
    if absent:
        raise ConfigError(
            f"{config.model} has no class {absent[0]!r}, and an adapter adds none; name the folders after its "
            f"classes ({', '.join(own[:5])} ...), or train with --label_column ignore, or leave --lora_rank out"
        )
    return number, own, [kept[label] for label in range(len(names))] or [number]


def _target(saved: SavedModel) -> dict[str, Any]:
    """Return the training target of a saved model, as far as its pipeline's files define it."""
    model, scheduler = saved.config, _scheduler(saved)
    found: dict[str, Any] = {}
    if {"in_channels", "out_channels"} <= model.keys():
        found["learned_variance"] = model["out_channels"] == 2 * model["in_channels"]
    if scheduler is None:
        return found
    found["objective"] = prediction_of(scheduler)
    if found["objective"] not in PREDICTION_TYPES:
        raise ConfigError(
            f"the scheduler of {saved.folder} has prediction type {found['objective']}; training supports "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    if found["objective"] == FLOW:
        found["flow_shift"] = float(scheduler.config.get("shift") or scheduler.config.get("flow_shift") or 1.0)
    return found


def _scheduler(saved: SavedModel) -> diffusers.SchedulerMixin | None:
    """Return the scheduler of a saved model's pipeline; None if there is none."""
    config = saved.scheduler_config
    kind = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
        return None
    with user_errors(ValueError, NotImplementedError):  # from diffusers, for values in the file
        return kind.from_config(dict(config))


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
