"""Scores of tasks by the residuals of class tokens, and the tasks chosen by them, in float32.

The updates of a fine-tune respond to the inputs it was trained on: the class token of an image of
its task lies nearer to the span of the right singular vectors than that of other images. Source:
Crisostomi et al., "MASS: MoErging through Adaptive Subspace Selection" (arXiv 2504.05342), which
looks at one layer of the merged model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_SPREAD = 1e-6
"""Standard deviation of residuals, which are 0 to 1, below which a layer tells no tasks apart."""


@dataclass(frozen=True)
class Route:
    """Tasks that images belong to.

    Args:
        scores (`Tensor`): share of each task, shape (images, tasks), float32; the sum is 1.
        chosen (`list[tuple[int, ...]]`): places of the tasks of each image, in ascending order.
        names (`tuple[str, ...]`): names of the tasks.
    """

    scores: Tensor
    chosen: list[tuple[int, ...]]
    names: tuple[str, ...]

    @property
    def tasks(self) -> list[tuple[str, ...]]:
        """Names of the tasks of each image."""
        return [tuple(self.names[i] for i in own) for own in self.chosen]


def residuals(tokens: Tensor, directions: Tensor) -> Tensor:
    """‖x − VᵀV x‖ for every image and task, shape (images, tasks), where x has length 1.

    Args:
        tokens (`Tensor`): class tokens at the input of one layer, shape (images, d_in).
        directions (`Tensor`): right singular vectors of the tasks, shape (tasks, r, d_in).
    """
    x = torch.nn.functional.normalize(tokens.float(), dim=-1)
    V = directions.float()
    inside = torch.einsum("nd,trd->tnr", x, V) @ V
    apart: Tensor = torch.linalg.vector_norm(x - inside, dim=-1)
    return apart.mT


def label_evidence(labels: Tensor, classes: Sequence[Tensor | None], temperature: float) -> Tensor:
    """Logarithm of the share of candidate labels that belong to each task, shape (tasks,).

    A label belongs to tasks by the softmax of the cosines to the nearest class of each. A task
    whose classes are not known counts as near as the nearest one.

    Args:
        labels (`Tensor`): embeddings of candidate labels, shape (labels, d).
        classes (`Sequence[Tensor]`): embeddings of class names by task, each (classes, d), of
            length 1; None where they are not known.
        temperature (`float`): divides the cosines.
    """
    x = torch.nn.functional.normalize(labels.float(), dim=-1)
    known = [(x @ own.float().mT).amax(dim=1) for own in classes if own is not None]
    if not known:
        return x.new_zeros(len(classes))
    best, near = torch.stack(known).amax(dim=0), iter(known)
    fits = torch.stack([best if own is None else next(near) for own in classes])
    return (fits / temperature).log_softmax(dim=0).logsumexp(dim=1) - math.log(len(x))


def scores(
    residuals_by_layer: Sequence[Tensor], temperature: float, evidence: Tensor | None = None
) -> Tensor:
    """Softmax of the negative sum of the layers' residuals, standardised over the tasks.

    Evidence of the tasks, from [`label_evidence`], is added to the logarithms of the scores.
    """
    R = torch.stack(list(residuals_by_layer))
    spread = R.std(dim=-1, correction=0, keepdim=True)
    standard = (R - R.mean(dim=-1, keepdim=True)) / spread
    standard = torch.where(spread < LEAST_SPREAD, 0.0, standard)
    logits = -standard.sum(dim=0) / temperature
    return torch.softmax(logits if evidence is None else logits + evidence, dim=-1)


def choose(found: Tensor, threshold: float, max_tasks: int) -> list[tuple[int, ...]]:
    """Tasks of each image: those from a score on, at most so many, and always the first.

    Example:
        >>> choose(torch.tensor([[0.5, 0.1, 0.4], [0.2, 0.2, 0.2]]), 0.25, 3)
        [(0, 2), (0,)]
    """
    order = found.argsort(dim=-1, descending=True, stable=True)[:, :max_tasks].tolist()
    values = found.tolist()
    return [
        tuple(sorted(i for n, i in enumerate(own) if n == 0 or row[i] >= threshold))
        for own, row in zip(order, values, strict=True)
    ]
