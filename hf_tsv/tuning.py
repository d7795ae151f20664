"""Choice of α on labelled validation images: one merge, evaluated at many α."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_tsv.errors import RecipeError
from hf_tsv.evaluation.data import (
    EvaluationTask,
    LabelledImages,
    check_counts,
    listed,
    load,
    refuse_not_installed,
)
from hf_tsv.evaluation.variants import accuracies
from hf_tsv.models import ZERO_SHOT, load_model, pipeline
from hf_tsv.progress import logger
from hf_tsv.recipe import check_number

VALIDATION = "validation"
MOST = 1000
"""Most values of α in one search."""


@dataclass(frozen=True)
class AlphaSearch:
    """Candidates for α, the images to choose on, and the result.

    Args:
        tasks (`Mapping[str, str]` or `Sequence`): datasets by the name of the task, or
            `NAME=DATASET` texts, or [`EvaluationTask`]s. Their split `validation` is used unless
            they name another.
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
            raise RecipeError("There is no α to choose from.", "Write --tune-alpha 0:2:0.1.")
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
        return max(zip(self.means, self.alphas, strict=True), key=lambda pair: (pair[0], -pair[1]))[
            1
        ]

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


def alphas_of(text: str) -> list[float]:
    """Parse numbers and ranges `FIRST:LAST:STEP`, both ends included, separated by commas.

    Args:
        text (`str`): text from the command line.

    Raises:
        [`RecipeError`]: it is something else.

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
        if len(numbers) != 3 or not all(map(math.isfinite, numbers)):
            raise _no_alphas(text)
        first, last, step = numbers
        if step <= 0 or last < first:
            raise _no_alphas(text)
        steps = (last - first) / step + 1e-9
        if steps + len(found) >= MOST:
            raise RecipeError(f"{text} is more than {MOST} values of α.", "Take a larger step.")
        found += [round(first + i * step, 10) for i in range(math.floor(steps) + 1)]
    return found


def _no_alphas(text: str) -> RecipeError:
    return RecipeError(
        f"The values of α are {text!r}.", "Write FIRST:LAST:STEP (0:3:0.1), or 0.5,1,1.5."
    )


def images_of(wanted: AlphaSearch, token: str | None) -> list[LabelledImages]:
    """Load the images of every task, before the merge, so that a wrong name fails at once.

    Args:
        wanted ([`AlphaSearch`]): search that names the tasks.
        token (`str`, *optional*): token for private datasets.
    """
    refuse_not_installed("Choosing α")
    return [load(task, limit=wanted.limit, token=token) for task in wanted.tasks]


def search(
    wanted: AlphaSearch,
    data: Sequence[LabelledImages],
    merged: Path,
    base: str,
    *,
    device: torch.device,
    token: str | None,
    cache_dir: str | None,
    show: bool,
) -> AlphaSearch:
    """Evaluate W0 + α (W1 − W0) at every α.

    Args:
        wanted ([`AlphaSearch`]): tasks and candidates.
        data (`Sequence[LabelledImages]`): images from [`images_of`].
        merged (`Path`): W1, the merge with α = 1, in float32.
        base (`str`): W0.
        device (`torch.device`): device that computes.
        token (`str`, *optional*): token for private datasets and models.
        cache_dir (`str`, *optional*): cache folder of the Hub client.
        show (`bool`): show bars.

    Returns:
        [`AlphaSearch`]: the same with its results.

    Raises:
        [`HfTsvError`]: a dataset cannot be read, or the base model is no whole CLIP.
    """
    from transformers.utils import logging

    if not show:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    access: Any = {"token": token, "cache_dir": cache_dir, "progress": False}
    pipe = pipeline(
        ZERO_SHOT, merged, base_model=base, dtype=torch.float32, device=str(device), **access
    )
    w0 = load_model(base, kind=ZERO_SHOT, dtype=torch.float32, **access).state_dict()
    model: Any = pipe.model
    changed = [
        (parameter.data, w0[name].to(device), parameter.data.clone())
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter.data, w0[name].to(device))
    ]
    variants = [partial(_put, changed, alpha) for alpha in wanted.alphas]
    found = {
        task.name: tuple(
            accuracies(pipe, variants, task, images, batch_size=wanted.batch_size, show=show)
        )
        for task, images in zip(wanted.tasks, data, strict=True)
    }
    done = replace(wanted, images=tuple(len(images.rows) for images in data), accuracies=found)
    logger.info("α = %g is best: %.2f %% on validation images.", done.alpha, 100 * max(done.means))
    return done


def _put(changed: Sequence[tuple[Tensor, Tensor, Tensor]], alpha: float) -> None:
    for parameter, w0, w1 in changed:
        torch.lerp(w0, w1, alpha, out=parameter)
