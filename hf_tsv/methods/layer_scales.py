"""Factors of layers, for any method: LiNeS and LARV.

Both keep early layers nearer to the base model, which hold what all tasks have in common. LiNeS
scales what is merged, by depth; LARV scales each task before, by depth and by what its update is
like.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_tsv.linalg.products import for_each, in_working_precision, product, working_dtype
from hf_tsv.linalg.updates import Update, dense, matrix_of
from hf_tsv.methods.sums import sum_update

STEEPNESS, DEPTH_POWER = 3.0, 0.5
"""Constants of LARV, as published."""


@dataclass(frozen=True)
class Layers:
    """Factors of the merged update by depth.

    Args:
        start (`float`): factor in the first block, and outside of blocks.
        depths (`dict[str, float]`): depth of each weight in a block, 0 to 1, by its label.
    """

    start: float
    depths: Mapping[str, float]

    def factor(self, label: str, alpha: float) -> float:
        """Factor of the merged update of a weight."""
        return self.start + alpha * self.depths.get(label, 0.0)


def sum_of(deltas: Sequence[Update]) -> Tensor:
    """Σᵢ Δᵢ, in float32."""
    return sum_update(map(matrix_of, deltas))


def size(update: Tensor) -> float:
    """‖·‖₁ of an update of any shape."""
    return float(update.abs().sum(dtype=working_dtype(update)))


def lines(sizes: Iterable[tuple[float, float]], tasks: int, depths: Mapping[str, float]) -> Layers:
    """LiNeS (Wang et al., ICLR 2025, arXiv 2410.17146): a + α l/(L − 1) in block l of L.

    a = ‖Σᵢ Δᵢ‖₁ / (T ‖M‖₁) over all weights, as in the authors' code, which also scales by `a`
    what is in no block.

    Args:
        sizes (`Iterable[tuple[float, float]]`): ‖Σᵢ Δᵢ‖₁ and ‖M‖₁ of each weight.
        tasks (`int`): T.
        depths (`Mapping[str, float]`): l/(L − 1) by label of a weight in a block.
    """
    pairs = list(sizes)
    summed, merged = (math.fsum(pair[i] for pair in pairs) for i in (0, 1))
    return Layers(summed / (tasks * merged) if merged else 1 / tasks, dict(depths))


@dataclass(frozen=True)
class Likeness:
    """Measures, for LARV, of the update of one task in one weight.

    Args:
        contrast (`float`): e, effective rank of W0 over that of Δ.
        commutator (`float`): c, how far W0 and Δ are from commuting, 0 to 2.
    """

    contrast: float
    commutator: float


def likenesses(base: Tensor, deltas: Sequence[Update]) -> list[Likeness]:
    """Measure updates (m, n) of a weight W0, in float64.

    With k × k matrices alone, k the shorter side: where m ≤ n, P = W0 Δᵀ gives both commutators,
    ‖W0 Δᵀ − Δ W0ᵀ‖² = 2 ‖P‖² − 2 tr(P P) and
    ‖W0ᵀ Δ − Δᵀ W0‖² = 2 ⟨W0 W0ᵀ, Δ Δᵀ⟩ − 2 tr(P P).
    """
    turned = base.shape[0] > base.shape[1]  # the sum of both is the same for transposes
    w0 = in_working_precision(base.mT if turned else base).contiguous()
    gram = product(w0, w0.mT)
    rank, norm = _effective_rank(gram), math.sqrt(float(gram.trace()))

    def measured(delta: Update) -> Likeness:
        change = dense(delta)
        change = (change.mT if turned else change).contiguous()
        own, mixed = product(change, change.mT), product(w0, change.mT)
        size = math.sqrt(float(own.trace()))
        crossed = float((mixed * mixed.mT).sum())
        squares = float(mixed.square().sum()), float((gram * own).sum())
        first, second = (math.sqrt(max(0.0, 2 * (square - crossed))) for square in squares)
        commutator = (first + second) / (2 * norm * size) if norm and size else 0.0
        return Likeness(rank / max(_effective_rank(own), 1.0), commutator)

    return for_each(measured, list(deltas))


def _effective_rank(gram: Tensor) -> float:
    """Effective rank exp(H) of a matrix A of A Aᵀ, H the entropy of σ²/Σσ²."""
    values = torch.linalg.eigvalsh(gram).clamp_min(0)
    if not (total := float(values.sum())):
        return 1.0
    shares = values / total
    return math.exp(-float(torch.special.xlogy(shares, shares).sum()))


def larv(found: Mapping[str, Likeness], depths: Mapping[str, float]) -> dict[str, float]:
    """LARV (arXiv 2602.09413): the factor 1 + ½ tanh(3 (q − 1)) of one task in each weight.

    q = e √d / (softplus(ĉ) + 1) with d = (l + 1)/L in block l of L, and ĉ the commutator c in
    standard deviations from its mean over the weights. The equations are from secondary sources;
    no code of the authors was at hand.

    Args:
        found (`Mapping[str, Likeness]`): what was measured of the task, by label of a weight.
        depths (`Mapping[str, float]`): d of each of these weights.
    """
    values = [one.commutator for one in found.values()]
    mean = math.fsum(values) / max(len(values), 1)
    spread = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / max(len(values), 1))
    scales = {}
    for label, one in found.items():
        standard = (one.commutator - mean) / spread if spread else 0.0
        conflict = math.log1p(math.exp(-abs(standard))) + max(standard, 0.0)  # softplus
        quality = one.contrast * depths[label] ** DEPTH_POWER / (conflict + 1)
        scales[label] = 1 + math.tanh(STEEPNESS * (quality - 1)) / 2
    return scales
