"""Singular task interference, effective ranks and spectra of one weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor

from hf_tsv.linalg import products
from hf_tsv.linalg.updates import TaskSingularVectors, concatenate
from hf_tsv.methods.rules import MergedUpdate

RANK_SHARES = tuple((i / 32) ** 2 for i in range(33))
"""Ranks, as a share of k, at which a spectrum is noted; they are closer where it is steep."""

ROWS = 512
"""Number of rows of a product of Gram matrices that are computed at a time."""

Row = tuple[float, ...]


@dataclass(frozen=True)
class Interference:
    """Interference of tasks in one weight, tasks in the order they were given in.

    `sti` is the singular task interference of the truncated factors, `sti_after` that of the
    orthonormal ones: 0 but for rounding, and for directions that tasks share exactly. `pairs` are
    those of every two tasks alone, T × T. Of each task `kept` is Σσ² of the triplets kept,
    `spectra` its singular values at [`RANK_SHARES`], 0 beyond those known, and `energies` Σσ² of
    the triplets up to there.
    """

    sti: float
    sti_after: float
    pairs: tuple[Row, ...]
    kept: Row
    effective_ranks: Row
    spectra: tuple[Row, ...]
    energies: tuple[Row, ...]


def singular_task_interference(vectors: TaskSingularVectors) -> float:
    """‖(UᵀU − I) diag(σ) (VhVhᵀ − I)‖₁, entrywise, of concatenated factors (section 3.2).

    In the units of the weights; 0 where singular vectors of different tasks are orthogonal.

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
    """Singular task interference of every two tasks alone, in the units of the weights.

    The tasks have orthonormal factors; the result (T, T) is symmetric, float64, zero on the
    diagonal.
    """
    parts = [[products.in_working_precision(t) for t in (x.U, x.S, x.Vh)] for x in tasks]
    pairs = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for (i, (Ui, Si, Vi)), (j, (Uj, Sj, Vj)) in combinations(enumerate(parts), 2):
        left, right = products.product(Ui.mT, Uj), products.product(Vi, Vj.mT)
        found = products.product(left * Sj, right.mT), products.product(left.mT * Si, right)
        pairs[i, j] = pairs[j, i] = sum(float(part.abs().sum()) for part in found)
    return pairs


def effective_rank(S: Tensor) -> float:
    """exp(H(σ / Σσ)), H the entropy: number of directions that an update is spread over.

    `S` holds all singular values. Source: Roy and Vetterli, "The effective rank" (2007).
    """
    values = S.cpu().double()
    total = float(values.sum())
    return float(torch.special.entr(values / total).sum().exp()) if total else 0.0


def profile(S: Tensor, k: int) -> tuple[Row, Row]:
    """A spectrum in few numbers: σ at each of [`RANK_SHARES`], and Σσ² up to there, interpolated.

    `S` descends; those that are missing of k = min(d_out, d_in) singular values count as 0.

    Example:
        >>> sigma, energy = profile(torch.tensor([2.0, 1.0]), 2)
        >>> sigma[0], sigma[-1], energy[0], energy[-1]
        (2.0, 0.0, 0.0, 5.0)
    """
    values = S.cpu().double().numpy()
    after = np.concatenate([values, np.zeros(k + 1 - len(values))])  # σ of the triplet to come
    energy = np.concatenate([[0.0], np.cumsum(after[:k] ** 2)])
    at = np.asarray(RANK_SHARES) * k
    sigma, up_to = (np.interp(at, np.arange(k + 1), curve) for curve in (after, energy))
    return tuple(sigma.tolist()), tuple(up_to.tolist())


def measured(merged: MergedUpdate) -> Interference | None:
    """Interference of the tasks in one weight; None where the rule kept no singular vectors."""
    found = merged.measurable
    if found is None:
        return None
    k = min(merged.matrix.shape)
    spectra, energies = zip(*(profile(S, k) for S in found.spectra), strict=True)
    ranks = tuple(map(effective_rank, found.spectra))
    if not found.tasks:  # a single one is kept whole
        return Interference(0.0, 0.0, ((0.0,),), (energies[0][-1],), ranks, spectra, energies)
    sti = singular_task_interference(concatenate(found.tasks))
    made = found.orthonormal
    after = sti if made is None else singular_task_interference(made)
    pairs = tuple(map(tuple, pairwise_interference(found.tasks).tolist()))
    kept = tuple(float(task.S.cpu().double().square().sum()) for task in found.tasks)
    return Interference(sti, after, pairs, kept, ranks, spectra, energies)
