"""TALL-masks and consensus: the sum of updates, and which entries each task needs."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Where a task needs the sum of updates (Wang et al., ICML 2024).

    Args:
        scale (`float`): λ.

    Example:
        >>> tall_mask(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0])).tolist()
        [True, False]
    """

    scale: float

    def __call__(self, delta: Tensor, total: Tensor) -> Tensor:
        """Tell where |Δ| is larger than λ times what the other tasks add (arXiv 2405.07813, eq. 4).

        Args:
            delta (`Tensor`): Δ of the task, any shape.
            total (`Tensor`): Σ_i Δi, same shape.

        Returns:
            `Tensor`: bool, same shape.
        """
        return delta.abs() > self.scale * (total - delta).abs()


tall_mask = TallMask(MASK_SCALE)


def consensus(updates: Updates) -> MergedUpdate:
    """Consensus task arithmetic; tasks that left the weight as it is have no need."""
    return MergedUpdate(consensus_update(list(updates.matrices()), updates.count))


def consensus_update(deltas: Sequence[Tensor], tasks: int | None = None) -> Tensor:
    """Consensus task arithmetic: the sum, where several tasks need it (Wang et al., ICML 2024).

    Entries that are in the [`tall_mask`] of fewer than [`AGREEING_TASKS`] are left at the base
    model's (arXiv 2405.07813).

    Args:
        deltas (`Sequence[Tensor]`): Δ of each task that has one, any shape.
        tasks (`int`, *optional*): how many there are; default: as many.

    Returns:
        `Tensor`: Σ_i Δi with the others set to zero, in float32, same shape.

    Example:
        >>> consensus_update([torch.tensor([1.0, 1.0]), torch.tensor([1.0, 0.0])]).tolist()
        [2.0, 0.0]
    """
    total = sum_update(deltas)
    votes = torch.zeros_like(total)
    for delta in deltas:
        votes += tall_mask(delta, total)
    return total.mul_(votes >= min(AGREEING_TASKS, tasks or len(deltas)))
