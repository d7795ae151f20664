"""Checks of numbers, counts and sizes that users give."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from fractions import Fraction
from numbers import Real

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


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse what is not one of the values allowed; `name` is what the error calls it."""
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed if a is not None)
        raise UsageError(
            f"{argument(name)} cannot be {shortened(value)}.", f"Choose one of {choices}."
        )


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
    if unit != "%" and 1 <= number * UNITS[unit] < LIMIT:
        return int(number * UNITS[unit])
    if unit == "%" and of is not None and 0 < number <= 100:
        return int(number * of / 100)
    hint = "Examples: 2GB, 800MB."
    if of is not None:
        hint = "Examples: 10%, 35MB."
        if isinstance(size, float) or (found and not found[2]):
            share = float(size)
            hint = f"Did you mean {100 * share:g}%? {hint}" if 0 < share < 1 else hint
    raise UsageError(f"{argument(name)}: invalid size {shortened(size)}.", hint)
