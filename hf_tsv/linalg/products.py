"""Norms, threads and matrix products."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_tsv.linalg import lapack
from hf_tsv.system.memory import empty

S = TypeVar("S")
T = TypeVar("T")
F = TypeVar("F", bound=tuple[float, ...])

# Vectors that residuals are estimated with: an estimate is ten times too small once in ten million.
PROBES = 8

SMALL = 1e-12
"""Norm up to which, and from the inverse of which, squares are summed after scaling."""

LINES = 384  # rows or columns of a product computed at a time, whatever the number of threads

_POOL: ContextVar[ThreadPoolExecutor | None] = ContextVar("pool", default=None)
"""Threads for independent parts; none in those threads themselves."""


def in_working_precision(matrix: Tensor) -> Tensor:
    """Return `matrix` in the dtype decompositions run in: float64, or float32 on MPS."""
    return matrix.to(working_dtype(matrix))


def working_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype that decompositions, and long sums, run in where a tensor is."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64


@contextmanager
def threads(count: int | None = None) -> Iterator[None]:
    """Let the functions here use as many threads, by default those torch has, one task each.

    Within the context no call of torch or LAPACK starts threads of its own.
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


def largest_entry(matrix: Tensor) -> float:
    """Largest absolute value of a matrix that has entries; NaN or Inf if it has one."""
    low, high = torch.aminmax(matrix)
    return float(torch.maximum(-low, high))


def norms(matrix: Tensor) -> tuple[float, float]:
    """Largest norms of a row and of a column of a matrix in float32 or float64."""

    def largest(a: Tensor) -> tuple[float, float]:
        rows, columns = (torch.cat([_squares(a, i), a.new_zeros(1)]).max() for i in (0, 1))
        return float(rows), float(columns)

    (rows, columns), scale = _scaled_squares(matrix, largest)
    return scale * math.sqrt(rows), scale * math.sqrt(columns)


def frobenius_norm(tensor: Tensor) -> float:
    """Root of the sum of all squares of a matrix or vector in float32 or float64."""

    def total(a: Tensor) -> tuple[float]:
        if a.dim() < 2:
            return (float(torch.linalg.vector_norm(a)) ** 2,)
        return (float(in_working_precision(_squares(a, 0)).sum()),)

    (square,), scale = _scaled_squares(tensor, total)
    return scale * math.sqrt(square)


def _scaled_squares(a: Tensor, sums: Callable[[Tensor], F]) -> tuple[F, float]:
    """Sums of squares of a tensor, divided by its largest entry where they would leave the range.

    The second is the entry. A sum that is neither small nor large has lost nothing.
    """
    found = sums(a)
    if min(found) > SMALL**2 and max(found) < SMALL**-2:
        return found, 1.0
    largest = largest_entry(a) if a.numel() else 0.0
    return (sums(a / largest), largest) if largest else (found, 1.0)


def _squares(a: Tensor, kept: int) -> Tensor:
    """Sums of squares along the other dimension."""
    if a.device.type != "cpu":
        return a.square().sum(dim=1 - kept)
    n = a.numpy()  # torch takes twenty times as long for the columns
    return torch.as_tensor(np.einsum(f"ij,ij->{'ij'[kept]}", n, n))


def by_products(matrix: Tensor) -> bool:
    """Whether products are so much faster than LAPACK's ways there that iterations pay."""
    return matrix.device.type not in ("cpu", "mps") and matrix.numel() > 0


def probe_vectors(a: Tensor) -> Tensor:
    """Rows (PROBES, n) of random signs, the same in every run, for a (m, n)."""
    return _signs(a.shape[1]).to(a.device, a.dtype)


@functools.lru_cache(maxsize=64)
def _signs(n: int) -> Tensor:
    numbers = torch.rand(PROBES, n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return numbers.sub_(0.5).sign_()


def chain(factors: Sequence[Tensor]) -> Tensor:
    """Their product, multiplied in the order that takes fewest operations."""
    factors = list(factors)
    while len(factors) > 1:
        # greedy is optimal where it matters: few factors, one inner size
        costs = [a.shape[0] * a.shape[1] * b.shape[1] for a, b in pairwise(factors)]
        i = costs.index(min(costs))
        factors[i : i + 2] = [product(factors[i], factors[i + 1])]
    return factors[0]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a b, of shapes (m, k) and (k, n), on the CPU by rows in several threads."""
    if a.device.type != "cpu" or a.dtype != torch.float64:
        return a @ b
    result = empty(a.shape[0], b.shape[1], dtype=a.dtype)

    def multiply(span: tuple[int, int]) -> None:
        rows = slice(*span)
        torch.mm(a[rows], b, out=result[rows])

    for_each(multiply, spans(a.shape[0]))
    return result


def spans(n: int) -> list[tuple[int, int]]:
    """First and last rows of n, so that a few hundred are computed at a time."""
    parts = max(1, -(-n // LINES))
    return list(pairwise(n * i // parts for i in range(parts + 1)))


def for_each(call: Callable[[S], T], items: Sequence[S]) -> list[T]:
    """Results of a call on every item, several at a time inside [`threads`]."""
    pool = _POOL.get()
    if pool is None or len(items) < 2:
        return [call(item) for item in items]
    return list(pool.map(call, items))
