"""JSON and YAML from untrusted files, parsed within bounds."""

from __future__ import annotations

import json
import re
from typing import Any

import yaml

MAX_BYTES = 32_000_000
# Most values of a JSON text, far beyond a header of 50,000 tensors (they take up to 250 MB), and
# of a YAML text, each of which takes about a kilobyte while it is parsed.
MAX_JSON_VALUES, MAX_YAML_VALUES = 2_000_000, 300_000

# Bytes of which at least one precedes every value but the first, so that they bound the count.
JSON_MARKS, YAML_MARKS = b",:[{", b",:[{-?\n"

MAX_DEPTH = 100  # of nesting: readers and writers recurse, and Python's stack is limited
MOST_DIGITS = 1000  # of a YAML integer; longer ones are slow to parse, or cannot be printed
SURROGATE = re.compile(rb"\\u[dD]")


def parse_json(raw: bytes, *, unique: bool = False) -> Any:
    """Parse a JSON text in UTF-8, with or without a byte order mark.

    Of duplicate keys the last one counts, or all are refused.

    It raises `ValueError` for what is not valid, and `OverflowError` for what is too large.

    Example:
        >>> parse_json(b'{"a": [1, 2]}')
        {'a': [1, 2]}
    """
    _check_size(raw, JSON_MARKS, MAX_JSON_VALUES)
    try:
        value = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=_unique if unique else None)
        if SURROGATE.search(raw):
            json.dumps(value, ensure_ascii=False).encode()  # fails for half a surrogate pair
    except (ValueError, RecursionError):
        raise ValueError("not valid JSON") from None
    if _is_deep(value):
        raise ValueError("nested too deeply")
    return value


def parse_yaml(text: str) -> Any:
    """Parse a YAML text as `yaml.safe_load` does, but refuse aliases.

    Aliases can double the content with every line, so that a kilobyte stands for more than memory
    holds or a comparison could ever finish. It raises `ValueError` for what is not valid, or has
    aliases, and says which; `OverflowError` for what is too large.

    Example:
        >>> parse_yaml("a: [1, 2]")
        {'a': [1, 2]}
    """
    try:
        _check_size(text.encode(), YAML_MARKS, MAX_YAML_VALUES)
        return yaml.load(text, _Loader)  # noqa: S506  (derived from SafeLoader)
    except _AliasError:
        raise ValueError("written with aliases, which are not read") from None
    except (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError):
        raise ValueError("not valid YAML") from None


def _check_size(raw: bytes, marks: bytes, most: int) -> None:
    values = sum(raw.count(mark) for mark in marks)
    if len(raw) > MAX_BYTES or values > most:
        raise OverflowError(f"{len(raw)} bytes, {values} values")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


class _AliasError(Exception):
    """A YAML alias was met."""


class _Loader(yaml.SafeLoader):
    """Safe loader that refuses aliases, and integers too long to parse or print quickly."""

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, "a number of very many digits")
        number: int = super().construct_yaml_int(node)
        return number

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _AliasError
        return super().compose_node(parent, index)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
