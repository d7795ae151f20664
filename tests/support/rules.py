"""Rules of the methods, called with a few task matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from hf_tsv.linalg.choices import Orthogonalizer, Precision
from hf_tsv.linalg.svd import truncated_svd
from hf_tsv.linalg.updates import TaskSingularVectors, Update
from hf_tsv.methods import tsv
from hf_tsv.methods.rules import How, MergedUpdate, Rule, Updates


def updates_of(
    deltas: Sequence[Update],
    rank: int,
    *,
    floors: Sequence[float] | None = None,
    solver: Orthogonalizer = "procrustes",
    precision: Precision = "fast",
    keep: bool = False,
    count: int | None = None,
    known: Any = None,
) -> Updates:
    """What the pipeline gives to a rule, with noise floors of 0 by default."""
    return Updates(
        list(deltas),
        floors or [0.0] * len(deltas),
        tuple(range(len(deltas))),
        tuple(deltas[0].shape),
        count or len(deltas),
        rank,
        How(precision, solver, keep),
        known=known,
    )


def merge(
    deltas: Sequence[Update], rank: int, *, rule: Rule = tsv.orthogonal, **options: Any
) -> MergedUpdate:
    """Merge by a rule; the options are those of [`updates_of`]."""
    return rule(updates_of(deltas, rank, **options))


def decompose(delta: Tensor, rank: int, floor: float = 0.0) -> TaskSingularVectors:
    """Leading triplets of one task matrix."""
    svd = truncated_svd(delta, rank, floor)
    return TaskSingularVectors(svd.U, svd.S, svd.Vh)
