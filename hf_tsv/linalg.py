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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_tsv import iterative, lanczos, lapack
from hf_tsv.lapack import NotConvergedError
from hf_tsv.memory import empty, give_back

Precision = Literal["fast", "exact"]
Orthogonalizer = Literal["procrustes", "whitening"]

S = TypeVar("S")
T = TypeVar("T")

RANK_TOLERANCE = 1e-6
"""Singular values of a concatenated factor below this share of the largest are null directions.

Concatenations of real fine-tunes have condition numbers up to 1e5; equal or opposite tasks give
1e-16.
"""

WHITENING_LOSS = 1e6
"""Smallest ratio of eigenvalues that a Gram matrix is used for, in units of its precision.

Squaring the condition number costs accuracy: at a ratio of 2e-10 (condition 7e4) the factor is
still good to 1e-7; at 1e-12, where null directions begin, only to 3e-4.
"""

CERTIFICATE = 1e-8
"""Largest residual of singular triplets, and loss of orthogonality, that is accepted.

Relative to the largest singular value. float64 leaves about 1e-13 where singular values are within
three orders of magnitude; a float32 SVD leaves 5e-7.
"""

SINGLE_CERTIFICATE = 1e-4
"""The same in float32, the working precision of MPS."""

POLAR_CERTIFICATE = 1e-5
"""Largest loss of orthonormality of a polar factor, Frobenius norm, that is accepted.

The merged update is wrong by 0.005 to 0.14 of it, measured on related tasks of many conditions.
"""

SMALLEST_EIGENVALUE = 10 * RANK_TOLERANCE**2
"""Of a Gram matrix, relative to its largest: below it null directions may begin."""

SMALLEST_SQUARE = 0.1
"""Of a singular value, relative to the largest eigenvalue of a Gram matrix, in units of its
precision and size: below it there may be nothing but rounding. Measured: 0.03 where half of the
spectrum is flat and the rest zero."""

PROBES = 8
"""Vectors that residuals are estimated with: ten times too small once in ten million."""

BATCH = 1 << 26
"""Entries of the matrices decomposed at a time, 0.5 GB; eigenvectors take several times that."""

SMALL = 1e-12
"""Entries up to which, and from the inverse of which, squares are summed after scaling."""

EXPONENTS = 1022
"""Of powers of two that matrices are divided by."""

TILE = 128
"""Rows and columns that are mirrored at a time."""

COLUMNS = 384
"""Columns a product is computed in at a time; the same for every number of threads."""


@dataclass(frozen=True)
class SVD:
    """Leading singular triplets of one matrix.

    Args:
        U (`Tensor`): shape (m, r).
        S (`Tensor`): shape (r,), descending.
        Vh (`Tensor`): shape (r, n).
        exact (`bool`): from a full float64 SVD.
        numerical_rank (`int`): of the matrix, r or more: how many singular values are above the
            floor, where all were asked for.
        spectrum (`Tensor`, *optional*): all singular values, shape (k,), descending; those far
            below the floor are rounding.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    exact: bool
    numerical_rank: int
    spectrum: Tensor | None = None


def in_working_precision(matrix: Tensor) -> Tensor:
    """Return `matrix` in the dtype decompositions run in: float64, or float32 on MPS."""
    return matrix.to(torch.float32 if matrix.device.type == "mps" else torch.float64)


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Let the functions here use the threads that torch has, one task each.

    Within the context no call of torch or LAPACK starts threads of its own.

    Args:
        count (`int`, *optional*): default: those torch has.
    """
    own = torch.get_num_threads()
    workers = count or own
    torch.set_num_threads(1)
    try:
        with lapack.one_thread(), ThreadPoolExecutor(workers, "hf-tsv-compute") as pool:
            token = _POOL.set(pool if workers > 1 else None)
            try:
                yield
            finally:
                _POOL.reset(token)
    finally:
        torch.set_num_threads(own)


_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)
"""Threads for independent parts; none in those threads themselves."""


def truncated_svds(
    matrices: Sequence[Tensor],
    rank: int,
    floors: Sequence[float],
    precision: Precision = "fast",
    *,
    spectrum: bool = False,
) -> list[SVD]:
    """Leading singular triplets of several matrices.

    Args:
        matrices (`Sequence[Tensor]`): shape (m, n) each.
        rank (`int`): how many triplets at most.
        floors (`Sequence[float]`): singular values up to this are numerically zero and dropped.
        precision (`str`): `"exact"`: by a full float64 SVD, always.
        spectrum (`bool`): find all singular values, and the numerical rank, too.

    Raises:
        [`NotConvergedError`]: with the place of a matrix that cannot be decomposed.
    """
    batches = _batches(list(zip(matrices, floors, strict=True)))
    starts = accumulate((len(batch) for batch in batches[:-1]), initial=0)

    def decompose(part: tuple[int, list[tuple[Tensor, float]]]) -> list[SVD]:
        return _svds(part[1], rank, precision, spectrum, part[0])

    found = _each(decompose, list(zip(starts, batches, strict=False)))
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


@dataclass(frozen=True)
class OrthogonalProduct:
    """polar(U) diag(S) polar(Vh).

    Args:
        matrix (`Tensor`): shape (m, n).
        null_directions (`int`): left out of a polar factor because they are not independent.
        exact (`int`): polar factors, of two, from a full float64 SVD.
        factors (`tuple[Tensor, Tensor]`, *optional*): polar(U) (m, q) and polar(Vh) (q, n), where
            they were asked for.
    """

    matrix: Tensor
    null_directions: int
    exact: int
    factors: tuple[Tensor, Tensor] | None = None


def singular_values(matrix: Tensor) -> Tensor:
    """All singular values of a matrix, descending, in the working precision.

    Args:
        matrix (`Tensor`): shape (m, n).

    Raises:
        [`NotConvergedError`]: they cannot be found.
    """
    item = _scaled(matrix, 0.0)
    return _singular_values(item.a) * item.scale


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of a matrix, in the working precision, checked.

    Args:
        matrix (`Tensor`): shape (m, n).

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: U (m, k), singular values descending (k,), and Vh (k, n).

    Raises:
        [`NotConvergedError`]: no way to find them converges, or there is NaN or Inf.
    """
    a = in_working_precision(matrix)
    if a.numel() and not math.isfinite(largest_entry(a)):
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
    if _by_products(a):
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
    probes = _probes(a.mT)
    rest = product(probes, a) - product(product(probes, U) * S, Vh)
    losses = [float(rest.norm() / S[0]) if S[0] else float(rest.norm())]
    for W in (U.mT, Vh):
        own = _probes(W.mT)
        losses.append(float((product(product(own, W), W.mT) - own).norm()))
    bar = CERTIFICATE if a.dtype == torch.float64 else SINGLE_CERTIFICATE
    return all(loss <= bar * math.sqrt(PROBES) for loss in losses)


def _singular_values(a: Tensor) -> Tensor:
    """All of them; their squares make up that of the Frobenius norm, or a full SVD finds them."""
    try:
        values: Tensor = torch.linalg.svdvals(a)
    except LinAlgError:
        return svd(a)[1]
    squares = float(a.norm()) ** 2
    near = abs(float(values.square().sum()) - squares) <= CERTIFICATE * squares
    return values if near or a.dtype != torch.float64 else svd(a)[1]


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

    Args:
        U (`Tensor`): shape (m, q).
        S (`Tensor`): shape (q,).
        Vh (`Tensor`): shape (q, n).
        precision (`str`): `"fast"`: as U (UᵀU)^(−1/2), never formed; `"exact"`: see `solver`.
        solver (`str`): how polar factors are computed where `fast` does not do it: `"procrustes"`,
            by an SVD, or `"whitening"`, U (UᵀU)^(−1/2) where that is accurate enough.
        form (`bool`): form the polar factors too.
    """
    left, right = _each(lambda X: _polar(X, precision, solver), [U, Vh.mT])
    behind = [factor.mT for factor in reversed(right.factors)]
    formed = (_chain(left.factors), _chain(behind)) if form else None
    last = left.factors.pop()
    scaled = torch.mul(last, S, out=empty(*last.shape, dtype=last.dtype, device=last.device))
    del last
    null_directions = max(left.null_directions, right.null_directions)
    matrix = _chain([*left.factors, scaled, *behind])
    return OrthogonalProduct(matrix, null_directions, left.exact + right.exact, formed)


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
    svd = truncated_svd(matrix, min(matrix.shape), precision="exact")
    kept = int((tolerance * svd.S[:1] < svd.S).sum())
    return svd.U[:, :kept] @ svd.Vh[:kept], min(matrix.shape) - kept


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
    try:
        eigenvalues, Q = torch.linalg.eigh(a.mT @ a)
    except LinAlgError:
        return polar_factor(matrix, tolerance)
    smallest = WHITENING_LOSS * torch.finfo(a.dtype).eps * eigenvalues[-1:]
    if not (eigenvalues > smallest).all():
        return polar_factor(matrix, tolerance)
    factor = a @ (Q * eigenvalues.rsqrt()) @ Q.mT
    return (factor.mT if wide else factor), 0


def largest_entry(matrix: Tensor) -> float:
    """Largest absolute value of a matrix that has entries; NaN or Inf if it has one."""
    low, high = torch.aminmax(matrix)
    return float(torch.maximum(-low, high))


def norms(matrix: Tensor) -> tuple[float, float, float]:
    """Frobenius norm, and the largest norms of a row and of a column.

    Args:
        matrix (`Tensor`): shape (m, n), float32 or float64.
    """
    a, scale = _with_safe_squares(matrix)
    rows = _squares(a, 0)
    columns = _squares(a, 1)
    zero = rows.new_zeros(1)
    squares = rows.double().sum(), torch.cat([rows, zero]).max(), torch.cat([columns, zero]).max()
    whole, row, column = (scale * math.sqrt(s) for s in squares)
    return whole, row, column


def frobenius_norm(matrix: Tensor) -> float:
    """Root of the sum of all squares.

    Args:
        matrix (`Tensor`): shape (m, n), or a vector; float32 or float64.
    """
    a, scale = _with_safe_squares(matrix)
    if a.dim() < 2:
        return scale * float(torch.linalg.vector_norm(a))
    return scale * math.sqrt(_squares(a, 0).double().sum())


def _with_safe_squares(matrix: Tensor) -> tuple[Tensor, float]:
    """The matrix, divided by its largest entry where squares would leave the range of float32."""
    largest = largest_entry(matrix) if matrix.numel() else 0.0
    if SMALL < largest < 1 / SMALL or not largest:
        return matrix, 1.0
    return matrix / largest, largest


def _squares(a: Tensor, kept: int) -> Tensor:
    """Sums of squares along the other dimension."""
    if a.device.type != "cpu":
        return a.square().sum(dim=1 - kept)
    n = a.numpy()  # torch takes twenty times as long for the columns
    return torch.as_tensor(np.einsum(f"ij,ij->{'ij'[kept]}", n, n))


def _batches(items: Sequence[tuple[Tensor, float]]) -> list[list[tuple[Tensor, float]]]:
    """Matrices to decompose at a time: neighbours of one shape where products are the way."""
    batches: list[list[tuple[Tensor, float]]] = []
    for matrix, floor in items:
        last = batches[-1] if batches else []
        fits = last and _by_products(matrix) and matrix.shape == last[0][0].shape
        if fits and (len(last) + 1) * matrix.numel() <= BATCH:
            last.append((matrix, floor))
        else:
            batches.append([(matrix, floor)])
    return batches


def _by_products(matrix: Tensor) -> bool:
    """Whether products are so much faster than LAPACK's ways there that iterations pay."""
    return matrix.device.type not in ("cpu", "mps") and matrix.numel() > 0


@dataclass(frozen=True)
class _Scaled:
    """A matrix `a` (m, n), m >= n, of entries up to 1, its floor, and what to undo afterwards."""

    a: Tensor
    floor: float
    scale: float
    wide: bool


def _scaled(matrix: Tensor, floor: float) -> _Scaled:
    """Divided by a power of two, so that squares neither underflow nor overflow."""
    largest = largest_entry(matrix) if matrix.numel() else 0.0
    if not math.isfinite(largest):
        raise NotConvergedError("it holds NaN or Inf")
    exponent = math.frexp(largest)[1] if largest else 0
    scale = 2.0 ** min(max(exponent, -EXPONENTS), EXPONENTS)  # whose inverse is a number too
    if matrix.device.type == "cpu":
        a = empty(*matrix.shape, dtype=torch.float64).copy_(matrix).mul_(1 / scale)
    else:
        a = in_working_precision(matrix) / scale
    floor = max(floor / scale, torch.finfo(a.dtype).eps * max(a.shape) * float(a.norm()))
    wide = a.shape[0] < a.shape[1]  # LAPACK takes about twice as long for a wide matrix
    return _Scaled(a.mT if wide else a, floor, scale, wide)


def _svds(
    batch: Sequence[tuple[Tensor, float]],
    rank: int,
    precision: Precision,
    spectrum: bool,
    start: int | None = None,
) -> list[SVD]:
    """Of matrices of one shape; errors count them from `start` on."""
    done = 0
    try:
        items = []
        for matrix, floor in batch:
            items.append(_scaled(matrix, floor))
            done += 1
        eigen: Sequence[_Eigen | None] = [None] * len(items)
        if precision == "fast":
            eigen = _leading_eighs(items, rank, spectrum)
        found, done = [], 0
        for item, vectors in zip(items, eigen, strict=True):
            found.append(_svd(item, rank, vectors, spectrum))
            done += 1
        return found
    except NotConvergedError as error:
        place = None if start is None else start + done
        raise NotConvergedError(str(error), place) from None


@dataclass(frozen=True)
class _Eigen:
    """Leading eigenvalues of a Gram matrix, descending, and eigenvectors as rows.

    Args:
        values (`Tensor`): shape (r,).
        vectors (`Tensor`): shape (r, n).
        all_values (`Tensor`, *optional*): shape (n,).
    """

    values: Tensor
    vectors: Tensor
    all_values: Tensor | None = None


def _svd(item: _Scaled, rank: int, eigen: _Eigen | None, spectrum: bool) -> SVD:
    every = None
    found = _gram_svd(item.a, item.floor, eigen) if eigen else None
    if found:
        U, S, Vh = found
        if spectrum:
            every = _spectrum(item, eigen)
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


def _spectrum(item: _Scaled, eigen: _Eigen | None) -> Tensor:
    """All singular values: roots of eigenvalues, if those show what is above the floor."""
    every = eigen.all_values if eigen else None
    if every is not None:
        smallest = SMALLEST_SQUARE * len(every) * torch.finfo(every.dtype).eps * every[:1]
        if bool(item.floor**2 > smallest):
            return every.clamp_min(0).sqrt()
    return _singular_values(item.a)


def _gram_svd(a: Tensor, floor: float, eigen: _Eigen) -> tuple[Tensor, Tensor, Tensor] | None:
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
    probes = _probes(a)
    found: Tensor = product(product(probes, a.mT), U) - product(probes, Vh.mT) * S
    return found.square().sum(dim=0).amax().div(PROBES).sqrt()


def _probes(a: Tensor) -> Tensor:
    """Rows (PROBES, n) of random signs, the same in every run, for a (m, n)."""
    return _signs(a.shape[1]).to(a.device, a.dtype)


@functools.lru_cache(maxsize=64)
def _signs(n: int) -> Tensor:
    numbers = torch.rand(PROBES, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return numbers.sub_(0.5).sign_()


def _skewness(rows: Tensor) -> Tensor:
    """Largest entry of W Wᵀ − I."""
    gram = product(rows, rows.mT)
    gram.diagonal().sub_(1)
    return gram.abs().amax()


@dataclass(frozen=True)
class _Polar:
    """A polar factor as the product of `factors`."""

    factors: list[Tensor]
    null_directions: int
    exact: bool


def _polar(matrix: Tensor, precision: Precision, solver: Orthogonalizer) -> _Polar:
    if precision == "fast":
        a = in_working_precision(matrix)
        wide = a.shape[0] < a.shape[1]
        tall = a.mT if wide else a
        parts = _polar_parts(tall) if _by_products(tall) else None
        if parts is not None:
            return _Polar([f.mT for f in reversed(parts)] if wide else [*parts], 0, exact=False)
        root = _inverse_root(tall)
        if root is not None:
            return _Polar([root, a] if wide else [a, root], 0, exact=False)
    by = polar_factor if solver == "procrustes" else polar_factor_by_whitening
    factor, null_directions = by(matrix)
    return _Polar([factor], null_directions, exact=True)


def _polar_parts(a: Tensor) -> tuple[Tensor, Tensor] | None:
    """Polar factor of a (m, n), m >= n, as a product of two; None if it fails the check."""
    parts = iterative.polar_parts(a, SMALLEST_EIGENVALUE)
    return parts if parts and _loss(*parts) < POLAR_CERTIFICATE else None


def _inverse_root(a: Tensor) -> Tensor | None:
    """(aᵀa)^(−1/2) of a (m, n), m >= n; None if it fails the check."""
    found = _leading_eigh(a, a.shape[1])
    if found is None:
        return None
    if not found.values[-1] > SMALLEST_EIGENVALUE * found.values[0]:
        return None
    root = _symmetric(_gram(found.vectors.mul_(found.values[:, None] ** -0.25)))
    return root if _loss(a, root) < POLAR_CERTIFICATE else None


def _leading_eighs(items: Sequence[_Scaled], rank: int, spectrum: bool) -> Sequence[_Eigen | None]:
    """What [`_leading_eigh`] finds of each."""
    rank = min(rank, items[0].a.shape[1])
    if not _by_products(items[0].a):
        return [_leading_eigh(item.a, rank, item.floor, spectrum) for item in items]
    grams = torch.stack([item.a.mT @ item.a for item in items])
    floors = torch.tensor([item.floor for item in items], dtype=grams.dtype, device=grams.device)
    try:
        values, vectors = iterative.leading_eigh(grams, rank, floors)
        every = torch.linalg.eigvalsh(grams).flip(-1) if spectrum else [None] * len(items)
    except LinAlgError:
        return [None] * len(items)
    proved = iterative.nothing_missed(grams, values, vectors, floors).tolist()
    found = zip(values, vectors, strict=True)
    return [
        _Eigen(*pair, all_values) if ok else None
        for pair, ok, all_values in zip(found, proved, every, strict=True)
    ]


def _loss(a: Tensor, root: Tensor) -> float:
    """‖rootᵀ aᵀ a root − I‖, Frobenius, estimated on a few vectors."""
    probes = _probes(a)
    white = product(product(probes, root.mT), a.mT)
    return float((product(product(white, a), root) - probes).norm() / math.sqrt(PROBES))


def _leading_eigh(
    a: Tensor, rank: int, floor: float = 0.0, spectrum: bool = False
) -> _Eigen | None:
    """Largest eigenvalues of aᵀa and their eigenvectors; None where that is no use.

    Args:
        a (`Tensor`): shape (m, n).
        rank (`int`): how many at most.
        floor (`float`): singular values up to this are not wanted.
        spectrum (`bool`): find all eigenvalues too.
    """
    if a.dtype != torch.float64 or not a.numel():
        return None
    gram = _gram(a)
    try:
        if a.device.type != "cpu":
            values, vectors = torch.linalg.eigh(gram)
            values, vectors = values.flip(0), vectors.mT.flip(0)
            return _Eigen(values[:rank], vectors[:rank], values)
        if rank == a.shape[1]:
            values, vectors = lapack.eigh(gram)
            return _Eigen(values.flip(0), vectors.flip(0), values.flip(0))
        found = None if spectrum else lanczos.leading_eigh(gram, rank, floor**2)
        if found:
            return _Eigen(*found)
        return _Eigen(*lapack.leading_eigh(gram, rank, spectrum=spectrum))
    except (NotConvergedError, LinAlgError):
        return None


def _gram(a: Tensor) -> Tensor:
    """aᵀa; on the CPU its upper triangle."""
    return lapack.gram(a) if a.device.type == "cpu" else a.mT @ a


def _symmetric(gram: Tensor) -> Tensor:
    """A Gram matrix from [`_gram`] with its lower triangle filled in, in the same memory."""
    n = gram.shape[0]
    for start in range(0, n if gram.device.type == "cpu" else 0, TILE):
        stop = min(start + TILE, n)
        corner = gram[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        gram[stop:, start:stop] = gram[start:stop, stop:].mT
    return gram


def _chain(factors: Sequence[Tensor]) -> Tensor:
    """Their product, multiplied in the order that takes fewest operations."""
    factors = list(factors)
    while len(factors) > 1:
        # greedy is optimal where it matters: few factors, one inner size
        costs = [a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairwise(factors)]
        i = costs.index(min(costs))
        factors[i : i + 2] = [product(factors[i], factors[i + 1])]
    return factors[0]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, on the CPU by columns in several threads.

    Args:
        a (`Tensor`): shape (m, k).
        b (`Tensor`): shape (k, n).
    """
    if a.device.type != "cpu" or a.dtype != torch.float64:
        return a @ b
    n = b.shape[1]
    result = empty(a.shape[0], n, dtype=a.dtype)
    parts = max(1, -(-n // COLUMNS))
    bounds = [n * i // parts for i in range(parts + 1)]
    left, right, out = a.numpy(), b.numpy(), result.numpy()

    def multiply(span: tuple[int, int]) -> None:
        columns = slice(*span)
        np.matmul(left, right[:, columns], out=out[:, columns])

    _each(multiply, list(pairwise(bounds)))
    return result


def _each(call: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Results of a call on every item, several at a time inside [`threads`]."""
    pool = _POOL.get()
    if pool is None or len(items) < 2:
        return [call(item) for item in items]
    return list(pool.map(call, items))
