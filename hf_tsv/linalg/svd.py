"""Decompositions and products of a weight: tensors in, tensors out, whatever the device.

Singular vectors come from the eigenvectors of a Gram matrix of the shorter side, in float64:
squaring singular values in float32 loses the trailing half of them. Every result is checked
afterwards; what fails is computed again by a full float64 SVD. `exact` does only that. An SVD that
does not converge, or fails the check, is computed by another routine; if none does it, that is an
error.

On the CPU tasks are decomposed side by side, one thread each, which makes the bits independent of
the number of threads. On other devices those of one shape are decomposed in one batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_tsv.linalg import lapack, products
from hf_tsv.linalg.choices import Precision
from hf_tsv.linalg.eigen import Eigen, Scaled, leading_eighs
from hf_tsv.linalg.lapack import NotConvergedError
from hf_tsv.linalg.products import PROBES, for_each, in_working_precision, probe_vectors, product
from hf_tsv.system.memory import empty, give_back

CERTIFICATE = 1e-8
"""Largest residual of singular triplets, and loss of orthogonality, that is accepted.

Relative to the largest singular value. float64 leaves about 1e-13 where singular values are within
three orders of magnitude; a float32 SVD leaves 5e-7.
"""

SINGLE_CERTIFICATE = 1e-4  # in float32, the working precision of MPS

# Square of a singular value, in units of n · eps · λ_max, that may be rounding of a Gram matrix.
# Measured: 0.03 for a spectrum of which half is flat and half zero.
SMALLEST_SQUARE = 0.1

PER_VALUE = 200.0
"""Operations that reading, checking and adding one value count for."""

# Entries of the matrices decomposed at a time: 0.5 GB. Eigenvectors take several times that.
BATCH = 1 << 26

# Largest exponent of the powers of two that matrices are divided by: their inverse is a number.
EXPONENTS = 1022


def operations(rows: int, columns: int, rank: int) -> float:
    """Floating-point operations of the leading triplets of one matrix, approximately."""
    short = min(rows, columns)
    return rows * columns * short + 4.0 * short**3 + 4.0 * rows * columns * rank


@dataclass(frozen=True)
class SVD:
    """Leading singular triplets of one matrix: U (m, r), S descending (r,) and Vh (r, n).

    `exact` tells whether they come from a full float64 SVD. Where all singular values were asked
    for, `spectrum` (k,) has them, descending (those far below the floor are rounding), and
    `numerical_rank` counts those above the floor; else it is r.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    exact: bool
    numerical_rank: int
    spectrum: Tensor | None = None


def truncated_svds(
    matrices: Sequence[Tensor],
    rank: int,
    floors: Sequence[float],
    precision: Precision = "fast",
    *,
    spectrum: bool = False,
) -> list[SVD]:
    """Leading singular triplets of several matrices (m, n), at most `rank` of each.

    Singular values up to a matrix's floor are numerically zero and dropped. `"exact"` takes full
    float64 SVDs, always; `spectrum` asks for all singular values, and the numerical rank, too. A
    [`NotConvergedError`] has the place of a matrix that cannot be decomposed.
    """
    batches = _batches(list(zip(matrices, floors, strict=True)))
    starts = accumulate((len(batch) for batch in batches[:-1]), initial=0)

    def decompose(part: tuple[int, list[tuple[Tensor, float]]]) -> list[SVD]:
        return _svds(part[1], rank, precision, spectrum, part[0])

    found = for_each(decompose, list(zip(starts, batches, strict=False)))
    return [svd for batch in found for svd in batch]


def truncated_svd(
    matrix: Tensor,
    rank: int,
    floor: float = 0.0,
    precision: Precision = "fast",
    *,
    spectrum: bool = False,
) -> SVD:
    """Leading singular triplets of one matrix; see [`truncated_svds`]."""
    return _svds([(matrix, floor)], rank, precision, spectrum)[0]


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a matrix, descending, in the working precision."""
    item = _scaled(matrix, 0.0)
    return _singular_values(item.a) * item.scale


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of a matrix (m, n), checked: U (m, k), S descending (k,), Vh (k, n)."""
    a = in_working_precision(matrix)
    if a.numel() and not math.isfinite(products.largest_entry(a)):
        raise NotConvergedError("it holds NaN or Inf")
    give_back()  # it takes memory of its own
    for way in _ways(a):
        try:
            found = way()
        except (LinAlgError, NotConvergedError):
            continue
        if _is_svd(a, *found):
            return found
    raise NotConvergedError("no solver converges")


def _ways(a: Tensor) -> Iterator[Callable[[], tuple[Tensor, Tensor, Tensor]]]:
    """Routines for all singular triplets, the fastest first; the last ones on the CPU."""
    usual = functools.partial(torch.linalg.svd, full_matrices=False)
    if products.by_products(a):
        yield lambda: usual(a)
    if a.device.type == "cuda":
        yield lambda: usual(a, driver="gesvd")
    near = a.to("cpu", torch.float64)
    for routine in (usual, lapack.svd):

        def on_cpu(routine: Callable[..., Any] = routine) -> tuple[Tensor, Tensor, Tensor]:
            U, S, Vh = (part.to(a) for part in routine(near))
            return U, S, Vh

        yield on_cpu


def _is_svd(a: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> bool:
    """Whether all triplets give the matrix and are orthonormal, estimated on a few vectors."""
    if not S.numel():
        return True
    probes = probe_vectors(a.mT)
    rest = product(probes, a) - product(product(probes, U) * S, Vh)
    losses = [float(rest.norm() / S[0]) if S[0] else float(rest.norm())]
    for W in (U.mT, Vh):
        own = probe_vectors(W.mT)
        losses.append(float((product(product(own, W), W.mT) - own).norm()))
    bar = CERTIFICATE if a.dtype == torch.float64 else SINGLE_CERTIFICATE
    return all(loss <= bar * math.sqrt(PROBES) for loss in losses)


def _singular_values(a: Tensor) -> Tensor:
    """All singular values; by a full SVD where their squares do not add up to the norm's."""
    try:
        values: Tensor = torch.linalg.svdvals(a)
    except LinAlgError:
        return svd(a)[1]
    squares = float(a.norm()) ** 2
    near = abs(float(values.square().sum()) - squares) <= CERTIFICATE * squares
    return values if near or a.dtype != torch.float64 else svd(a)[1]


def _batches(items: Sequence[tuple[Tensor, float]]) -> list[list[tuple[Tensor, float]]]:
    """Matrices to decompose at a time: neighbours of one shape where products are the way."""
    batches: list[list[tuple[Tensor, float]]] = []
    for matrix, floor in items:
        last = batches[-1] if batches else []
        fits = last and products.by_products(matrix) and matrix.shape == last[0][0].shape
        if fits and (len(last) + 1) * matrix.numel() <= BATCH:
            last.append((matrix, floor))
        else:
            batches.append([(matrix, floor)])
    return batches


def _scaled(matrix: Tensor, floor: float) -> Scaled:
    """The matrix divided by a power of two, so that squares neither underflow nor overflow."""
    largest = products.largest_entry(matrix) if matrix.numel() else 0.0
    if not math.isfinite(largest):
        raise NotConvergedError("it holds NaN or Inf")
    exponent = math.frexp(largest)[1] if largest else 0
    scale = 2.0 ** min(max(exponent, -EXPONENTS), EXPONENTS)
    if matrix.device.type == "cpu":
        a = empty(*matrix.shape, dtype=torch.float64).copy_(matrix).mul_(1 / scale)
    else:
        a = in_working_precision(matrix) / scale
    floor = max(floor / scale, torch.finfo(a.dtype).eps * max(a.shape) * float(a.norm()))
    wide = a.shape[0] < a.shape[1]  # LAPACK takes about twice as long for a wide matrix
    return Scaled(a.mT if wide else a, floor, scale, wide)


def _svds(
    batch: Sequence[tuple[Tensor, float]],
    rank: int,
    precision: Precision,
    spectrum: bool,
    start: int | None = None,
) -> list[SVD]:
    """Leading triplets of matrices of one shape; errors count the matrices from `start` on."""
    done = 0
    try:
        items = []
        for matrix, floor in batch:
            items.append(_scaled(matrix, floor))
            done += 1
        eigen: Sequence[Eigen | None] = [None] * len(items)
        if precision == "fast":
            eigen = leading_eighs(items, rank, spectrum)
        found, done = [], 0
        for item, vectors in zip(items, eigen, strict=True):
            found.append(_svd(item, rank, vectors, spectrum))
            done += 1
        return found
    except NotConvergedError as error:
        place = None if start is None else start + done
        raise NotConvergedError(str(error), place) from None


def _svd(item: Scaled, rank: int, eigen: Eigen | None, spectrum: bool) -> SVD:
    every = None
    found = _gram_svd(item.a, item.floor, eigen) if eigen else None
    if found:
        U, S, Vh = found
        every = _spectrum(item, eigen) if spectrum else None
    else:
        U, S, Vh, every = _full_svd(item.a, rank, item.floor)
    numerical_rank = S.numel() if every is None else int((item.floor < every).sum())
    if item.wide:
        U, Vh = Vh.mT, U.mT
    every = every * item.scale if spectrum and every is not None else None
    return SVD(U, S * item.scale, Vh, not found, max(numerical_rank, S.numel()), every)


def _full_svd(a: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Leading triplets, and all singular values."""
    U, S, Vh = svd(a)
    r = min(rank, int((floor < S).sum()))
    # Clones, so that the untruncated factors can be freed.
    return U[:, :r].clone(), S[:r].clone(), Vh[:r].clone(), S


def _spectrum(item: Scaled, eigen: Eigen | None) -> Tensor:
    """All singular values: roots of eigenvalues, if those show what is above the floor."""
    every = eigen.all_values if eigen else None
    if every is not None:
        smallest = SMALLEST_SQUARE * len(every) * torch.finfo(every.dtype).eps * every[:1]
        if bool(item.floor**2 > smallest):
            return every.clamp_min(0).sqrt()
    return _singular_values(item.a)


def _gram_svd(a: Tensor, floor: float, eigen: Eigen) -> tuple[Tensor, Tensor, Tensor] | None:
    """Triplets of a (m, n), m >= n, from the eigenvectors of aᵀa; None if they fail the check."""
    S = eigen.values.clamp_min(0).sqrt()
    r = int((floor < S).sum())
    S, Vh = S[:r].clone(), eigen.vectors[:r].clone()
    U = product(a, Vh.mT).div_(S)
    residual = _residual(a, U, S, Vh) / S[0] if r else S.sum()
    loss = torch.maximum(*(_skewness(W) for W in (U.mT, Vh))) if r else S.sum()
    return (U, S, Vh) if bool(torch.maximum(residual, loss) < CERTIFICATE) else None


def _residual(a: Tensor, U: Tensor, S: Tensor, Vh: Tensor) -> Tensor:
    """Largest ‖aᵀu − σv‖ of a triplet, estimated on a few vectors."""
    probes = probe_vectors(a)
    found: Tensor = product(product(probes, a.mT), U) - product(probes, Vh.mT) * S
    return found.square().sum(dim=0).amax().div(PROBES).sqrt()


def _skewness(rows: Tensor) -> Tensor:
    """Largest entry of W Wᵀ − I."""
    gram = product(rows, rows.mT)
    gram.diagonal().sub_(1)
    return gram.abs().amax()
