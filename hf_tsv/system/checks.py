"""Checks of numbers, counts and sizes that users give."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from fractions import Fraction
from numbers import Real
from typing import Any

from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import shortened

SIZE = re.compile(
    r"\s*([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*(%|(?:[kmgt]i?)?b?)\s*", re.ASCII | re.IGNORECASE
)
UNITS = {
    "": 1,
    **{letter: 1000**i for i, letter in enumerate("kmgt", start=1)},
    **{f"{letter}i": 1024**i for i, letter in enumerate("kmgt", start=1)},
}
LIMIT = 2**63  # bytes that no size reaches: files and tensors count theirs in signed 64-bit numbers


def argument(name: str) -> str:
    """Name of an argument as errors write it; other texts as they are."""
    return f"`{name}=`" if name.isidentifier() else name


def check_number(name: str, value: object) -> None:
    """Refuse what is not a finite number; `name` is what the error calls it."""
    with suppress(OverflowError):
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return
    raise UsageError(f"{argument(name)} must be a finite number (got {shortened(value)}).")


def check_counts(**numbers: object) -> None:
    """Refuse numbers, by name, that are not whole and from 1 on; None stands for not given."""
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            said = "at least 1" if type(number) is int else "a whole number"
            raise UsageError(f"{argument(name)} must be {said} (got {shortened(number)}).")


OTHER_NAMES = {
    "fp32": "float32", "float": "float32", "fp16": "float16", "half": "float16", "bf16": "bfloat16",
    "linear": "average",
}  # fmt: skip
"""Names of other tools for types and methods."""


def choice(name: str, value: object, allowed: Sequence[object]) -> Any:
    """One of the values allowed, by its own name or another one; `name` is for the error.

    Example:
        >>> choice("method", "task_arithmetic", ["tsv", "task-arithmetic"])
        'task-arithmetic'
    """
    if value in allowed:
        return value
    names = [one for one in allowed if isinstance(one, str)]
    text = str(value).removeprefix("torch.").lower()
    text = OTHER_NAMES.get(text, text).replace("_", "-")
    for one in names:
        if one.replace("_", "-") == text:
            return one
    close = get_close_matches(text, names, 1)
    hint = f"Did you mean {close[0]}?" if close else f"Choose one of {', '.join(names)}."
    raise UsageError(f"{argument(name)} cannot be {shortened(value)}.", hint)


def size_in_bytes(size: int | str, of: int | None = None, *, name: str = "size") -> int:
    """Bytes that a size stands for, rounded down; the error calls it `name`.

    A size is a number of bytes, or a number with a unit in any case: k, M, G, T, with an i for
    powers of 1024, with or without a B; or with % where `of`, the bytes that are 100%, is given. A
    [`UsageError`] refuses all else, less than a byte, and more than all.

    Example:
        >>> size_in_bytes("1.5 GB"), size_in_bytes("2gib"), size_in_bytes("10%", 350_000_000)
        (1500000000, 2147483648, 35000000)
    """
    found = SIZE.fullmatch(size) if isinstance(size, str) else None
    number = Fraction(found[1] if found else size if type(size) is int else 0)
    unit = found[2].lower().rstrip("b") if found else ""
    bare = of is not None and number <= 100 and not (found and found[2])  # a share without its %
    if not bare and unit != "%" and 1 <= number * UNITS[unit] < LIMIT:
        return int(number * UNITS[unit])
    if unit == "%" and of is not None and 0 < number <= 100:
        return int(number * of / 100)
    hint = "Examples: 2GB, 800MB."
    if of is not None:
        hint = "Examples: 10%, 35MB."
        if isinstance(size, int | float) or (found and not found[2]):
            share = size if isinstance(size, int | float) else Fraction(size)
            share *= 100 if 0 < share < 1 else 1
            hint = f"Did you mean {float(share):g}%? {hint}" if 0 < share <= 100 else hint
    raise UsageError(f"{argument(name)}: invalid size {shortened(size)}.", hint)
