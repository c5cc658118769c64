"""Run configuration: one dataclass a script, YAML files that name only what differs, command-line overrides.

    @dataclass(kw_only=True)
    class LDMConfig(TrainingConfig):
        data: str = option("data/emoji64", "folder of images, parquet or datasets name", group="data")

    config = parse_config(LDMConfig)          # --config file.yaml --data my_photos --learning_rate 3e-4

Precedence: command line over YAML over the defaults of the dataclass; the word none means None in both. Unknown options
are errors that name the nearest ones. Only the standard library and yaml are imported here, so that `--help` answers at
once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

from iptv2_diffusion.data.files import user_path
from iptv2_diffusion.strict_yaml import StrictSyntaxError, read_json, read_yaml
from iptv2_diffusion.training.errors import ConfigError

ConfigType = TypeVar("ConfigType")

_NONE_WORDS = {"none", "null", "~", ""}
_TRUE_WORDS, _FALSE_WORDS = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


class MeaningError(ConfigError):
    """A number that is none, or is not what it looks like."""


def option(default: Any, help: str, *, group: str = "run", free: bool = False) -> Any:
    """A field of a run configuration.

    `free`: the field may change between a checkpoint and its resumption (run length, paths, intervals); every other
    field must be what it was, or the checkpoint is refused. A mutable default is copied for each instance.
    """
    metadata = {"help": help, "group": group, "free": free}
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


_RATES = ("weight_decay", "max_grad_norm")
_EMA = {"group": "averaged weights"}
_FREE_LOG = {"group": "checkpoints and logs", "free": True}


@dataclass(kw_only=True)
class TrainingConfig:
    """What every train script shares. Batch sizes are per optimiser step over all processes together."""

    output_dir: str = option("runs/run", "folder for checkpoints, logs and the result", free=True)
    seed: int = option(0, "with the step it fixes everything random: order, flips, noise, timesteps, label drops")
    dry_run: bool = option(False, "run every stage once on a few samples, in OUTPUT_DIR/dry_run, and stop", free=True)
    overwrite: bool = option(False, "delete the checkpoints in output_dir and start again", free=True)
    accept_changes: bool = option(
        False, "resume although the recipe (learning rate, data ...) is not the checkpoint's", free=True
    )

    max_train_steps: int = option(10_000, "optimiser steps; the schedule ends there", group="length", free=True)
    max_train_minutes: float | None = option(
        None,
        "stop after so many minutes of training; the schedule follows time or steps, whichever is further along "
        "(results then depend on the machine's speed: not reproducible bit for bit)",
        group="length",
        free=True,
    )
    batch_size: int = option(64, "samples per optimiser step, over all processes and micro-batches", group="length")
    gradient_accumulation_steps: int = option(
        1, "micro-batches a step: the same result in less memory", group="length", free=True
    )

    learning_rate: float = option(1e-4, "peak learning rate", group="optimiser")
    lr_schedule: Literal["constant", "cosine", "cosine_with_restarts", "linear"] = option(
        "constant", "after warm-up", group="optimiser"
    )
    lr_cycles: int = option(4, "of cosine_with_restarts: equal cycles, each from the peak to 0", group="optimiser")
    lr_warmup_steps: int = option(0, "steps of linear warm-up", group="optimiser")
    adam_beta1: float = option(0.9, "AdamW beta 1", group="optimiser")
    adam_beta2: float = option(0.999, "AdamW beta 2", group="optimiser")
    adam_epsilon: float = option(1e-8, "AdamW epsilon", group="optimiser")
    weight_decay: float = option(0.0, "AdamW weight decay, on matrices and kernels only", group="optimiser")
    max_grad_norm: float = option(1.0, "clip the gradient norm to this; 0: off", group="optimiser")
    ema: Literal["constant", "power"] = option(
        "constant", "averaged weights of one length, or by power functions of time (any length afterwards)", **_EMA
    )
    ema_decay: float = option(0.9999, "the largest decay of the averaged weights; 0: no averaging", **_EMA)
    ema_power: float = option(
        0.75, "the decay ramps up as 1 - (1 + step)^-power: 0.75 suits 10 K steps, 2/3 1 M", **_EMA
    )
    ema_sigma_rels: tuple[float, float] = option(
        (0.05, 0.1), "of --ema power: relative widths of its two averages; the first is drawn and saved", **_EMA
    )
    ema_snapshot_every: int = option(
        1000, "of --ema power: steps between snapshots of both averages, each twice the weights in size", **_FREE_LOG
    )

    mixed_precision: Literal["no", "fp16", "bf16", "auto"] | None = option(
        None,
        "autocast precision; auto: bf16 if this machine is faster with it; none: what `accelerate launch` says",
        group="machine",
        free=True,
    )
    sharding: Literal["none", "zero2", "zero3"] = option(
        "none",
        "of model state over the processes, by torch's fully_shard (FSDP2); none: each holds all; zero2: gradients, "
        "optimiser, average; zero3: weights too",
        group="machine",
        free=True,
    )
    channels_last: bool = option(
        True, "keep feature maps and kernels in channels-last memory", group="machine", free=True
    )
    gradient_checkpointing: bool = option(
        False, "recompute activations: less memory, slower", group="machine", free=True
    )
    torch_compile: bool = option(False, "compile the model's blocks (first steps are slow)", group="machine", free=True)
    cuda_graphs: bool = option(
        False,
        "on one GPU: record the model's forward and backward once and replay them; for models whose many small kernels "
        "the CPU cannot start fast enough",
        group="machine",
        free=True,
    )
    allow_tf32: bool = option(
        False,
        "on a GPU: matrix products in float32 with 10 bits of mantissa (cuDNN's convolutions are so either way)",
        group="machine",
        free=True,
    )
    num_threads: int | None = option(
        None, "CPU threads a process; none: on a CPU all cores, shared among the processes", group="machine", free=True
    )
    num_workers: int = option(0, "processes (of a stream: threads) that decode images", group="machine", free=True)

    max_pixels: int = option(
        178_956_970, "height times width above which an image is refused before it is decoded", group="data", free=True
    )

    checkpoint_every: int = option(1000, "steps between checkpoints (one is always written at the end)", **_FREE_LOG)
    keep_last: int = option(2, "how many checkpoints are kept", **_FREE_LOG)
    sharded_checkpoints: bool = option(
        False, "with sharding: every process writes its part, to a common disk; false: gathered into one", **_FREE_LOG
    )
    max_skipped_steps: int = option(
        0, "steps in a row with a NaN or infinite loss or gradient that are left out before the run stops", **_FREE_LOG
    )
    log_every: int = option(20, "steps between lines of metrics.jsonl", **_FREE_LOG)
    eval_every: int = option(1000, "steps between held-out losses; 0: never", **_FREE_LOG)
    preview_every: int = option(1000, "steps between preview pictures; 0: never", **_FREE_LOG)
    report_to: str = option("tensorboard", "tensorboard, wandb, all or none", **_FREE_LOG)

    def validate(self) -> None:
        """Raise `ConfigError` for values that cannot work, naming them."""
        self.require_positive("max_train_steps", "batch_size", "gradient_accumulation_steps", "keep_last", "log_every")
        self.require_positive("ema_snapshot_every", "lr_cycles", "max_pixels")
        if self.ema == "power" and not all(0 < width < 0.28 for width in self.ema_sigma_rels):
            raise ConfigError(f"ema_sigma_rels is {self.ema_sigma_rels}; each must lie in (0, 0.28)")
        if self.ema == "power" and len(set(self.ema_sigma_rels)) == 1:
            raise ConfigError(f"ema_sigma_rels is {self.ema_sigma_rels}; the two must differ, as 0.05,0.1 do")
        counts = ("checkpoint_every", "eval_every", "preview_every", "max_skipped_steps")
        for name in (*counts, "lr_warmup_steps", "num_workers", *_RATES):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must not be negative")
        for name in ("learning_rate", "adam_epsilon", "ema_power"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1)")
        if self.sharding != "none" and self.mixed_precision == "fp16":
            raise ConfigError("sharding does not go with fp16, whose loss scaling it lacks; use bf16")
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed is {self.seed}; it must lie in 0 to 4294967295")
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"num_threads is {self.num_threads}; it must be at least 1, or none")
        if self.max_train_minutes is not None and self.max_train_minutes <= 0:
            raise ConfigError(f"max_train_minutes is {self.max_train_minutes}; it must be positive, or none")

    def require_positive(self, *names: str) -> None:
        """Raise `ConfigError` unless each of these counts (or pairs of them) is at least 1."""
        for name in names:
            value = getattr(self, name)
            if min(value if isinstance(value, tuple) else (value,)) < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


# --------------------------------------------------------------------------------------------------------------------
# Parsing


def parse_config(
    config_type: type[ConfigType], argv: Sequence[str] | None = None, *, description: str = "", examples: str = ""
) -> ConfigType:
    """Read `--config FILE` and `--name value` overrides into `config_type`. Raises `ConfigError`."""
    parser, arguments = _make_parser(config_type, description, examples), _normalise(argv)
    known, rest = parser.parse_known_args(arguments)
    if rest:
        names = [field.name for field in dataclasses.fields(config_type)]
        raise ConfigError(_unknown(rest[0].lstrip("-").split("=")[0], names, "on the command line"))
    hints = typing.get_type_hints(config_type)
    values: dict[str, Any] = {}
    for path in known.config or []:
        values |= coerce_fields(config_type, _read_yaml(path), path)
    for name, text in vars(known).items():
        if name != "config" and text is not None:
            values[name] = coerce(_parse_text(text, hints[name]), hints[name], name)
    values = expand_home(config_type, values)
    config = config_type(**values)
    if hasattr(config, "validate"):
        config.validate()
    return config


def coerce_fields(config_type: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Values by field name, each turned into its field's type. Raises `ConfigError` for a name that is no field."""
    hints = typing.get_type_hints(config_type)
    names = [field.name for field in dataclasses.fields(config_type)]
    for name in values:
        if name not in names:
            raise ConfigError(_unknown(str(name), names, f"in {where}"))
    return expand_home(config_type, {name: coerce(value, hints[name], name) for name, value in values.items()})


def expand_home(config_type: type, values: dict[str, Any]) -> dict[str, Any]:
    """~ in fields that no checkpoint holds; the others, and defaults, are expanded where they are used."""
    free = {field.name: field.default for field in dataclasses.fields(config_type) if field.metadata.get("free")}
    return {
        name: os.path.expanduser(value) if isinstance(value, str) and free.get(name, value) != value else value
        for name, value in values.items()
    }


def save_config(config: Any, path: str | Path) -> None:
    """Write the resolved configuration, every field, as YAML that `--config` reads back."""
    text = yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True, width=110)
    Path(path).write_text(text, encoding="utf-8")


def config_to_dict(config: Any) -> dict[str, Any]:
    """Plain values only (tuples become lists), as JSON and YAML give them back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def frozen_fields(config: Any) -> dict[str, Any]:
    """The fields that must not change between a checkpoint and its resumption (see `option(free=...)`)."""
    values = config_to_dict(config)
    return {f.name: values[f.name] for f in dataclasses.fields(config) if not f.metadata.get("free", False)}


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Turn a YAML value into the field's type: '1e-4' into a float, a list into a tuple; refuse what cannot be."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if type(None) in arguments and (value is None or str(value).lower() in _NONE_WORDS):
            return None
        for argument in (a for a in arguments if a is not type(None)):
            try:
                return coerce(value, argument, name)
            except MeaningError:
                raise
            except ConfigError:
                continue
        raise ConfigError(f"{name} is {value!r}; it must be {_type_name(hint)}")
    if origin is Literal:
        if value is False and "no" in arguments:  # YAML 1.1 reads a bare `no` as false
            value = "no"
        for argument in arguments:  # a number comes as a word from the command line
            if str(argument) == str(value):
                return argument
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(map(str, arguments))}")
    if hint is Any:
        return value
    length = len(arguments) if origin is tuple and Ellipsis not in arguments else None
    if origin in (list, tuple) and isinstance(value, (list, tuple)) and length in (None, len(value)):
        return origin(coerce(item, arguments[0], name) for item in value)
    if (origin is dict or hint is dict) and isinstance(value, dict):
        return value
    return _coerce_plain(value, hint, name)


def _coerce_plain(value: Any, hint: Any, name: str) -> Any:
    if hint is bool and isinstance(value, bool):
        return value
    if hint is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if hint in (int, float) and not isinstance(value, bool):
        try:
            number = float(value)
            if not math.isfinite(number):
                raise MeaningError(f"{name} is {value!r}; it must be a finite number")
            if hint is int and isinstance(value, str) and re.fullmatch(r"[-+]?0[0-9_]+", value):
                raise MeaningError(f"{name} is {value!r}; write it without leading zeros")
            if hint is float or number == int(number):
                return hint(number) if hint is float or not isinstance(value, int) else value
        except (TypeError, ValueError, OverflowError):
            pass
    raise ConfigError(f"{name} is {value!r}; it must be {_type_name(hint)}")


def _parse_text(text: str, hint: Any) -> Any:
    """A command-line word as YAML would give it: booleans, JSON and comma-separated lists; `coerce` reads the rest."""
    arguments = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = {typing.get_origin(a) or a for a in arguments}
    if bool in kinds and text.lower() in _TRUE_WORDS | _FALSE_WORDS:
        return text.lower() in _TRUE_WORDS
    if kinds & {dict, list, tuple} and text[:1] in ("[", "{"):
        try:
            return read_json(text)
        except StrictSyntaxError as error:
            told = str(error)
            raise ConfigError(f"{text!r} is {told}" if told.startswith("not JSON") else f"{text!r}: {told}") from error
    if kinds & {list, tuple} and ("," in text or not kinds & {int, float, str}):
        return [part.strip() for part in text.split(",")] if text else []
    return text


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        values = read_yaml(user_path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from error
    except StrictSyntaxError as error:
        told = str(error)
        raise ConfigError(f"{path}, {told}" if told.startswith("line ") else f"{path} is not YAML: {told}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `name: value` lines; it holds a {type(values).__name__}")
    return values


def _normalise(argv: Sequence[str] | None) -> list[str]:
    """Accept --max-train-steps for --max_train_steps."""
    words = sys.argv[1:] if argv is None else argv
    result = []
    for word in words:
        name, equals, value = word.partition("=")
        result.append(name.replace("-", "_").replace("__", "--", 1) + equals + value if word[:2] == "--" else word)
    return result


def _unknown(name: str, known: list[str], where: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(near)}?" if near else "see --help for the options"
    return f"unknown option {name!r} {where}; {hint}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> typing.NoReturn:
        raise ConfigError(message)


def _make_parser(config_type: type, description: str, examples: str) -> argparse.ArgumentParser:
    parser = _Parser(
        usage="%(prog)s [--config FILE] [--option VALUE ...]",
        description=description,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=110),
        epilog=examples,
        allow_abbrev=False,
    )
    parser.add_argument("--config", action="append", metavar="FILE", help="YAML file; may be given several times")
    hints, groups = typing.get_type_hints(config_type), {}
    for field in dataclasses.fields(config_type):
        title = field.metadata.get("group", "options")
        group = groups.setdefault(title, parser.add_argument_group(title) if title not in groups else None)
        missing = field.default is dataclasses.MISSING
        default = field.default_factory() if missing else field.default  # type: ignore[misc]
        shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else default
        text = f"{field.metadata.get('help', '')} [{shown}]".replace("%", "%%")
        flag = {"nargs": "?", "const": "true"} if hints[field.name] is bool else {}
        group.add_argument(f"--{field.name}", metavar=_type_name(hints[field.name]), help=text, **flag)
    return parser


def _type_name(hint: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join("none" if a is type(None) else _type_name(a) for a in arguments)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return ",".join(map(_type_name, arguments))
    if origin in (list, tuple):
        return "LIST"
    names = {bool: "true|false", dict: "JSON", str: "TEXT", int: "INT", float: "NUMBER"}
    return names.get(origin or hint, "VALUE")
