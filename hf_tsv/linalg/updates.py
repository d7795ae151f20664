"""The update of one weight, Δ or its singular triplets, with its rounding noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tsv.linalg import grids, products
from hf_tsv.system.memory import empty

ROUNDING_SPREAD = 0.3
"""Upper bound of the standard deviation of rounding to floating point, in units of eps · |w|.

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
        U, S, Vh = map(products.in_working_precision, (self.U, self.S, self.Vh))
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


def norm_of(tensor: Tensor) -> float:
    """Frobenius norm of a tensor of any shape and floating-point type."""
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return products.frobenius_norm(wide.reshape(len(wide), -1) if wide.dim() > 1 else wide)


def scaled(update: Update, scale: float) -> Update:
    """An update times a number; Δ itself is overwritten."""
    if scale == 1.0:
        return update
    if isinstance(update, TaskSingularVectors):  # singular values stay positive
        sign = -1.0 if scale < 0 else 1.0
        return TaskSingularVectors(update.U * sign, update.S * abs(scale), update.Vh)
    return update.mul_(scale)


def matrix_of(update: Update) -> Tensor:
    """Δ of an update that may be given by its triplets."""
    return update if isinstance(update, Tensor) else update.matrix()


def difference(fine_tuned: Tensor, base: Tensor, *, overwrite: bool = False) -> Tensor:
    """Δ = W1 − W0 of two stored weights, in float32, or in float64 where one of the two is.

    `overwrite` puts it into the memory of W1, whose type must be that of Δ.
    """
    dtype = _dtype_of_difference(fine_tuned, base)
    result = fine_tuned if overwrite else empty(*base.shape, dtype=dtype, device=base.device)
    return torch.sub(fine_tuned.to(dtype), base.to(dtype), out=result)


def _dtype_of_difference(fine_tuned: Tensor, base: Tensor) -> torch.dtype:
    wide = torch.float64 in (fine_tuned.dtype, base.dtype)
    return torch.float64 if wide else torch.float32


def storage_noise(base: Tensor, fine_tuned: Tensor, norm: float | None = None) -> float:
    """Spectral norm below which a task matrix is rounding of the stored checkpoints.

    W0 + Δ is rounded to the dtype of W1, so W1 − W0 differs from Δ by noise of about eps · |w| an
    entry. The dtype of W0 adds none: a fine-tune begins with the stored W0, however coarse it is.
    A W1 in a wider dtype than W0's with nothing finer in it was rounded to that of W0.

    A LoRA of rank 16 therefore has full numerical rank on disk; the triplets under this floor are
    not the task's and would be amplified by orthogonalisation. The spectral norm of independent
    noise is at most its largest row norm plus its largest column norm (Bandeira and van Handel,
    2016), which also holds where few columns carry most of the weight.

    W0 and W1 are given as stored, (d_out, d_in), and ‖W1 − W0‖, Frobenius, where it is known; the
    result is in their units.
    """
    dtype, own = _dtype_of_difference(fine_tuned, base), grid_of(fine_tuned, base)
    eps = max(torch.finfo(kind).eps for kind in (own, dtype))
    tiny = max(torch.finfo(kind).smallest_normal for kind in (own, dtype))
    most = torch.finfo(dtype).max
    if torch.promote_types(base.dtype, own) == own:
        change = products.frobenius_norm(difference(fine_tuned, base)) if norm is None else norm
        most = min(_largest_that_rounds(change, base.numel(), eps), most)
    size = fine_tuned.to(dtype, copy=True).abs_().clamp_(min(tiny, most), most)
    return noise(size, eps)


def _largest_that_rounds(change: float, entries: int, eps: float) -> float:
    """Largest |w| whose rounding is noise in a change of this norm.

    W0 lies on the grid that W1 was rounded to: a change below half a step is lost rather than
    replaced by noise, so no entry is wrong by more than it should have changed.
    """
    return change / math.sqrt(entries) / (ROUNDING_SPREAD * eps)


@dataclass(frozen=True)
class Measured:
    """Δ, its Frobenius norm, its largest absolute entry, and its storage noise if that is wanted.

    See [`storage_noise`].
    """

    update: Tensor
    norm: float
    largest: float
    floor: float = 0.0


def measured(fine_tuned: Tensor, base: Tensor, *, noisy: bool) -> Measured:
    """Measure Δ of W1 and W0 as stored, in the memory of W1 if its type allows that.

    `noisy` asks for the storage noise, of matrices.
    """
    own = fine_tuned.dtype
    overwrite = own == base.dtype and own == _dtype_of_difference(fine_tuned, base)
    row, column = products.norms(fine_tuned) if overwrite and noisy else (0.0, 0.0)
    update = difference(fine_tuned, base, overwrite=overwrite)
    largest = products.largest_entry(update) if update.numel() else 0.0
    norm = norm_of(update) if largest < math.inf else math.inf
    if not noisy or not 0 < norm < math.inf:
        return Measured(update, norm, largest)
    if not overwrite:
        return Measured(update, norm, largest, storage_noise(base, fine_tuned, norm))
    eps = torch.finfo(own).eps
    if row > _largest_that_rounds(norm, base.numel(), eps):  # and an entry may be, too
        floor = storage_noise(base, base + update, norm)
    else:
        floor = ROUNDING_SPREAD * eps * (row + column)
    return Measured(update, norm, largest, floor)


def grid_of(fine_tuned: Tensor, base: Tensor) -> torch.dtype:
    """Dtype that W1 was rounded to: its own, or that of W0 if it holds nothing finer."""
    finer = torch.finfo(fine_tuned.dtype).eps < torch.finfo(base.dtype).eps
    return base.dtype if finer and grids.on_grid(fine_tuned, base.dtype) else fine_tuned.dtype


def evidence_of_rounded_base(
    fine_tuned: Tensor, base: Tensor, update: Tensor
) -> tuple[float, float]:
    """Evidence that W0 was rounded after W1 was made of it, see [`grids.evidence_of_rounding`].

    A W1 on a grid as coarse as that of W0 shows nothing.
    """
    if torch.finfo(fine_tuned.dtype).eps >= torch.finfo(base.dtype).eps:
        return 0.0, 0.0
    if grid_of(fine_tuned, base) == base.dtype:
        return 0.0, 0.0
    return grids.evidence_of_rounding(base, update)


def rounding_noise(matrix: Tensor, dtype: torch.dtype) -> float:
    """Spectral norm of what rounding to a dtype changes in a matrix; see [`storage_noise`]."""
    return noise(matrix.to(torch.float32), torch.finfo(dtype).eps)


def noise(size: Tensor, eps: float) -> float:
    """Spectral norm of the rounding of entries of this size."""
    row, column = products.norms(size)
    return ROUNDING_SPREAD * eps * (row + column)


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
    return products.in_working_precision(matrix_of(update))
