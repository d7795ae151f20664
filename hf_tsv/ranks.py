"""Rules for the number of triplets kept of each weight: by share, number, energy, or bytes."""

from __future__ import annotations

import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tsv.errors import RecipeError
from hf_tsv.recipe import check_number

DEFAULT_RANK_FRACTION = 0.1
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
BUDGET = re.compile(r"(\d+(?:\.\d+)?)\s*(%|[KMGT]?B|)", re.IGNORECASE)


@dataclass(frozen=True)
class RankRule:
    """Rule for the ranks, one of four; `rank_fraction` 0.1 if none is given.

    Args:
        rank_fraction (`float`, *optional*): share of k = min(d_out, d_in), rounded down.
        rank (`int`, *optional*): the same number for every weight.
        energy (`float`, *optional*): share of the squared norm to keep; the smallest sufficient
            rank is taken.
        budget (`str` or `int`, *optional*): bytes for everything, as a number, `"35MB"`, or `"10%"`
            of the fine-tuned checkpoint.
    """

    rank_fraction: float | None = None
    rank: int | None = None
    energy: float | None = None
    budget: str | int | None = None

    def __post_init__(self) -> None:
        given = [name for name in RankRule.__annotations__ if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{' and '.join(given)} exclude each other.", "Give one of them.")
        if not given:
            object.__setattr__(self, "rank_fraction", DEFAULT_RANK_FRACTION)
        for name in ("rank_fraction", "energy"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
                object.__setattr__(self, name, float(value))
                if not 0 < value <= 1:
                    raise RecipeError(f"{name} is {value}.", "Give a number above 0 and up to 1.")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise RecipeError(f"rank is {self.rank!r}.", "Give a whole number from 1 on.")
        if self.budget is not None:
            budget_bytes(self.budget, 1)

    def to_dict(self) -> dict[str, Any]:
        """Value of the one rule that applies, by its name."""
        return {k: v for k, v in vars(self).items() if v is not None}

    def rank_before(self, k: int) -> int | None:
        """Rank of a weight, or None if it depends on the singular values.

        Args:
            k (`int`): min(d_out, d_in).
        """
        if self.rank is not None:
            return min(self.rank, k)
        if self.rank_fraction is not None:
            return max(1, int(self.rank_fraction * k + 1e-9))
        return None


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


def rank_of_energy(energies: Tensor, total: float, share: float) -> int:
    """Smallest rank that keeps a share of the energy.

    Args:
        energies (`Tensor`): squared singular values, descending, shape (k,).
        total (`float`): squared Frobenius norm of the update.
        share (`float`): share of that norm to keep.

    Returns:
        `int`: the rank; k if the singular values given do not suffice.
    """
    enough = torch.nonzero(energies.cumsum(0) >= share * total * (1 - 1e-12))
    return int(enough[0]) + 1 if len(enough) else len(energies)


@dataclass(frozen=True)
class Choice:
    """Alternatives for storing one weight.

    Args:
        energies (`Tensor`): squared singular values that may be kept, descending, shape (n,).
        total (`float`): squared Frobenius norm of the update.
        triplet_bytes (`int`): cost of one triplet.
        dense_bytes (`int`, *optional*): cost of the update itself; None if it may not be stored.
    """

    energies: Tensor
    total: float
    triplet_bytes: int
    dense_bytes: int | None


DENSE = -1
"""Value in place of a rank for a weight whose update itself is stored."""


def allocate(choices: Sequence[Choice], budget: int) -> list[int]:
    """Spend bytes on the triplets that carry most energy per byte, over all weights.

    The squared error of a weight is the energy of the omitted triplets (Eckart and Young, 1936), so
    the total error is a sum of terms that each depend on one rank. Singular values descend, so each
    further triplet of a weight adds at most as much energy as the one before. The curve of energy
    over bytes is therefore concave, and so is its hull, in which storing the update itself is the
    last step. Taking the steepest steps of all hulls first minimises error + λ · bytes for the λ of
    the last step taken: no allocation of as many bytes or fewer has a smaller error. When the rest
    of the budget is too small for the next step, it is spent on smaller steps that still fit; the
    result is worse than the best one by at most the energy of that next step.

    Args:
        choices (`Sequence[Choice]`): the weights.
        budget (`int`): bytes for all weights together.

    Returns:
        `list[int]`: rank of each weight, or [`DENSE`].
    """
    kept = [0] * len(choices)
    energies = [choice.energies.tolist() for choice in choices]
    bends = [_bend(choice, e) for choice, e in zip(choices, energies, strict=True)]
    queue: list[tuple[float, int, int, int]] = []

    def offer(i: int) -> None:
        """Queue the next step of a weight: one triplet, or at its bend the update itself."""
        choice, rank = choices[i], kept[i]
        gain, cost, after = 0.0, choice.triplet_bytes, rank + 1
        if rank == bends[i] and choice.dense_bytes is not None:
            gain = choice.total - sum(energies[i][:rank])
            cost, after = choice.dense_bytes - rank * choice.triplet_bytes, DENSE
        elif rank < _most(choice):
            gain = energies[i][rank]
        if gain > 0:
            heapq.heappush(queue, (-gain / cost, i, after, cost))

    for i in range(len(choices)):
        offer(i)
    left = budget
    while queue:
        _, i, after, cost = heapq.heappop(queue)
        if cost <= left:
            left -= cost
            kept[i] = after
        elif after == DENSE:
            bends[i] = DENSE  # too large, but single triplets may still fit
        else:
            continue
        if kept[i] != DENSE:
            offer(i)
    return kept


def _most(choice: Choice) -> int:
    """Largest rank that takes fewer bytes than the update itself."""
    if choice.dense_bytes is None:
        return len(choice.energies)
    return min(len(choice.energies), (choice.dense_bytes - 1) // choice.triplet_bytes)


def _bend(choice: Choice, energies: Sequence[float]) -> int:
    """Rank at which the hull leaves the curve of triplets for the update itself."""
    rank = _most(choice)
    if choice.dense_bytes is None:
        return DENSE
    rest = max(choice.total - sum(energies[:rank]), 0.0)
    cost = choice.dense_bytes - rank * choice.triplet_bytes
    while rank and energies[rank - 1] * cost <= rest * choice.triplet_bytes:
        rank -= 1
        rest += energies[rank]
        cost += choice.triplet_bytes
    return rank
