"""Polar factors: the nearest matrices with orthonormal columns."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_tsv.linalg import iterative, products
from hf_tsv.linalg.choices import Orthogonalizer, Precision
from hf_tsv.linalg.eigen import gram_matrix, leading_eigh, symmetric
from hf_tsv.linalg.products import PROBES, for_each, in_working_precision, probe_vectors, product
from hf_tsv.linalg.svd import truncated_svd
from hf_tsv.system.memory import empty

RANK_TOLERANCE = 1e-11
"""Singular value of a concatenated factor, relative to the largest, that counts as null direction.

Directions are left out only where they are dependent to the rounding of float64: equal or opposite
tasks give 1e-16 to 1e-15, multiples of a task in float64 up to 1e-13. Larger singular values are
ill-conditioned and no more than that: of eight random tasks that fill a square matrix one factor
in seven hundred has a ratio under 1e-6, and to leave its last direction out moves the merged update
by 5 to 13 %.
"""

ILL_CONDITIONED = 1e-6
"""Ratio of singular values of a concatenated factor below which its columns must be exact.

A polar factor amplifies the errors of the columns by up to the inverse of the ratio, and what
[`CERTIFICATE`] accepts is not enough any more: see [`OrthogonalProduct`].
"""

UNCERTAIN_SIGN = 1e-7
"""Smallest singular value of a square factor, relative to the largest, whose sign is certain.

Errors E of a square matrix move its polar factor by 2 ‖E‖ / (σ_n + σ_(n−1)) at most, so that one
small singular value alone amplifies nothing, unless errors turn its direction round. This is ten
times [`CERTIFICATE`].
"""

WHITENING_LOSS = 1e6
"""Smallest ratio of eigenvalues that a Gram matrix is used for, in units of its precision.

Squaring the condition number costs accuracy: at a ratio of 2e-10 (condition 7e4) the factor is
still good to 1e-7; at 1e-12 only to 3e-4.
"""

POLAR_CERTIFICATE = 5e-6
"""Largest loss of orthonormality of a polar factor, Frobenius norm, that is accepted.

The merged update is wrong by 0.005 to 0.14 of it, measured on related tasks of many conditions:
by 7e-7 at most.
"""

SMALLEST_EIGENVALUE = 1e-11
"""Smallest ratio of eigenvalues of a Gram matrix for which `fast` takes an inverse root of it.

It is that of a condition of 3e5; worse ones are left to the SVD, which does not square.
"""


@dataclass(frozen=True)
class OrthogonalProduct:
    """polar(U) diag(S) polar(Vh), shape (m, n); `factors` are the two, where they were asked for.

    `null_directions` counts directions left out of a polar factor because they are not independent,
    and `exact` the polar factors, of two, from a full float64 SVD. `smallest` is the smallest
    singular value of U and Vh that was kept and counts, relative to the largest: of a square factor
    the last one does not, see [`UNCERTAIN_SIGN`]. It is 1 where no SVD was needed to see that it is
    large enough.
    """

    matrix: Tensor
    null_directions: int
    exact: int
    smallest: float = 1.0
    factors: tuple[Tensor, Tensor] | None = None

    @property
    def ill_conditioned(self) -> bool:
        """Whether errors of U and Vh count so much that these should be computed exactly."""
        return self.smallest < ILL_CONDITIONED


def orthogonal_product(
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    precision: Precision = "fast",
    solver: Orthogonalizer = "procrustes",
    *,
    form: bool = False,
) -> OrthogonalProduct:
    """polar(U) diag(S) polar(Vh): the factors replaced by the nearest orthonormal ones (eq. 6).

    U has the shape (m, q), S (q,) and Vh (q, n). `"fast"` takes polar factors as U (UᵀU)^(−1/2),
    never formed. Where that does not do it, or with `"exact"`, they are computed by an SVD
    (`"procrustes"`), or as U (UᵀU)^(−1/2) where that is accurate enough (`"whitening"`). `form`
    asks for the polar factors too.
    """
    left, right = for_each(lambda X: polar(X, precision, solver), [U, Vh.mT])
    behind = [factor.mT for factor in reversed(right.factors)]
    formed = (products.chain(left.factors), products.chain(behind)) if form else None
    last = left.factors.pop()
    scaled = torch.mul(last, S, out=empty(*last.shape, dtype=last.dtype, device=last.device))
    del last
    null_directions = max(left.null_directions, right.null_directions)
    matrix = products.chain([*left.factors, scaled, *behind])
    smallest = min(left.smallest, right.smallest)
    return OrthogonalProduct(matrix, null_directions, left.exact + right.exact, smallest, formed)


@dataclass(frozen=True)
class Polar:
    """A polar factor as the product of `factors`; for the rest see [`OrthogonalProduct`]."""

    factors: list[Tensor]
    null_directions: int
    exact: bool
    smallest: float = 1.0


def polar(matrix: Tensor, precision: Precision, solver: Orthogonalizer) -> Polar:
    """Polar factor of a matrix (m, n): the nearest partial isometry, P Qᵀ of P D Qᵀ."""
    if precision == "fast":
        a = in_working_precision(matrix)
        wide = a.shape[0] < a.shape[1]
        tall = a.mT if wide else a
        parts = _polar_parts(tall) if products.by_products(tall) else None
        if parts is not None:
            return Polar([f.mT for f in reversed(parts)] if wide else [*parts], 0, exact=False)
        root = _inverse_root(tall)
        if root is not None:
            return Polar([root, a] if wide else [a, root], 0, exact=False)
    white = _whitened(matrix) if solver == "whitening" else None
    if white is not None:
        return Polar([white], 0, exact=True)
    return _procrustes(matrix)


def _procrustes(matrix: Tensor) -> Polar:
    """Polar factor by the SVD; without null directions it is the unique minimum-norm one."""
    svd = truncated_svd(matrix, min(matrix.shape), precision="exact")
    kept = int((RANK_TOLERANCE * svd.S[:1] < svd.S).sum())
    factor = svd.U[:, :kept] @ svd.Vh[:kept]
    ratios = (svd.S[:kept] / svd.S[:1]).tolist()
    if matrix.shape == (kept, kept) and kept > 1 and ratios[-1] > UNCERTAIN_SIGN:
        ratios.pop()
    return Polar([factor], min(matrix.shape) - kept, exact=True, smallest=min(ratios, default=1.0))


def _whitened(matrix: Tensor) -> Tensor | None:
    """Polar factor by the Gram matrix of the shorter side; None where that is too inaccurate."""
    a = in_working_precision(matrix)
    wide = a.shape[0] < a.shape[1]
    if wide:
        a = a.mT
    try:
        eigenvalues, Q = torch.linalg.eigh(a.mT @ a)
    except LinAlgError:
        return None
    smallest = WHITENING_LOSS * torch.finfo(a.dtype).eps * eigenvalues[-1:]
    if not (eigenvalues > smallest).all():
        return None
    factor: Tensor = a @ (Q * eigenvalues.rsqrt()) @ Q.mT
    return factor.mT if wide else factor


def _polar_parts(a: Tensor) -> tuple[Tensor, Tensor] | None:
    """Polar factor of a (m, n), m >= n, as a product of two; None if it fails the check."""
    parts = iterative.polar_parts(a, SMALLEST_EIGENVALUE)
    return parts if parts and _loss(*parts) < POLAR_CERTIFICATE else None


def _inverse_root(a: Tensor) -> Tensor | None:
    """(aᵀa)^(−1/2) of a (m, n), m >= n; None if it fails the check."""
    found = leading_eigh(a, a.shape[1])
    if found is None or not found.values[-1] > SMALLEST_EIGENVALUE * found.values[0]:
        return None
    root = symmetric(gram_matrix(found.vectors.mul_(found.values[:, None] ** -0.25)))
    return root if _loss(a, root) < POLAR_CERTIFICATE else None


def _loss(a: Tensor, root: Tensor) -> float:
    """‖rootᵀ aᵀ a root − I‖, Frobenius, estimated on a few vectors."""
    probes = probe_vectors(a)
    white = product(product(probes, root.mT), a.mT)
    return float((product(product(white, a), root) - probes).norm() / math.sqrt(PROBES))
