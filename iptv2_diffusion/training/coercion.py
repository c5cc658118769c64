"""Conversion of words in YAML files and on the command line to the declared types of the options."""

from __future__ import annotations

import math
import re
import types
import typing
from typing import Any, Literal

from iptv2_diffusion.strict_yaml import StrictSyntaxError, read_json
from iptv2_diffusion.training.errors import ConfigError

_NONE_WORDS = {"none", "null", "~", ""}
_TRUE_WORDS, _FALSE_WORDS = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}


class MeaningError(ConfigError):
    """Raised for an invalid number, or for one whose value differs from its appearance."""


def coerce(value: Any, hint: Any, name: str) -> Any:
    """Convert a YAML value to the field's type: '1e-4' to a float, a list to a tuple. Raises an error if it cannot."""
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
        raise ConfigError(f"{name} is {value!r}; it must be {type_name(hint)}")
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
    if hint in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            number = float(value)
            if not math.isfinite(number):
                raise MeaningError(f"{name} is {value!r}; it must be a finite number")
            if hint is int and isinstance(value, str) and re.fullmatch(r"[-+]?0[0-9_]+", value):
                raise MeaningError(f"{name} is {value!r}; write it without leading zeros")
            if hint is float or number == int(number):
                return hint(number) if hint is float or not isinstance(value, int) else value
        except (ValueError, OverflowError):
            pass
    raise ConfigError(f"{name} is {value!r}; it must be {type_name(hint)}")


def read_word(text: str, hint: Any) -> Any:
    """Parse a command-line word as YAML: booleans, JSON and comma-separated lists. `coerce` converts the others."""
    arguments = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    kinds = {typing.get_origin(a) or a for a in arguments}
    if bool in kinds and text.lower() in _TRUE_WORDS | _FALSE_WORDS:
        return text.lower() in _TRUE_WORDS
    if kinds & {dict, list, tuple} and text[:1] in ("[", "{"):
        try:
            return read_json(text)
        except StrictSyntaxError as error:
            reason = str(error)
            joined = f"{text!r} is {reason}" if reason.startswith("not JSON") else f"{text!r}: {reason}"
            raise ConfigError(joined) from error
    if kinds & {list, tuple} and ("," in text or not kinds & {int, float, str}):
        return [part.strip() for part in text.split(",")] if text else []
    return text


def type_name(hint: Any) -> str:
    """Return the name of a type for --help and errors, such as INT|none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return "|".join("none" if a is type(None) else type_name(a) for a in arguments)
    if origin is Literal:
        return "|".join(map(str, arguments))
    if origin is tuple and Ellipsis not in arguments:
        return ",".join(map(type_name, arguments))
    if origin in (list, tuple):
        return "LIST"
    names = {bool: "true|false", dict: "JSON", str: "TEXT", int: "INT", float: "NUMBER"}
    return names.get(origin or hint, "VALUE")
