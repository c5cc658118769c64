"""Parsing of the command line and YAML files into a run configuration.

    config = parse_config(LDMConfig)          # --config file.yaml --data my_photos --learning_rate 3e-4

The command line takes precedence over YAML files, and YAML files over the defaults of the dataclass. The word none
means None in both. An unknown option is an error that names the nearest options. Only the standard library and yaml are
imported here, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import difflib
import os
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iptv2_diffusion.completion import complete
from iptv2_diffusion.files import shipped
from iptv2_diffusion.messages import one_line
from iptv2_diffusion.strict_yaml import StrictSyntaxError, read_yaml, read_yaml_texts
from iptv2_diffusion.training.coercion import coerce, read_word, type_name
from iptv2_diffusion.training.errors import ConfigError
from iptv2_diffusion.training.options import ConfigType


def parse_config(
    config_type: type[ConfigType], argv: Sequence[str] | None = None, *, description: str = "", examples: str = ""
) -> ConfigType:
    """Read `--config FILE` and `--name value` overrides into `config_type`, resolved. Raises `ConfigError`."""
    parser, arguments = _make_parser(config_type, description, examples), _normalise(argv)
    complete(parser)
    known, rest = parser.parse_known_args(arguments)
    if rest:
        names = [field.name for field in dataclasses.fields(config_type)]
        raise ConfigError(_unknown(rest[0].lstrip("-").split("=")[0], names, "on the command line"))
    hints = typing.get_type_hints(config_type)
    values: dict[str, Any] = {}
    for path in known.config or []:
        values |= coerce_fields(config_type, _read_yaml(path, hints), path)
    for name, text in vars(known).items():
        if name != "config" and text is not None:
            values[name] = coerce(read_word(text, hints[name]), hints[name], name)
    return config_type(**expand_home(config_type, values)).resolve()


def coerce_fields(config_type: type, values: dict[str, Any], where: str) -> dict[str, Any]:
    """Convert values, by field name, to the types of their fields. Raises a `ConfigError` for an unknown name."""
    hints = typing.get_type_hints(config_type)
    names = [field.name for field in dataclasses.fields(config_type)]
    for name in values:
        if name not in names:
            raise ConfigError(_unknown(str(name), names, f"in {where}"))
    return expand_home(config_type, {name: coerce(value, hints[name], name) for name, value in values.items()})


def expand_home(config_type: type, values: dict[str, Any]) -> dict[str, Any]:
    """Expand ~ in fields that no checkpoint stores. The other fields and defaults are expanded where they are used."""
    free = {field.name: field.default for field in dataclasses.fields(config_type) if field.metadata.get("free")}
    return {
        name: os.path.expanduser(value) if isinstance(value, str) and free.get(name, value) != value else value
        for name, value in values.items()
    }


def _read_yaml(path: str, hints: dict[str, Any]) -> dict[str, Any]:
    """Read a configuration. Numbers and dates for options of text are kept as they are written."""
    try:
        text = find_recipe(path).read_text(encoding="utf-8")
        values = read_yaml(text)
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}{_recipes(path)}") from error
    except StrictSyntaxError as error:
        reason = str(error)
        joined = f"{path}, {reason}" if reason.startswith("line ") else f"{path} is not YAML: {reason}"
        raise ConfigError(joined) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold `name: value` lines; it holds a {type(values).__name__}")
    texts = read_yaml_texts(text)
    for name, value in values.items():
        is_text = str in (hints.get(name), *typing.get_args(hints.get(name)))
        if is_text and isinstance(value, (int, float, datetime.date)) and not isinstance(value, bool):
            values[name] = texts.get(name, value)
    return values


def find_recipe(name: str) -> Path:
    """Return the YAML file of this path, or the recipe of this name: configs/NAME.yaml, here or next to the code."""
    path = shipped(name)
    named = shipped(f"configs/{name}.yaml")
    return named if not path.exists() and named.is_file() else path


def recipe_names(**_: Any) -> list[str]:
    """Return the names that `--config` takes besides paths. A completer of argcomplete, which passes keywords."""
    folder = shipped("configs")
    found = folder.rglob("*.yaml") if folder.is_dir() else []
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in found)


def _recipes(name: str) -> str:
    """Return the end of the error about a missing configuration: the names of similar recipes."""
    known = recipe_names()
    if Path(name).suffix or not known:
        return ""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(n for n in known if "/" not in n)
    return f"; recipes have the names {', '.join(near)} ..."


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
    config = parser.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML file, or a recipe's name such as emoji64; may be given several times",
    )
    config.completer = recipe_names  # type: ignore[attr-defined]
    hints = typing.get_type_hints(config_type)
    groups: dict[str, Any] = {}
    for field in dataclasses.fields(config_type):
        title = field.metadata.get("group", "options")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        shown = "none" if default is None else str(default).lower() if isinstance(default, bool) else default
        shown = ",".join(map(str, default)) if isinstance(default, (list, tuple)) else shown
        text = f"{field.metadata.get('help', '')} [{shown}]".replace("%", "%%")
        is_flag = bool in (hints[field.name], *typing.get_args(hints[field.name]))
        flag: dict[str, Any] = {"nargs": "?", "const": "true"} if is_flag else {}
        groups[title].add_argument(f"--{field.name}", metavar=type_name(hints[field.name]), help=text, **flag)
    return parser
