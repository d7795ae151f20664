"""Singular task interference, effective ranks and spectra of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from hf_tsv.linalg import products
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.methods.rules import MergedUpdate

RANK_SHARES = tuple((i / 32) ** 2 for i in range(33))
"""Ranks, as a share of k, at which a spectrum is noted; they are closer where it is steep."""

ROWS = 512
"""Number of rows of a product of Gram matrices that are computed at a time."""


@dataclass(frozen=True)
class Interference:
    """Who disturbs whom in one weight, tasks in the order they were given in.

    Args:
        sti (`float`): singular task interference of the truncated factors.
        sti_after (`float`): the same of the orthonormal factors: 0 but for rounding, and for
            directions that tasks share exactly.
        pairs (`tuple[tuple[float, ...], ...]`): `sti` of every two tasks alone, T × T.
        kept (`tuple[float, ...]`): Σσ² of the triplets kept of each task.
        effective_ranks (`tuple[float, ...]`): of each task, see [`effective_rank`].
        spectra (`tuple[tuple[float, ...], ...]`): singular values of each task at [`RANK_SHARES`],
            0 beyond those known.
        energies (`tuple[tuple[float, ...], ...]`): Σσ² of the triplets up to there.
    """

    sti: float
    sti_after: float
    pairs: tuple[tuple[float, ...], ...]
    kept: tuple[float, ...]
    effective_ranks: tuple[float, ...]
    spectra: tuple[tuple[float, ...], ...]
    energies: tuple[tuple[float, ...], ...]


def singular_task_interference(vectors: TaskSingularVectors) -> float:
    """‖(UᵀU − I) diag(σ) (VhVhᵀ − I)‖₁, entrywise, of concatenated factors (section 3.2).

    Args:
        vectors ([`TaskSingularVectors`]): of all tasks, see [`concatenate`].

    Returns:
        `float`: in the units of the weights; 0 where singular vectors of different tasks are
        orthogonal.

    Example:
        >>> e = torch.eye(3)
        >>> task = TaskSingularVectors(e[:, :1], torch.tensor([2.0]), e[:1])
        >>> singular_task_interference(concatenate([task, task]))  # ‖[[2, 0], [0, 2]]‖₁
        4.0
    """
    U, S, Vh = map(products.in_working_precision, (vectors.U, vectors.S, vectors.Vh))
    rank = vectors.rank
    right = products.product(Vh, Vh.mT) if rank <= max(vectors.shape) else None
    total = 0.0
    for start in range(0, rank, ROWS):  # of the product, which never lies in memory whole
        rows = products.product(U[:, start : start + ROWS].mT, U)
        rows.diagonal(start).sub_(1)
        rows *= S
        if right is not None:
            found = products.product(rows, right)
        else:
            found = products.product(products.product(rows, Vh), Vh.mT)
        total += float(found.sub_(rows).abs().sum())
    return total


def pairwise_interference(tasks: Sequence[TaskSingularVectors]) -> Tensor:
    """Singular task interference of every two tasks alone, shape (T, T).

    Args:
        tasks (`Sequence[TaskSingularVectors]`): each with orthonormal factors.

    Returns:
        `Tensor`: symmetric, float64, zero on the diagonal; in the units of the weights.
    """
    parts = [[products.in_working_precision(t) for t in (x.U, x.S, x.Vh)] for x in tasks]
    pairs = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for (i, (Ui, Si, Vi)), (j, (Uj, Sj, Vj)) in combinations(enumerate(parts), 2):
        left, right = products.product(Ui.mT, Uj), products.product(Vi, Vj.mT)
        found = products.product(left * Sj, right.mT), products.product(left.mT * Si, right)
        pairs[i, j] = pairs[j, i] = sum(float(part.abs().sum()) for part in found)
    return pairs


def effective_rank(S: Tensor) -> float:
    """exp(H(σ / Σσ)), H the entropy: how many directions an update is spread over.

    Source: Roy and Vetterli, "The effective rank" (2007).

    Args:
        S (`Tensor`): all singular values, shape (k,).

    Example:
        >>> round(effective_rank(torch.tensor([1.0, 1.0, 0.0])), 6)
        2.0
    """
    total = float(S.double().sum())
    return float(torch.special.entr(S.double() / total).sum().exp()) if total else 0.0


def profile(S: Tensor, k: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A spectrum in few numbers: at each of [`RANK_SHARES`], σ and the energy up to there.

    Between two ranks both are interpolated.

    Args:
        S (`Tensor`): singular values, descending; those that are missing count as 0.
        k (`int`): how many there are in all, min(d_out, d_in).

    Returns:
        `tuple[tuple[float, ...], tuple[float, ...]]`: σ, and Σσ², in the units of the weights.

    Example:
        >>> sigma, energy = profile(torch.tensor([2.0, 1.0]), 2)
        >>> sigma[0], sigma[-1], energy[0], energy[-1]
        (2.0, 0.0, 0.0, 5.0)
    """
    values = S.double().cpu().numpy()
    after = np.concatenate([values, np.zeros(k + 1 - len(values))])  # σ of the triplet to come
    energy = np.concatenate([[0.0], np.cumsum(after[:k] ** 2)])
    at = np.asarray(RANK_SHARES) * k
    sigma, up_to = (np.interp(at, np.arange(k + 1), curve) for curve in (after, energy))
    return tuple(sigma.tolist()), tuple(up_to.tolist())


def measured(merged: MergedUpdate) -> Interference | None:
    """Interference of the tasks in one weight; None where the rule kept no singular vectors.

    Args:
        merged ([`MergedUpdate`]): result of a rule that was asked to keep them.
    """
    found = merged.measurable
    if found is None:
        return None
    if found.vectors is None:
        return interference_alone(found.spectra[0], min(merged.matrix.shape))
    measured = interference(found.tasks, found.vectors, found.spectra)
    if found.orthonormal is not None:
        after = singular_task_interference(found.orthonormal)
        measured = replace(measured, sti_after=after)
    return measured


def interference_alone(S: Tensor, k: int) -> Interference:
    """Interference of a task that is the only one, and kept whole."""
    sigma, energy = profile(S, k)
    return Interference(
        0.0, 0.0, ((0.0,),), (energy[-1],), (effective_rank(S),), (sigma,), (energy,)
    )


def interference(
    tasks: Sequence[TaskSingularVectors], vectors: TaskSingularVectors, spectra: Sequence[Tensor]
) -> Interference:
    """Interference of the truncated factors, as if nothing were done about it."""
    sti = singular_task_interference(vectors)
    sigmas, energies = zip(*(profile(S, min(vectors.shape)) for S in spectra), strict=True)
    return Interference(
        sti=sti,
        sti_after=sti,
        pairs=tuple(tuple(row) for row in pairwise_interference(tasks).tolist()),
        kept=tuple(float(task.S.double().square().sum()) for task in tasks),
        effective_ranks=tuple(map(effective_rank, spectra)),
        spectra=sigmas,
        energies=energies,
    )
