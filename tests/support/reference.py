"""The method once more, from its equations alone, and task matrices like those of fine-tuning.

Everything is float64 and for one weight. Nothing here imports what it checks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

NULL = 1e-11
"""Singular values of a concatenation up to this share of the largest are null directions."""

NULL_SQUARE = 1e-12
"""Eigenvalues of a sum of projectors up to this share of the largest are rounding of zeros."""


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Small decompositions are many times slower when threads compete for busy cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, Frobenius."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# The method


def triplets(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading `rank` singular triplets: U (d_out, r), σ (r,), Vh (r, d_in)."""
    U, s, Vh = torch.linalg.svd(delta.double(), full_matrices=False)
    return U[:, :rank], s[:rank], Vh[:rank]


def low_rank_approximation(delta: Tensor, rank: int) -> Tensor:
    """Σ_j≤r σ_j u_j v_jᵀ."""
    U, s, Vh = triplets(delta, rank)
    return U * s @ Vh


def concatenation(deltas: Sequence[Tensor], ranks: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """U = [U1 | … | UT], σ = [σ1 … σT], Vh = [Vh1; …; VhT]."""
    tasks = [triplets(delta, rank) for delta, rank in zip(deltas, ranks, strict=True)]
    return (
        torch.cat([U for U, _, _ in tasks], dim=1),
        torch.cat([s for _, s, _ in tasks]),
        torch.cat([Vh for _, _, Vh in tasks]),
    )


def procrustes(X: Tensor) -> Tensor:
    """X = P D Qᵀ → P Qᵀ, without the null directions."""
    P, D, Qh = torch.linalg.svd(X, full_matrices=False)
    keep = NULL * D[0] < D
    return P[:, keep] @ Qh[keep]


def inverse_root(gram: Tensor) -> Tensor:
    """G^(−1/2), the pseudo-inverse root of a sum of projectors."""
    eigenvalues, Q = torch.linalg.eigh(gram)
    keep = eigenvalues > NULL_SQUARE * eigenvalues[-1]
    return Q[:, keep] / eigenvalues[keep].sqrt() @ Q[:, keep].T


def whitening(X: Tensor) -> Tensor:
    """X (XᵀX)^(−1/2)."""
    return X @ inverse_root(X.T @ X)


def tsv(deltas: Sequence[Tensor], ranks: Sequence[int], solver: str = "procrustes") -> Tensor:
    """Low-rank and orthogonalised: M = U⊥ diag(σ) V⊥h."""
    U, s, Vh = concatenation(deltas, ranks)
    polar = {"procrustes": procrustes, "whitening": whitening}[solver]
    return polar(U) * s @ polar(Vh.T).T


def tsv_by_projectors(deltas: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """The same as (Σ UiUiᵀ)^(−1/2) · Σ Ui σi Vhi · (Σ ViViᵀ)^(−1/2), pseudo-inverse roots."""
    U, s, Vh = concatenation(deltas, ranks)
    return inverse_root(U @ U.T) @ (U * s @ Vh) @ inverse_root(Vh.T @ Vh)


def low_rank(deltas: Sequence[Tensor], ranks: Sequence[int]) -> Tensor:
    """Low-rank, not orthogonalised: the sum of the rank-r approximations."""
    U, s, Vh = concatenation(deltas, ranks)
    return U * s @ Vh


def orthogonal(deltas: Sequence[Tensor], solver: str = "procrustes") -> Tensor:
    """Orthogonalised at full rank: U is d_out × kT."""
    return tsv(deltas, [min(delta.shape) for delta in deltas], solver)


def task_arithmetic(deltas: Sequence[Tensor]) -> Tensor:
    """Neither: the sum."""
    return torch.stack([delta.double() for delta in deltas]).sum(0)


def average(deltas: Sequence[Tensor]) -> Tensor:
    """What everything takes that is not a matrix: the mean."""
    return torch.stack([delta.double() for delta in deltas]).mean(0)


# Task matrices


def ill_conditioned(
    sizes: tuple[int, int], rank: int, tasks: int, angle: float, g: torch.Generator
) -> list[Tensor]:
    """Float64 updates whose leading vectors are independent, but one of the last by an angle only.

    The smallest singular value of both concatenations is about `angle` times the largest. Singular
    values are 2 to 1 up to the rank and 0.5 to 0.1 beyond, so that vectors are known to 1e-15.

    Args:
        sizes: (d_out, d_in); square concatenations where it is (rank · tasks, rank · tasks).
        rank: leading vectors of each task.
        tasks: how many.
        angle: in rad, of the last task's last vector to what all others span.
        g: of the random directions.
    """
    left, right = (_nearly_dependent_bases(size, rank, tasks, angle, g) for size in sizes)
    k = min(sizes)
    s = torch.cat([torch.linspace(2, 1, rank), torch.linspace(0.5, 0.1, k - rank)]).double()
    return [U[:, :k] * s @ V[:, :k].T for U, V in zip(left, right, strict=True)]


def _nearly_dependent_bases(
    size: int, rank: int, tasks: int, angle: float, g: torch.Generator
) -> list[Tensor]:
    """Orthonormal (size, size) of each task, whose leading columns are of [`ill_conditioned`]."""
    bases = [orthonormal(size, size, g) for _ in range(tasks)]
    others = torch.cat([U[:, :rank] for U in bases], dim=1)[:, :-1]
    spanned, away = torch.linalg.qr(others, mode="complete")[0].tensor_split([others.shape[1]], 1)
    weights = gaussian(spanned.shape[1] - rank + 1, 1, g)  # not of the last task's own
    inside = others[:, : len(weights)] @ weights
    own = others[:, len(weights) :]
    inside -= own @ (own.T @ inside)
    last = inside / inside.norm() * math.cos(angle) + away[:, :1] * math.sin(angle)
    leading = torch.cat([own, last], dim=1)
    beyond = torch.linalg.qr(leading, mode="complete")[0][:, rank:]
    bases[-1] = torch.cat([leading, beyond], dim=1)
    return bases


def generator(seed: int) -> torch.Generator:
    """Random numbers that are the same in every run."""
    return torch.Generator().manual_seed(seed)


def gaussian(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Independent normal entries."""
    return torch.randn(rows, columns, generator=g, dtype=torch.float64)


def orthonormal(rows: int, columns: int, g: torch.Generator) -> Tensor:
    """Orthonormal columns in a random direction."""
    return torch.linalg.qr(gaussian(rows, columns, g))[0]


def with_rms(delta: Tensor, rms: float) -> Tensor:
    """Scaled so that the root mean square of its entries is `rms`."""
    return delta * (rms * math.sqrt(delta.numel()) / delta.norm())


def power_law(shape: tuple[int, int], exponent: float, g: torch.Generator) -> Tensor:
    """σ_j = j^−exponent in random directions."""
    k = min(shape)
    s = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    return with_rms(orthonormal(shape[0], k, g) * s @ orthonormal(shape[1], k, g).T, 3e-4)


def lora(shape: tuple[int, int], rank: int, rms: float, g: torch.Generator) -> Tensor:
    """Product of two Gaussian factors, as low-rank adapters are."""
    return with_rms(gaussian(shape[0], rank, g) @ gaussian(rank, shape[1], g), rms)


def bases_near_each_other(
    size: int, columns: int, shared: int, tasks: int, smallest_angle: float, g: torch.Generator
) -> list[Tensor]:
    """Orthonormal (size, columns) for each task whose leading columns lie near one subspace.

    15 % of the `shared` directions are `smallest_angle` … 0.3 rad away from it (log-uniform),
    the others 0.3 … 1.5 rad.
    """
    common = orthonormal(size, shared, g)
    bases = []
    for _ in range(tasks):
        log_range = math.log(smallest_angle), math.log(0.3)
        tiny = torch.empty(shared, dtype=torch.float64).uniform_(*log_range, generator=g).exp()
        wide = torch.empty(shared, dtype=torch.float64).uniform_(0.3, 1.5, generator=g)
        angle = torch.where(torch.rand(shared, generator=g) < 0.15, tiny, wide)
        away = gaussian(size, shared, g)
        away = torch.linalg.qr(away - common @ (common.T @ away))[0]
        leading = common * angle.cos() + away * angle.sin()
        rest = gaussian(size, columns - shared, g)
        rest = torch.linalg.qr(rest - leading @ (leading.T @ rest))[0]
        bases.append(torch.cat([leading, rest], dim=1))
    return bases


def fine_tunes(
    shape: tuple[int, int],
    tasks: int,
    exponent: float,
    seed: int,
    *,
    noise: float = 0.0,
    smallest_angle: float = 1e-3,
) -> list[Tensor]:
    """Float32 updates of related tasks: power-law spectra, partly shared leading subspaces.

    Entries are about 3e-4 rms; `noise` adds a Gaussian floor of that share of it.
    """
    g = generator(seed)
    k = min(shape)
    shared = max(1, min(k // tasks, 64))
    s = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    left = bases_near_each_other(shape[0], k, shared, tasks, smallest_angle, g)
    right = bases_near_each_other(shape[1], k, shared, tasks, smallest_angle, g)
    deltas = [with_rms(U * s @ V.T, 3e-4) for U, V in zip(left, right, strict=True)]
    return [(delta + noise * 3e-4 * gaussian(*shape, g)).float() for delta in deltas]


def base_weights(kind: str, shape: tuple[int, int], g: torch.Generator) -> Tensor:
    """W0 of 0.02 rms: `normal`, `heavy-tailed` (Student-t), `outlier-columns`, `outlier-rows`."""
    W = 0.02 * gaussian(*shape, g)
    if kind == "heavy-tailed":  # 3 degrees of freedom
        W /= torch.stack([gaussian(*shape, g) for _ in range(3)]).square().mean(0).sqrt()
    elif kind == "outlier-columns":
        W[:, :3] *= 30
    elif kind == "outlier-rows":
        W[:3] *= 30
    return W
