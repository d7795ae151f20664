"""Choices of what is learned from images before a merge: coefficients, or the best of a grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from hf_tsv.methods.catalogue import METHODS, Method
from hf_tsv.recipes.images import EvaluationTask, listed
from hf_tsv.recipes.searching import ALPHAS, Search, methods_of
from hf_tsv.system.checks import check_number
from hf_tsv.system.errors import UsageError


@dataclass(frozen=True)
class Adaptation:
    """Settings for learning coefficients, and the result.

    Args:
        tasks (`Mapping[str, str]` or `Sequence`): datasets by the name of the task, or
            `NAME=DATASET` texts, or [`EvaluationTask`]s. Their labels are not used.
        steps (`int`): number of Adam steps.
        learning_rate (`float`): Adam learning rate.
        batch_size (`int`): images of each task in a step.
        seed (`int`): seed of the order of the images.
        images (`tuple[int, ...]`): number of images of each task; a result of learning.
        entropy (`tuple[float, ...]`): mean entropy of predictions before and after, in nats; a
            result of learning.

    Example:
        >>> Adaptation({"dtd": "tanganke/dtd"}).tasks[0].dataset
        'tanganke/dtd'
    """

    tasks: tuple[EvaluationTask, ...]
    steps: int = 300
    learning_rate: float = 2e-3
    batch_size: int = 16
    seed: int = 0
    images: tuple[int, ...] = ()
    entropy: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        tasks = tuple(listed(self.tasks, "There are no images to learn from."))
        object.__setattr__(self, "tasks", tasks)
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**63:
                raise UsageError(
                    f"`{name}=` must be a whole number, at least {least} (got {value!r})."
                )
        check_number("learning_rate", self.learning_rate)
        rate = float(self.learning_rate)
        if not rate > 0:
            raise UsageError(f"`learning_rate=` must be above 0 (got {rate:g}).")
        object.__setattr__(self, "learning_rate", rate)

    def to_dict(self) -> dict[str, Any]:
        """Settings and result for a recipe."""
        tasks = [
            {
                f.name: list(value) if isinstance(value, tuple) else value
                for f in fields(EvaluationTask)
                if (value := getattr(task, f.name)) != f.default
            }
            for task in (replace(task, dataset=task.shown) for task in self.tasks)
        ]
        found = {"images": list(self.images), "entropy": list(self.entropy)}
        return {**asdict(self), "tasks": tasks, **found}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Adaptation:
        """Adaptation with its result, from the form of [`to_dict`].

        Raises:
            [`UsageError`]: the content does not have that form.
        """
        entries: list[dict[str, Any]] = [
            {n: tuple(v) if isinstance(v, list) else v for n, v in item.items()}
            for item in content["tasks"]
        ]
        tasks = tuple(EvaluationTask(**entry) for entry in entries)
        found = Adaptation(**{**content, "tasks": tasks})
        found = replace(found, images=tuple(found.images), entropy=tuple(found.entropy))
        for number in (*found.images, *found.entropy):
            check_number("A number of the adaptation", number)
        if len(found.images) != len(tasks) or len(found.entropy) != 2:
            problem = "The adaptation does not say what was found for each task."
            raise UsageError(problem, "Use the recipe as it was written.")
        return found


def to_learn(
    method: Sequence[str] | str,
    tasks: Any,
    *,
    alphas: Any = None,
    slopes: Any = None,
    trials: int | None = None,
    limit: int | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    **descent: Any,
) -> Adaptation | Search:
    """Settings of what is learned from images; arguments of None have their defaults.

    Raises:
        [`UsageError`]: an argument does not suit the method.
    """
    methods = methods_of(method)
    learns = any(METHODS[name].learns for name in methods)
    search = {"alphas": alphas, "slopes": slopes, "trials": trials, "limit": limit}
    for name, value in (search if learns else descent).items():
        if value is not None:
            whose = "not for the method ada" if learns else "for the method ada only"
            raise UsageError(f"`{name}=` is {whose}.", f"Omit `{name}=`.")
    if seed is not None and not learns and trials is None:
        problem = "`seed=` draws points of the grid, and all are tried."
        raise UsageError(problem, "Omit `seed=`, or add `trials=`.")
    given = {**(descent if learns else search), "seed": seed, "batch_size": batch_size}
    given = {name: value for name, value in given.items() if value is not None}
    if learns:
        return Adaptation(tasks, **given)
    return Search(tasks, **{"alphas": ALPHAS, **given, "methods": methods})


def refuse_no_images(method: Method, adaptation: Adaptation | None) -> None:
    """Refuse a method that learns without images, and images for one that does not."""
    if method.learns and adaptation is None:
        problem = f"The method {method.name} learns from images, and there are none."
        raise UsageError(problem, "Use `tune`, and name images of each task.")
    if adaptation is not None and not method.learns:
        problem = f"The method {method.name} does not learn from images."
        raise UsageError(problem, "Use `method=ada`.")
