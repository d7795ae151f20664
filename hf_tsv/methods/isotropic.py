"""Iso-C and Iso-CTS: sums whose singular values are made equal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from hf_tsv.linalg import polar, products
from hf_tsv.linalg.choices import Precision
from hf_tsv.linalg.svd import truncated_svd, truncated_svds
from hf_tsv.linalg.updates import TaskSingularVectors, concatenate
from hf_tsv.methods.rules import MergedUpdate, Updates
from hf_tsv.methods.sums import sum_update

COMMON_SHARE = 0.8
"""Of the directions of Iso-CTS that are those of the sum: the default of its paper."""


def iso_c(updates: Updates) -> MergedUpdate:
    """Iso-C: the sum, with all singular values equal."""
    return isotropic_update(list(updates.matrices()), updates.floors, updates.how.precision)


def iso_cts(updates: Updates) -> MergedUpdate:
    """Iso-CTS: the same, with directions of the tasks' own."""
    return isotropic_common_update(
        list(updates.matrices()), updates.floors, updates.count, updates.how.precision
    )


def isotropic_update(
    deltas: Sequence[Tensor], floors: Sequence[float], precision: Precision = "fast"
) -> MergedUpdate:
    """Iso-C: the sum of updates with all singular values equal (Marczak et al., arXiv 2502.04959).

    Args:
        deltas (`Sequence[Tensor]`): the task matrices, shape (d_out, d_in) each.
        floors (`Sequence[float]`): noise floor of each task matrix.
        precision (`str`): `"fast"`, certified, or `"exact"`: full float64 SVDs.

    Returns:
        [`MergedUpdate`]: mean(σ) U Vᵀ of Σ_i Δi = U diag(σ) Vᵀ, in float64. Directions that the
        sum does not have stay zero, and count in the mean.

    Example:
        >>> delta = torch.diag(torch.tensor([3.0, 1.0]))
        >>> isotropic_update([delta], [0.0]).matrix.round(decimals=9).tolist()
        [[2.0, 0.0], [0.0, 2.0]]
    """
    total, floor = _total(deltas, floors)
    svd = truncated_svd(total, min(total.shape), floor, precision)
    matrix = svd.U @ svd.Vh * (svd.S.sum() / min(total.shape))
    return MergedUpdate(matrix, exact=int(svd.exact))


def isotropic_common_update(
    deltas: Sequence[Tensor],
    floors: Sequence[float],
    tasks: int | None = None,
    precision: Precision = "fast",
) -> MergedUpdate:
    """Iso-CTS: [`isotropic_update`], with room for what each task has of its own.

    The leading [`COMMON_SHARE`] of the directions are those of the sum; the others are shared out
    among the tasks, for the leading directions of what of their update lies outside (algorithm 2).

    Args:
        deltas (`Sequence[Tensor]`): the task matrices that are not zero, shape (d_out, d_in) each.
        floors (`Sequence[float]`): noise floor of each task matrix.
        tasks (`int`, *optional*): how many share the directions; default: as many.
        precision (`str`): `"fast"`, certified, or `"exact"`: full float64 SVDs.

    Returns:
        [`MergedUpdate`]: mean(σ) U⊥ V⊥ᵀ, in float64.
    """
    total, floor = _total(deltas, floors)
    k = min(total.shape)
    own = round((k - int(COMMON_SHARE * k)) / (tasks or len(deltas)))
    shared = truncated_svd(total, k - own * len(deltas), floor, precision)
    outside = [
        delta - shared.U @ (shared.U.mT @ delta)
        for delta in map(products.in_working_precision, deltas)
    ]
    found = truncated_svds(outside, own, floors, precision) if own else []
    parts = [TaskSingularVectors(svd.U, svd.S, svd.Vh) for svd in (*found, shared)]
    vectors = concatenate(parts)
    sigma = vectors.S.mean().expand(len(vectors.S))
    product = polar.orthogonal_product(vectors.U, sigma, vectors.Vh, precision)
    if product.ill_conditioned and precision == "fast":
        return isotropic_common_update(deltas, floors, tasks, "exact")
    exact = product.exact + sum(svd.exact for svd in (*found, shared))
    return MergedUpdate(product.matrix, (), product.null_directions, exact)


def _total(deltas: Sequence[Tensor], floors: Sequence[float]) -> tuple[Tensor, float]:
    """Σ_i Δi in the working precision, and its noise floor."""
    return products.in_working_precision(sum_update(deltas)), math.hypot(*floors)
