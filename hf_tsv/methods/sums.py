"""Sum and mean of task updates, taken one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from hf_tsv.methods.rules import MergedUpdate, Updates
from hf_tsv.system.memory import empty


def total(updates: Updates) -> MergedUpdate:
    """Task arithmetic, M = Σᵢ Δᵢ."""
    return MergedUpdate(sum_update(updates.matrices()))


def mean(updates: Updates) -> MergedUpdate:
    """Weight averaging, M = (1/T') Σᵢ Δᵢ over the T' tasks that change the weight."""
    return MergedUpdate(mean_update(updates.matrices()))


def mean_update(deltas: Iterable[Tensor]) -> Tensor:
    """Mean of updates of any shape in float32, as a running mean (Knuth)."""
    mean: Tensor | None = None
    counts = itertools.count(1)  # enumerate() would keep each update until the next one is there
    for delta in deltas:
        count = next(counts)
        if mean is None:
            mean = _copy(delta, torch.float32)
        else:
            apart = _copy(delta, torch.result_type(delta, mean)).sub_(mean).div_(count)
            mean += apart
            del apart
        del delta  # before the next one is made
    if mean is None:
        raise ValueError("mean_update needs at least one task")
    return mean


def sum_update(deltas: Iterable[Tensor]) -> Tensor:
    """Sum of updates of any shape in float32 (Ilharco et al., ICLR 2023, arXiv 2212.04089)."""
    total: Tensor | None = None
    for delta in deltas:
        total = _copy(delta, torch.float32) if total is None else total.add_(delta)
        del delta  # before the next one is made
    if total is None:
        raise ValueError("sum_update needs at least one task")
    return total


def _copy(delta: Tensor, dtype: torch.dtype) -> Tensor:
    return empty(*delta.shape, dtype=dtype, device=delta.device).copy_(delta)
