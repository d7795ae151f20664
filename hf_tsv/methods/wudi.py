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
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from hf_tsv.linalg import products
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
    reduced = None if kind == "tact" else _row_space(deltas, updates.shape)
    given: list[Update] = deltas
    if reduced is not None:
        given = [_within(delta, reduced) for delta in deltas]
    del deltas
    merged, exact = _solved(given, updates, kind)
    return MergedUpdate(merged if reduced is None else product(merged, reduced.mT), exact=exact)


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
    tasks = [_Scaled(delta, scale, kind) for delta in deltas]
    tasks = [replace(task, weight=task.own_weight()) for task in tasks]
    floors = zip(tasks, updates.floors, strict=True)
    noise = sum(task.weight * (floor / scale) ** 2 for task, floor in floors)
    count = partial(_directions, kind, updates.shape[1], noise)
    ways = {"exact": _by_svd, "fast": _by_covariance}
    eigen, target, exact = ways[updates.how.precision](tasks, count)
    values, vectors = eigen.values, eigen.vectors
    inverse, share = 1 / values, torch.ones_like(values)
    if kind == "swudi":
        share = -torch.expm1(-values * STEPS)
        inverse = share / values
    image = product(target, vectors.mT) * inverse
    if kind == "tact":
        return product(image, vectors).mul_(scale), exact
    total = torch.zeros_like(target)
    for task in tasks:
        total += task.delta()
    image -= product(total, vectors.mT) * share
    return total.add_(product(image, vectors)).mul_(scale), exact


def _largest(delta: Update) -> float:
    """Largest absolute entry of an update, or its largest singular value."""
    return products.largest_entry(delta if isinstance(delta, Tensor) else delta.S[:1])


@dataclass(frozen=True)
class _Scaled:
    """A task divided by a scale, with its weight in C and D."""

    update: Update
    scale: float
    kind: WudiFilter
    weight: float = 1.0

    def delta(self) -> Tensor:
        """Δᵢ, scaled, in the working precision."""
        return dense(self.update) / self.scale

    def own_weight(self) -> float:
        """wᵢ; 0 for what is nothing beside the other tasks."""
        if self.kind == "tact":
            return 1.0
        square = float(self.delta().square().sum())
        return 1 / square if square > torch.finfo(torch.float64).tiny else 0.0

    def parts(self) -> tuple[Tensor, Tensor]:
        """Δᵢ, and R of the covariance RᵀR, both scaled."""
        delta = self.delta()
        return delta, _trimmed(delta) if self.kind == "tact" else delta


def _by_svd(tasks: Sequence[_Scaled], count: Count) -> tuple[Eigen, Tensor, int]:
    """Leading eigenpairs of C by the SVD of its root, and D."""
    rows = [task.parts()[1] * math.sqrt(task.weight) for task in tasks]
    _, S, Vh = svd(torch.cat(rows))
    values = S.square()
    kept = count(values)
    return Eigen(values[:kept], Vh[:kept]), _target(tasks), 1


def _by_covariance(tasks: Sequence[_Scaled], count: Count) -> tuple[Eigen, Tensor, int]:
    """Leading eigenpairs of C, and D."""
    delta = tasks[0].delta()
    m, n = delta.shape
    covariance, target = delta.new_zeros(n, n), torch.zeros_like(delta)
    del delta
    for task in tasks:
        delta, rows = task.parts()
        if n <= m:  # then C of one task is the way to D too
            own = torch.zeros_like(covariance)
            _add_upper(own, rows, task.weight)
            covariance += own
            target += product(delta, symmetric(own))
            del own
        else:
            _add_upper(covariance, rows, task.weight)
        del delta, rows
    symmetric(covariance)
    if n <= m:
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


def _trimmed(delta: Tensor) -> Tensor:
    """Δ̃: the larger half of the entries, 0 elsewhere."""
    size = delta.abs().flatten()
    dropped = size.numel() - max(1, round(TRIMMED_SHARE * size.numel()))
    if not dropped:
        return delta
    least = size.kthvalue(dropped + 1).values
    return torch.where(size.view_as(delta) >= least, delta, 0)


def _add_upper(total: Tensor, rows: Tensor, weight: float) -> None:
    """Add w RᵀR to the upper triangle of a matrix, by columns in several threads."""
    n = total.shape[0]
    if total.device.type != "cpu":
        total += (rows.mT @ rows) * weight
        return
    parts = max(1, -(-n // products.COLUMNS))
    bounds = [n * i // parts for i in range(parts + 1)]

    def add(span: tuple[int, int]) -> None:
        start, stop = span
        total[:stop, start:stop] += rows[:, :stop].mT @ (rows[:, start:stop] * weight)

    for_each(add, list(pairwise(bounds)))
