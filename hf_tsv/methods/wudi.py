"""WUDI in closed form: the merged layer answers each task's inputs as the task's own layer does.

A layer of task i is right on inputs with the covariance Sᵢ, which nobody has; but the rows of an
update are sums of inputs that its fine-tuning saw, so the update itself, ΔᵢᵀΔᵢ, stands in for it.
M then minimises Σᵢ wᵢ tr (M − Δᵢ) Sᵢ (M − Δᵢ)ᵀ, hence M C = D with C = Σ wᵢ Sᵢ and
D = Σ wᵢ Δᵢ Sᵢ. The filters differ in Sᵢ and wᵢ, and in how much of C is inverted.

Sources: WUDI-Merging (Cheng et al., arXiv 2503.08099) for the objective, which it minimises by
gradient descent; SWUDI and SWUDI-A solve it by the eigenvectors of C; TACT is ACTMat's estimate
from the larger half of the entries (github.com/marawangamal/actmat, by which it was checked). The
equations of SWUDI and SWUDI-A are from secondary sources.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_tsv.linalg import lapack, products
from hf_tsv.linalg.choices import WudiFilter
from hf_tsv.linalg.eigen import Eigen, largest_eigen, symmetric
from hf_tsv.linalg.products import chain, for_each, product
from hf_tsv.linalg.svd import svd
from hf_tsv.linalg.updates import TaskSingularVectors, Update, dense
from hf_tsv.methods.rules import MergedUpdate, Updates

Count = Callable[[Tensor], int]

STEPS = 300.0
"""Length t of the gradient flow that SWUDI follows: its authors' value."""

LEADING_SHARE = 0.65
"""Share of the directions of C that SWUDI filters."""

TRIMMED_SHARE = 0.5
"""Share of the entries of an update that TACT estimates the covariance from."""


def wudi(updates: Updates) -> MergedUpdate:
    """WUDI: M of M C = D, by the filter of `Updates.how`.

    - `swudi-a`: Sᵢ = ΔᵢᵀΔᵢ and wᵢ = 1/‖Δᵢ‖². With the K leading eigenvectors V of C and their
      eigenvalues Λ, M = Σᵢ Δᵢ (I − V Vᵀ) + D V Λ⁻¹ Vᵀ, where K = ⌈(Σ√λ)² / Σλ⌉.
    - `swudi`: the same Sᵢ and wᵢ, and the leading 65 % of the eigenvectors, of each of which the
      share f(λ) = 1 − e^(−λt), t = 300, is replaced: M = Σᵢ Δᵢ (I − V f Vᵀ) + D V (f/λ) Vᵀ.
    - `tact`: Sᵢ = Δ̃ᵢᵀΔ̃ᵢ of the larger half of the entries, wᵢ = 1, and M = D C⁺.

    Directions of C whose eigenvalues are storage noise, or rounding, count as zero. Tasks that are
    all given by their singular triplets are never made whole, but for `tact`, which looks at their
    entries.
    """
    kind, deltas = updates.how.wudi_filter, list(updates.deltas)
    device = deltas[0].device if isinstance(deltas[0], Tensor) else deltas[0].S.device
    if device.type == "mps":  # which has no float64
        deltas = [delta.to(torch.device("cpu")) for delta in deltas]
    reduced = None if kind == "tact" else _row_space(deltas, updates.shape)
    given: list[Update] = deltas
    if reduced is not None:
        given = [_within(delta, reduced) for delta in deltas]
    del deltas
    merged, exact = _solved(given, updates, kind)
    merged = merged if reduced is None else product(merged, reduced.mT)
    return MergedUpdate(merged.float().to(device) if device.type == "mps" else merged, exact=exact)


def _row_space(deltas: Sequence[Update], shape: tuple[int, ...]) -> Tensor | None:
    """Orthonormal columns (n, R) that span the rows of all updates, if triplets show fewer than n.

    Outside of them C, D and every Δᵢ are zero.
    """
    triplets = [delta for delta in deltas if isinstance(delta, TaskSingularVectors)]
    if len(triplets) < len(deltas) or sum(delta.rank for delta in triplets) >= shape[1]:
        return None
    rows = torch.cat([products.in_working_precision(delta.Vh) for delta in triplets])
    columns: Tensor = torch.linalg.qr(rows.mT)[0]
    return columns


def _within(delta: Update, columns: Tensor) -> Tensor:
    """Δ Q of an update given by its triplets, shape (m, R)."""
    assert isinstance(delta, TaskSingularVectors)  # only then is there a Q
    U, S, Vh = map(products.in_working_precision, (delta.U, delta.S, delta.Vh))
    return product(U * S, product(Vh, columns))


def _solved(deltas: list[Update], updates: Updates, kind: WudiFilter) -> tuple[Tensor, int]:
    """M of M C = D, and how many decompositions took a second routine."""
    size = max(_largest(delta) for delta in deltas)
    if not size:
        return torch.zeros_like(dense(deltas[0])), 0
    scale = 2.0 ** math.frexp(size)[1]  # so that no power of an entry leaves the range
    tasks = [_Scaled.of(delta, scale, kind) for delta in deltas]
    floors = zip(tasks, updates.floors, strict=True)
    noise = sum(task.weight * (floor / scale) ** 2 for task, floor in floors)
    count = partial(_directions, kind, updates.shape[1], noise)
    if updates.how.precision == "exact":
        eigen, target, exact = _by_svd(tasks, count)
    else:
        covariance, begun = _equation(tasks)
        found = _solution(tasks, covariance, begun, noise) if kind == "tact" else None
        if found is not None:
            return found.mul_(scale), 0
        eigen, target, exact = _by_covariance(tasks, covariance, begun, count)
        del covariance
    values, vectors = eigen.values, eigen.vectors
    inverse, share = 1 / values, torch.ones_like(values)
    if kind == "swudi":
        share = -torch.expm1(-values * STEPS)
        inverse = share / values
    image = product(target, vectors.mT).mul_(inverse)
    if kind == "tact":
        return product(image, vectors).mul_(scale), exact
    total = target.zero_()
    for task in tasks:
        total += task.delta()
    image -= product(total, vectors.mT).mul_(share)
    return total.add_(product(image, vectors)).mul_(scale), exact


def _largest(delta: Update) -> float:
    """Largest absolute entry of an update, or its largest singular value."""
    entries = delta if isinstance(delta, Tensor) else delta.S[:1]
    return products.largest_entry(entries) if entries.numel() else 0.0


@dataclass(frozen=True)
class _Scaled:
    """A task divided by a scale, its weight in C and D, and the least entry of its R, if any is."""

    update: Update
    scale: float
    weight: float = 1.0
    least: float | None = None

    @staticmethod
    def of(update: Update, scale: float, kind: WudiFilter) -> _Scaled:
        """A task with weight 1 and an R of its larger half; or with R = Δᵢ and wᵢ = 1/‖Δᵢ‖².

        What is nothing beside the other tasks weighs 0.
        """
        task = _Scaled(update, scale)
        if kind == "tact":
            return replace(task, least=_median(task.delta()))
        square = products.frobenius_norm(task.delta()) ** 2
        weighs = square > torch.finfo(torch.float64).tiny
        return replace(task, weight=1 / square if weighs else 0.0)

    def delta(self) -> Tensor:
        """Δᵢ, scaled, in the working precision."""
        delta = dense(self.update)
        return delta / self.scale if delta is self.update else delta.div_(self.scale)

    def parts(self) -> tuple[Tensor, Tensor]:
        """Δᵢ, and R of the covariance RᵀR, both scaled."""
        delta = self.delta()
        if self.least is None:
            return delta, delta
        return delta, torch.where(delta.abs() >= self.least, delta, 0)


def _by_svd(tasks: Sequence[_Scaled], count: Count) -> tuple[Eigen, Tensor, int]:
    """Leading eigenpairs of C by the SVD of its root, and D."""
    rows = [task.parts()[1] * math.sqrt(task.weight) for task in tasks]
    _, S, Vh = svd(torch.cat(rows))
    values = S.square()
    kept = count(values)
    return Eigen(values[:kept], Vh[:kept]), _target(tasks), 1


def _equation(tasks: Sequence[_Scaled]) -> tuple[Tensor, Tensor | None]:
    """C, and D where C of one task is the way to it."""
    delta = tasks[0].delta()
    m, n = delta.shape
    on_cpu = delta.device.type == "cpu"
    covariance = lapack.room(n).zero_() if on_cpu else delta.new_zeros(n, n)
    target = torch.zeros_like(delta) if n <= m else None
    del delta
    for task in tasks:
        delta, rows = task.parts()
        if target is not None:
            own = torch.zeros_like(covariance)
            _add_upper(own, rows, task.weight)
            covariance += own
            target += product(delta, symmetric(own))
            del own
        else:
            _add_upper(covariance, rows, task.weight)
        del delta, rows
    return symmetric(covariance), target


def _solution(
    tasks: Sequence[_Scaled], covariance: Tensor, target: Tensor | None, noise: float
) -> Tensor | None:
    """M = D C⁻¹ by Cholesky's method, where all eigenvalues of C are above its noise."""
    n = len(covariance)
    lowered = covariance.clone()
    floor = n * torch.finfo(covariance.dtype).eps * float(covariance.trace())
    lowered.diagonal().sub_(max(floor, noise))
    if int(torch.linalg.cholesky_ex(lowered).info):
        return None
    del lowered
    factor = torch.linalg.cholesky(covariance)
    target = _target(tasks) if target is None else target
    solved: Tensor = torch.cholesky_solve(target.mT, factor).mT.contiguous()
    return solved


def _by_covariance(
    tasks: Sequence[_Scaled], covariance: Tensor, target: Tensor | None, count: Count
) -> tuple[Eigen, Tensor, int]:
    """Leading eigenpairs of C, and D."""
    if target is not None:
        eigen, again = largest_eigen(covariance, count)
        return eigen, target, int(again)
    jobs: list[Callable[[], Any]] = [
        partial(largest_eigen, covariance, count),
        partial(_target, tasks),
    ]
    (eigen, again), target = for_each(_called, jobs)
    return eigen, target, int(again)


def _called(job: Callable[[], Any]) -> Any:
    return job()


def _target(tasks: Sequence[_Scaled]) -> Tensor:
    """D = Σᵢ wᵢ Δᵢ Sᵢ."""
    target: Tensor | None = None
    for task in tasks:
        delta, rows = task.parts()
        own = chain([delta, rows.mT, rows]).mul_(task.weight)
        target = own if target is None else target.add_(own)
    assert target is not None  # there is a task
    return target


def _directions(kind: WudiFilter, n: int, noise: float, values: Tensor) -> int:
    """Number of leading eigenvectors of C (n, n) that a filter uses.

    The eigenvalues descend; they may be fewer than n, where all others are known to be 0.
    """
    floor = max(n * torch.finfo(values.dtype).eps * float(values[0]), noise)
    above = int((values > floor).sum())
    if kind == "tact":
        return above
    if kind == "swudi":
        return min(above, math.ceil(LEADING_SHARE * n))
    roots = values.clamp_min(0).sqrt()
    return min(above, math.ceil(float(roots.sum().square() / roots.square().sum())))


def _median(delta: Tensor) -> float:
    """Smallest absolute value in the larger half of the entries, 0 for all."""
    size = delta.abs().flatten()
    dropped = size.numel() - max(1, round(TRIMMED_SHARE * size.numel()))
    if not dropped:
        return 0.0
    if size.device.type != "cpu":
        return float(size.kthvalue(dropped + 1).values)
    return float(np.partition(size.numpy(), dropped)[dropped])  # several times as fast


def _add_upper(total: Tensor, rows: Tensor, weight: float) -> None:
    """Add w RᵀR to the upper triangle of a matrix, by columns in several threads."""
    n = total.shape[0]
    if total.device.type != "cpu":
        total += (rows.mT @ rows) * weight
        return

    def add(span: tuple[int, int]) -> None:
        start, stop = span
        total[:stop, start:stop] += rows[:, :stop].mT @ (rows[:, start:stop] * weight)

    for_each(add, products.spans(n))
