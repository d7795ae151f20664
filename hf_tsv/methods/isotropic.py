"""Iso-C and Iso-CTS: sums whose singular values are made equal (Marczak et al., arXiv 2502.04959).

Both make mean(σ) U Vᵀ in float64. Directions that are missing stay zero, and count in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from hf_tsv.linalg import polar, products
from hf_tsv.linalg.svd import truncated_svd, truncated_svds
from hf_tsv.linalg.updates import TaskSingularVectors, concatenate
from hf_tsv.methods.multiples import rounding, with_shared_vectors
from hf_tsv.methods.rules import MergedUpdate, Updates
from hf_tsv.methods.sums import sum_update

COMMON_SHARE = 0.8
"""Share of the directions of Iso-CTS that are those of the sum: the default of its paper."""


def iso_c(updates: Updates) -> MergedUpdate:
    """Iso-C: mean(σ) U Vᵀ of Σ_i Δi = U diag(σ) Vᵀ."""
    total, floor = _total(list(updates.matrices()), updates.floors)
    svd = truncated_svd(total, min(total.shape), floor, updates.how.precision)
    matrix = svd.U @ svd.Vh * (svd.S.sum() / min(total.shape))
    return MergedUpdate(matrix, exact=int(svd.exact))


def iso_cts(updates: Updates) -> MergedUpdate:
    """Iso-CTS: the same, with room for what each task has of its own.

    The leading [`COMMON_SHARE`] of the directions are those of the sum; the others are shared out
    among all T tasks, for the leading directions of what of their update lies outside (algorithm
    2).
    """
    deltas, floors, how = list(updates.matrices()), updates.floors, updates.how
    total, floor = _total(deltas, floors)
    k = min(total.shape)
    own = round((k - int(COMMON_SHARE * k)) / updates.count)
    shared = truncated_svd(total, k - own * len(deltas), floor, how.precision)
    outside = [_outside(products.in_working_precision(delta), shared.U) for delta in deltas]
    found = truncated_svds(outside, own, floors, how.precision) if own else []
    *tasks, common = (TaskSingularVectors(svd.U, svd.S, svd.Vh) for svd in (*found, shared))
    if how.precision == "exact" and tasks:
        noises = [rounding(delta, floor) for delta, floor in zip(deltas, floors, strict=True)]
        tasks = with_shared_vectors(tasks, outside, noises)
    vectors = concatenate([*tasks, common])
    sigma = vectors.S.mean().expand(len(vectors.S))
    product = polar.orthogonal_product(vectors.U, sigma, vectors.Vh, how.precision)
    if product.ill_conditioned and how.precision == "fast":  # as for TSV-Merge
        del outside, found, shared, tasks, common, vectors, product
        return iso_cts(replace(updates, deltas=deltas, how=replace(how, precision="exact")))
    exact = product.exact + sum(svd.exact for svd in (*found, shared))
    return MergedUpdate(product.matrix, (), product.null_directions, exact)


def _total(deltas: Sequence[Tensor], floors: Sequence[float]) -> tuple[Tensor, float]:
    """Σ_i Δi in the working precision, and its noise floor."""
    return products.in_working_precision(sum_update(deltas)), math.hypot(*floors)


def _outside(delta: Tensor, U: Tensor) -> Tensor:
    """Part of Δ outside the span of orthonormal columns."""
    return delta - U @ (U.mT @ delta)
