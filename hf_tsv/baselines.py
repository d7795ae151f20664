"""The other rules, for one weight: mean and sum of task updates, and what followed them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from hf_tsv import linalg
from hf_tsv.memory import empty
from hf_tsv.tsv import MergedUpdate, TaskSingularVectors, concatenate

KEPT_SHARE = 0.2
"""Of the entries of a task that TIES keeps, the largest: the default of its paper."""

MASK_SCALE, AGREEING_TASKS = 0.4, 2
"""λ of TALL-masks and k of consensus task arithmetic: their paper chooses λ from 0.2 to 0.6 on
validation images, and 2 removes what matters to one task alone."""

COMMON_SHARE = 0.8
"""Of the directions of Iso-CTS that are those of the sum: the default of its paper."""


def mean_update(deltas: Iterable[Tensor]) -> Tensor:
    """Mean task update as a running mean (Knuth), for everything that is not decomposed.

    Args:
        deltas (`Iterable[Tensor]`): Δ of each task, any shape.

    Returns:
        `Tensor`: mean_i(Δi) in float32, same shape. W0 + mean is weight averaging.
    """
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
    """Sum of task updates: task arithmetic (Ilharco et al., ICLR 2023, arXiv 2212.04089).

    Args:
        deltas (`Iterable[Tensor]`): Δ of each task, any shape.

    Returns:
        `Tensor`: Σ_i Δi in float32, same shape.
    """
    total: Tensor | None = None
    for delta in deltas:
        total = _copy(delta, torch.float32) if total is None else total.add_(delta)
        del delta  # before the next one is made
    if total is None:
        raise ValueError("sum_update needs at least one task")
    return total


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


def tall_mask(delta: Tensor, total: Tensor) -> Tensor:
    """Where a task needs the sum of updates: its TALL-mask (Wang et al., ICML 2024).

    Args:
        delta (`Tensor`): Δ of the task, any shape.
        total (`Tensor`): Σ_i Δi, same shape.

    Returns:
        `Tensor`: of bool, same shape: whether |Δ| is larger than λ ([`MASK_SCALE`]) times what the
        other tasks add (arXiv 2405.07813, eq. 4).

    Example:
        >>> tall_mask(torch.tensor([1.0, 1.0]), torch.tensor([3.0, 4.0])).tolist()
        [True, False]
    """
    return delta.abs() > MASK_SCALE * (total - delta).abs()


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


def isotropic_update(
    deltas: Sequence[Tensor], floors: Sequence[float], precision: linalg.Precision = "fast"
) -> MergedUpdate:
    """Iso-C: the sum of updates with all singular values equal (Marczak et al., arXiv 2502.04959).

    Args:
        deltas (`Sequence[Tensor]`): the task matrices, shape (d_out, d_in) each.
        floors (`Sequence[float]`): noise floor of each task matrix.
        precision (`str`): `"fast"`, certified, or `"exact"`: full float64 SVDs.

    Returns:
        [`MergedUpdate`]: mean(σ) U Vᵀ of Σ_i Δi = U diag(σ) Vᵀ, in float64. Directions that the
        sum does not have stay zero, and count in the mean.

    Example:
        >>> delta = torch.diag(torch.tensor([3.0, 1.0]))
        >>> isotropic_update([delta], [0.0]).matrix.round(decimals=9).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    total, floor = _total(deltas, floors)
    svd = linalg.truncated_svd(total, min(total.shape), floor, precision)
    matrix = svd.U @ svd.Vh * (svd.S.sum() / min(total.shape))
    return MergedUpdate(matrix, exact=int(svd.exact))


def isotropic_common_update(
    deltas: Sequence[Tensor],
    floors: Sequence[float],
    tasks: int | None = None,
    precision: linalg.Precision = "fast",
) -> MergedUpdate:
    """Iso-CTS: [`isotropic_update`], with room for what each task has of its own.

    The leading [`COMMON_SHARE`] of the directions are those of the sum; the others are shared out
    among the tasks, for the leading directions of what of their update lies outside (algorithm 2).

    Args:
        deltas (`Sequence[Tensor]`): the task matrices that are not zero, shape (d_out, d_in) each.
        floors (`Sequence[float]`): noise floor of each task matrix.
        tasks (`int`, *optional*): how many share the directions; default: as many.
        precision (`str`): `"fast"`, certified, or `"exact"`: full float64 SVDs.

    Returns:
        [`MergedUpdate`]: mean(σ) U⊥ V⊥ᵀ, in float64.
    """
    total, floor = _total(deltas, floors)
    k = min(total.shape)
    own = round((k - int(COMMON_SHARE * k)) / (tasks or len(deltas)))
    shared = linalg.truncated_svd(total, k - own * len(deltas), floor, precision)
    outside = [
        delta - shared.U @ (shared.U.mT @ delta)
        for delta in map(linalg.in_working_precision, deltas)
    ]
    found = linalg.truncated_svds(outside, own, floors, precision) if own else []
    parts = [TaskSingularVectors(svd.U, svd.S, svd.Vh) for svd in (*found, shared)]
    vectors = concatenate(parts)
    sigma = vectors.S.mean().expand(len(vectors.S))
    product = linalg.orthogonal_product(vectors.U, sigma, vectors.Vh, precision)
    exact = product.exact + sum(svd.exact for svd in (*found, shared))
    return MergedUpdate(product.matrix, (), product.null_directions, exact)


def _total(deltas: Sequence[Tensor], floors: Sequence[float]) -> tuple[Tensor, float]:
    """Σ_i Δi in the working precision, and its noise floor."""
    return linalg.in_working_precision(sum_update(deltas)), math.hypot(*floors)


def _copy(delta: Tensor, dtype: torch.dtype) -> Tensor:
    return empty(*delta.shape, dtype=dtype, device=delta.device).copy_(delta)
