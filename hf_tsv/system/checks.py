"""Checks of numbers, counts and sizes that users give."""

from __future__ import annotations

import math
import re
from numbers import Real
from typing import cast

from hf_tsv.system.errors import RecipeError
from hf_tsv.system.text import shortened

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]?B|)", re.IGNORECASE)

SHARD_SIZE = re.compile(r"[1-9]\d*(KB|MB|GB|TB)")  # as the Hub client reads it


def memory_size(size: int | str | None) -> int | None:
    """Limit of memory in bytes.

    Args:
        size (`int` or `str`, *optional*): bytes, or a number with a unit; None: no limit.

    Raises:
        [`RecipeError`]: it is neither.

    Example:
        >>> memory_size("2GB")
        2000000000
    """
    if size is None:
        return None
    found = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?([kKMGT]?)B?", str(size).strip())
    if found is None or not float(found[1]):
        raise RecipeError(f"max_memory (--max-memory) is {size!r}.", "Write 2GB or 800MB.")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " "))


def check_counts(**numbers: int | None) -> None:
    """Refuse values that are not whole numbers of images from 1 on.

    Args:
        numbers (`int`, *optional*): values by the name of their argument.
    """
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise RecipeError(f"{name} is {number!r}.", "Give a whole number from 1 on.")


def budget_bytes(budget: str | int, checkpoint_bytes: int) -> int:
    """Convert a budget to bytes.

    Args:
        budget (`str` or `int`): a number of bytes, `"35MB"`, or `"10%"` of the checkpoint.
        checkpoint_bytes (`int`): size of the fine-tuned checkpoint.

    Raises:
        [`RecipeError`]: it is none of these.

    Example:
        >>> budget_bytes("10%", 350_000_000), budget_bytes("1.5MB", 350_000_000)
        (35000000, 1500000)
    """
    match = BUDGET.fullmatch(budget.strip()) if isinstance(budget, str) else None
    number = budget if type(budget) is int else float(match[1]) if match else 0
    unit = match[2].upper() if match else ""
    if not 0 < number < 2**63 or (unit == "%" and number > 100):
        what = repr(budget)[:40] if isinstance(budget, str) else "out of range"
        raise RecipeError(
            f"budget is {what}.", "Write a share such as 10%, or a size such as 35MB."
        )
    if unit == "%":
        return int(checkpoint_bytes * number / 100 + 1e-6)
    return int(number * UNITS[unit])


def check_shard_size(size: object) -> None:
    """Refuse what is neither a number of bytes nor a size such as 5GB."""
    positive = type(size) is int and size > 0
    if not positive and not (isinstance(size, str) and SHARD_SIZE.fullmatch(size)):
        raise RecipeError(
            f"max_shard_size is {shortened(size)}.", "Write bytes, or a size such as 5GB."
        )


def check_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        choices = ", ".join(str(a) for a in allowed if a is not None)
        raise RecipeError(f"{name} is {shortened(value)}.", f"Choose one of {choices}.")


def check_number(name: str, value: object) -> None:
    """Refuse what is not a finite number; `name` is what the error calls it."""
    good = isinstance(value, Real) and not isinstance(value, bool)
    try:
        good = good and math.isfinite(cast("float", value))
    except OverflowError:
        good = False
    if not good:
        raise RecipeError(f"{name} is {shortened(value)}.", "Give a finite number.")
