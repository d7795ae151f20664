"""Task singular vectors of one weight: decompose, orthogonalise, merge.

Notation: a task matrix Δ has shape (d_out, d_in) and k = min(d_out, d_in); T tasks are merged with
rank r each. Source: Gargiulo et al., "Task Singular Vectors", CVPR 2025 (arXiv 2412.00081).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from hf_tsv.linalg import polar, products
from hf_tsv.linalg.choices import Orthogonalizer, Precision
from hf_tsv.linalg.lapack import NotConvergedError
from hf_tsv.linalg.svd import truncated_svd, truncated_svds
from hf_tsv.linalg.updates import TaskSingularVectors, Update, concatenate, dense
from hf_tsv.methods.catalogue import MergedUpdate
from hf_tsv.methods.interference import interference, interference_alone, singular_task_interference
from hf_tsv.methods.multiples import with_shared_vectors


def decompose(
    delta: Tensor, rank: int, floor: float = 0.0, precision: Precision = "fast"
) -> TaskSingularVectors:
    """Leading task singular vectors of one task matrix (section 3.1).

    Args:
        delta (`Tensor`): Δ, shape (d_out, d_in).
        rank (`int`): triplets to keep at most.
        floor (`float`): singular values up to this are noise, see [`storage_noise`].
        precision (`str`): `"fast"`, certified, or `"exact"`: a full float64 SVD.

    Returns:
        [`TaskSingularVectors`]: of rank min(rank, numerical rank of Δ).

    Example:
        >>> decompose(torch.diag(torch.tensor([3.0, 2.0, 0.0])), rank=3).S.tolist()
        [3.0, 2.0]
    """
    svd = truncated_svd(delta, rank, floor, precision)
    return TaskSingularVectors(svd.U, svd.S, svd.Vh)


def merge(
    deltas: Sequence[Update],
    rank: int,
    *,
    floors: Sequence[float] | None = None,
    orthogonal: bool = True,
    solver: Orthogonalizer = "procrustes",
    precision: Precision = "fast",
    measure: bool = False,
    coefficients: Sequence[float] | None = None,
) -> MergedUpdate:
    """Merged update of one weight, M = U⊥ diag(S) V⊥h (algorithm 1).

    Args:
        deltas (`Sequence[Tensor | TaskSingularVectors]`): the task matrices, shape (d_out, d_in)
            each; those given by their triplets need no decomposition.
        rank (`int`): triplets kept of each task; k for the untruncated ablation.
        floors (`Sequence[float]`, *optional*): noise floor of each task matrix.
        orthogonal (`bool`): whether to orthogonalise; without it the truncated updates are summed.
        solver (`str`): `"procrustes"` (SVD) or `"whitening"` (U (UᵀU)^(−1/2)), the same matrix.
        precision (`str`): `"fast"`, certified, or `"exact"`: full float64 SVDs.
        measure (`bool`): find who disturbs whom, from the same decompositions.
        coefficients (`Sequence[float]`, *optional*): factors of the singular values of each task
            after orthogonalisation, see [`orthonormal_vectors`].

    Returns:
        [`MergedUpdate`]: M before α. A task matrix of zeros contributes nothing.

    Raises:
        [`NotConvergedError`]: a decomposition fails; with the place of the task whose it is.

    Example:
        >>> delta = torch.eye(4)
        >>> torch.dist(merge([delta], rank=4).matrix, delta).item() < 1e-12
        True
    """
    k = min(deltas[0].shape)
    if len(deltas) == 1 and rank >= k:  # nothing is truncated and nothing interferes
        kept = deltas[0].rank if isinstance(deltas[0], TaskSingularVectors) else k
        alone = interference_alone(deltas[0], k) if measure else None
        matrix = dense(deltas[0])
        matrix = matrix if coefficients is None else matrix * coefficients[0]
        return MergedUpdate(matrix, (kept,), interference=alone)
    floors = floors or [0.0] * len(deltas)
    tasks, spectra, exact = _leading(deltas, rank, floors, precision, measure)
    vectors, ranks = concatenate(tasks), tuple(task.rank for task in tasks)
    found = interference(tasks, vectors, spectra) if measure else None
    del tasks  # whose vectors are in memory twice now
    if not orthogonal or not vectors.rank:
        matrix = _weighted(vectors, ranks, coefficients).matrix()
        return MergedUpdate(matrix, ranks, exact=exact, interference=found)
    vectors, ranks, product = _orthogonalised(
        deltas, vectors, ranks, rank, floors, solver, precision, coefficients, form=measure
    )
    if found is not None and product.factors is not None:
        U, Vh = product.factors
        after = singular_task_interference(TaskSingularVectors(U, vectors.S, Vh))
        found = replace(found, sti_after=after)
    exact += product.exact
    return MergedUpdate(product.matrix, ranks, product.null_directions, exact, found)


def orthonormal_vectors(
    deltas: Sequence[Update],
    rank: int,
    *,
    floors: Sequence[float] | None = None,
    solver: Orthogonalizer = "procrustes",
    precision: Precision = "fast",
) -> tuple[TaskSingularVectors, tuple[int, ...]]:
    """U⊥, S and V⊥h of one weight, whose columns and rows are those of one task after the other.

    They do not depend on factors of the singular values: M = Σᵢ cᵢ U⊥ᵢ diag(Sᵢ) V⊥hᵢ.

    Args:
        deltas (`Sequence[Tensor | TaskSingularVectors]`): as in [`merge`].
        rank (`int`): triplets kept of each task.
        floors (`Sequence[float]`, *optional*): noise floor of each task matrix.
        solver (`str`): as in [`merge`].
        precision (`str`): as in [`merge`].

    Returns:
        `tuple[TaskSingularVectors, tuple[int, ...]]`: of all tasks, and how many are of each.
    """
    floors = floors or [0.0] * len(deltas)
    tasks, _, _ = _leading(deltas, rank, floors, precision, False)
    vectors, ranks = concatenate(tasks), tuple(task.rank for task in tasks)
    if vectors.rank:
        vectors, ranks, product = _orthogonalised(
            deltas, vectors, ranks, rank, floors, solver, precision, None, form=True
        )
        assert product.factors is not None  # they were asked for
        vectors = replace(vectors, U=product.factors[0], Vh=product.factors[1])
    return vectors, ranks


def _orthogonalised(
    deltas: Sequence[Update],
    vectors: TaskSingularVectors,
    ranks: tuple[int, ...],
    rank: int,
    floors: Sequence[float],
    solver: Orthogonalizer,
    precision: Precision,
    coefficients: Sequence[float] | None,
    *,
    form: bool,
) -> tuple[TaskSingularVectors, tuple[int, ...], polar.OrthogonalProduct]:
    """Product of polar factors and singular values, with a second look if it is ill-conditioned.

    An ill-conditioned polar factor amplifies whatever is wrong with its columns. Then only, the
    task matrices are decomposed anew by full float64 SVDs, and tasks that are the same update but
    for rounding get the same vectors, see [`_with_shared_vectors`]. What is dependent then is
    dependent to the rounding of float64, and merged once; the rest follows the equations.

    Args:
        deltas (`Sequence[Tensor | TaskSingularVectors]`): as in [`merge`], like all not named here.
        vectors ([`TaskSingularVectors`]): of all tasks.
        ranks (`tuple[int, ...]`): how many are of each task.
        form (`bool`): form the polar factors too.

    Returns:
        `tuple[TaskSingularVectors, tuple[int, ...], OrthogonalProduct]`: the vectors and ranks that
        were used, and the product; its `exact` counts the SVDs of the second look too.
    """
    vectors = _weighted(vectors, ranks, coefficients)
    product = polar.orthogonal_product(
        vectors.U, vectors.S, vectors.Vh, precision, solver, form=form
    )
    if not product.ill_conditioned:
        return vectors, ranks, product
    exact = product.exact
    tasks, _, decomposed = _leading(deltas, rank, floors, "exact", False)
    tasks = with_shared_vectors(tasks, deltas, floors)
    ranks = tuple(task.rank for task in tasks)
    vectors = _weighted(concatenate(tasks), ranks, coefficients)
    product = polar.orthogonal_product(vectors.U, vectors.S, vectors.Vh, "exact", solver, form=form)
    return vectors, ranks, replace(product, exact=exact + decomposed + product.exact)


def _weighted(
    vectors: TaskSingularVectors, ranks: Sequence[int], coefficients: Sequence[float] | None
) -> TaskSingularVectors:
    """Vectors of all tasks, the singular values of each times its coefficient."""
    if coefficients is None:
        return vectors
    factors = [c for c, r in zip(coefficients, ranks, strict=True) for _ in range(r)]
    return replace(vectors, S=vectors.S * vectors.S.new_tensor(factors))


def _leading(
    deltas: Sequence[Update],
    rank: int,
    floors: Sequence[float],
    precision: Precision,
    spectrum: bool,
) -> tuple[list[TaskSingularVectors], list[Tensor], int]:
    """Triplets of every task, all singular values, and how many took a full SVD.

    Without `spectrum`, and of what is given by its triplets, the singular values are those kept.
    """
    whole = [
        (i, delta, floor)
        for i, (delta, floor) in enumerate(zip(deltas, floors, strict=True))
        if isinstance(delta, Tensor)
    ]
    try:
        found = truncated_svds(
            [d for _, d, _ in whole], rank, [f for *_, f in whole], precision, spectrum=spectrum
        )
    except NotConvergedError as error:  # of them, to be counted among all
        place = None if error.place is None else whole[error.place][0]
        raise NotConvergedError(str(error), place) from None
    decomposed = iter(found)
    tasks, spectra = [], []
    for delta in deltas:
        if isinstance(delta, Tensor):
            svd = next(decomposed)
            tasks.append(TaskSingularVectors(svd.U, svd.S, svd.Vh))
            spectra.append(svd.S if svd.spectrum is None else svd.spectrum)
        else:
            kept = delta.truncated(rank)
            tasks.append(kept.to(products.in_working_precision(kept.S).dtype))
            spectra.append(delta.S)
    return tasks, spectra, sum(svd.exact for svd in found)
