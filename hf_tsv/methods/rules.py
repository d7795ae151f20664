"""Rules: what the function of a method is given of one weight, and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any

from torch import Tensor

from hf_tsv.linalg.choices import Orthogonalizer, Precision, WudiFilter
from hf_tsv.linalg.updates import TaskSingularVectors, Update, matrix_of
from hf_tsv.methods.catalogue import Method
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.text import first_line


@dataclass(frozen=True)
class How:
    """Choices about the computation.

    Args:
        precision (`str`): `"fast"`, certified, or `"exact"`: full float64 SVDs.
        solver (`str`): `"procrustes"` (SVD) or `"whitening"` (U (UᵀU)^(−1/2)), the same matrix.
        keep (`bool`): whether to return the singular vectors that interference is measured from.
        wudi_filter (`str`): filter of the method wudi.
    """

    precision: Precision = "fast"
    solver: Orthogonalizer = "procrustes"
    keep: bool = False
    wudi_filter: WudiFilter = "swudi-a"


@dataclass(frozen=True)
class Updates:
    """Changes of one weight by the tasks, and all that a rule may need to know.

    Args:
        deltas (`Iterable[Tensor | TaskSingularVectors]`): Δ of each task that changed the weight,
            or its triplets if it is stored so. To be gone through once: nobody else keeps them, so
            that a rule decides when their memory is free.
        floors (`Sequence[float]`): noise floor of each of them; empty for a sum or mean.
        tasks (`tuple[int, ...]`): index of each of these tasks; empty for a sum or mean.
        shape (`tuple[int, ...]`): shape of the weight.
        count (`int`): number of all tasks, T.
        rank (`int`): triplets to keep of each task; 0 if none are kept.
        how ([`How`]): choices about the computation.
        coefficients (`Sequence[float]`, *optional*): learned factor of each of these tasks.
        known (`Any`): result of the method's pass before.
    """

    deltas: Iterable[Update]
    floors: Sequence[float]
    tasks: tuple[int, ...]
    shape: tuple[int, ...]
    count: int
    rank: int = 0
    how: How = How()
    coefficients: Sequence[float] | None = None
    known: Any = None

    def matrices(self) -> Iterator[Tensor]:
        """Δ of each of the tasks, in the shape of the weight, one at a time."""
        return map(matrix_of, self.deltas)


@dataclass(frozen=True)
class Measurable:
    """Singular vectors of the tasks, from which interference is measured.

    Args:
        spectra (`Sequence[Tensor]`): all known singular values of each task.
        tasks (`Sequence[TaskSingularVectors]`): triplets used of each task; empty for one task that
            is kept whole.
        orthonormal ([`TaskSingularVectors`], *optional*): those made of them, concatenated.
    """

    spectra: Sequence[Tensor]
    tasks: Sequence[TaskSingularVectors] = ()
    orthonormal: TaskSingularVectors | None = None


@dataclass(frozen=True)
class MergedUpdate:
    """Merged update of one weight, and what was found on the way.

    Args:
        matrix (`Tensor`): M, in the shape of the weight, before α.
        ranks (`tuple[int, ...]`): number of triplets used of each task.
        null_directions (`int`): directions that orthogonalisation left out because the tasks have
            them in common but for rounding (equal or opposite tasks).
        exact (`int`): decompositions that took a full float64 SVD.
        measurable ([`Measurable`], *optional*): there if `How.keep` asks for it.
    """

    matrix: Tensor
    ranks: tuple[int, ...] = ()
    null_directions: int = 0
    exact: int = 0
    measurable: Measurable | None = None


Rule = Callable[[Updates], MergedUpdate]
"""Function of a method that merges one weight."""

PassBefore = Callable[[Iterable[Updates], int], Any]
"""Function that sees all weights, and the number of tasks, before the first is merged. What it
returns goes to other processes too, as a pickle."""


def function_of(method: Method, name: str) -> Any:
    """Import a function that the row of a method names, as `module:function`."""
    try:
        return resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        owner = f" of {method.package}" if method.package else ""
        raise RecipeError(
            f"The method {method.name}{owner} cannot be loaded: {first_line(error)}.",
            "Install what it needs, or choose another method.",
        ) from error


def rule_of(method: Method) -> Rule:
    """Rule of a method, imported when it is first used."""
    rule: Rule = function_of(method, method.rule)
    return rule
