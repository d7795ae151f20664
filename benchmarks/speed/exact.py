"""The merge of one weight in float64, from its definition, as the reference for errors.

Nothing here imports the code it checks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor

NULL = 1e-6
"""Largest singular value of a null direction of a concatenation, as a share of the largest one."""


@contextmanager
def one_thread_each() -> Iterator[None]:
    """Let decompositions start no threads; they would compete for busy cores and be far slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute U, σ, Vh in float64, of the taller of matrix and transpose."""
    if matrix.shape[0] < matrix.shape[1]:
        V, S, Uh = svd(matrix.mT)
        return Uh.mT, S, V.mT
    U, S, Vh = torch.linalg.svd(matrix.double().contiguous(), full_matrices=False)
    return U, S, Vh


def triplets(delta: Tensor, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    """Leading triplets: `rank` at most, and only those with σ above the floor."""
    U, S, Vh = svd(delta)
    smallest = max(floor, torch.finfo(S.dtype).eps * max(delta.shape) * float(S[0]))
    kept = min(rank, int((smallest < S).sum()))
    return U[:, :kept], S[:kept], Vh[:kept]


def polar(matrix: Tensor) -> Tensor:
    """Compute P Qᵀ of P D Qᵀ, of minimum norm: without the null directions."""
    P, D, Qh = svd(matrix)
    kept = NULL * D[:1] < D
    return P[:, kept] @ Qh[kept]


def merge(deltas: Sequence[Tensor], rank: int, floors: Sequence[float]) -> Tensor:
    """Compute M = U⊥ diag(σ) V⊥h of the leading triplets of every task.

    Args:
        deltas: Δ of every task, shape (d_out, d_in).
        rank: most triplets kept of each task.
        floors: largest singular value of each task that is noise of storage.
    """
    with one_thread_each(), ThreadPoolExecutor(os.cpu_count()) as pool:
        tasks = list(pool.map(lambda delta, floor: triplets(delta, rank, floor), deltas, floors))
        return _product(tasks, deltas[0].shape)


def _product(tasks: Sequence[tuple[Tensor, Tensor, Tensor]], shape: torch.Size) -> Tensor:
    U = torch.cat([U for U, _, _ in tasks], dim=1)
    S = torch.cat([S for _, S, _ in tasks])
    Vh = torch.cat([Vh for _, _, Vh in tasks])
    if not S.numel():
        return torch.zeros(shape, dtype=torch.float64)
    return (polar(U) * S) @ polar(Vh)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Compute ‖found − expected‖ / ‖expected‖, Frobenius."""
    norm = float(expected.double().norm())
    return float((found.double().cpu() - expected.double()).norm()) / (norm or 1.0)
