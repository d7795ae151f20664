"""The rules without singular vectors, for one weight: running mean and sum of task updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def mean_update(deltas: Iterable[Tensor]) -> Tensor:
    """Mean task update as a running mean (Knuth), for everything that is not decomposed.

    Args:
        deltas (`Iterable[Tensor]`): Δ of each task, any shape.

    Returns:
        `Tensor`: mean_i(Δi) in float32, same shape. W0 + mean is weight averaging.
    """
    mean: Tensor | None = None
    for count, delta in enumerate(deltas, start=1):
        if mean is None:
            mean = delta.to(torch.float32, copy=True)
        else:
            mean += (delta - mean) / count
    if mean is None:
        raise ValueError("mean_update needs at least one task")
    return mean


def sum_update(deltas: Iterable[Tensor]) -> Tensor:
    """Sum of task updates: task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089).

    Args:
        deltas (`Iterable[Tensor]`): Δ of each task, any shape.

    Returns:
        `Tensor`: Σ_i Δi in float32, same shape.
    """
    total: Tensor | None = None
    for delta in deltas:
        total = delta.to(torch.float32, copy=True) if total is None else total.add_(delta)
    if total is None:
        raise ValueError("sum_update needs at least one task")
    return total
