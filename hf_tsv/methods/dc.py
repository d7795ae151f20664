"""DC-Merge: task singular vectors made orthogonal, and only what tasks agree on in them.

Source: DC-Merge (arXiv 2603.05957), as in its authors' code for whole fine-tunes, which leaves out
the smoothing of singular values that the paper begins with.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hf_tsv.linalg.products import product
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.methods import tsv
from hf_tsv.methods.rules import MergedUpdate, Updates

KEPT_SHARE = 0.001
"""Entries kept of each projected update, as a share of k²: the value of its authors."""


def dc(updates: Updates) -> MergedUpdate:
    """DC-Merge: M = Ũ B Ṽ, with the polar factors Ũ and Ṽ of TSV-Merge.

    The truncated update of each task is projected, Mᵢ = Ũᵀ Δᵢ Ṽᵀ, and trimmed to its
    [`KEPT_SHARE`] · k² largest entries. Then the mean is taken, entry by entry, over the tasks
    whose sign is that of the sum. B is the result on the diagonal, in blocks of one task each, and
    0 elsewhere.
    """
    deltas = list(updates.deltas)
    found = tsv.leading(deltas, updates)
    if not found.vectors.rank:
        return MergedUpdate(found.vectors.matrix(), found.ranks, exact=found.exact)
    vectors, ranks, merged = tsv.orthogonalised(deltas, found, updates, form=True)
    assert merged.factors is not None  # they were asked for
    (left, right), exact = merged.factors, found.exact + merged.exact
    null_directions = merged.null_directions
    del deltas, found, merged  # before the projections take their memory
    kept = max(1, int(KEPT_SHARE * min(updates.shape) ** 2))
    spans = [slice(*ends) for ends in pairwise(accumulate(ranks, initial=0))]
    tasks = [_trimmed(_projected(vectors, span, left, right), kept, spans) for span in spans]
    del vectors
    pairs = zip(spans, _agreed(tasks), strict=True)
    matrix = product(torch.cat([product(left[:, span], block) for span, block in pairs], 1), right)
    return MergedUpdate(matrix, ranks, null_directions, exact)


def _projected(vectors: TaskSingularVectors, own: slice, left: Tensor, right: Tensor) -> Tensor:
    """Mᵢ = Ũᵀ Uᵢ diag(Sᵢ) Vhᵢ Ṽᵀ of the task whose triplets are `own`, shape (R, R)."""
    before = product(left.mT, vectors.U[:, own] * vectors.S[own])
    return product(before, product(vectors.Vh[own], right.mT))


def _trimmed(projected: Tensor, kept: int, spans: list[slice]) -> list[Tensor]:
    """Diagonal blocks of a projected update, of which only the largest entries are kept."""
    size = projected.abs()
    if kept < size.numel():
        least = size.flatten().kthvalue(size.numel() - kept + 1).values
        projected = torch.where(size >= least, projected, 0)
    return [projected[span, span].clone() for span in spans]


def _agreed(tasks: list[list[Tensor]]) -> list[Tensor]:
    """Mean of each entry over the tasks whose sign is that of the sum, block by block."""
    blocks = []
    for own in zip(*tasks, strict=True):
        stacked = torch.stack(own)
        agrees = stacked.sign() == stacked.sum(dim=0).sign()
        total, count = torch.where(agrees, stacked, 0).sum(dim=0), agrees.sum(dim=0)
        blocks.append(total / count.clamp(min=1))
    return blocks
