"""What a weight costs, in operations and in memory, and how much can go on at a time."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from hf_tsv.errors import RecipeError
from hf_tsv.progress import human_bytes
from hf_tsv.tsv import ROWS

if TYPE_CHECKING:
    from hf_tsv.plan import Weight

EIGH = 9.0
"""Operations of a full symmetric eigendecomposition, per cube of its size; of leading pairs 4/3,
which run at a third of the speed of a product."""

LITTLE = 0.05
"""What biases and norms take, as a share of the largest weight."""

PER_VALUE = 200.0
"""Operations as which reading, checking and adding one value count."""


NOTED, NOTED_PAIR = 8_000, 64
"""Bytes kept of every weight until the end (its place in the headers, its plan, what was found, its
line of the report), and of every two tasks in it. Measured: 7,700 with two tasks."""


@dataclass(frozen=True)
class Parallelism:
    """How much goes on at a time.

    Args:
        threads (`int`): for the computation.
        ahead (`bool`): whether the next weight is read meanwhile.
    """

    threads: int = 1
    ahead: bool = True


def operations(weight: Weight) -> float:
    """About how many floating-point operations a weight takes.

    Args:
        weight ([`Weight`]): its plan.
    """
    tasks = len(weight.inputs)
    values = PER_VALUE * prod(weight.shape) * (tasks + 1)
    if weight.treatment != "decomposed":
        return values
    (m, n), columns = weight.shape, weight.rank * tasks
    short, inner = min(m, n), min(columns, max(m, n))
    truncation = m * n * short + 4 * short**3 + 4 * m * n * weight.rank
    sides = sum(d * inner * min(d, inner) + EIGH * min(d, inner) ** 3 for d in (m, n))
    return values + tasks * truncation + sides + 4 * m * n * columns


def peak_memory(
    weights: Sequence[Weight], parallelism: Parallelism, *, measure: bool = False
) -> int:
    """Most bytes in use at a time, on top of the interpreter and its libraries.

    Args:
        weights (`Sequence[Weight]`): in the order they are worked on.
        parallelism ([`Parallelism`]): how they are.
        measure (`bool`): their interference too.
    """
    largest = max((held(weight) for weight in weights), default=0)
    most_read = max(map(_reading, weights), default=0)
    peak = 0
    for i, weight in enumerate(weights):
        computing = _computing(weight, parallelism.threads, measure)
        now = held(weight) + max(computing, _reading(weight))
        if i:  # still being written
            now += 4 * prod(weights[i - 1].shape)
        if parallelism.ahead and i + 1 < len(weights):
            now += int(largest * (1 + LITTLE)) + most_read
        peak = max(peak, now)
    return peak


def noted_bytes(weights: Sequence[Weight]) -> int:
    """Bytes of what is kept of all weights until the end.

    Args:
        weights (`Sequence[Weight]`): of the plan.
    """
    return sum(NOTED + NOTED_PAIR * len(weight.inputs) ** 2 for weight in weights)


def held(weight: Weight) -> int:
    """Bytes of W0 and all updates; means and sums hold one task at a time.

    Args:
        weight ([`Weight`]): its plan.
    """
    together = weight.treatment in ("decomposed", "combined")
    tasks = len(weight.inputs) if together else 1
    return 4 * prod(weight.shape) * (tasks + 1)


def fitting(
    weights: Sequence[Weight], threads: int, most: int | None, used: int, *, measure: bool = False
) -> Parallelism:
    """As much parallelism as memory allows.

    Args:
        weights (`Sequence[Weight]`): in the order they are worked on.
        threads (`int`): that there are.
        most (`int`, *optional*): bytes the whole process may use.
        used (`int`): bytes it uses already.
        measure (`bool`): their interference too.

    Raises:
        [`RecipeError`]: not even one thread fits.
    """
    choices = [Parallelism(threads), *(Parallelism(n, ahead=False) for n in range(threads, 0, -1))]
    for choice in choices:
        needed = used + peak_memory(weights, choice, measure=measure)
        if most is None or needed <= most:
            return choice
    raise RecipeError(
        f"About {human_bytes(needed)} of memory are needed, more than --max-memory allows.",
        f"Give at least {human_bytes(needed)}.",
    )


def memory_size(size: int | str | None) -> int | None:
    """Bytes of a limit of memory.

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


def _reading(weight: Weight) -> int:
    """A checkpoint's own values, and the same in float32."""
    return 0 if weight.treatment == "copied" else 4 * 2 * prod(weight.shape)


def _computing(weight: Weight, threads: int, measure: bool) -> int:
    """Everything in float64."""
    result = (8 + 4) * prod(weight.shape)  # update, cast
    if weight.treatment == "combined":  # trimmed or voted on beside one another
        return result + 4 * prod(weight.shape) * (len(weight.inputs) + 3)
    if weight.treatment != "decomposed":
        return result
    (m, n), columns = weight.shape, weight.rank * len(weight.inputs)
    vectors = 8 * columns * (m + n)
    one_task = 8 * (m * n + 4 * min(m, n) ** 2 + 4 * weight.rank * (m + n))
    inner = min(columns, max(m, n))
    polar = min(threads, 2) * 8 * 5 * inner**2 + vectors  # beside it, the chain of products
    decomposing = min(threads, len(weight.inputs)) * one_task
    measuring = vectors + 8 * inner * (inner + 2 * ROWS) if measure else 0
    return vectors + max(decomposing, vectors + polar + result + measuring)
