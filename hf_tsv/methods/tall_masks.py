"""TALL-masks and consensus: the sum of updates, and which entries each task needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tsv.methods.rules import MergedUpdate, Updates
from hf_tsv.methods.sums import sum_update

MASK_SCALE, AGREEING_TASKS = 0.4, 2
"""λ of TALL-masks and k of consensus task arithmetic: their paper chooses λ from 0.2 to 0.6 on
validation images, and 2 removes what matters to one task alone."""


@dataclass(frozen=True)
class TallMask:
    """Entries in which a task needs the sum of updates (Wang et al., ICML 2024), for a λ.

    Example:
        >>> tall_mask(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0])).tolist()
        [True, False]
    """

    scale: float

    def __call__(self, delta: Tensor, total: Tensor) -> Tensor:
        """Tell where |Δ| is larger than λ |Σ_i Δi − Δ| of the others (arXiv 2405.07813, eq. 4)."""
        return delta.abs() > self.scale * (total - delta).abs()


tall_mask = TallMask(MASK_SCALE)


def consensus(updates: Updates) -> MergedUpdate:
    """Consensus task arithmetic: Σ_i Δi, where several tasks need it (Wang et al., ICML 2024).

    Entries in the [`tall_mask`] of fewer than [`AGREEING_TASKS`] are zero. Tasks that left the
    weight as it is have no need.
    """
    deltas = list(updates.matrices())
    total = sum_update(deltas)
    votes = torch.zeros_like(total)
    for delta in deltas:
        votes += tall_mask(delta, total)
    return MergedUpdate(total.mul_(votes >= min(AGREEING_TASKS, updates.count)))
