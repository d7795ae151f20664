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
from hf_tsv.linalg import Orthogonalizer, Precision
from hf_tsv.memory import empty

Method = Literal["tsv", "low-rank", "orthogonal", "task-arithmetic", "average"]

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
        exact (`int`): decompositions that took a full float64 SVD.
    """

    matrix: Tensor
    ranks: tuple[int, ...]
    null_directions: int = 0
    exact: int = 0


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
    result = empty(*base.shape, dtype=dtype, device=base.device)
    return torch.sub(fine_tuned.to(dtype), base.to(dtype), out=result)


def storage_noise(
    base: Tensor, fine_tuned: Tensor, delta: Tensor | None = None, *, overwrite: bool = False
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
        delta (`Tensor`, *optional*): W1 − W0, where it is at hand.
        overwrite (`bool`): use the memory of W1 for the work.

    Returns:
        `float`: in the units of the weights.
    """
    delta = difference(fine_tuned, base) if delta is None else delta
    eps = max(torch.finfo(t.dtype).eps for t in (base, fine_tuned, delta))
    tiny = max(torch.finfo(t.dtype).smallest_normal for t in (base, fine_tuned, delta))
    most = torch.finfo(delta.dtype).max
    if base.dtype == fine_tuned.dtype:
        # W0 lies on the grid that W1 was rounded to: a change below half a step is lost rather
        # than replaced by noise, so no entry is wrong by more than it should have changed.
        change = linalg.frobenius_norm(delta)
        most = min(change / math.sqrt(base.numel()) / (ROUNDING_SPREAD * eps), most)
    size = fine_tuned.to(delta.dtype, copy=not overwrite).abs_().clamp_(min(tiny, most), most)
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
    tasks, exact = _leading(deltas, rank, floors or [0.0] * len(deltas), precision)
    ranks = tuple(task.rank for task in tasks)
    vectors = concatenate(tasks)
    del deltas, tasks  # the last references, when the caller has let go of them
    if not orthogonal or not vectors.rank:
        return MergedUpdate(vectors.matrix(), ranks, exact=exact)
    product = linalg.orthogonal_product(vectors.U, vectors.S, vectors.Vh, precision, solver)
    return MergedUpdate(product.matrix, ranks, product.null_directions, exact + product.exact)


def _leading(
    deltas: Sequence[Update], rank: int, floors: Sequence[float], precision: Precision
) -> tuple[list[TaskSingularVectors], int]:
    """Triplets of every task, and how many took a full SVD."""
    whole = [(d, f) for d, f in zip(deltas, floors, strict=True) if isinstance(d, Tensor)]
    found = linalg.truncated_svds([d for d, _ in whole], rank, [f for _, f in whole], precision)
    decomposed = iter(found)
    tasks = []
    for delta in deltas:
        if isinstance(delta, Tensor):
            svd = next(decomposed)
            tasks.append(TaskSingularVectors(svd.U, svd.S, svd.Vh))
        else:
            kept = delta.truncated(rank)
            tasks.append(kept.to(linalg.in_working_precision(kept.S).dtype))
    return tasks, sum(svd.exact for svd in found)
