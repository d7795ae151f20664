"""Leading eigenpairs of symmetric matrices, with a certificate."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from hf_tsv.linalg import iterative, lanczos, lapack, products
from hf_tsv.linalg.lapack import NotConvergedError

EIGEN_CERTIFICATE = 1e-10
"""Largest residual of eigenpairs, relative to the largest eigenvalue, and loss of orthogonality.

Not that of singular triplets: where an eigenvalue is divided by, what is lost counts squared."""

TILE = 128  # rows and columns that are mirrored at a time


@dataclass(frozen=True)
class Scaled:
    """A matrix `a` (m, n), m >= n, of entries up to 1, its floor, and what to undo afterwards."""

    a: Tensor
    floor: float
    scale: float
    wide: bool


@dataclass(frozen=True)
class Eigen:
    """Eigenvalues (r,), descending, eigenvectors as rows (r, n), and maybe all eigenvalues (n,)."""

    values: Tensor
    vectors: Tensor
    all_values: Tensor | None = None


def leading_eighs(items: Sequence[Scaled], rank: int, spectrum: bool) -> Sequence[Eigen | None]:
    """Leading eigenvectors of the Gram matrix of each, as from [`leading_eigh`]."""
    rank = min(rank, items[0].a.shape[1])
    if not products.by_products(items[0].a):
        return [leading_eigh(item.a, rank, item.floor, spectrum) for item in items]
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
        Eigen(*pair, all_values) if ok else None
        for pair, ok, all_values in zip(found, proved, every, strict=True)
    ]


def leading_eigh(a: Tensor, rank: int, floor: float = 0.0, spectrum: bool = False) -> Eigen | None:
    """The `rank` largest eigenvalues of aᵀa and their eigenvectors; None where that is no use.

    `a` has the shape (m, n). Singular values up to `floor` are not wanted; `spectrum` finds all
    eigenvalues too.
    """
    if a.dtype != torch.float64 or not a.numel():
        return None
    gram = gram_matrix(a)
    try:
        if a.device.type != "cpu":
            values, vectors = torch.linalg.eigh(gram)
            values, vectors = values.flip(0), vectors.mT.flip(0)
            return Eigen(values[:rank], vectors[:rank], values)
        if rank == a.shape[1]:
            return _full_eigh(gram)
        found = None if spectrum else lanczos.leading_eigh(gram, rank, floor**2)
        return Eigen(*(found or lapack.leading_eigh(gram, rank, spectrum=spectrum)))
    except (NotConvergedError, LinAlgError):
        return None


def _full_eigh(upper: Tensor) -> Eigen:
    """All eigenvalues of a symmetric matrix, given by its upper triangle, and eigenvectors."""
    n = upper.shape[0]
    if 1 + 6 * n + 2 * n * n >= 2**31:
        raise NotConvergedError(f"{n} rows are more than 32-bit sizes allow")
    values, vectors = torch.linalg.eigh(upper, UPLO="U")
    return Eigen(values.flip(0), vectors.mT.flip(0), values.flip(0))


def largest_eigen(gram: Tensor, count: Callable[[Tensor], int]) -> tuple[Eigen, bool]:
    """The largest eigenvalues of a symmetric matrix, as many as a function of all of them says.

    Pairs that do not fit the matrix are computed again by another routine.

    Args:
        gram (`Tensor`): positive semidefinite, shape (n, n), float64, with both triangles; on the
            CPU a triangle is overwritten meanwhile.
        count (`Callable`): given all eigenvalues, descending.

    Returns:
        The pairs, and whether they took the other routine.

    Raises:
        [`NotConvergedError`]: no routine finds them.
    """
    ways = [_by_torch] if gram.device.type != "cpu" else [_by_tridiagonal_form, _by_torch]
    for i, way in enumerate(ways):
        try:
            found = way(gram, count)
        except (NotConvergedError, LinAlgError):
            continue
        if _are_eigenpairs(gram, found):
            return found, i > 0
    raise NotConvergedError("no solver converges")


def _by_tridiagonal_form(gram: Tensor, count: Callable[[Tensor], int]) -> Eigen:
    diagonal = gram.diagonal().clone()
    try:
        return Eigen(*lapack.leading_eigh(gram, count))
    finally:  # of its triangles, LAPACK has left the lower one as it was
        _mirror(gram.mT)
        gram.diagonal().copy_(diagonal)


def _by_torch(gram: Tensor, count: Callable[[Tensor], int]) -> Eigen:
    values, vectors = torch.linalg.eigh(gram)
    every = values.flip(0)
    kept = count(every)
    return Eigen(every[:kept], vectors[:, len(every) - kept :].flip(1).mT.contiguous(), every)


def _are_eigenpairs(gram: Tensor, found: Eigen) -> bool:
    """Whether pairs fit the matrix and are orthonormal, estimated on a few vectors."""
    if not found.values.numel():
        return True
    probes = products.probe_vectors(found.vectors.mT)
    mixed = probes @ found.vectors
    residual = mixed @ gram - (probes * found.values) @ found.vectors
    loss = mixed @ found.vectors.mT - probes
    scale = max(float(found.values[0]), torch.finfo(gram.dtype).tiny)
    worst = max(float(residual.norm()) / scale, float(loss.norm()))
    return worst <= EIGEN_CERTIFICATE * math.sqrt(products.PROBES)


def gram_matrix(a: Tensor) -> Tensor:
    """aᵀa; on the CPU its upper triangle."""
    return lapack.gram(a) if a.device.type == "cpu" else a.mT @ a


def symmetric(gram: Tensor) -> Tensor:
    """A Gram matrix from [`gram_matrix`] with its lower triangle filled in, in the same memory."""
    if gram.device.type == "cpu":
        _mirror(gram)
    return gram


def _mirror(upper: Tensor) -> None:
    """Copy the upper triangle of a matrix into its lower one."""
    n = upper.shape[0]
    for start in range(0, n, TILE):
        stop = min(start + TILE, n)
        corner = upper[start:stop, start:stop]
        corner.copy_(corner.triu() + corner.triu(1).mT)
        upper[stop:, start:stop] = upper[start:stop, stop:].mT
