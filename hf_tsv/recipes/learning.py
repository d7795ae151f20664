"""Choices of what is learned from images: coefficients and α."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from hf_tsv.methods.catalogue import METHODS, Method
from hf_tsv.recipes.images import EvaluationTask, listed
from hf_tsv.system import processes
from hf_tsv.system.checks import check_counts, check_number, choice
from hf_tsv.system.errors import UsageError

VALIDATION = "validation"
ALPHAS = "0:2:0.1"
MOST = 1000  # values of α in one search


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


@dataclass(frozen=True)
class AlphaSearch:
    """Candidates for α, the images to choose on, and the result.

    Args:
        tasks (`Mapping[str, str]` or `Sequence`): as in [`Adaptation`]; their split `validation`
            is used unless they name another.
        alphas (`Sequence[float]` or `str`): candidates: numbers, or `"0.5,1,1.5"`, or
            `"FIRST:LAST:STEP"`.
        limit (`int`, *optional*): number of images per task; default: all.
        batch_size (`int`): images at a time.
        images (`tuple[int, ...]`): number of images of each task; a result of the search.
        accuracies (`dict[str, tuple[float, ...]]`): top-1 by task, 0 to 1, one for each α; a
            result of the search.

    Example:
        >>> AlphaSearch({"dtd": "tanganke/dtd"}, "0:1:0.25").alphas
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """

    tasks: tuple[EvaluationTask, ...]
    alphas: tuple[float, ...]
    limit: int | None = None
    batch_size: int = 64
    images: tuple[int, ...] = ()
    accuracies: dict[str, tuple[float, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        tasks = listed(self.tasks, "There are no images to choose α on.")
        tasks = [replace(task, split=task.split or VALIDATION) for task in tasks]
        object.__setattr__(self, "tasks", tuple(tasks))
        given: Any = self.alphas
        alphas = alphas_of(given) if isinstance(given, str) else list(given)
        for alpha in alphas:
            check_number("alpha", alpha)
        if not alphas:
            raise UsageError("No α to choose from.", "Write `alphas=0:2:0.1`.")
        object.__setattr__(self, "alphas", tuple(map(float, alphas)))
        check_counts(limit=self.limit, batch_size=self.batch_size)

    @property
    def means(self) -> list[float]:
        """Mean accuracy over the tasks, 0 to 1, for each α."""
        rows = list(self.accuracies.values())
        return [sum(column) / len(column) for column in zip(*rows, strict=True)]

    @property
    def alpha(self) -> float:
        """Value of α with the best mean; the smallest of several."""
        pairs = zip(self.means, self.alphas, strict=True)
        return max(pairs, key=lambda pair: (pair[0], -pair[1]))[1]

    def to_dict(self) -> dict[str, Any]:
        """Result of the search for a report."""
        return {
            "alpha": self.alpha,
            "alphas": list(self.alphas),
            "mean": self.means,
            "accuracies": {name: list(row) for name, row in self.accuracies.items()},
            "images": {t.name: n for t, n in zip(self.tasks, self.images, strict=True)},
            "splits": {task.name: task.split for task in self.tasks},
        }


def to_learn(
    method: str,
    tasks: Any,
    *,
    alphas: Any = None,
    limit: int | None = None,
    batch_size: int | None = None,
    **descent: Any,
) -> Adaptation | AlphaSearch:
    """Settings of what a method learns from images; arguments of None have their defaults.

    Raises:
        [`UsageError`]: an argument does not suit the method.
    """
    learns = METHODS[choice("method", method, tuple(METHODS))].learns
    search = {"alphas": alphas, "limit": limit}
    for name, value in (search if learns else descent).items():
        if value is not None:
            whose = "not for the method ada" if learns else "for the method ada only"
            raise UsageError(f"`{name}=` is {whose}.", f"Omit `{name}=`.")
    given = {**(descent if learns else search), "batch_size": batch_size}
    given = {name: value for name, value in given.items() if value is not None}
    if learns:
        return Adaptation(tasks, **given)
    return AlphaSearch(tasks, **{"alphas": ALPHAS, **given})


def refuse_no_images(method: Method, adaptation: Adaptation | None) -> None:
    """Refuse a method that learns without images, and images for one that does not."""
    if method.learns and adaptation is None:
        problem = f"The method {method.name} learns from images, and there are none."
        raise UsageError(problem, "Use `tune`, and name images of each task.")
    if adaptation is not None and not method.learns:
        problem = f"The method {method.name} does not learn from images."
        raise UsageError(problem, "Use `method=ada`.")


def refuse_no_search(method: Method, alpha: float | None) -> None:
    """Refuse to choose an α that is given, that the method has not, or in several processes."""
    if alpha is not None:
        raise UsageError("`alpha=` and a search for α cannot be combined.", "Give one.")
    if method.learns or method.alpha is None:
        problem = f"The method {method.name} has no α to choose."
        raise UsageError(problem, "Use `merge` instead.")
    processes.alone("The choice of α", ", then repeat with `alpha=`")


def alphas_of(text: str) -> list[float]:
    """Parse numbers and ranges `FIRST:LAST:STEP`, both ends included, separated by commas.

    Example:
        >>> alphas_of("0:0.3:0.1"), alphas_of("1,0:0.5:0.5")
        ([0.0, 0.1, 0.2, 0.3], [1.0, 0.0, 0.5])
    """
    found: list[float] = []
    for part in text.split(","):
        try:
            numbers = [float(number) for number in part.split(":")]
        except ValueError:
            numbers = []
        if len(numbers) == 1:
            numbers = [numbers[0], numbers[0], 1.0]
        first, last, step = numbers if len(numbers) == 3 else (math.nan, math.nan, math.nan)
        if not all(map(math.isfinite, numbers)) or not (step > 0 and last >= first):
            hint = "Write FIRST:LAST:STEP (0:3:0.1), or 0.5,1,1.5."
            raise UsageError(f"`alphas=` cannot be {text!r}.", hint)
        steps = (last - first) / step + 1e-9
        if steps + len(found) >= MOST:
            raise UsageError(f"{text} gives more than {MOST} values of α.", "Take a larger step.")
        found += [round(first + i * step, 10) for i in range(math.floor(steps) + 1)]
    return found
