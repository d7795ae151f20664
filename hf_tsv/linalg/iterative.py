"""Eigenvectors and polar factors by matrix products, for devices on which LAPACK's ways are slow.

The eigensolvers of GPUs wait for one small kernel after another; products run at full speed, many
matrices at a time. All of it is float64: what is found is as accurate as what LAPACK finds.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_tsv.linalg import lanczos

# Largest residual of a singular triplet, relative to the largest singular value, to stop at;
# factor by which the residual of a Ritz vector may exceed the largest one of the columns it
# combines; residual of an eigenvector, relative to the largest eigenvalue, that is only rounding.
TOLERANCE, SLACK, ROUNDING = 1e-11, 10.0, 8 * torch.finfo(torch.float64).eps

# Largest ratio by which one filter may amplify the leading over the last wanted direction. After
# the first sweep the columns are sorted, later columns hold almost nothing of the leading
# directions, and Cholesky's method can still separate them at 1e10; the unsorted block only at 1e5.
FIRST_GROWTH, GROWTH = 1e5, 1e10

# Smallest pivot of Cholesky's method on columns of norm 1 that is accepted: under about 1e-8 two
# passes would not make them orthonormal.
SMALLEST_PIVOT = 1e-6

# Largest degree of a filter; number of filters until a matrix is left to the eigensolver, of which
# a power law takes 6 to 11.
DEGREE, SWEEPS = 20, 32


def leading_eigh(grams: Tensor, count: int, floors: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalues of several matrices and their eigenvectors.

    Subspace iteration with Chebyshev filters: a polynomial of the matrix damps what lies under the
    smallest Rayleigh quotient of the block and amplifies the rest. Cholesky's method keeps columns
    in descending order, so only the last block is diagonalised. Source: Zhou, Saad, Tiago and
    Chelikowsky, "Self-consistent-field calculations using Chebyshev-filtered subspace iteration"
    (2006).

    The matrices (T, n, n) are float64, symmetric and positive semi-definite. Eigenvalues up to the
    squares of `floors` (T,) are not wanted, and may come with vectors that are none. The result is
    eigenvalues, descending (T, count), and eigenvectors as rows (T, count, n).
    """
    width = count + max(8, count // 2)
    if 2 * width > grams.shape[1]:
        return _eigh(grams, count)
    values = grams.new_empty(len(grams), count)
    vectors = grams.new_empty(len(grams), count, grams.shape[1])
    todo = torch.arange(len(grams), device=grams.device)
    same = torch.Generator().manual_seed(0)  # in every run
    start = torch.randn(grams.shape[1], width, generator=same, dtype=torch.float64)
    block = _orthonormal(grams @ start.to(grams.device))
    for sweep in range(SWEEPS):
        image = grams @ block
        core = block.mT @ image
        rest = image - block @ core
        ritz = core.diagonal(dim1=1, dim2=2)
        excess = _excess(ritz, rest.norm(dim=1), floors, count)
        near = (excess <= 1).nonzero()[:, 0]
        if len(near):
            found, mix = torch.linalg.eigh(core[near])
            found, mix = found.flip(1), mix.flip(2)
            residuals = (rest[near] @ mix).norm(dim=1)
            # Places rather than masks, for which the CPU would wait each time.
            settled = (_excess(found, residuals, floors[near], count) <= SLACK).nonzero()[:, 0]
            done = near[settled]
            values[todo[done]] = found[settled][:, :count]
            vectors[todo[done]] = (block[done] @ mix[settled][:, :, :count]).mT
            left = torch.ones_like(todo).index_fill(0, done, 0).nonzero()[:, 0]
            todo, grams, floors, excess = todo[left], grams[left], floors[left], excess[left]
            block, image, ritz = block[left], image[left], ritz[left]
            if not len(todo):
                return values, vectors
        block = _filtered(grams, block, image, ritz, excess, count, sweep == 0)
    values[todo], vectors[todo] = _eigh(grams, count)
    return values, vectors


def nothing_missed(grams: Tensor, values: Tensor, vectors: Tensor, floors: Tensor) -> Tensor:
    """Whether matrices have no other eigenvalues above the last of these and above their floors.

    Cholesky's method shows it, as in [`hf_tsv.linalg.lanczos`]. The shapes are those of
    [`leading_eigh`]; the result has the shape (T,).
    """
    wanted = values > floors[:, None] ** 2
    bounds = torch.where(wanted.all(1), values[:, -1], floors**2) * (1 + lanczos.MARGIN)
    weights = (2 * values.clamp_min(0)).sqrt()[:, :, None]
    weighted = torch.where(wanted[:, :, None], vectors, 0) * weights
    rest = weighted.mT @ weighted - grams
    rest.diagonal(dim1=1, dim2=2).add_(bounds[:, None] + torch.finfo(bounds.dtype).tiny)
    proved: Tensor = torch.linalg.cholesky_ex(rest).info == 0
    return proved


def polar_parts(a: Tensor, smallest: float) -> tuple[Tensor, Tensor] | None:
    """Polar factor of a matrix, as a product of two with orthonormal columns.

    Cholesky's method, twice, gives Q R; Newton–Schulz steps give the polar factor of R. Each step
    is stretched so that it brings the interval of singular values as near to 1 as a cubic can,
    hence their number depends on `smallest` only. Nothing is lost to squaring: a condition of 1e5
    costs 1e-11. Source: Chen and Chow, "A stable scaling of Newton-Schulz for improving the sign
    function computation of a Hermitian matrix" (2014).

    `a` is float64, (m, n), m >= n. The result is Q (m, n) and the polar factor of R (n, n); None
    where a ratio of eigenvalues of aᵀa may be less than `smallest`.
    """
    gram = a.mT @ a
    bound = (gram @ gram).norm().sqrt()  # on the largest eigenvalue
    shift = smallest * bound * torch.eye(len(gram), dtype=a.dtype, device=a.device)
    if torch.linalg.cholesky_ex(gram - shift).info.item():
        return None
    lower = torch.linalg.cholesky_ex(gram).L
    Q = _divided(a, lower)
    again = torch.linalg.cholesky_ex(Q.mT @ Q).L
    Q = _divided(Q, again)
    X = again.mT @ lower.mT / bound.sqrt()
    low = math.sqrt(smallest)  # singular values of X lie in [low, 1]
    while True:
        stretch = math.sqrt(3 / (1 + low + low**2))
        X = torch.addmm(X, X, X.mT @ X, beta=1.5 * stretch, alpha=-0.5 * stretch**3)
        if 1 - low < 1e-8:  # and its square is rounding
            return Q, X
        low *= 1.5 * stretch - 0.5 * stretch**3 * low**2


def _eigh(grams: Tensor, count: int) -> tuple[Tensor, Tensor]:
    values, vectors = torch.linalg.eigh(grams)
    return values.flip(1)[:, :count], vectors.mT.flip(1)[:, :count]


def _excess(values: Tensor, residuals: Tensor, floors: Tensor, count: int) -> Tensor:
    """Largest residual of the `count` leading vectors, as a multiple of what is allowed (T,).

    `values` are their Rayleigh quotients (T, p), `residuals` are norms (T, p), `floors` (T,).
    """
    largest = values.amax(1, keepdim=True)
    allowed = TOLERANCE * (largest * values.clamp_min(0)).sqrt()
    allowed = torch.maximum(allowed, ROUNDING * largest)
    unwanted = values + residuals <= floors[:, None] ** 2
    excess = residuals / allowed.clamp_min(torch.finfo(values.dtype).tiny)
    return excess.masked_fill(unwanted, 0)[:, :count].amax(1)


def _filtered(
    grams: Tensor,
    block: Tensor,
    image: Tensor,
    ritz: Tensor,
    excess: Tensor,
    count: int,
    first: bool,
) -> Tensor:
    """Orthonormal basis of a Chebyshev polynomial of matrices times their blocks.

    The matrices have the shape (T, n, n), `block` and `image` (grams · block) (T, n, p), the
    Rayleigh quotients `ritz` of the columns (T, p), and `excess`, the distance of each matrix from
    being settled, (T,). At `first` the columns are not in order yet.
    """
    largest, end = ritz.amax(1), ritz.amin(1)
    end = torch.maximum(end, torch.finfo(end.dtype).eps * largest)  # of what is damped
    tops, wanted = (2 * q / end - 1 for q in (largest, ritz[:, count - 1]))
    allowed = math.log(2 * (FIRST_GROWTH if first else GROWTH)) / _rate(tops)
    needed = (2 * excess).log() / _rate(wanted)
    degree = int(torch.minimum(allowed.amin().floor(), needed.amax().ceil()).clamp(1, DEGREE))
    scale = (2 / end)[:, None, None]
    before, block = block, scale * image - block
    for _ in range(degree - 1):
        before, block = block, 2 * scale * (grams @ block) - 2 * block - before
    return _orthonormal(block)


def _rate(x: Tensor) -> Tensor:
    """Logarithm of the factor by which a degree more multiplies a Chebyshev polynomial at x > 1."""
    return x.clamp_min(1 + 1e-3).acosh()


def _orthonormal(block: Tensor) -> Tensor:
    """Orthonormal bases of matrices (T, n, p), by Cholesky's method twice or else Householder's."""
    block = block / block.norm(dim=1, keepdim=True).clamp_min(torch.finfo(block.dtype).tiny)
    lower, failed = torch.linalg.cholesky_ex(block.mT @ block)
    pivots = lower.diagonal(dim1=1, dim2=2).amin(1)
    dependent = ((failed > 0) | ~(pivots > SMALLEST_PIVOT)).nonzero()[:, 0]
    basis = _divided(block, lower)
    if len(dependent):
        basis[dependent] = torch.linalg.qr(block[dependent]).Q
    return _divided(basis, torch.linalg.cholesky_ex(basis.mT @ basis).L)


def _divided(block: Tensor, lower: Tensor) -> Tensor:
    """block · lower⁻ᵀ."""
    quotient: Tensor = torch.linalg.solve_triangular(lower.mT, block, upper=True, left=False)
    return quotient
