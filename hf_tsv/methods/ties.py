"""TIES: the largest entries of each task, and the mean of those that agree in sign."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_tsv.linalg.updates import matrix_of
from hf_tsv.methods.rules import MergedUpdate, Updates
from hf_tsv.methods.sums import sum_update
from hf_tsv.system.progress import logger

KEPT_SHARE = 0.2
"""Of the entries of a task that TIES keeps, the largest: the default of its paper."""

DROPPED_BITS = 11
"""Of the 23 of a float32's fraction: sizes are told apart to 2⁻¹², and a task takes 4 MB."""

BINS = 1 << (31 - DROPPED_BITS)


def thresholds(weights: Iterable[Updates], tasks: int) -> list[float]:
    """Size from which on entries of each task are among its largest fifth.

    Args:
        weights (`Iterable[Updates]`): all weights that are merged.
        tasks (`int`): T.
    """
    logger.info("Finding the largest entries of each task.")
    found = [Sizes() for _ in range(tasks)]
    for updates in weights:
        entries = math.prod(updates.shape)
        changed = dict(zip(updates.tasks, updates.deltas, strict=True))
        for i, sizes in enumerate(found):
            sizes.add(matrix_of(changed[i]) if i in changed else None, entries)
    return [sizes.threshold() for sizes in found]


def ties(updates: Updates) -> MergedUpdate:
    """TIES, with the thresholds of the pass before."""
    own = [updates.known[i] for i in updates.tasks]
    return MergedUpdate(ties_update(list(updates.matrices()), own))


def ties_update(deltas: Sequence[Tensor], thresholds: Sequence[float]) -> Tensor:
    """TIES: trim, elect signs, and average those that agree (Yadav et al., arXiv 2306.01708).

    Args:
        deltas (`Sequence[Tensor]`): Δ of each task, any shape.
        thresholds (`Sequence[float]`): of each task, below which its entries are trimmed.

    Returns:
        `Tensor`: in float32, same shape: the mean over tasks whose trimmed entry has the elected
        sign, that of the sum of all trimmed ones; 0 where there is none.

    Example:
        >>> ties_update([torch.tensor([3.0, 1.0]), torch.tensor([-2.0, 0.1])], [0.5, 0.5]).tolist()
        [3.0, 1.0]
    """
    trimmed = [
        torch.where(delta.abs() >= threshold, delta, 0).to(torch.float32)
        for delta, threshold in zip(deltas, thresholds, strict=True)
    ]
    elected = sum_update(trimmed).sign_()
    total = torch.zeros_like(elected)
    count = torch.zeros_like(elected)
    for delta in trimmed:
        agrees = delta.sign() == elected
        total += torch.where(agrees, delta, 0)
        count += agrees
    return total.div_(count.clamp_(min=1))


class Sizes:
    """The absolute values of all entries of one task, counted by size.

    Example:
        >>> sizes = Sizes()
        >>> sizes.add(torch.arange(10.0), 10)
        >>> 7.0 < sizes.threshold(0.2) <= 8.0
        True
    """

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._total = 0

    def add(self, delta: Tensor | None, count: int) -> None:
        """Count the entries of one weight.

        Args:
            delta (`Tensor`, *optional*): Δ, any shape; None where the task did not change it.
            count (`int`): of its entries.
        """
        self._total += count
        if delta is not None:
            # Sizes of positive floats are in the order of their bits.
            bits = delta.detach().cpu().to(torch.float32).abs().reshape(-1).view(torch.int32)
            self._counts += torch.bincount(bits >> DROPPED_BITS, minlength=BINS)

    def threshold(self, share: float = KEPT_SHARE) -> float:
        """The size from which on entries are kept: no more of them than this share of all.

        Args:
            share (`float`): 0 to 1.
        """
        wanted = int(share * self._total)
        from_top = self._counts.flip(0).cumsum(0)
        bins = int((from_top <= wanted).sum())  # whole bins that fit, the largest first
        bits = torch.tensor((BINS - bins) << DROPPED_BITS, dtype=torch.int64)
        if bins == BINS:
            return 0.0
        return float(bits.to(torch.int32).view(torch.float32))
