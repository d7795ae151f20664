"""The merging methods, one row each; imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from torch import Tensor

    from hf_tsv.methods.interference import Interference

Method = Literal[
    "tsv",
    "ada",
    "low-rank",
    "orthogonal",
    "task-arithmetic",
    "average",
    "ties",
    "consensus",
    "iso-c",
    "iso-cts",
    "tall-mask",
]
METHODS: tuple[str, ...] = get_args(Method)

DEFAULT_ALPHA: dict[Method, float] = {"task-arithmetic": 0.3, "low-rank": 0.3, "consensus": 0.3}
"""α of methods that sum tasks, which add up where they agree; 1 for all others.

It is what task arithmetic takes without validation images (Ilharco et al., ICLR 2023).
"""


@dataclass(frozen=True)
class MergedUpdate:
    """The merged update of one weight and what the decomposition found.

    Args:
        matrix (`Tensor`): M, shape (d_out, d_in), before α.
        ranks (`tuple[int, ...]`): triplets used of each task.
        null_directions (`int`): directions that orthogonalisation left out because the tasks have
            them in common but for rounding (equal or opposite tasks).
        exact (`int`): decompositions that took a full float64 SVD.
        interference ([`Interference`], *optional*): where it was asked for.
    """

    matrix: Tensor
    ranks: tuple[int, ...] = ()
    null_directions: int = 0
    exact: int = 0
    interference: Interference | None = None
