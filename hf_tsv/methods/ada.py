"""AdaMerging on TSV-M: W0 + α Σ cᵢ Mᵢ of one weight, and its gradient."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.methods.rules import Updates
from hf_tsv.methods.tsv import leading, orthogonalised


@dataclass(frozen=True)
class Layer:
    """Weight of a model, called `label` in the plan, as a function of the coefficients.

    The model's own parameters are stacked along dimension 0 if several, and so is W0, `base`. Of
    each of the T' `tasks` that change it `shares` holds α Mᵢ: concatenated singular vectors,
    `ranks` of them, or matrices, shape (T', …).
    """

    label: str
    parameters: tuple[Tensor, ...]
    base: Tensor
    tasks: tuple[int, ...]
    shares: TaskSingularVectors | Tensor
    ranks: tuple[int, ...] = ()

    @torch.no_grad()
    def place(self, coefficients: Tensor) -> None:
        """Set the parameters to W0 + α Σᵢ cᵢ Mᵢ, for coefficients of all tasks, shape (T,)."""
        own = coefficients[list(self.tasks)].to(self.base)
        if isinstance(self.shares, TaskSingularVectors):
            ranks = torch.tensor(self.ranks, device=own.device)
            scaled = self.shares.S * own.repeat_interleave(ranks)
            weight = torch.addmm(self.base, self.shares.U * scaled, self.shares.Vh)
        else:
            weight = self.base + torch.tensordot(own, self.shares, dims=1)
        stacked = len(self.parameters) > 1
        parts = torch.split(weight, [p.shape[0] for p in self.parameters]) if stacked else [weight]
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part)

    @torch.no_grad()
    def gradient(self, tasks: int) -> Tensor:
        """Gradient ∂L/∂cᵢ = α ⟨∂L/∂W, Mᵢ⟩, (T,), on the CPU; 0 where a task changes nothing."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        found = self.base.new_zeros(tasks)
        if len(gradients) < len(self.parameters):  # the loss does not depend on them
            return found.cpu()
        G = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
        if isinstance(self.shares, TaskSingularVectors):
            slopes = (self.shares.U * (G @ self.shares.Vh.mT)).sum(dim=0) * self.shares.S
            own = torch.stack([part.sum() for part in torch.split(slopes, list(self.ranks))])
        else:
            own = self.shares.flatten(1) @ G.flatten()
        found[list(self.tasks)] = own
        return found.cpu()


def orthonormal_vectors(updates: Updates) -> tuple[TaskSingularVectors, tuple[int, ...]]:
    """U⊥, S and V⊥h of one weight, one task after the other, and the number of each task.

    They do not depend on factors of the singular values: M = Σᵢ cᵢ U⊥ᵢ diag(Sᵢ) V⊥hᵢ.
    """
    deltas = list(updates.deltas)
    found = leading(deltas, updates)
    if not found.vectors.rank:
        return found.vectors, found.ranks
    vectors, ranks, product = orthogonalised(deltas, found, updates, form=True)
    assert product.factors is not None  # they were asked for
    return replace(vectors, U=product.factors[0], Vh=product.factors[1]), ranks
