"""TIES: the largest entries of each task, and the mean of those that agree in sign."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from hf_tsv.linalg.updates import matrix_of
from hf_tsv.methods.rules import MergedUpdate, Updates
from hf_tsv.methods.sums import sum_update
from hf_tsv.system.progress import logger

KEPT_SHARE = 0.2
"""Share of the entries of a task that TIES keeps, the largest: the default of its paper."""

DROPPED_BITS = 11
"""Bits dropped of the 23 of a float32's fraction: sizes are told apart to 2⁻¹², for 4 MB a task."""

BINS = 1 << (31 - DROPPED_BITS)


def thresholds(weights: Iterable[Updates], tasks: int) -> list[float]:
    """Size from which on entries of each of T tasks are among its largest fifth."""
    logger.info("Trimming the updates to their largest entries.")
    found = [Sizes() for _ in range(tasks)]
    for updates in weights:
        entries = math.prod(updates.shape)
        changed = dict(zip(updates.tasks, updates.deltas, strict=True))
        for i, sizes in enumerate(found):
            sizes.add(matrix_of(changed[i]) if i in changed else None, entries)
    return [sizes.threshold() for sizes in found]


def ties(updates: Updates) -> MergedUpdate:
    """TIES: trim, elect signs, and average those that agree (Yadav et al., arXiv 2306.01708).

    Entries below the threshold of their task are trimmed. The elected sign is that of the sum of
    the others; where no task has it, 0 remains.
    """
    trimmed = [
        torch.where(delta.abs() >= updates.known[i], delta, 0).to(torch.float32)
        for i, delta in zip(updates.tasks, updates.matrices(), strict=True)
    ]
    elected = sum_update(trimmed).sign_()
    total, count = torch.zeros_like(elected), torch.zeros_like(elected)
    for delta in trimmed:
        agrees = delta.sign() == elected
        total += torch.where(agrees, delta, 0)
        count += agrees
    return MergedUpdate(total.div_(count.clamp_(min=1)))


class Sizes:
    """The absolute values of all entries of one task, counted by size."""

    def __init__(self) -> None:
        self._counts = torch.zeros(BINS, dtype=torch.int64)
        self._total = 0

    def add(self, delta: Tensor | None, count: int) -> None:
        """Count the entries of one weight; Δ is None where the task did not change it."""
        self._total += count
        if delta is not None:
            # Sizes of positive floats are in the order of their bits.
            bits = delta.detach().cpu().to(torch.float32).abs().reshape(-1).view(torch.int32)
            self._counts += torch.bincount(bits >> DROPPED_BITS, minlength=BINS)

    def threshold(self, share: float = KEPT_SHARE) -> float:
        """The size from which on entries are kept: no more of them than this share of all."""
        wanted = int(share * self._total)
        from_top = self._counts.flip(0).cumsum(0)
        bins = int((from_top <= wanted).sum())  # whole bins that fit, the largest first
        if bins == BINS:
            return 0.0
        bits = torch.tensor((BINS - bins) << DROPPED_BITS, dtype=torch.int32)
        return float(bits.view(torch.float32))
