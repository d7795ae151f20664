"""Decompositions and products of a weight: tensors in, tensors out, whatever the device.

Singular vectors come from the eigenvectors of a Gram matrix of the shorter side, in float64:
squaring singular values in float32 loses the trailing half of them. Every result is checked
afterwards; what fails is computed again by a full float64 SVD. `exact` does only that.

On the CPU tasks are decomposed side by side, one thread each, which makes the bits independent of
the number of threads. On other devices those of one shape are decomposed in one batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_tsv import iterative, lanczos, lapack
from hf_tsv.memory import empty

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

POLAR_CERTIFICATE = 1e-5
"""Largest loss of orthonormality of a polar factor, Frobenius norm, that is accepted.

The merged update is wrong by 0.005 to 0.14 of it, measured on related tasks of many conditions.
"""

SMALLEST_EIGENVALUE = 10 * RANK_TOLERANCE**2
"""Of a Gram matrix, relative to its largest: below it null directions may begin."""

SMALLEST_SQUARE = 1e-12
"""Of a singular value, relative to the squared norm: below it a Gram matrix holds rounding."""

PROBES = 8
"""Vectors that it is estimated with."""

BATCH = 1 << 26
"""Entries of the matrices decomposed at a time, 0.5 GB; eigenvectors take several times that."""

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
    """

    U: Tensor
    S: Tensor
    Vh: Tensor
    exact: bool


@dataclass(frozen=True)
class OrthogonalProduct:
    """polar(U) diag(S) polar(Vh).

    Args:
        matrix (`Tensor`): shape (m, n).
        null_directions (`int`): left out of a polar factor because they are not independent.
        exact (`int`): polar factors, of two, from a full float64 SVD.
    """

    matrix: Tensor
    null_directions: int
    exact: int


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
    matrices: Sequence[Tensor], rank: int, floors: Sequence[float], precision: Precision = "fast"
) -> list[SVD]:
    """Leading singular triplets of several matrices.

    Args:
        matrices (`Sequence[Tensor]`): shape (m, n) each.
        rank (`int`): how many triplets at most.
        floors (`Sequence[float]`): singular values up to this are numerically zero and dropped.
        precision (`str`): `"exact"`: by a full float64 SVD, always.
    """
    items = list(zip(matrices, floors, strict=True))
    found = _each(lambda batch: _svds(batch, rank, precision), _batches(items))
    return [svd for batch in found for svd in batch]


def truncated_svd(
    matrix: Tensor, rank: int, floor: float = 0.0, precision: Precision = "fast"
) -> SVD:
    """Leading singular triplets of one matrix; see [`truncated_svds`]."""
    return truncated_svds([matrix], rank, [floor], precision)[0]


def numerical_rank(matrix: Tensor, floor: float) -> int:
    """How many singular values of a matrix are above a floor.

    Args:
        matrix (`Tensor`): shape (m, n).
        floor (`float`): in the units of the matrix.
    """
    item = _scaled(matrix, floor)
    norm = float(item.a.norm())
    if item.a.dtype == torch.float64 and item.floor**2 > SMALLEST_SQUARE * norm**2:
        gram = _symmetric(_gram(item.a))
        gram.diagonal().sub_(item.floor**2)
        return _positive(gram)
    return int((torch.linalg.svdvals(item.a) > item.floor).sum())


def _positive(matrix: Tensor) -> int:
    """Number of positive eigenvalues of a symmetric matrix, those of D in L D Lᵀ (Sylvester)."""
    factor, pivots, info = torch.linalg.ldl_factor_ex(matrix)
    if info.item():
        return int((torch.linalg.eigvalsh(matrix) > 0).sum())
    single = pivots > 0  # the others are rows of 2 × 2 blocks, one eigenvalue of each sign
    return int((factor.diagonal()[single] > 0).sum()) + int((~single).sum()) // 2


def orthogonal_product(
    U: Tensor,
    S: Tensor,
    Vh: Tensor,
    precision: Precision = "fast",
    solver: Orthogonalizer = "procrustes",
) -> OrthogonalProduct:
    """polar(U) diag(S) polar(Vh): the factors replaced by the nearest orthonormal ones (eq. 6).

    Args:
        U (`Tensor`): shape (m, q).
        S (`Tensor`): shape (q,).
        Vh (`Tensor`): shape (q, n).
        precision (`str`): `"fast"`: as U (UᵀU)^(−1/2), never formed; `"exact"`: see `solver`.
        solver (`str`): how polar factors are computed where `fast` does not do it: `"procrustes"`,
            by an SVD, or `"whitening"`, U (UᵀU)^(−1/2) where that is accurate enough.
    """
    left, right = _each(lambda X: _polar(X, precision, solver), [U, Vh.mT])
    factors = [*left.factors[:-1], left.factors[-1] * S, *(f.mT for f in reversed(right.factors))]
    null_directions = max(left.null_directions, right.null_directions)
    return OrthogonalProduct(_chain(factors), null_directions, left.exact + right.exact)


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
    eigenvalues, Q = torch.linalg.eigh(a.mT @ a)
    smallest = WHITENING_LOSS * torch.finfo(a.dtype).eps * eigenvalues[-1:]
    if not (eigenvalues > smallest).all():
        return polar_factor(matrix, tolerance)
    factor = a @ (Q * eigenvalues.rsqrt()) @ Q.mT
    return (factor.mT if wide else factor), 0


def largest_entry(matrix: Tensor) -> float:
    """Largest absolute value of a matrix that has entries; NaN or Inf if it has one."""
    low, high = torch.aminmax(matrix)
    return float(torch.maximum(-low, high))


def norms(matrix: Tensor, *, overwrite: bool = False) -> tuple[float, float, float]:
    """Frobenius norm, and the largest norms of a row and of a column.

    Args:
        matrix (`Tensor`): shape (m, n), float32 or float64.
        overwrite (`bool`): use its memory for the work.
    """
    scale = (largest_entry(matrix) if matrix.numel() else 0.0) or 1.0
    a = matrix if overwrite else empty(*matrix.shape, dtype=matrix.dtype, device=matrix.device)
    torch.div(matrix, scale, out=a)
    if a.device.type == "cpu":  # torch takes twenty times as long for the columns
        n = a.numpy()
        rows, columns = (torch.from_numpy(np.einsum(f"ij,ij->{kept}", n, n)) for kept in "ij")
    else:
        rows, columns = a.square().sum(dim=1), a.square_().sum(dim=0)
    zero = rows.new_zeros(1)
    squares = rows.double().sum(), torch.cat([rows, zero]).max(), torch.cat([columns, zero]).max()
    whole, row, column = (scale * math.sqrt(s) for s in squares)
    return whole, row, column


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
    scale = 2.0 ** (math.frexp(largest)[1] if largest else 0)
    if matrix.device.type == "cpu":
        a = empty(*matrix.shape, dtype=torch.float64).copy_(matrix).mul_(1 / scale)
    else:
        a = in_working_precision(matrix) / scale
    floor = max(floor / scale, torch.finfo(a.dtype).eps * max(a.shape) * float(a.norm()))
    wide = a.shape[0] < a.shape[1]  # LAPACK takes about twice as long for a wide matrix
    return _Scaled(a.mT if wide else a, floor, scale, wide)


def _svds(batch: Sequence[tuple[Tensor, float]], rank: int, precision: Precision) -> list[SVD]:
    items = [_scaled(matrix, floor) for matrix, floor in batch]
    eigen = _leading_eighs(items, rank) if precision == "fast" else [None] * len(items)
    return [_svd(item, rank, found) for item, found in zip(items, eigen, strict=True)]


def _svd(item: _Scaled, rank: int, eigen: tuple[Tensor, Tensor] | None) -> SVD:
    found = _gram_svd(item.a, item.floor, *eigen) if eigen else None
    U, S, Vh = found or _full_svd(item.a, rank, item.floor)
    if item.wide:
        U, Vh = Vh.mT, U.mT
    return SVD(U, S * item.scale, Vh, exact=found is None)


def _full_svd(a: Tensor, rank: int, floor: float) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = torch.linalg.svd(a, full_matrices=False)
    r = min(rank, int((floor < S).sum()))
    # Clones, so that the untruncated factors can be freed.
    return U[:, :r].clone(), S[:r].clone(), Vh[:r].clone()


def _gram_svd(
    a: Tensor, floor: float, values: Tensor, Vh: Tensor
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Triplets of a (m, n), m >= n, from the eigenvectors of aᵀa; None if they fail the check."""
    S = values.clamp_min(0).sqrt()
    r = int((floor < S).sum())
    S, Vh = S[:r].clone(), Vh[:r].clone()
    U = _product(a, Vh.mT) / S
    residual = _product(U.mT, a) - S[:, None] * Vh
    residual = residual.norm(dim=1).amax() / S[0] if r else S.sum()
    loss = torch.maximum(*(_skewness(W) for W in (U.mT, Vh))) if r else S.sum()
    return (U, S, Vh) if bool(torch.maximum(residual, loss) < CERTIFICATE) else None


def _skewness(rows: Tensor) -> Tensor:
    """Largest entry of W Wᵀ − I."""
    gram = _product(rows, rows.mT)
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
    values, vectors = found
    if not values[-1] > SMALLEST_EIGENVALUE * values[0]:
        return None
    root = _symmetric(_gram(vectors * values[:, None] ** -0.25))
    return root if _loss(a, root) < POLAR_CERTIFICATE else None


def _leading_eighs(items: Sequence[_Scaled], rank: int) -> Sequence[tuple[Tensor, Tensor] | None]:
    """What [`_leading_eigh`] finds of each."""
    count = min(rank, items[0].a.shape[1])
    if not _by_products(items[0].a):
        return [_leading_eigh(item.a, count, item.floor) for item in items]
    grams = torch.stack([item.a.mT @ item.a for item in items])
    floors = torch.tensor([item.floor for item in items], dtype=grams.dtype, device=grams.device)
    try:
        values, vectors = iterative.leading_eigh(grams, count, floors)
    except LinAlgError:
        return [None] * len(items)
    proved = iterative.nothing_missed(grams, values, vectors, floors).tolist()
    found = zip(values, vectors, strict=True)
    return [pair if ok else None for pair, ok in zip(found, proved, strict=True)]


def _loss(a: Tensor, root: Tensor) -> float:
    """‖rootᵀ aᵀ a root − I‖, Frobenius, estimated on a few vectors."""
    n = a.shape[1]
    signs = torch.linspace(0, 1e4, n * PROBES, dtype=a.dtype, device=a.device).sin().sign()
    probes = signs.reshape(n, PROBES)
    white = a @ (root @ probes)
    return float((root.mT @ (a.mT @ white) - probes).norm() / PROBES**0.5)


def _leading_eigh(a: Tensor, count: int, floor: float = 0.0) -> tuple[Tensor, Tensor] | None:
    """Largest eigenvalues of aᵀa, descending, eigenvectors as rows; None where that is no use.

    Args:
        a (`Tensor`): shape (m, n).
        count (`int`): how many at most.
        floor (`float`): singular values up to this are not wanted.
    """
    if a.dtype != torch.float64 or not a.numel():
        return None
    gram = _gram(a)
    try:
        if a.device.type != "cpu":
            values, vectors = torch.linalg.eigh(gram)
            return values.flip(0)[:count], vectors.mT.flip(0)[:count]
        if count < a.shape[1]:
            found = lanczos.leading_eigh(gram, count, floor**2)
            return found or lapack.leading_eigh(gram, count)
        values, vectors = lapack.eigh(gram)
        return values.flip(0), vectors.flip(0)
    except (lapack.NotConvergedError, LinAlgError):
        return None


def _gram(a: Tensor) -> Tensor:
    """aᵀa; on the CPU its upper triangle."""
    return lapack.gram(a) if a.device.type == "cpu" else a.mT @ a


def _symmetric(gram: Tensor) -> Tensor:
    return gram.triu() + gram.triu(1).mT if gram.device.type == "cpu" else gram


def _chain(factors: Sequence[Tensor]) -> Tensor:
    """Their product, multiplied in the order that takes fewest operations."""
    factors = list(factors)
    while len(factors) > 1:
        # greedy is optimal where it matters: few factors, one inner size
        costs = [a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairwise(factors)]
        i = costs.index(min(costs))
        factors[i : i + 2] = [_product(factors[i], factors[i + 1])]
    return factors[0]


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b, on the CPU by columns in several threads."""
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
