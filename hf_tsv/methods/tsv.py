"""Task singular vectors of one weight: decompose, orthogonalise, merge.

Notation: a task matrix Δ has shape (d_out, d_in) and k = min(d_out, d_in); T tasks are merged with
rank r each. Source: Gargiulo et al., "Task Singular Vectors", CVPR 2025 (arXiv 2412.00081).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from hf_tsv.linalg import polar, products
from hf_tsv.linalg.choices import Precision
from hf_tsv.linalg.lapack import NotConvergedError
from hf_tsv.linalg.svd import singular_values, truncated_svds
from hf_tsv.linalg.updates import TaskSingularVectors, Update, concatenate, dense
from hf_tsv.methods.multiples import rounding, with_shared_vectors
from hf_tsv.methods.rules import Measurable, MergedUpdate, Updates


def orthogonal(updates: Updates) -> MergedUpdate:
    """TSV-Merge, M = U⊥ diag(S) V⊥h (algorithm 1). A task matrix of zeros contributes nothing."""
    deltas = list(updates.deltas)
    if len(deltas) == 1 and updates.rank >= min(updates.shape):
        return _as_it_is(deltas[0], updates)
    found = leading(deltas, updates)  # r triplets of each task, side by side
    if not found.vectors.rank:
        return MergedUpdate(found.vectors.matrix(), found.ranks, 0, found.exact, found.measurable)
    vectors, ranks, product = orthogonalised(deltas, found, updates, form=updates.how.keep)
    measurable = found.measurable
    if measurable is not None and product.factors is not None:
        U, Vh = product.factors
        measurable = replace(measurable, orthonormal=TaskSingularVectors(U, vectors.S, Vh))
    exact = found.exact + product.exact
    return MergedUpdate(product.matrix, ranks, product.null_directions, exact, measurable)


def low_rank(updates: Updates) -> MergedUpdate:
    """The sum of truncated updates, M = Σᵢ Uᵢ diag(Sᵢ) Vhᵢ: TSV-Merge without its second half."""
    deltas = list(updates.deltas)
    if len(deltas) == 1 and updates.rank >= min(updates.shape):
        return _as_it_is(deltas[0], updates)
    found = leading(deltas, updates)
    vectors = _weighted(found.vectors, found.ranks, updates)
    return MergedUpdate(vectors.matrix(), found.ranks, 0, found.exact, found.measurable)


@dataclass(frozen=True)
class Leading:
    """Leading triplets of all tasks, side by side (section 4.2).

    `vectors` are [U1 | … | UT], [S1 … ST] and [Vh1; …; VhT], `ranks` of each task; `exact` counts
    the full SVDs that it took; interference is measured from `measurable`, if asked for.
    """

    vectors: TaskSingularVectors
    ranks: tuple[int, ...]
    exact: int
    measurable: Measurable | None


def leading(deltas: Sequence[Update], updates: Updates) -> Leading:
    """The r leading triplets of each task, without those that are noise (section 3.1)."""
    keep = updates.how.keep
    tasks, spectra, exact = _decomposed(deltas, updates, updates.how.precision, spectrum=keep)
    vectors = concatenate(tasks)
    measurable = Measurable(spectra, tasks) if keep else None
    return Leading(vectors, tuple(task.rank for task in tasks), exact, measurable)


def orthogonalised(
    deltas: Sequence[Update], found: Leading, updates: Updates, *, form: bool
) -> tuple[TaskSingularVectors, tuple[int, ...], polar.OrthogonalProduct]:
    """Product of polar factors and singular values, with a second look if it is ill-conditioned.

    An ill-conditioned polar factor amplifies whatever is wrong with its columns. Then only, the
    task matrices are decomposed anew by full float64 SVDs, and tasks that are the same update but
    for rounding get the same vectors, see [`with_shared_vectors`]. What is dependent then is
    dependent to the rounding of float64, and merged once; the rest follows the equations.

    `form` asks for the polar factors too. The result is the vectors and ranks that were used, and
    the product; its `exact` counts the SVDs of the second look too.
    """
    product_of = partial(polar.orthogonal_product, solver=updates.how.solver, form=form)
    vectors, ranks = _weighted(found.vectors, found.ranks, updates), found.ranks
    product = product_of(vectors.U, vectors.S, vectors.Vh, updates.how.precision)
    if not product.ill_conditioned:
        return vectors, ranks, product
    exact = product.exact
    del product  # before the decompositions take their memory
    tasks, _, decomposed = _decomposed(deltas, updates, "exact", spectrum=False)
    noises = [rounding(d, floor) for d, floor in zip(deltas, updates.floors, strict=True)]
    tasks = with_shared_vectors(tasks, deltas, noises)
    ranks = tuple(task.rank for task in tasks)
    vectors = _weighted(concatenate(tasks), ranks, updates)
    product = product_of(vectors.U, vectors.S, vectors.Vh, "exact")
    return vectors, ranks, replace(product, exact=exact + decomposed + product.exact)


def _weighted(
    vectors: TaskSingularVectors, ranks: Sequence[int], updates: Updates
) -> TaskSingularVectors:
    """Vectors of all tasks, the singular values of each times its coefficient."""
    if updates.coefficients is None:
        return vectors
    factors = [c for c, r in zip(updates.coefficients, ranks, strict=True) for _ in range(r)]
    return replace(vectors, S=vectors.S * vectors.S.new_tensor(factors))


def _as_it_is(delta: Update, updates: Updates) -> MergedUpdate:
    """One task alone, of which nothing is truncated: nothing interferes."""
    rank = min(updates.shape) if isinstance(delta, Tensor) else delta.rank
    measurable = None
    if updates.how.keep:
        measurable = Measurable([singular_values(delta) if isinstance(delta, Tensor) else delta.S])
    matrix = dense(delta)
    if updates.coefficients is not None:
        matrix = matrix * updates.coefficients[0]
    return MergedUpdate(matrix, (rank,), measurable=measurable)


def _decomposed(
    deltas: Sequence[Update], updates: Updates, precision: Precision, *, spectrum: bool
) -> tuple[list[TaskSingularVectors], list[Tensor], int]:
    """Triplets of every task, all singular values, and how many took a full SVD.

    Without `spectrum`, and of what is given by its triplets, the singular values are those kept.
    """
    whole = [i for i, delta in enumerate(deltas) if isinstance(delta, Tensor)]
    matrices = [delta for delta in deltas if isinstance(delta, Tensor)]
    floors = [f for d, f in zip(deltas, updates.floors, strict=True) if isinstance(d, Tensor)]
    try:
        found = truncated_svds(matrices, updates.rank, floors, precision, spectrum=spectrum)
    except NotConvergedError as error:  # of them, to be counted among all
        place = None if error.place is None else whole[error.place]
        raise NotConvergedError(str(error), place) from None
    decomposed, tasks, spectra = iter(found), [], []
    for delta in deltas:
        if isinstance(delta, Tensor):
            svd = next(decomposed)
            tasks.append(TaskSingularVectors(svd.U, svd.S, svd.Vh))
            spectra.append(svd.S if svd.spectrum is None else svd.spectrum)
        else:
            kept = delta.truncated(updates.rank)
            tasks.append(kept.to(products.in_working_precision(kept.S).dtype))
            spectra.append(delta.S)
    return tasks, spectra, sum(svd.exact for svd in found)
