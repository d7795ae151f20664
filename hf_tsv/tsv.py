"""Task singular vectors of one weight: decompose, orthogonalise, merge.

Notation: a task matrix Δ has shape (d_out, d_in) and k = min(d_out, d_in); T tasks are merged with
rank r each. Source: Gargiulo et al., "Task Singular Vectors", CVPR 2025 (arXiv 2412.00081).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hf_tsv import linalg
from hf_tsv.lapack import NotConvergedError
from hf_tsv.linalg import Orthogonalizer, Precision
from hf_tsv.memory import empty

Method = Literal[
    "tsv",
    "ada",
    "low-rank",
    "orthogonal",
    "task-arithmetic",
    "average",
    "ties",
    "consensus",
    "iso-c",
    "iso-cts",
    "tall-mask",
]

DEFAULT_ALPHA: dict[Method, float] = {"task-arithmetic": 0.3, "low-rank": 0.3, "consensus": 0.3}
"""Of sums in which tasks add up where they agree: what task arithmetic takes without validation
images (Ilharco et al., ICLR 2023); 1 for all others."""

RANK_SHARES = tuple((i / 32) ** 2 for i in range(33))
"""Ranks, as a share of k, at which a spectrum is noted; closer together where it is steep."""

ROWS = 512
"""Of a product of Gram matrices computed at a time."""

ROUNDING_SPREAD = 0.3
"""Standard deviation of rounding to the floating-point grid, in units of eps · |w|; upper bound.

Uniform rounding gives at most 1/√12 = 0.289. Measured spectral norms of the rounding of Gaussian,
Laplace, Student-t and outlier-column weights in float32, float16 and bfloat16, 96x96 to 1024x4096,
are 0.01 to 0.204 of eps · (largest row norm + largest column norm).
"""


@dataclass(frozen=True)
class TaskSingularVectors:
    """Singular triplets of one task matrix, or of several concatenated.

    Args:
        U (`Tensor`): left singular vectors, shape (d_out, r).
        S (`Tensor`): singular values, shape (r,).
        Vh (`Tensor`): right singular vectors, shape (r, d_in).
    """

    U: Tensor
    S: Tensor
    Vh: Tensor

    @property
    def rank(self) -> int:
        """Number of triplets kept."""
        return self.S.numel()

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in)."""
        return self.U.shape[0], self.Vh.shape[1]

    def matrix(self) -> Tensor:
        """U diag(S) Vh, shape (d_out, d_in), in the working precision."""
        U, S, Vh = map(linalg.in_working_precision, (self.U, self.S, self.Vh))
        return (U * S) @ Vh

    def truncated(self, rank: int) -> TaskSingularVectors:
        """The leading triplets, `rank` at most; those with a singular value of zero are dropped."""
        r = min(rank, int((self.S > 0).sum()))
        return TaskSingularVectors(self.U[:, :r], self.S[:r], self.Vh[:r])

    def to(self, target: torch.device | torch.dtype) -> TaskSingularVectors:
        """The same triplets on another device, or in another dtype."""
        return TaskSingularVectors(self.U.to(target), self.S.to(target), self.Vh.to(target))


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


Update = Tensor | TaskSingularVectors
"""The update of one weight by one task: Δ itself, or its leading singular triplets."""


@dataclass(frozen=True)
class MergedUpdate:
    """The merged update of one weight and what the decomposition found.

    Args:
        matrix (`Tensor`): M, shape (d_out, d_in), before α.
        ranks (`tuple[int, ...]`): triplets used of each task.
        null_directions (`int`): directions the tasks have in common so exactly that
            orthogonalisation left them out (equal or opposite tasks).
        exact (`int`): decompositions that took a full float64 SVD.
        interference ([`Interference`], *optional*): where it was asked for.
    """

    matrix: Tensor
    ranks: tuple[int, ...] = ()
    null_directions: int = 0
    exact: int = 0
    interference: Interference | None = None


def rank_at(fraction: float, shape: Sequence[int]) -> int:
    """⌊fraction · k⌋, at least 1.

    Args:
        fraction (`float`): above 0, up to 1.
        shape (`Sequence[int]`): (d_out, d_in).

    Example:
        >>> rank_at(0.29, (100, 300)), rank_at(0.001, (100, 300))
        (29, 1)
    """
    return max(1, int(fraction * min(shape) + 1e-9))


def default_rank(shape: Sequence[int], tasks: int) -> int:
    """Rank kept of each task, r = max(1, ⌊k/T⌋) (section 4.1).

    Example:
        >>> default_rank((768, 3072), tasks=8)
        96
    """
    return max(1, min(shape) // tasks)


def difference(fine_tuned: Tensor, base: Tensor) -> Tensor:
    """Δ = W1 − W0, in float32, or in float64 where one of the two is.

    Args:
        fine_tuned (`Tensor`): W1 as stored.
        base (`Tensor`): W0 as stored, same shape.
    """
    dtype = _dtype_of_difference(fine_tuned, base)
    result = empty(*base.shape, dtype=dtype, device=base.device)
    return torch.sub(fine_tuned.to(dtype), base.to(dtype), out=result)


def _dtype_of_difference(fine_tuned: Tensor, base: Tensor) -> torch.dtype:
    wide = torch.float64 in (fine_tuned.dtype, base.dtype)
    return torch.float64 if wide else torch.float32


def storage_noise(
    base: Tensor, fine_tuned: Tensor, norm: float | None = None, *, overwrite: bool = False
) -> float:
    """Spectral norm below which a task matrix is rounding of the stored checkpoints.

    W0 + Δ is rounded to the stored dtype, so W1 − W0 differs from Δ by noise of about eps · |w| an
    entry. A LoRA of rank 16 therefore has full numerical rank on disk; the triplets under this
    floor are not the task's and would be amplified by orthogonalisation. The spectral norm of
    independent noise is at most its largest row norm plus its largest column norm
    (Bandeira and van Handel, 2016), which also holds where few columns carry most of the weight.

    Args:
        base (`Tensor`): W0 as stored, shape (d_out, d_in).
        fine_tuned (`Tensor`): W1 as stored, same shape.
        norm (`float`, *optional*): ‖W1 − W0‖, Frobenius, where it is known.
        overwrite (`bool`): use the memory of W1 for the work.

    Returns:
        `float`: in the units of the weights.
    """
    dtype = _dtype_of_difference(fine_tuned, base)
    dtypes = (base.dtype, fine_tuned.dtype, dtype)
    eps = max(torch.finfo(kind).eps for kind in dtypes)
    tiny = max(torch.finfo(kind).smallest_normal for kind in dtypes)
    most = torch.finfo(dtype).max
    if base.dtype == fine_tuned.dtype:
        # W0 lies on the grid that W1 was rounded to: a change below half a step is lost rather
        # than replaced by noise, so no entry is wrong by more than it should have changed.
        change = linalg.frobenius_norm(difference(fine_tuned, base)) if norm is None else norm
        most = min(change / math.sqrt(base.numel()) / (ROUNDING_SPREAD * eps), most)
    size = fine_tuned.to(dtype, copy=not overwrite).abs_().clamp_(min(tiny, most), most)
    return _noise(size, eps)


def rounding_noise(matrix: Tensor, dtype: torch.dtype) -> float:
    """Spectral norm of what rounding to a dtype changes in a matrix; see [`storage_noise`].

    Args:
        matrix (`Tensor`): shape (d_out, d_in).
        dtype (`torch.dtype`): it was rounded to.
    """
    return _noise(matrix.to(torch.float32), torch.finfo(dtype).eps)


def _noise(size: Tensor, eps: float) -> float:
    """Of entries of this size."""
    _, row, column = linalg.norms(size)
    return ROUNDING_SPREAD * eps * (row + column)


def decompose(
    delta: Tensor, rank: int, floor: float = 0.0, precision: Precision = "fast"
) -> TaskSingularVectors:
    """Leading task singular vectors of one task matrix (section 3.1).

    Args:
        delta (`Tensor`): Δ, shape (d_out, d_in).
        rank (`int`): triplets to keep at most.
        floor (`float`): singular values up to this are noise, see [`storage_noise`].
        precision (`str`): `"fast"`, certified, or `"exact"`: a full float64 SVD.

    Returns:
        [`TaskSingularVectors`]: of rank min(rank, numerical rank of Δ).

    Example:
        >>> decompose(torch.diag(torch.tensor([3.0, 2.0, 0.0])), rank=3).S.tolist()
        [3.0, 2.0]
    """
    svd = linalg.truncated_svd(delta, rank, floor, precision)
    return TaskSingularVectors(svd.U, svd.S, svd.Vh)


def concatenate(tasks: Sequence[TaskSingularVectors]) -> TaskSingularVectors:
    """U = [U1 | … | UT], S = [S1 … ST], Vh = [Vh1; …; VhT] (section 4.2)."""
    (d_out, d_in), rank, U = tasks[0].shape, sum(t.rank for t in tasks), tasks[0].U
    left = empty(d_out, rank, dtype=U.dtype, device=U.device)
    right = empty(rank, d_in, dtype=U.dtype, device=U.device)
    return TaskSingularVectors(
        torch.cat([t.U for t in tasks], dim=1, out=left),
        torch.cat([t.S for t in tasks]),
        torch.cat([t.Vh for t in tasks], dim=0, out=right),
    )


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
    U, S, Vh = map(linalg.in_working_precision, (vectors.U, vectors.S, vectors.Vh))
    rank = vectors.rank
    right = linalg.product(Vh, Vh.mT) if rank <= max(vectors.shape) else None
    total = 0.0
    for start in range(0, rank, ROWS):  # of the product, which never lies in memory whole
        rows = linalg.product(U[:, start : start + ROWS].mT, U)
        rows.diagonal(start).sub_(1)
        rows *= S
        if right is not None:
            found = linalg.product(rows, right)
        else:
            found = linalg.product(linalg.product(rows, Vh), Vh.mT)
        total += float(found.sub_(rows).abs().sum())
    return total


def pairwise_interference(tasks: Sequence[TaskSingularVectors]) -> Tensor:
    """Singular task interference of every two tasks alone, shape (T, T).

    Args:
        tasks (`Sequence[TaskSingularVectors]`): each with orthonormal factors.

    Returns:
        `Tensor`: symmetric, float64, zero on the diagonal; in the units of the weights.
    """
    parts = [[linalg.in_working_precision(t) for t in (x.U, x.S, x.Vh)] for x in tasks]
    pairs = torch.zeros(len(tasks), len(tasks), dtype=torch.float64)
    for (i, (Ui, Si, Vi)), (j, (Uj, Sj, Vj)) in combinations(enumerate(parts), 2):
        left, right = linalg.product(Ui.mT, Uj), linalg.product(Vi, Vj.mT)
        found = linalg.product(left * Sj, right.mT), linalg.product(left.mT * Si, right)
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


def dense(update: Update) -> Tensor:
    """Δ of an update, in the working precision."""
    if isinstance(update, TaskSingularVectors):
        return update.matrix()
    return linalg.in_working_precision(update)


def merge(
    deltas: Sequence[Update],
    rank: int,
    *,
    floors: Sequence[float] | None = None,
    orthogonal: bool = True,
    solver: Orthogonalizer = "procrustes",
    precision: Precision = "fast",
    measure: bool = False,
    coefficients: Sequence[float] | None = None,
) -> MergedUpdate:
    """Merged update of one weight, M = U⊥ diag(S) V⊥h (algorithm 1).

    Args:
        deltas (`Sequence[Tensor | TaskSingularVectors]`): the task matrices, shape (d_out, d_in)
            each; those given by their triplets need no decomposition.
        rank (`int`): triplets kept of each task; k for the untruncated ablation.
        floors (`Sequence[float]`, *optional*): noise floor of each task matrix.
        orthogonal (`bool`): whether to orthogonalise; without it the truncated updates are summed.
        solver (`str`): `"procrustes"` (SVD) or `"whitening"` (U (UᵀU)^(−1/2)), the same matrix.
        precision (`str`): `"fast"`, certified, or `"exact"`: full float64 SVDs.
        measure (`bool`): find who disturbs whom, from the same decompositions.
        coefficients (`Sequence[float]`, *optional*): factors of the singular values of each task
            after orthogonalisation, see [`orthonormal_vectors`].

    Returns:
        [`MergedUpdate`]: M before α. A task matrix of zeros contributes nothing.

    Raises:
        [`NotConvergedError`]: a decomposition fails; with the place of the task whose it is.

    Example:
        >>> delta = torch.eye(4)
        >>> torch.dist(merge([delta], rank=4).matrix, delta).item() < 1e-12
        True
    """
    k = min(deltas[0].shape)
    if len(deltas) == 1 and rank >= k:  # nothing is truncated and nothing interferes
        kept = deltas[0].rank if isinstance(deltas[0], TaskSingularVectors) else k
        alone = _alone(deltas[0], k) if measure else None
        matrix = dense(deltas[0])
        matrix = matrix if coefficients is None else matrix * coefficients[0]
        return MergedUpdate(matrix, (kept,), interference=alone)
    tasks, spectra, exact = _leading(
        deltas, rank, floors or [0.0] * len(deltas), precision, measure
    )
    ranks = tuple(task.rank for task in tasks)
    vectors = concatenate(tasks)
    found = _interference(tasks, vectors, spectra) if measure else None
    del deltas, tasks  # the last references, when the caller has let go of them
    if coefficients is not None:
        factors = [c for c, r in zip(coefficients, ranks, strict=True) for _ in range(r)]
        vectors = replace(vectors, S=vectors.S * vectors.S.new_tensor(factors))
    if not orthogonal or not vectors.rank:
        return MergedUpdate(vectors.matrix(), ranks, exact=exact, interference=found)
    product = linalg.orthogonal_product(
        vectors.U, vectors.S, vectors.Vh, precision, solver, form=measure
    )
    if found is not None and product.factors is not None:
        U, Vh = product.factors
        after = singular_task_interference(TaskSingularVectors(U, vectors.S, Vh))
        found = replace(found, sti_after=after)
    exact += product.exact
    return MergedUpdate(product.matrix, ranks, product.null_directions, exact, found)


def orthonormal_vectors(
    deltas: Sequence[Update],
    rank: int,
    *,
    floors: Sequence[float] | None = None,
    solver: Orthogonalizer = "procrustes",
    precision: Precision = "fast",
) -> tuple[TaskSingularVectors, tuple[int, ...]]:
    """U⊥, S and V⊥h of one weight, whose columns and rows are those of one task after the other.

    They do not depend on factors of the singular values: M = Σᵢ cᵢ U⊥ᵢ diag(Sᵢ) V⊥hᵢ.

    Args:
        deltas (`Sequence[Tensor | TaskSingularVectors]`): as in [`merge`].
        rank (`int`): triplets kept of each task.
        floors (`Sequence[float]`, *optional*): noise floor of each task matrix.
        solver (`str`): as in [`merge`].
        precision (`str`): as in [`merge`].

    Returns:
        `tuple[TaskSingularVectors, tuple[int, ...]]`: of all tasks, and how many are of each.
    """
    tasks, _, _ = _leading(deltas, rank, floors or [0.0] * len(deltas), precision, False)
    vectors, ranks = concatenate(tasks), tuple(task.rank for task in tasks)
    if vectors.rank:
        product = linalg.orthogonal_product(
            vectors.U, vectors.S, vectors.Vh, precision, solver, form=True
        )
        assert product.factors is not None  # they were asked for
        vectors = replace(vectors, U=product.factors[0], Vh=product.factors[1])
    return vectors, ranks


def _leading(
    deltas: Sequence[Update],
    rank: int,
    floors: Sequence[float],
    precision: Precision,
    spectrum: bool,
) -> tuple[list[TaskSingularVectors], list[Tensor], int]:
    """Triplets of every task, all singular values, and how many took a full SVD.

    Without `spectrum`, and of what is given by its triplets, the singular values are those kept.
    """
    whole = [
        (i, delta, floor)
        for i, (delta, floor) in enumerate(zip(deltas, floors, strict=True))
        if isinstance(delta, Tensor)
    ]
    try:
        found = linalg.truncated_svds(
            [d for _, d, _ in whole], rank, [f for *_, f in whole], precision, spectrum=spectrum
        )
    except NotConvergedError as error:  # of them, to be counted among all
        place = None if error.place is None else whole[error.place][0]
        raise NotConvergedError(str(error), place) from None
    decomposed = iter(found)
    tasks, spectra = [], []
    for delta in deltas:
        if isinstance(delta, Tensor):
            svd = next(decomposed)
            tasks.append(TaskSingularVectors(svd.U, svd.S, svd.Vh))
            spectra.append(svd.S if svd.spectrum is None else svd.spectrum)
        else:
            kept = delta.truncated(rank)
            tasks.append(kept.to(linalg.in_working_precision(kept.S).dtype))
            spectra.append(delta.S)
    return tasks, spectra, sum(svd.exact for svd in found)


def _alone(delta: Update, k: int) -> Interference:
    """Of a task that is the only one, and kept whole."""
    S = delta.S if isinstance(delta, TaskSingularVectors) else linalg.singular_values(delta)
    sigma, energy = profile(S, k)
    return Interference(
        0.0, 0.0, ((0.0,),), (energy[-1],), (effective_rank(S),), (sigma,), (energy,)
    )


def _interference(
    tasks: Sequence[TaskSingularVectors], vectors: TaskSingularVectors, spectra: Sequence[Tensor]
) -> Interference:
    """Of the truncated factors; as if nothing were done about it."""
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
