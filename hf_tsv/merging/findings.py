"""Findings of a run, collected weight by weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_tsv.checkpoints.storage.tensors import fingerprint
from hf_tsv.methods.interference import Interference
from hf_tsv.runs.reading import Seconds

TUPLES = ("ranks", "tasks", "norms", "factors", "rounded_base", "likeness")


@dataclass(frozen=True)
class Finding:
    """Findings about one weight.

    Args:
        ranks (`tuple[int, ...]`): triplets used of each of `tasks`, the ones that changed it.
        null_directions (`int`): number of directions that tasks share exactly.
        exact (`int`): number of decompositions that took a full SVD.
        frozen (`bool`): planned to change, but equal to the base in every checkpoint.
        norms (`tuple[float, ...]`): ‖Δ‖, Frobenius, of each of `tasks`; `base_norm` is ‖W0‖.
        factors (`tuple[float, ...]`): factor of the update of each of `tasks` in the merge.
        rounded_base (`tuple[tuple[float, float], ...]`): evidence of each of `tasks` that W0 was
            rounded after they were made of it, see `hf_tsv.linalg.grids.evidence_of_rounding`.
        update_norm (`float`): ‖Δ‖, Frobenius, of the merged update, if it is written in 16 bits;
            `lost` is the norm of what rounding W0 + Δ changes.
        likeness (`tuple[tuple[float, ...], ...]`): inner products of their sampled updates.
        digests (`dict[int, dict[str, str]]`): sha256 of each tensor read, by local input;
            −1 is the base. `written` has those of each tensor written.
    """

    label: str
    ranks: tuple[int, ...] = ()
    null_directions: int = 0
    exact: int = 0
    frozen: bool = False
    tasks: tuple[int, ...] = ()
    norms: tuple[float, ...] = ()
    factors: tuple[float, ...] = ()
    base_norm: float = 0.0
    interference: Interference | None = None
    rounded_base: tuple[tuple[float, float], ...] = ()
    update_norm: float = 0.0
    lost: float = 0.0
    likeness: tuple[tuple[float, ...], ...] = ()
    digests: dict[int, dict[str, str]] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> Finding:
        """Finding from the JSON form of its `asdict`."""
        own = entry["interference"]
        return cls(**{
            **entry,
            **{name: _tuples(entry[name]) for name in TUPLES},
            "interference": own and Interference(**{k: _tuples(v) for k, v in own.items()}),
            "digests": {int(index): found for index, found in entry["digests"].items()},
            "seconds": Seconds(**entry["seconds"]),
        })  # fmt: skip


def _tuples(value: Any) -> Any:
    """Turn lists into tuples, at any depth."""
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclass(frozen=True)
class Findings:
    """Findings about all weights, in the order of the plan, and the number of tasks, T."""

    inputs: int
    weights: Sequence[Finding]

    @property
    def shared(self) -> int:
        """Number of weights in which tasks share directions exactly."""
        return sum(found.null_directions > 0 for found in self.weights)

    @property
    def exact(self) -> int:
        """Number of decompositions that took a full SVD."""
        return sum(found.exact for found in self.weights)

    @property
    def frozen(self) -> frozenset[str]:
        """Weights planned to change, but equal to the base in every checkpoint."""
        return frozenset(found.label for found in self.weights if found.frozen)

    @property
    def seconds(self) -> Seconds:
        """Time spent on all weights."""
        return sum((found.seconds for found in self.weights), Seconds())

    def norms(self) -> list[float]:
        """‖Δ‖ of every task over all weights."""
        squares = [0.0] * self.inputs
        for found in self.weights:
            for task, norm in zip(found.tasks, found.norms, strict=True):
                squares[task] += norm * norm
        return [math.sqrt(square) for square in squares]

    def merged_norms(self) -> list[float]:
        """‖Δ‖ of every task over all weights, times its factor in each."""
        squares = [0.0] * self.inputs
        for found in self.weights:
            for task, norm, factor in zip(found.tasks, found.norms, found.factors, strict=True):
                squares[task] += (norm * factor) ** 2
        return [math.sqrt(square) for square in squares]

    def changed(self, task: int) -> tuple[float, float]:
        """‖Δ‖ of a task, and ‖W0‖, over the weights that it changed."""
        norm = base_norm = 0.0
        for found in self.weights:
            if task in found.tasks:
                norm = math.hypot(norm, found.norms[found.tasks.index(task)])
                base_norm = math.hypot(base_norm, found.base_norm)
        return norm, base_norm

    def rounded_base(self, task: int) -> tuple[float, float]:
        """Coefficient of the rounding of W0 in a task's updates, 1 or 0, and its standard error."""
        found = [w.rounded_base[w.tasks.index(task)] for w in self.weights if task in w.tasks]
        weighted, inverse = (sum(part) for part in zip(*found, strict=True)) if found else (0, 0)
        return (weighted / inverse, inverse**-0.5) if inverse else (0.0, math.inf)

    @property
    def lost(self) -> float:
        """Share of the merged update that is lost where it is written in 16 bits, in norm."""
        update = math.hypot(*(found.update_norm for found in self.weights))
        return math.hypot(*(found.lost for found in self.weights)) / update if update else 0.0

    def cosines(self) -> Tensor:
        """Cosines between the updates of all pairs of tasks, from the samples, shape (T, T)."""
        likeness = torch.zeros(self.inputs, self.inputs, dtype=torch.float64)
        for found in self.weights:
            if found.likeness:
                index = torch.tensor(found.tasks)
                likeness[index[:, None], index] += torch.tensor(found.likeness, dtype=torch.float64)
        norms = likeness.diagonal().clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        return likeness / norms / norms[:, None]

    def fingerprint(self, index: int) -> str | None:
        """sha256 of the tensors of one local input, −1 being the base; None for a repository."""
        digests = [found.digests[index] for found in self.weights if index in found.digests]
        if not digests:
            return None
        return fingerprint({name: value for part in digests for name, value in part.items()})
