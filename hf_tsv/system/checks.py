"""Checks of numbers, counts and sizes that users give."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from fractions import Fraction
from numbers import Real

from hf_tsv.system.errors import RecipeError
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


def check_number(name: str, value: object) -> None:
    """Refuse what is not a finite number; `name` is what the error calls it."""
    with suppress(OverflowError):
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
            return
    raise RecipeError(f"{name} is {shortened(value)}.", "Give a finite number.")


def check_counts(**numbers: object) -> None:
    """Refuse numbers, by name, that are not whole and from 1 on; None stands for not given."""
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise RecipeError(f"{name} is {shortened(number)}.", "Give a whole number from 1 on.")


def check_choice(name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Refuse what is not one of the values allowed; `name` is what the error calls it."""
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed if a is not None)
        raise RecipeError(f"{name} is {shortened(value)}.", f"Choose one of {choices}.")


def size_in_bytes(size: int | str, of: int | None = None, *, name: str = "size") -> int:
    """Bytes that a size stands for, rounded down; the error calls it `name`.

    A size is a number of bytes, or a number with a unit in any case: k, M, G, T, with an i for
    powers of 1024, with or without a B; or with % where `of`, the bytes that are 100%, is given. A
    [`RecipeError`] refuses all else, less than a byte, and more than all.

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
    hint = "Write a size such as 2GB or 800MB."
    if of is not None:
        hint = "Write a share such as 10%, or a size such as 35MB."
        if type(size) in (int, float) or (found and not found[2]):
            share = float(size) * (100 if float(size) < 1 else 1)
            hint = f"Did you mean {share:g}%? {hint}" if 0 < share <= 100 else hint
    raise RecipeError(f"{name} is {shortened(size)}.", hint)
