"""Run configuration: one frozen dataclass a script, whose fields are the options.

    @dataclass(frozen=True, kw_only=True)
    class LDMConfig(TrainingConfig):
        data: str = option("data/emoji64", "folder of images, parquet or datasets name", group="data")
        crops: int = option(1, "number of crops of an image", group="data", at_least=1)

`parsing.py` fills it in from the command line and YAML files. A configuration is checked when it is made and never
changes; `dataclasses.replace` makes a changed copy, which is checked too. Only the standard library and yaml are
imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import yaml

from iptv2_diffusion.files import write_text
from iptv2_diffusion.training.errors import ConfigError

ConfigType = TypeVar("ConfigType", bound="Config")

# --------------------------------------------------------------------------------------------------------------------
# Options and their ranges


@dataclass(frozen=True, kw_only=True)
class Range:
    """Range of the numbers of an option. None means no bound."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def __contains__(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )

    def __str__(self) -> str:
        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if low is not None and high is not None:
            return f"be in {'(['[self.above is None]}{low}, {high}{')]'[self.below is None]}"
        words = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"be {word} {bound}" for word, bound in words.items() if bound is not None)

    def check(self, name: str, value: Any, *, or_none: bool = False) -> None:
        """Raise a `ConfigError` if a number, or one of a list of numbers, is outside the range."""
        several = isinstance(value, (list, tuple))
        numbers = [number for number in (value if several else [value]) if isinstance(number, (int, float))]
        if all(number in self for number in numbers):
            return
        shown, subject = (",".join(f"{number:g}" for number in numbers), "each") if several else (value, "it")
        raise ConfigError(f"{name} is {shown}; {subject} must {self}{', or none' if or_none else ''}")


def option(
    default: Any,
    help: str,
    *,
    group: str = "run",
    free: bool = False,
    within: tuple[float, float] | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    nonempty: bool = False,
) -> Any:
    """A field of a run configuration.

    Args:
        default: default value. A mutable one is copied for each instance.
        help: text for --help, a phrase that begins with a noun or a verb.
        group: heading in --help.
        free: whether the field may change between a checkpoint and its resumption (run length, paths, intervals). If
            another field changes, the checkpoint is refused.
        within: smallest and largest number allowed, both included; for a list, those of each of its numbers.
        at_least, above, at_most, below: single bounds.
        nonempty: whether the list or dictionary needs at least one entry.
    """
    low, high = within or (at_least, at_most)
    limits = Range(at_least=low, above=above, at_most=high, below=below)
    metadata = {"help": help, "group": group, "free": free, "range": limits, "nonempty": nonempty}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def lora_rank_option() -> Any:
    """Return the option of the recipes that can train an adapter instead of the weights."""
    return option(
        None,
        "rank of a LoRA adapter that is trained instead of the weights of a saved model; none: train all weights",
        group="model",
        at_least=1,
    )


@dataclass(frozen=True, kw_only=True)
class Config:
    """Options that are checked at construction and never change."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata.get("nonempty") and value is not None and not value:
                raise ConfigError(f"{field.name} is empty; give at least one")
            field.metadata.get("range", Range()).check(field.name, value, or_none=field.default is None)
        self.validate()

    def validate(self) -> None:
        """Raise a `ConfigError` for options that contradict each other. Each option is within its range already."""

    def resolve(self: ConfigType) -> ConfigType:
        """Return this configuration with options filled in that depend on others. `parse_config` returns the result."""
        return self


_EMA: dict[str, Any] = {"group": "exponential moving average"}
_FREE_LOG: dict[str, Any] = {"group": "checkpoints and logs", "free": True}
_HUB: dict[str, Any] = {"group": "model card and Hub", "free": True}


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """Options that all training scripts share. Batch sizes are per optimiser step, over all processes together."""

    not_with_cuda_graphs: ClassVar[tuple[str, ...]] = ("gradient_checkpointing", "torch_compile")
    lora_rank: ClassVar[int | None] = None  # a recipe that can train adapters makes it an option

    output_dir: str = option("runs/run", "folder for checkpoints, logs and the result", free=True)
    seed: int = option(
        0,
        "seed of all random numbers; with the step it determines order, flips, noise, timesteps and label drops",
        within=(0, 2**32 - 1),
    )
    dry_run: bool = option(False, "run every stage once on a few samples, in OUTPUT_DIR/dry_run, and stop", free=True)
    overwrite: bool = option(False, "delete the checkpoints in output_dir and start again", free=True)
    accept_changes: bool = option(
        False, "resume although the recipe (learning rate, data ...) differs from the checkpoint's", free=True
    )

    max_train_steps: int = option(
        10_000,
        "number of optimiser steps; the learning-rate schedule ends there",
        group="length",
        free=True,
        at_least=1,
    )
    max_train_minutes: float | None = option(
        None,
        "stop after this many minutes of training; the schedule follows time or steps, whichever is further along "
        "(results then depend on the machine's speed and cannot be reproduced bit for bit)",
        group="length",
        free=True,
        above=0,
    )
    batch_size: int = option(
        64, "samples per optimiser step, over all processes and micro-batches", group="length", at_least=1
    )
    gradient_accumulation_steps: int = option(
        1, "micro-batches per step: the same result in less memory", group="length", free=True, at_least=1
    )

    learning_rate: float = option(1e-4, "peak learning rate", group="optimiser", above=0)
    lr_schedule: Literal["constant", "cosine", "cosine_with_restarts", "linear"] = option(
        "constant", "learning-rate schedule after the warm-up", group="optimiser"
    )
    lr_cycles: int = option(
        4,
        "number of equal cycles of cosine_with_restarts, each from the peak to 0",
        group="optimiser",
        at_least=1,
    )
    lr_warmup_steps: int = option(0, "steps of linear warm-up", group="optimiser", at_least=0)
    adam_beta1: float = option(0.9, "AdamW beta 1", group="optimiser", at_least=0, below=1)
    adam_beta2: float = option(0.999, "AdamW beta 2", group="optimiser", at_least=0, below=1)
    adam_epsilon: float = option(1e-8, "AdamW epsilon", group="optimiser", above=0)
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices and kernels only", group="optimiser", at_least=0)
    max_grad_norm: float = option(
        1.0, "largest gradient norm, to which larger ones are clipped; 0: no clipping", group="optimiser", at_least=0
    )
    ema: Literal["constant", "power"] = option(
        "constant",
        "form of the exponential moving average of the weights: constant: one decay; power: power functions of time, "
        "from which an average of any length can be reconstructed after the training",
        **_EMA,
    )
    ema_decay: float = option(
        0.9999, "largest decay of the exponential moving average; 0: no average", **_EMA, at_least=0, below=1
    )
    ema_power: float = option(
        0.75,
        "power of the decay's ramp, 1 - (1 + step)^-power: 0.75 suits 10 K steps, 2/3 suits 1 M",
        **_EMA,
        above=0,
    )
    ema_sigma_rels: tuple[float, float] = option(
        (0.05, 0.1),
        "relative widths of the two averages of --ema power; previews and the result use the first",
        **_EMA,
        above=0,
        below=0.28,
    )
    ema_snapshot_every: int = option(
        1000,
        "steps between snapshots of both averages of --ema power; each snapshot takes twice the size of the weights",
        **_FREE_LOG,
        at_least=1,
    )

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(
        None,
        "autocast precision; auto: bf16 if this machine is faster with it; none: the choice of `accelerate launch`",
        group="machine",
        free=True,
    )
    sharding: Literal["none", "zero2", "zero3"] = option(
        "none",
        "shard the model state over the processes with torch's fully_shard (FSDP2); none: every process has the whole "
        "state; zero2: shard gradients, optimiser state and EMA; zero3: also shard the weights",
        group="machine",
        free=True,
    )
    channels_last: bool = option(
        True, "keep feature maps and kernels in channels-last memory", group="machine", free=True
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations in the backward pass: less memory, slower", group="machine", free=True
    )
    torch_compile: bool = option(
        False, "compile the model's blocks (the first steps are slow)", group="machine", free=True
    )
    cuda_graphs: bool = option(
        False,
        "record the model's forward and backward once on one GPU and replay them; for models whose many small kernels "
        "the CPU cannot launch fast enough",
        group="machine",
        free=True,
    )
    allow_tf32: bool = option(
        False,
        "compute float32 matrix products in TF32 on a GPU, with 10 bits of mantissa (cuDNN's convolutions always do)",
        group="machine",
        free=True,
    )
    num_threads: int | None = option(
        None,
        "number of CPU threads per process; none: on a CPU all cores, shared among the processes",
        group="machine",
        free=True,
        at_least=1,
    )
    num_workers: int = option(
        0, "number of processes (for a stream: threads) that decode images", group="machine", free=True, at_least=0
    )

    max_pixels: int = option(
        178_956_970,
        "height times width above which an image is refused before it is decoded",
        group="data",
        free=True,
        at_least=1,
    )

    checkpoint_every: int = option(1000, "steps between checkpoints; 0: only one at the end", **_FREE_LOG, at_least=0)
    keep_last: int = option(2, "number of checkpoints that are kept", **_FREE_LOG, at_least=1)
    sharded_checkpoints: bool = option(
        False,
        "let every process write its part of a sharded model to a shared disk; false: gather it into one file",
        **_FREE_LOG,
    )
    max_skipped_steps: int = option(
        0,
        "number of steps in a row with a NaN or infinite loss or gradient that are skipped before the run stops",
        **_FREE_LOG,
        at_least=0,
    )
    log_every: int = option(20, "steps between lines of metrics.jsonl", **_FREE_LOG, at_least=1)
    eval_every: int = option(1000, "steps between held-out evaluations; 0: never", **_FREE_LOG, at_least=0)
    preview_every: int = option(1000, "steps between previews; 0: never", **_FREE_LOG, at_least=0)
    report_to: str = option(
        "tensorboard", "where metrics and previews are logged: tensorboard, wandb, all or none", **_FREE_LOG
    )

    license: str | None = option(
        None, "licence of the weights for the model card, such as apache-2.0; none: not stated", **_HUB
    )
    data_license: str | None = option(
        None, "licence of the training data for the model card; none: it is unknown", **_HUB
    )
    push_to_hub: bool | str = option(
        False,
        "repository on the Hub to upload the result and its card to; true: the repository named after output_dir",
        **_HUB,
    )
    hub_private: bool = option(False, "make the repository of push_to_hub private if it is new", **_HUB)

    @property
    def averages(self) -> bool:
        """Whether the result is an average of the weights."""
        return self.ema == "power" or self.ema_decay > 0

    def validate(self) -> None:
        """Raise `ConfigError` for options that cannot work together, naming them."""
        if self.license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", self.license) is None:
            raise ConfigError(
                f"license is {self.license!r}; use the Hub's identifier, such as apache-2.0, mit or other"
            )
        if self.ema == "power" and len(set(self.ema_sigma_rels)) == 1:
            width = self.ema_sigma_rels[0]
            raise ConfigError(f"ema_sigma_rels is {width},{width}; the two must differ, as 0.05,0.1 do")
        if self.lora_rank and (self.ema == "power" or self.sharding != "none"):
            raise ConfigError("lora_rank needs --ema constant and --sharding none; a LoRA is too small to shard")
        if self.sharding != "none" and self.mixed_precision == "fp16":
            raise ConfigError("sharding does not work with fp16, whose loss scaling it lacks; use bf16")


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration, every field, as YAML that `--config` reads back."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=110)
    write_text(path, text)


def config_to_dict(config: Any) -> dict[str, Any]:
    """Return plain values (tuples become lists), as JSON and YAML read them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def frozen_fields(config: Any) -> dict[str, Any]:
    """Return the fields that must not change between a checkpoint and its resumption (see `option(free=...)`)."""
    values = config_to_dict(config)
    return {f.name: values[f.name] for f in dataclasses.fields(config) if not f.metadata.get("free", False)}
