"""Leading eigenvectors of a Gram matrix where few are wanted: Lanczos' method, and a proof.

Fourteen tasks or more keep so few triplets of each that bringing the whole matrix to tridiagonal
form, which waits for memory, takes most of the time. A Krylov space a few times as large as what is
wanted holds it to the last digit.
"""

from __future__ import annotations

import ctypes
import math

import numpy as np
import torch
from torch import Tensor

from hf_tsv.linalg import lapack
from hf_tsv.linalg.lapack import Vector, prepared

# Least ratio of the size to the number of eigenvectors for which Lanczos' method is used: above
# n / 12 eigenvectors the tridiagonal form is faster.
FEW = 12

# Convergence is tested after 2 · count + 20 steps and then after 1.06 times as many each time, up
# to 0.4 n steps, where the method gives up.
FIRST, MORE, GROWTH, MOST = 2, 20, 1.06, 0.4

# Largest residual of an eigenvector that is accepted, relative to the geometric mean of its
# eigenvalue and the largest.
TOLERANCE = 1e-10

# Share by which an eigenvalue that was missed may be larger than the last one found.
MARGIN = 1e-6

QUICK = 1 << 16  # entries of the basis that are read within ten microseconds

# Largest rest of a step, relative to the largest eigenvalue, that is taken for nothing: the space
# holds all eigenvectors then that the start has a share in.
EXHAUSTED = 1e-14


def leading_eigh(upper: Tensor, count: int, floor: float) -> tuple[Tensor, Tensor] | None:
    """The largest eigenvalues of a positive semi-definite matrix and their eigenvectors.

    Every step is orthogonalised against the whole basis, and the start is the same in every run.
    Cholesky's method proves that no larger eigenvalue was missed: without what was found, the
    matrix is less than the smallest of them. Source: Parlett, "The Symmetric Eigenvalue Problem"
    (1998), chapter 13.

    The upper triangle of the matrix (n, n) counts, and eigenvalues up to `floor` are not wanted.
    The result is at most `count` eigenvalues, descending (r,), and eigenvectors as rows (r, n);
    None where the method is not the way, or fails.
    """
    n = upper.shape[0]
    steps, most = FIRST * count + MORE, int(MOST * n)
    if not 0 < FEW * count <= n or steps > most:
        return None
    basis = np.empty((most + 1, n))
    start = np.random.default_rng(0).standard_normal(n)
    basis[0] = start / np.linalg.norm(start)
    diagonal, beside = np.zeros(most), np.zeros(most)
    done = 0
    while True:
        exhausted = _extend(upper, basis, diagonal, beside, done, steps)
        done = steps if exhausted is None else exhausted
        wanted = min(count, done)
        values, mix = lapack.tridiagonal_eigh(diagonal[:done], beside[: done - 1], wanted)
        found = int((values > floor).sum())
        if not found:
            return None
        residuals = beside[done - 1] * np.abs(mix[:found, -1])
        if (residuals <= TOLERANCE * np.sqrt(values[0] * values[:found])).all():
            break
        if exhausted is not None or done == most:
            return None
        steps = min(most, int(GROWTH * done))
    largest, vectors = torch.tensor(values[:found]), torch.from_numpy(mix[:found] @ basis[:done])
    bound = float(values[-1]) if found == count else floor
    return (largest, vectors) if _rest_is_less(upper, largest, vectors, bound) else None


def _extend(
    upper: Tensor, basis: Vector, diagonal: Vector, beside: Vector, done: int, steps: int
) -> int | None:
    """Take Lanczos steps `done` to `steps`; return the step after which nothing was left, if any.

    Quick calls keep the interpreter lock: with NumPy's calls two threads took three times as long
    as one.
    """
    n, width = basis.shape[1], basis.strides[0]
    first, last, next_ = (ctypes.c_void_p() for _ in range(3))
    rows, factor = ctypes.c_int(), ctypes.c_double()
    found = np.zeros(len(basis))
    into = ctypes.c_void_p(found.ctypes.data)
    multiply = prepared("dsymv", "L", n, 1.0, upper, upper.stride(0), last, 1, 0.0, next_, 1)
    square = prepared("dgemv", "T", n, 1, 1.0, next_, n, next_, 1, 0.0, into, 1, quick=True)
    scale = prepared("dscal", n, factor, next_, 1, quick=True)
    slow, quick = (
        (
            prepared("dgemv", "T", n, rows, 1.0, first, n, next_, 1, 0.0, into, 1, quick=kept),
            prepared("dgemv", "N", n, rows, -1.0, first, n, into, 1, 1.0, next_, 1, quick=kept),
        )
        for kept in (False, True)
    )
    for k in range(done, steps):
        last.value = basis.ctypes.data + k * width
        next_.value = last.value + width
        multiply()
        first.value, rows.value = last.value, 1
        if k:  # the two that it is made of, then what rounding left of all
            first.value, rows.value = last.value - width, 2
        project, subtract = quick
        project()
        diagonal[k] = found[rows.value - 1]
        subtract()
        first.value, rows.value = basis.ctypes.data, k + 1
        project, subtract = quick if (k + 1) * n < QUICK else slow
        project()
        subtract()
        square()
        beside[k] = math.sqrt(found[0])
        if not beside[k] > EXHAUSTED * diagonal[: k + 1].max():
            return k + 1
        factor.value = 1 / beside[k]
        scale()
    return None


def _rest_is_less(upper: Tensor, values: Tensor, vectors: Tensor, bound: float) -> bool:
    """Whether a matrix has no other eigenvalue above a bound.

    These are moved to their negatives rather than to zero, so that what is left of their residuals
    counts in second order only.
    """
    rest = lapack.gram(vectors * (2 * values[:, None]).sqrt()).sub_(upper)
    rest.diagonal().add_(bound * (1 + MARGIN))
    return lapack.is_positive_definite(rest)
