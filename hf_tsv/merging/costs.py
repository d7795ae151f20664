"""Cost of a weight, in operations and in memory, and the parallelism that memory allows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from hf_tsv.checkpoints.layout import brief
from hf_tsv.linalg import svd
from hf_tsv.methods.interference import ROWS
from hf_tsv.runs.reading import LITTLE
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.text import human_bytes

if TYPE_CHECKING:
    from hf_tsv.merging.plan import Weight


EIGH = 9.0
"""Factor of n³ in the operations of a full symmetric eigendecomposition. Leading pairs take 4/3 n³
at a third of the speed of a matrix product, hence 4 n³ in `operations`."""

SLACK = 1.12
"""Memory of a process over that of its tensors: blocks that the allocator keeps, stacks of threads.
Measured: up to 1.10, by `python -m benchmarks.speed.methods`."""

NOTED, NOTED_PAIR = 8_000, 64
"""Bytes held per weight for the whole run (header entry, plan, finding, line of the report), and
per pair of tasks in it. Measured: 7,700 with two tasks."""


@dataclass(frozen=True)
class Parallelism:
    """Threads of the computation, and whether the next weight is read ahead meanwhile."""

    threads: int = 1
    ahead: bool = True


def steps(weights: Iterable[Weight]) -> list[tuple[str, float]]:
    """Short name and cost of each weight, for a bar."""
    return [(brief(weight.label), operations(weight)) for weight in weights]


def operations(weight: Weight) -> float:
    """Floating-point operations of a weight, approximately."""
    tasks = len(weight.inputs)
    values = svd.PER_VALUE * prod(weight.shape) * (tasks + 1)
    if weight.treatment != "decomposed":
        return values
    (m, n), columns = weight.shape, weight.rank * tasks
    inner = min(columns, max(m, n))
    if weight.forms == "covariance":
        return values + tasks * m * n * (n + 4 * min(m, n)) + 4 * n**3 + 6 * m * n * n
    sides = sum(d * inner * min(d, inner) + EIGH * min(d, inner) ** 3 for d in (m, n))
    projections = 6 * columns * inner * (m + n) if weight.forms == "projections" else 0
    products = 4 * m * n * columns + projections
    return values + tasks * svd.operations(m, n, weight.rank) + sides + products


def expected_seconds(weights: Iterable[Weight]) -> float:
    """Time of the computation on this machine's CPU, right within a factor of about two.

    The speed of a product of two matrices is measured for it. Measured: merges of ViT-B/32 with
    several methods take 1.3 to 3 times their operations at that speed.
    """
    side, tries = 512, 3
    matrix = torch.ones(side, side, dtype=torch.float64)
    times = []
    for _ in range(tries):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - began)
    return 2 * sum(map(operations, weights)) / (2 * side**3 / min(times))


def peak_memory(
    weights: Sequence[Weight], parallelism: Parallelism, *, measure: bool = False
) -> int:
    """Most bytes in use at a time, on top of the interpreter and its libraries.

    Weights are in the order of the work; `measure`: their interference is measured too.
    """
    largest = max(map(held, weights), default=0)
    most_read = max(map(_reading, weights), default=0)
    peak = 0
    for i, weight in enumerate(weights):
        computing = _computing(weight, parallelism.threads, measure)
        now = held(weight) + max(computing, _reading(weight))
        if i:  # the previous weight is still being written
            now += 4 * prod(weights[i - 1].shape)
        if parallelism.ahead and i + 1 < len(weights):
            now += int(largest * (1 + LITTLE)) + most_read
        peak = max(peak, now)
    return int(peak * SLACK)


def noted_bytes(weights: Sequence[Weight]) -> int:
    """Bytes that findings and plan of all weights take until the end."""
    return sum(NOTED + NOTED_PAIR * len(weight.inputs) ** 2 for weight in weights)


def held(weight: Weight) -> int:
    """Bytes of W0 and the updates held together; means and sums hold one task at a time."""
    tasks = len(weight.inputs) if weight.together or weight.surveyed else 1
    return 4 * prod(weight.shape) * (tasks + 1)


def fitting(
    weights: Sequence[Weight], threads: int, most: int | None, used: int, *, measure: bool = False
) -> Parallelism:
    """Largest parallelism of up to so many threads whose memory fits.

    `most` is what the whole process may use, in bytes, and `used` what it uses already; weights and
    `measure` are as in [`peak_memory`].

    Raises:
        [`RecipeError`]: not even one thread fits.
    """
    choices = [Parallelism(threads), *(Parallelism(n, ahead=False) for n in range(threads, 0, -1))]
    for choice in choices:
        needed = used + peak_memory(weights, choice, measure=measure)
        if most is None or needed <= most:
            return choice
    size = human_bytes(needed)
    problem = f"The merge needs about {size} of memory, more than `max_memory=` allows."
    raise RecipeError(problem, f"Give at least `max_memory={size.replace(' ', '')}`.")


def _reading(weight: Weight) -> int:
    """Bytes for reading one checkpoint's weight: its own values, and the same in float32."""
    unread = weight.treatment == "copied" and not weight.is_kept
    return 0 if unread else 4 * 2 * prod(weight.shape)


def _computing(weight: Weight, threads: int, measure: bool) -> int:
    """Bytes for computing a weight, mostly in float64, besides the updates."""
    steps = [_ruling(weight, threads, measure)]
    if weight.calibrated:
        steps.append(_calibrating(weight))
    if weight.surveyed:
        steps.append(_surveying(weight, threads))
    return max(steps)


def _calibrating(weight: Weight) -> int:
    """Bytes for calibrating the singular values of a merged update."""
    (m, n), k = weight.shape, min(weight.shape)
    return 8 * (8 * m * n + 4 * k * k + 3 * k * (m + n))


def _surveying(weight: Weight, threads: int) -> int:
    """Bytes for measuring updates, side by side."""
    (m, n), k = weight.shape, min(weight.shape)
    return 8 * (1 + min(threads, len(weight.inputs))) * (2 * m * n + 4 * k * k)


def _ruling(weight: Weight, threads: int, measure: bool) -> int:
    """Bytes for the rule of the method."""
    tasks, entries = len(weight.inputs), prod(weight.shape)
    result = (8 + 4) * entries  # update, cast
    if weight.treatment == "combined":  # trims or votes on all updates side by side
        return result + 4 * entries * (tasks + 6)
    if weight.treatment != "decomposed":
        return result + 12 * entries
    (m, n), columns = weight.shape, weight.rank * tasks
    if weight.forms == "covariance":
        return 8 * (5 * n * n + 14 * m * n + 2 * min(m, n) ** 2)
    vectors = 8 * columns * (m + n)
    one_task = 8 * (m * n + 4 * min(m, n) ** 2 + 4 * weight.rank * (m + n))
    inner = min(columns, max(m, n))
    polar = min(threads, 2) * 8 * 5 * inner**2 + vectors  # and the chain of products
    decomposing = min(threads, tasks) * one_task
    measuring = vectors + 8 * inner * (inner + 2 * ROWS) if measure else 0
    projecting = 3 * vectors + 16 * inner**2 if weight.forms == "projections" else 0
    remaining = 16 * tasks * m * n if weight.forms == "remainders" else 0
    besides = measuring + projecting
    return vectors + remaining + result + max(decomposing, vectors + polar + besides)
