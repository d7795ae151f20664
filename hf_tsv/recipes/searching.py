"""Choice of a method, α and the scales of blocks on labelled images: a grid, and its trials."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from hf_tsv.methods.catalogue import METHODS
from hf_tsv.recipes.images import EvaluationTask, listed
from hf_tsv.recipes.settings import Settings, refuse_no_report
from hf_tsv.system import processes
from hf_tsv.system.checks import check_counts, check_number, choice
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import counted

VALIDATION, TEST = "validation", "test"
ALPHAS = "0:2:0.1"
MOST = 1000  # values of α, or slopes, in one search


@dataclass(frozen=True)
class Trial:
    """One point of a grid, and its result.

    Args:
        method (`str`): the merging method.
        alpha (`float`): α, scale of the merged update.
        slope (`float`): s; α counts 1 − s times in the first block of each tower, 1 + s times in
            the last, and evenly from one to the other between them.
        accuracies (`dict[str, float]`): top-1 by task, 0 to 1; a result of the search.
    """

    method: str
    alpha: float
    slope: float = 0.0
    accuracies: dict[str, float] = field(default_factory=dict)

    @property
    def mean(self) -> float:
        """Mean accuracy over the tasks, 0 to 1."""
        return sum(self.accuracies.values()) / len(self.accuracies)

    def to_dict(self) -> dict[str, Any]:
        """Point, and result if there is one, for a report."""
        point = {"method": self.method, "alpha": self.alpha, "slope": self.slope}
        found = {"mean": self.mean, "accuracies": self.accuracies} if self.accuracies else {}
        return {**point, **found}


@dataclass(frozen=True)
class Search:
    """Grid of methods, values of α and slopes, the images to choose on, and the results.

    Args:
        tasks (`Mapping[str, str]` or `Sequence`): as in [`Adaptation`]; their split `validation`
            is used unless they name another. Test images of a dataset on the Hub are refused.
        alphas (`Sequence[float]` or `str`): values of α: numbers, or `"0.5,1,1.5"`, or
            `"FIRST:LAST:STEP"`.
        limit (`int`, *optional*): number of images per task; default: all.
        batch_size (`int`): images at a time.
        methods (`Sequence[str]` or `str`): methods to compare; none: that of the merge.
        slopes (`Sequence[float]` or `str`): slopes from −1 to 1, written like values of α.
        trials (`int`, *optional*): number of points of the grid to try, drawn at random; default:
            all of them.
        seed (`int`): seed of the draw.
        images (`tuple[int, ...]`): number of images of each task; a result of the search.
        results (`tuple[Trial, ...]`): trials in the order of the grid; a result of the search.

    Example:
        >>> Search({"dtd": "tanganke/dtd"}, "0:1:0.25").alphas
        (0.0, 0.25, 0.5, 0.75, 1.0)
    """

    tasks: tuple[EvaluationTask, ...]
    alphas: tuple[float, ...]
    limit: int | None = None
    batch_size: int = 64
    methods: tuple[str, ...] = ()
    slopes: tuple[float, ...] = (0.0,)
    trials: int | None = None
    seed: int = 0
    images: tuple[int, ...] = ()
    results: tuple[Trial, ...] = ()

    def __post_init__(self) -> None:
        tasks = listed(self.tasks, "There are no images to choose α on.")
        tasks = [replace(task, split=task.split or VALIDATION) for task in tasks]
        for task in tasks:
            if not task.is_local and is_test(str(task.split)):
                raise refused_split(task)
        object.__setattr__(self, "tasks", tuple(tasks))
        object.__setattr__(self, "methods", methods_of(self.methods))
        for name, example in (("alphas", ALPHAS), ("slopes", "0,0.25,0.5")):
            object.__setattr__(self, name, _values(name, getattr(self, name), example))
        for slope in self.slopes:
            if abs(slope) > 1:
                raise UsageError(f"`slopes=` must be from -1 to 1 (got {slope:g}).")
        check_counts(limit=self.limit, batch_size=self.batch_size, trials=self.trials)
        if type(self.seed) is not int or not 0 <= self.seed < 2**63:
            raise UsageError(f"`seed=` must be a whole number, at least 0 (got {self.seed!r}).")

    @property
    def grid(self) -> list[Trial]:
        """All points: by method, then by slope, then by α."""
        return [Trial(m, a, s) for m in self.methods for s in self.slopes for a in self.alphas]

    @cached_property
    def points(self) -> list[Trial]:
        """Points of the grid to try, in its order."""
        grid = self.grid
        if self.trials is None or self.trials >= len(grid):
            return grid
        drawn = random.Random(self.seed).sample(range(len(grid)), self.trials)  # noqa: S311
        return [grid[i] for i in sorted(drawn)]

    @property
    def by_method(self) -> dict[str, list[Trial]]:
        """Trials, or before they are made points, of each method that has some."""
        made = self.results or self.points
        names = dict.fromkeys(trial.method for trial in made)
        return {name: [trial for trial in made if trial.method == name] for name in names}

    @property
    def best_of_each(self) -> list[Trial]:
        """Best trial of each method, the best of all first.

        Of equal means the first method is taken, then the least slope, then the smallest α.
        """
        best = [
            min(trials, key=lambda trial: (-trial.mean, abs(trial.slope), trial.alpha))
            for trials in self.by_method.values()
        ]
        return sorted(best, key=lambda trial: -trial.mean)

    @property
    def best(self) -> Trial:
        """Trial with the best mean."""
        return self.best_of_each[0]

    @property
    def varies_alpha_alone(self) -> bool:
        """Tell whether the grid has one method and no slope."""
        return len(self.methods) < 2 and not any(self.slopes)

    @property
    def told(self) -> str:
        """Best trial, and how many others were tried, as the beginning of a sentence."""
        alphas = _span([trial.alpha for trial in self.results])
        if self.varies_alpha_alone:
            values = counted(len(self.results), "value")
            return f"{named(self.best, alone=True)} was the best of {values} ({alphas})"
        grid = f"{', '.join(self.by_method)}; α {alphas}"
        grid += f"; slope {_span([trial.slope for trial in self.results])}"
        trials = counted(len(self.results), "trial")
        if len(self.results) < len(self.grid):
            trials += f" drawn from {len(self.grid):,}"
        return f"{named(self.best)} was the best of {trials} ({grid})"

    def to_dict(self) -> dict[str, Any]:
        """Trials for a report, and the best of them once they are made."""
        trials = {"trials": [trial.to_dict() for trial in self.results or self.points]}
        splits = {"splits": {task.name: task.split for task in self.tasks}}
        if not self.results:
            return trials | splits
        best, means = self.best, [trial.mean for trial in self.results]
        found: dict[str, Any] = {"method": best.method, "alpha": best.alpha, "slope": best.slope}
        if len(self.methods) == len(self.slopes) == 1:
            found |= {"alphas": [trial.alpha for trial in self.results], "mean": means}
        images = {t.name: n for t, n in zip(self.tasks, self.images, strict=True)}
        trials["best_of_each"] = [trial.to_dict() for trial in self.best_of_each]
        return {**found, **trials, "images": images, **splits}


def is_test(split: str) -> bool:
    """Tell whether a split has test images, by its name."""
    return split.lower().startswith(TEST)


def refused_split(task: EvaluationTask) -> UsageError:
    """Make the error for choosing on images that results are reported on."""
    problem = f"{task.name}: the split {task.split} of {task.dataset} has test images."
    return UsageError(
        f"{problem} What is chosen on them cannot be measured on them.",
        "Choose on others: `split=validation`, or `split=train` with `limit=`.",
    )


def named(trial: Trial, *, alone: bool = False) -> str:
    """Choices of a trial as text; α alone where nothing else was searched."""
    alpha = f"α = {trial.alpha:g}"
    return alpha if alone else f"{trial.method} with {alpha} and slope {trial.slope:g}"


def methods_of(given: Sequence[str] | str) -> tuple[str, ...]:
    """Names of methods, each once; a text has them between commas.

    Example:
        >>> methods_of("tsv,task_arithmetic")
        ('tsv', 'task-arithmetic')
    """
    names = given.split(",") if isinstance(given, str) else given
    found = tuple(dict.fromkeys(choice("method", name, tuple(METHODS)) for name in names))
    if len(found) > 1 and (learned := [name for name in found if METHODS[name].learns]):
        problem = f"The method {learned[0]} learns coefficients, and is compared with no other."
        raise UsageError(problem, f"Use `method={learned[0]}` alone.")
    return found


def settings_of(
    search: Search | None, given: Mapping[str, Any], *, report: bool
) -> tuple[Search | None, Settings]:
    """Search that names its methods, and settings of the first, or of a merge without a search.

    Raises:
        [`UsageError`]: a setting does not suit one of the methods, or α is given.
    """
    if search is None:
        return None, Settings(**given)
    if "method" in given and search.methods:
        problem = "`method=` and the methods of a search cannot be combined."
        raise UsageError(problem, "Give one.")
    names = search.methods or (given.get("method", Settings.method),)
    every = [Settings(**{**given, "method": name}) for name in names]
    for settings in every:
        _refuse_no_search(settings, given.get("alpha"))
        if report:
            refuse_no_report(settings)
    return replace(search, methods=tuple(one.method for one in every)), every[0]


def _refuse_no_search(settings: Settings, alpha: float | None) -> None:
    """Refuse to choose an α that is given, that the method has not, or in several processes."""
    if alpha is not None:
        raise UsageError("`alpha=` and a search for α cannot be combined.", "Give one.")
    if settings.row.learns or settings.row.alpha is None:
        problem = f"The method {settings.method} has no α to choose."
        raise UsageError(problem, "Use `merge` instead.")
    processes.alone("The choice of α", ", then repeat with `alpha=`")


def _values(name: str, given: Any, example: str) -> tuple[float, ...]:
    """Values of a grid, each once."""
    given = [given] if isinstance(given, int | float) else given
    values = numbers_of(given, name) if isinstance(given, str) else list(given)
    for value in values:
        check_number(name, value)
    if not values:
        raise UsageError(f"`{name}=` has no value to try.", f"Write `{name}={example}`.")
    return tuple(dict.fromkeys(map(float, values)))


def _span(values: Sequence[float]) -> str:
    """Least and largest of values."""
    return " … ".join(f"{value:g}" for value in dict.fromkeys((min(values), max(values))))


def numbers_of(text: str, name: str) -> list[float]:
    """Parse numbers and ranges `FIRST:LAST:STEP`, both ends included, separated by commas.

    Example:
        >>> numbers_of("0:0.3:0.1", "alphas"), numbers_of("1,0:0.5:0.5", "alphas")
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
            raise UsageError(f"`{name}=` cannot be {text!r}.", hint)
        steps = (last - first) / step + 1e-9
        if steps + len(found) >= MOST:
            problem = f"`{name}=` has more than {counted(MOST, 'value')} ({text})."
            raise UsageError(problem, "Take a larger step.")
        found += [round(first + i * step, 10) for i in range(math.floor(steps) + 1)]
    return found
