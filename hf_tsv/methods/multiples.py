"""Tasks that are one update but for rounding: they get the same singular vectors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_tsv.linalg import products, svd
from hf_tsv.linalg.updates import ROUNDING_SPREAD, TaskSingularVectors, Update, dense, noise


def with_shared_vectors(
    tasks: Sequence[TaskSingularVectors], deltas: Sequence[Update], noises: Sequence[float]
) -> list[TaskSingularVectors]:
    """Triplets of tasks, with the same vectors for those that are one update but for rounding.

    Checkpoints of Δ and −Δ, a task and a multiple of it in float32, or a task and its own factors
    differ by rounding only, which would be amplified as if it told them apart.

    `noises` are the spectral norms of the rounding of each task, see [`rounding`].
    """
    found = list(tasks)
    for j in range(1, len(tasks)):
        for i in range(j):
            if sign := _sign_of_multiple(tasks[i], noises[i], tasks[j], noises[j], deltas[j]):
                found[j] = _with_vectors_of(found[i], tasks[j], sign)
                break
    return found


def rounding(delta: Update, floor: float) -> float:
    """Spectral norm of the rounding of an update: of its storage and of its own numbers.

    Numbers in half precision count as if in float32: what they lose is too much to be taken for
    rounding.
    """
    numbers = delta if isinstance(delta, Tensor) else delta.U
    eps = min(torch.finfo(numbers.dtype).eps, torch.finfo(torch.float32).eps)
    if isinstance(delta, Tensor):
        return floor + noise(products.in_working_precision(delta), eps)
    # U and Vh have orthonormal columns and rows, whose norms are 1 at most.
    return floor + 4 * ROUNDING_SPREAD * eps * float(delta.S[:1].sum())


def _sign_of_multiple(
    first: TaskSingularVectors,
    noise: float,
    second: TaskSingularVectors,
    noise_of_second: float,
    delta: Update,
) -> int:
    """1 if the second task is a multiple of the first but for rounding, −1 if a negative one, or 0.

    It is one if the leading triplets of the first are triplets of Δ of the second, within the noise
    of both, which is the spectral norm of their rounding.
    """
    r = min(first.rank, second.rank)
    if not r:
        return 0
    factor = float(second.S[:r].norm() / first.S[:r].norm())
    U, S, Vh = first.U[:, :r], first.S[:r] * factor, first.Vh[:r]
    allowed = factor * noise + noise_of_second
    if float((second.S[:r] - S).abs().max()) > allowed or float(S[-1]) <= allowed:
        return 0
    image = products.product(dense(delta), Vh.mT)
    sign = 1 if float((image * U * S).sum()) > 0 else -1
    rest = image.sub_(U * (sign * S))
    return sign if float(svd.singular_values(rest)[0]) <= allowed else 0


def _with_vectors_of(
    first: TaskSingularVectors, second: TaskSingularVectors, sign: int
) -> TaskSingularVectors:
    """Triplets of the second task with the leading vectors of the first, turned by a sign."""
    r = min(first.rank, second.rank)
    return TaskSingularVectors(
        torch.cat([sign * first.U[:, :r], second.U[:, r:]], dim=1),
        second.S,
        torch.cat([first.Vh[:r], second.Vh[r:]]),
    )
