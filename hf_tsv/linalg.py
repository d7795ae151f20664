"""Decompositions of one matrix: tensors in, tensors out.

Everything is computed in float64 where the device has it: squaring singular values in float32
loses the trailing half of them, and two nearly collinear tasks need exactly those.
"""

from __future__ import annotations

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-6
"""Singular values of a concatenated factor below this share of the largest are null directions.

Concatenations of real fine-tunes have condition numbers up to 1e5; equal or opposite tasks give
1e-16.
"""

WHITENING_LOSS = 1e6
"""Smallest ratio of eigenvalues that whitening is used for, in units of the working precision.

Squaring the condition number costs accuracy: at a ratio of 2e-10 (condition 7e4) the factor is
still good to 1e-7; at 1e-12, where null directions begin, only to 3e-4.
"""


def in_working_precision(matrix: Tensor) -> Tensor:
    """Return `matrix` in the dtype decompositions run in: float64, or float32 on MPS."""
    return matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)


def truncated_svd(matrix: Tensor, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular triplets of a matrix.

    Args:
        matrix (`Tensor`): shape (m, n).
        rank (`int`): how many triplets at most.
        floor (`float`): singular values up to this are numerically zero and dropped.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: U (m, r), S (r,) descending, Vh (r, n), r <= rank.
    """
    a = in_working_precision(matrix)
    wide = a.shape[0] < a.shape[1]  # LAPACK takes about twice as long for a wide matrix
    U, S, Vh = torch.linalg.svd(a.mT if wide else a, full_matrices=False)
    if wide:
        U, Vh = Vh.mT, U.mT
    r = min(rank, int((floor < S).sum()))
    # Clones, so that the untruncated factors can be freed.
    return U[:, :r].clone(), S[:r].clone(), Vh[:r].clone()


def polar_factor(matrix: Tensor, tolerance: float = RANK_TOLERANCE) -> tuple[Tensor, int]:
    """Nearest partial isometry P Qᵀ of a matrix P D Qᵀ, by its SVD (orthogonal Procrustes).

    Args:
        matrix (`Tensor`): shape (m, n).
        tolerance (`float`): singular values up to this share of the largest are null directions
            and left out, which makes the factor the unique minimum-norm one.

    Returns:
        `tuple[Tensor, int]`: the factor (m, n), and how many null directions were left out
        of the min(m, n) there could be.
    """
    P, D, Qh = truncated_svd(matrix, min(matrix.shape))
    kept = int((tolerance * D[:1] < D).sum())
    return P[:, :kept] @ Qh[:kept], min(matrix.shape) - kept


def polar_factor_by_whitening(
    matrix: Tensor, tolerance: float = RANK_TOLERANCE
) -> tuple[Tensor, int]:
    """The same factor as [`polar_factor`], as matrix · (matrixᵀ matrix)^(−1/2).

    The Gram matrix of the shorter side is eigendecomposed. Where its eigenvalues are too far apart
    for that, null directions included, the SVD takes over.

    Args:
        matrix (`Tensor`): shape (m, n).
        tolerance (`float`): as in [`polar_factor`].

    Returns:
        `tuple[Tensor, int]`: the factor (m, n), and how many null directions were left out.
    """
    a = in_working_precision(matrix)
    wide = a.shape[0] < a.shape[1]
    if wide:
        a = a.mT
    eigenvalues, Q = torch.linalg.eigh(a.mT @ a)
    smallest = WHITENING_LOSS * torch.finfo(a.dtype).eps * eigenvalues[-1:]
    if not (eigenvalues > smallest).all():
        return polar_factor(matrix, tolerance)
    factor = a @ (Q * eigenvalues.rsqrt()) @ Q.mT
    return (factor.mT if wide else factor), 0
