"""Symmetric routines of SciPy's LAPACK and BLAS that torch does not offer.

They are called through the function pointers that SciPy publishes for Cython, with ctypes, which
lets go of the interpreter lock: SciPy's own wrappers hold it, so that threads would wait for one
another. All matrices are float64, on the CPU; a symmetric one (n, n) is given by its upper triangle
and overwritten. A routine that fails raises [`NotConvergedError`].
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_tsv.system.memory import empty

Vector = NDArray[np.float64]

BLOCK = 64  # block size that workspaces are made for; LAPACK uses what fits

# A row whose length is a multiple of 512 doubles (one page) is padded by 24: otherwise rows map to
# the same cache sets, and `dsytrd` takes 10 % longer.
PAGE, PADDING = 512, 24

# Ratio of the size of a tridiagonal matrix to the number of wanted eigenpairs below which it is
# faster to find all eigenvalues than to bisect for the wanted ones.
MANY = 13

# What LAPACK's `dstemr` gives its two halves: relative precisions of bounds, and the least gap of
# eigenvalues, relative to them, that separates their vectors.
EPS = float(np.finfo(float).eps)
PRECISIONS = (math.sqrt(EPS), 5e-3 * math.sqrt(EPS))
LEAST_GAP = 1e-3


class NotConvergedError(ArithmeticError):
    """A decomposition gave up; `place` is the index of the matrix, where there were several."""

    def __init__(self, reason: str, place: int | None = None) -> None:
        super().__init__(reason)
        self.place = place


@functools.cache
def _routine(name: str, arguments: int, quick: bool) -> Callable[..., None]:
    from scipy.linalg import cython_blas, cython_lapack

    api = ctypes.pythonapi
    api.PyCapsule_GetName.restype = ctypes.c_char_p
    api.PyCapsule_GetName.argtypes = [ctypes.py_object]
    api.PyCapsule_GetPointer.restype = ctypes.c_void_p
    api.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]
    modules: tuple[ModuleType, ...] = (cython_lapack, cython_blas)
    capsule = next(m.__pyx_capi__[name] for m in modules if name in m.__pyx_capi__)
    signature = api.PyCapsule_GetName(capsule)
    if signature.count(b",") + 1 != arguments or b"int *" not in signature:
        raise ImportError(f"SciPy's {name} is not the one known here: {signature.decode()}")
    address = api.PyCapsule_GetPointer(capsule, signature)
    kind = ctypes.PYFUNCTYPE if quick else ctypes.CFUNCTYPE
    return kind(None, *[ctypes.c_void_p] * arguments)(address)


def prepared(name: str, *arguments: Any, quick: bool = False) -> Callable[[], None]:
    """A call of a Fortran routine to make many times: everything by reference.

    Arguments are strings of one character, numbers and tensors; or objects of ctypes, whose values
    can be changed between the calls, a `c_void_p` for an array. A quick call keeps the interpreter
    lock: letting go of it and getting it back from another thread takes ten microseconds.
    """
    held = [
        ctypes.c_char(a.encode()) if isinstance(a, str)
        else ctypes.c_int(a) if isinstance(a, int)
        else ctypes.c_double(a) if isinstance(a, float)
        else a
        for a in arguments
    ]  # fmt: skip
    references = [
        a.data_ptr() if isinstance(a, Tensor)
        else a if isinstance(a, ctypes.c_void_p)
        else ctypes.byref(a)
        for a in held
    ]  # fmt: skip
    routine = _routine(name, len(arguments), quick)
    return lambda held=held: routine(*references)  # type: ignore[misc]


def _call(name: str, *arguments: Any) -> None:
    """Call a Fortran routine once."""
    prepared(name, *arguments)()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep BLAS and LAPACK of NumPy and SciPy from starting threads while callers use their own."""
    from scipy.linalg import cython_blas, cython_lapack  # noqa: F401  (only what is loaded is held)
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


def gram(a: Tensor) -> Tensor:
    """aᵀ a of a (m, n), contiguous or transposed, in the upper triangle; the rest is anything."""
    m, n = a.shape
    result = room(n)
    if a.is_contiguous():
        _call("dsyrk", "L", "N", n, m, 1.0, a, n, 0.0, result, result.stride(0))
    else:
        a = a.mT.contiguous()
        _call("dsyrk", "L", "T", n, m, 1.0, a, m, 0.0, result, result.stride(0))
    return result


def room(n: int) -> Tensor:
    """Memory for a symmetric matrix (n, n), with rows of the length that is best for it."""
    return _doubles(n, n + (PADDING if n % PAGE == 0 else 0))[:, :n]


def is_positive_definite(upper: Tensor) -> bool:
    """Whether all eigenvalues of a symmetric matrix are positive, by Cholesky's method."""
    n, info = upper.shape[0], ctypes.c_int(0)
    _call("dpotrf", "L", n, upper, upper.stride(0), info)
    return info.value == 0


def tridiagonal_eigh(diagonal: Vector, beside: Vector, count: int) -> tuple[Vector, Vector]:
    """The `count` largest eigenvalues of a symmetric tridiagonal matrix and their eigenvectors.

    The diagonal has the shape (n,), the one beside it (n − 1,). Eigenvalues descend (count,);
    eigenvectors are rows (count, n).
    """
    padded = np.append(beside, 0.0)
    values, vectors, _ = _tridiagonal(torch.tensor(diagonal), torch.tensor(padded), count)
    return values.flip(0).numpy(), vectors.flip(0).numpy()


Count = int | Callable[[Tensor], int]
"""Number of wanted eigenvalues, or a function of all of them, descending, that tells it."""

Found = tuple[Tensor, Tensor, Tensor | None]
"""Largest eigenvalues, ascending, eigenvectors as rows, and maybe all eigenvalues, descending."""


def _tridiagonal(
    diagonal: Tensor, beside: Tensor, count: Count, *, spectrum: bool = False
) -> Found:
    """Eigenpairs of a tridiagonal matrix; all eigenvalues if the spectrum is asked for.

    Both arguments may be overwritten; the last entry of the second counts for nothing.
    """
    alone = isinstance(count, int) and not spectrum
    if not isinstance(count, int) or spectrum or MANY * count > diagonal.numel():
        with suppress(NotConvergedError):
            return _by_all_eigenvalues(diagonal, beside, count)
    every = diagonal[:0] if alone else _all_eigenvalues(diagonal.clone(), beside.clone())
    return *_by_bisection(diagonal, beside, _number(count, every)), None if alone else every


def _number(count: Count, every: Tensor) -> int:
    return count if isinstance(count, int) else count(every)


def _by_all_eigenvalues(diagonal: Tensor, beside: Tensor, count: Count) -> Found:
    """Eigenpairs of a tridiagonal matrix, and all eigenvalues, by the two halves of `dstemr`.

    The first half finds all eigenvalues, by differential quotients and differences, which takes
    less than bisection does for a tenth of them, and the second the vectors that are wanted. A
    matrix that falls into blocks is left to `dstemr`: what is found of them is not in order.
    """
    n = diagonal.numel()
    main, off = diagonal.clone(), beside.clone()
    off[-1] = 0.0
    values, errors, gaps, rings = (_doubles(size) for size in (n, n, n, 2 * n))
    ends, block, index, support = (_integers(size) for size in (n, n, n, 2 * n))
    blocks, found, info = (ctypes.c_int(0) for _ in range(3))
    low, high, pivot = (ctypes.c_double(0.0) for _ in range(3))
    work, iwork = _doubles(12 * n), _integers(7 * n)
    _call(
        "dlarre", "A", n, low, high, 1, n, main, off, off.square(), *PRECISIONS, -EPS, blocks, ends,
        found, values, errors, gaps, block, index, rings, pivot, work, iwork, info,
    )  # fmt: skip
    if info.value or blocks.value != 1 or found.value != n:
        raise NotConvergedError(f"dlarre: info {info.value}, {blocks.value} blocks")
    every = (values + off[-1]).flip(0)  # it has shifted the matrix by that
    if not (number := _number(count, every)):
        return _doubles(0), _doubles(0, n), every
    first = n - number + 1
    beyond = 1 if first > 1 else 0  # it works in the row before the first one, too
    rows = _doubles(number + beyond, n)
    start = ctypes.c_void_p(rows.data_ptr() - (first - 1 - beyond) * n * rows.itemsize)
    _call(
        "dlarrv", n, low, high, main, off, pivot, ends, n, first, n, LEAST_GAP, *PRECISIONS, values,
        errors, gaps, block, index, rings, start, n, support, work, iwork, info,
    )  # fmt: skip
    if info.value:
        raise NotConvergedError(f"dlarrv: info {info.value}")
    return values[n - number :], rows[beyond:], every


def _by_bisection(diagonal: Tensor, beside: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest eigenpairs by `dstemr`, which bisects for a part of the spectrum."""
    n = diagonal.numel()
    values, vectors = _doubles(n), _doubles(count, n)
    if not count:
        return values[:0], vectors
    work, iwork, support = _doubles(18 * n), _integers(10 * n), _integers(2 * count)
    found, info, relative = ctypes.c_int(0), ctypes.c_int(0), ctypes.c_int(1)
    _call(
        "dstemr", "V", "I", n, diagonal, beside, 0.0, 0.0, n - count + 1, n, found, values,
        vectors, n, count, support, relative, work, work.numel(), iwork, iwork.numel(), info,
    )  # fmt: skip
    if info.value or found.value != count:
        raise NotConvergedError(f"dstemr: info {info.value}, {found.value} of {count} eigenvalues")
    return values[:count], vectors


def leading_eigh(
    upper: Tensor, count: Count, *, spectrum: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The largest eigenvalues of a symmetric matrix and their eigenvectors.

    The ways are tridiagonal form and multiple relatively robust representations. LAPACK's driver
    for both, `dsyevr`, takes bisection and inverse iteration for a part of the spectrum, which is
    slower. The result is eigenvalues, descending (count,), eigenvectors as rows (count, n), and all
    eigenvalues, descending (n,), if the spectrum is asked for.
    """
    n = upper.shape[0]
    diagonal, beside, reflectors = _doubles(n), _doubles(n), _doubles(n)
    work, info = _doubles(BLOCK * n), ctypes.c_int(0)
    wide = upper.stride(0)
    _call("dsytrd", "L", n, upper, wide, diagonal, beside, reflectors, work, work.numel(), info)
    values, vectors, every = _tridiagonal(diagonal, beside, count, spectrum=spectrum)
    if len(vectors):
        _call(
            "dormtr", "L", "L", "N", n, len(vectors), upper, wide, reflectors, vectors, n, work,
            work.numel(), info,
        )  # fmt: skip
    _reverse(vectors)
    return values.flip(0), vectors, every


def _reverse(rows: Tensor) -> None:
    """Turn the order of the rows of a matrix around, with little memory of its own."""
    n = len(rows)
    for start in range(0, n // 2, BLOCK):
        stop = min(start + BLOCK, n // 2)
        first, last = rows[start:stop], rows[n - stop : n - start]
        kept = first.flip(0)
        first.copy_(last.flip(0))
        last.copy_(kept)


def _all_eigenvalues(diagonal: Tensor, beside: Tensor) -> Tensor:
    """All eigenvalues of a tridiagonal matrix, descending; both arguments are overwritten."""
    info = ctypes.c_int(0)
    _call("dsterf", diagonal.numel(), diagonal, beside, info)
    if info.value:
        raise NotConvergedError(f"dsterf: info {info.value}")
    return diagonal.flip(0)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All singular triplets of a matrix (m, n): U (m, k), S descending (k,), and Vh (k, n).

    QR iterations find them, which are slower and surer than divide and conquer.
    """
    m, n = matrix.shape
    k = min(m, n)
    U, S, Vh = _doubles(m, k), _doubles(k), _doubles(k, n)
    if k:
        a, info = matrix.clone(memory_format=torch.contiguous_format), ctypes.c_int(0)
        work = _doubles(max(3 * k + max(m, n), 5 * k) + BLOCK * (m + n))
        _call(  # of the transpose: LAPACK counts along columns
            "dgesvd", "S", "S", n, m, a, n, S, Vh, n, U, k, work, work.numel(), info
        )
        if info.value:
            raise NotConvergedError(f"dgesvd: info {info.value}")
    return U, S, Vh


def _doubles(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.float64)


def _integers(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.int32)
