"""Singular value calibration: what tasks share counts once (arXiv 2602.05536, ICML 2026).

Where tasks have directions in common, a merged update has them several times over. Along each of
its left singular vectors, the response of the merged update is compared with that of each task, and
its singular value is divided by how much too large the response is.

The least ratio is that of the authors' code: 1 for methods that keep tasks apart, whose responses
can then only shrink, and 1/T for sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_tsv.linalg.choices import Precision
from hf_tsv.linalg.products import in_working_precision, product
from hf_tsv.linalg.svd import truncated_svd
from hf_tsv.linalg.updates import TaskSingularVectors, Update


def calibrated(
    merged: Tensor, deltas: Sequence[Update], count: int, least: float, precision: Precision
) -> tuple[Tensor, int]:
    """Σⱼ sⱼ/ηⱼ uⱼ vⱼᵀ of a merged update Σⱼ sⱼ uⱼ vⱼᵀ, with ηⱼ = (1/T) Σᵢ max(κ, ⟨a, aᵢ⟩ / ‖aᵢ‖²).

    a = uⱼᵀ M and aᵢ = uⱼᵀ Δᵢ are the responses of the merged update and of task i. A task that does
    not respond counts κ.

    Args:
        merged (`Tensor`): M, shape (m, n).
        deltas (`Sequence[Tensor | TaskSingularVectors]`): Δ of each task that changed the weight.
        count (`int`): number of all tasks, T.
        least (`float`): κ.
        precision (`str`): how M is decomposed.

    Returns:
        The calibrated update, and how many decompositions took a full SVD.

    Example:
        >>> from hf_tsv.methods.calibration import calibrated
        >>> delta = torch.eye(3)
        >>> calibrated(2 * delta, [delta, delta], 2, 0.5, "fast")[0].diagonal().tolist()
        [1.0, 1.0, 1.0]
    """
    svd = truncated_svd(merged, min(merged.shape), precision=precision)
    ratios = svd.S.new_full((count - len(deltas),), least).sum().expand(svd.S.numel()).clone()
    for delta in deltas:
        ratios += _ratios(svd.U, svd.S, svd.Vh, delta).clamp_min(least)
    return product(svd.U * (svd.S * count / ratios), svd.Vh), int(svd.exact)


def _ratios(U: Tensor, S: Tensor, Vh: Tensor, delta: Update) -> Tensor:
    """⟨a, aᵢ⟩ / ‖aᵢ‖² along each left singular vector; 0 where the task does not respond."""
    if isinstance(delta, TaskSingularVectors):
        own, rows = in_working_precision(delta.U * delta.S), in_working_precision(delta.Vh)
        before = product(U.mT, own)
        inner = (before * product(Vh, rows.mT)).sum(dim=1)
        squares = (product(before, product(rows, rows.mT)) * before).sum(dim=1)
        size = own.norm()
    else:
        wide = in_working_precision(delta)
        response = product(U.mT, wide)
        inner, squares = (response * Vh).sum(dim=1), response.square().sum(dim=1)
        size = wide.norm()
    responds = squares > (torch.finfo(U.dtype).eps * size) ** 2
    return torch.where(responds, S * inner / torch.where(responds, squares, 1), 0)
