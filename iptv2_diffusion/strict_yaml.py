"""Strict readers of YAML and JSON that refuse ambiguous values and name the line.

YAML 1.1 reads 010 as 8 and 1:30 as 90, and it keeps the last of two equal keys. Both formats accept NaN and infinity.
In a configuration, each of these is a mistake.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Hashable
from typing import Any

import yaml

from iptv2_diffusion.messages import one_line

__all__ = ["StrictSyntaxError", "read_json", "read_yaml", "read_yaml_texts"]

_LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")
_BASE_60 = re.compile(r"[-+]?[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?")
MOST_DIGITS = 40
MOST_VALUES = 100_000


class StrictSyntaxError(ValueError):
    """Raised for invalid YAML or JSON and for ambiguous values. The message names the line or the key."""


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses duplicate keys, octal and base-60 numbers, NaN and infinity."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen: dict[Any, int] = {}
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue
        key, line = loader.construct_object(key_node, deep=True), key_node.start_mark.line + 1
        if not isinstance(key, Hashable):  # a list or a mapping
            raise StrictSyntaxError(f"line {line}: {key!r} cannot be a name; give name: value")
        before = seen.setdefault(key, line)
        if before != line or list(seen).count(key) > 1:
            raise StrictSyntaxError(f"line {line}: {key!r} is given twice, first in line {before}; remove one")
    loader.flatten_mapping(node)
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text, line = node.value, node.start_mark.line + 1
    if _LEADING_ZERO.fullmatch(text):
        raise StrictSyntaxError(f"line {line}: {text} would be read as an octal number; write it without leading zeros")
    if _BASE_60.fullmatch(text):
        raise StrictSyntaxError(f"line {line}: {text} would be read as a number to base 60; put it in quotes")
    if len(text) > MOST_DIGITS:
        raise StrictSyntaxError(f"line {line}: a number has {len(text)} digits; the limit is {MOST_DIGITS}")
    return loader.construct_yaml_int(node)


def _float(loader: _Loader, node: yaml.ScalarNode) -> float:
    text, line = node.value, node.start_mark.line + 1
    if _BASE_60.fullmatch(text):
        raise StrictSyntaxError(f"line {line}: {text} would be read as a number to base 60; put it in quotes")
    value = loader.construct_yaml_float(node)
    if not math.isfinite(value):
        raise StrictSyntaxError(f"line {line}: {text} is not a finite number; use a finite number or none")
    return value


def _count(value: Any, known: dict[int, int]) -> int:
    """Return the number of values in nested lists and mappings, where each repetition of an anchor counts."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
    if id(value) not in known:
        known[id(value)] = 1 + sum(_count(item, known) for item in inner)
    return known[id(value)]


_Loader.add_constructor("tag:yaml.org,2002:map", _mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _integer)
_Loader.add_constructor("tag:yaml.org,2002:float", _float)


def read_yaml(text: str) -> Any:
    """Parse a YAML text, or a JSON text, which is YAML. Raises a `StrictSyntaxError`."""
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise StrictSyntaxError(one_line(error)) from error
    except StrictSyntaxError:
        raise
    except (ValueError, TypeError, RecursionError, AttributeError, KeyError) as error:  # from yaml's constructors
        raise StrictSyntaxError(f"it cannot be read ({one_line(error)})") from error
    try:
        count = _count(value, {})
    except RecursionError as error:  # an anchor inside itself
        raise StrictSyntaxError(f"it cannot be read ({one_line(error)})") from error
    if count > MOST_VALUES:
        raise StrictSyntaxError(f"it repeats anchors to more than {MOST_VALUES} values; write them out")
    return value


def read_yaml_texts(text: str) -> dict[str, str]:
    """Return the plain values of a YAML mapping as they are written: `1.10` is "1.10" and not 1.1."""
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return {
        key.value: value.value
        for key, value in pairs
        if isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode)
    }


def read_json(text: str) -> Any:
    """Parse a JSON text. Raises a `StrictSyntaxError`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                raise StrictSyntaxError(f"{name!r} is given twice; remove one")
        return dict(pairs)

    def finite(word: str) -> float:
        value = float(word)
        if not math.isfinite(value):
            raise StrictSyntaxError(f"{word} is not a finite number; use a finite number or null")
        return value

    def short(word: str) -> int:
        if len(word) > MOST_DIGITS:
            raise StrictSyntaxError(f"a number has {len(word)} digits; the limit is {MOST_DIGITS}")
        return int(word)

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=finite, parse_float=finite, parse_int=short)
    except json.JSONDecodeError as error:
        raise StrictSyntaxError(f"not JSON ({error.msg} at character {error.pos})") from error
    except RecursionError as error:
        raise StrictSyntaxError("not JSON (nested too deeply)") from error
