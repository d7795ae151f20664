"""Task singular vectors of one weight: decompose, orthogonalise, merge.

Notation: a task matrix Δ has shape (d_out, d_in) and k = min(d_out, d_in); T tasks are merged with
rank r each. Source: Gargiulo et al., "Task Singular Vectors", CVPR 2025 (arXiv 2412.00081).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hf_tsv import linalg

Method = Literal["tsv", "low-rank", "orthogonal", "task-arithmetic", "average"]
Orthogonalizer = Literal["procrustes", "whitening"]

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
    """

    matrix: Tensor
    ranks: tuple[int, ...]
    null_directions: int = 0


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
    wide = torch.float64 in (fine_tuned.dtype, base.dtype)
    dtype = torch.float64 if wide else torch.float32
    return fine_tuned.to(dtype) - base.to(dtype)


def storage_noise(base: Tensor, fine_tuned: Tensor) -> float:
    """Spectral norm below which a task matrix is rounding of the stored checkpoints.

    W0 + Δ is rounded to the stored dtype, so W1 − W0 differs from Δ by noise of about eps · |w| an
    entry. A LoRA of rank 16 therefore has full numerical rank on disk; the triplets under this
    floor are not the task's and would be amplified by orthogonalisation. The spectral norm of
    independent noise is at most its largest row norm plus its largest column norm
    (Bandeira and van Handel, 2016), which also holds where few columns carry most of the weight.

    Args:
        base (`Tensor`): W0 as stored, shape (d_out, d_in).
        fine_tuned (`Tensor`): W1 as stored, same shape.

    Returns:
        `float`: in the units of the weights.
    """
    delta = difference(fine_tuned, base)
    eps = max(torch.finfo(t.dtype).eps for t in (base, fine_tuned, delta))
    tiny = max(torch.finfo(t.dtype).smallest_normal for t in (base, fine_tuned, delta))
    size = fine_tuned.to(delta.dtype).abs().clamp_min(tiny)
    if base.dtype == fine_tuned.dtype:
        # W0 lies on the grid that W1 was rounded to: a change below half a step is lost rather
        # than replaced by noise, so no entry is wrong by more than it should have changed.
        change = float(_norms(delta)) / math.sqrt(base.numel())
        size = size.clamp_max(min(change / (ROUNDING_SPREAD * eps), torch.finfo(size.dtype).max))
    return _noise(size, eps)


def rounding_noise(matrix: Tensor, dtype: torch.dtype) -> float:
    """Spectral norm of what rounding to a dtype changes in a matrix; see [`storage_noise`].

    Args:
        matrix (`Tensor`): shape (d_out, d_in).
        dtype (`torch.dtype`): it was rounded to.
    """
    return _noise(matrix.float(), torch.finfo(dtype).eps)


def _noise(size: Tensor, eps: float) -> float:
    return float(ROUNDING_SPREAD * eps * (_norms(size, 0).max() + _norms(size, 1).max()))


def decompose(delta: Tensor, rank: int, floor: float = 0.0) -> TaskSingularVectors:
    """Leading task singular vectors of one task matrix (section 3.1).

    Args:
        delta (`Tensor`): Δ, shape (d_out, d_in).
        rank (`int`): triplets to keep at most.
        floor (`float`): singular values up to this are noise, see [`storage_noise`].

    Returns:
        [`TaskSingularVectors`]: of rank min(rank, numerical rank of Δ).

    Example:
        >>> decompose(torch.diag(torch.tensor([3.0, 2.0, 0.0])), rank=3).S.tolist()
        [3.0, 2.0]
    """
    # Scaled to unit norm, so that tiny updates do not underflow and huge ones do not overflow.
    scale = linalg.in_working_precision(delta).norm().item()
    if scale == 0.0:
        scale = 1.0
    U, S, Vh = linalg.truncated_svd(
        linalg.in_working_precision(delta) / scale, rank, max(floor / scale, _precision(delta))
    )
    return TaskSingularVectors(U, S * scale, Vh)


def concatenate(tasks: Sequence[TaskSingularVectors]) -> TaskSingularVectors:
    """U = [U1 | … | UT], S = [S1 … ST], Vh = [Vh1; …; VhT] (section 4.2)."""
    return TaskSingularVectors(
        torch.cat([t.U for t in tasks], dim=1),
        torch.cat([t.S for t in tasks]),
        torch.cat([t.Vh for t in tasks], dim=0),
    )


def orthogonalise(
    vectors: TaskSingularVectors, solver: Orthogonalizer = "procrustes"
) -> tuple[TaskSingularVectors, int]:
    """Replace U and Vh by the nearest matrices with orthonormal columns and rows (eq. 6).

    Both solvers give the same matrix; where the polar factor is not unique (tasks that share a
    direction exactly) both take the one of minimum norm.

    Args:
        vectors ([`TaskSingularVectors`]): concatenated factors of all tasks.
        solver (`str`): `"procrustes"` (SVD) or `"whitening"` (U (UᵀU)^(−1/2)).

    Returns:
        `tuple[TaskSingularVectors, int]`: U⊥, S, V⊥h, and the null directions left out.
    """
    polar = linalg.polar_factor if solver == "procrustes" else linalg.polar_factor_by_whitening
    U, null_left = polar(vectors.U)
    Vh, null_right = polar(vectors.Vh)
    return TaskSingularVectors(U, vectors.S, Vh), max(null_left, null_right)


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
) -> MergedUpdate:
    """Merged update of one weight, M = U⊥ diag(S) V⊥h (algorithm 1).

    Args:
        deltas (`Sequence[Tensor | TaskSingularVectors]`): the task matrices, shape (d_out, d_in)
            each; those given by their triplets need no decomposition.
        rank (`int`): triplets kept of each task; k for the untruncated ablation.
        floors (`Sequence[float]`, *optional*): noise floor of each task matrix.
        orthogonal (`bool`): whether to orthogonalise; without it the truncated updates are summed.
        solver (`str`): see [`orthogonalise`].

    Returns:
        [`MergedUpdate`]: M before α. A task matrix of zeros contributes nothing.

    Example:
        >>> delta = torch.eye(4)
        >>> torch.dist(merge([delta], rank=4).matrix, delta).item() < 1e-12
        True
    """
    k = min(deltas[0].shape)
    if len(deltas) == 1 and rank >= k:  # nothing is truncated and nothing interferes
        kept = deltas[0].rank if isinstance(deltas[0], TaskSingularVectors) else k
        return MergedUpdate(dense(deltas[0]), (kept,))
    tasks = [
        _leading(delta, rank, floor)
        for delta, floor in zip(deltas, floors or [0.0] * len(deltas), strict=True)
    ]
    ranks = tuple(task.rank for task in tasks)
    vectors = concatenate(tasks)
    null_directions = 0
    if orthogonal and vectors.rank:
        vectors, null_directions = orthogonalise(vectors, solver)
    return MergedUpdate(vectors.matrix(), ranks, null_directions)


def _leading(delta: Update, rank: int, floor: float) -> TaskSingularVectors:
    if not isinstance(delta, TaskSingularVectors):
        return decompose(delta, rank, floor)
    kept = delta.truncated(rank)
    return kept.to(linalg.in_working_precision(kept.S).dtype)


def _norms(matrix: Tensor, dim: int | None = None) -> Tensor:
    """Norms summed in float64, where squares of float32 neither overflow nor vanish."""
    norms: Tensor = torch.linalg.vector_norm(matrix, dim=dim, dtype=torch.float64)
    return norms


def _precision(matrix: Tensor) -> float:
    """Relative size of singular values that the working precision cannot tell from zero."""
    dtype = linalg.in_working_precision(matrix[:1, :1]).dtype
    return torch.finfo(dtype).eps * float(max(matrix.shape))
