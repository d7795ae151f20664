"""The verb `tune`: a merge whose method, α and slope, or coefficients, are chosen by images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.recipes.learning import Adaptation, to_learn
from hf_tsv.recipes.searching import methods_of
from hf_tsv.recipes.settings import Settings
from hf_tsv.reports.merging import MergeReport
from hf_tsv.system.errors import public
from hf_tsv.verbs.merge import merge


@public
def tune(
    checkpoints: str | PathLike[str] | Sequence[str | PathLike[str]],
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    *,
    method: str | Sequence[str] = Settings.method,
    alphas: Sequence[float] | str | None = None,
    slopes: Sequence[float] | str | None = None,
    trials: int | None = None,
    limit: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> MergeReport:
    """Merge with the method, α and slope that score best on labelled images, or with coefficients.

    All points of a grid are tried, or some that are drawn. Each method merges once. With an output,
    the same call resumes a stopped search at the next task of a method.

    Args:
        checkpoints (`Sequence[str]`): as in [`merge`].
        tasks (`Mapping[str, str]` or `Sequence`): datasets by the name of the task, or
            `NAME=DATASET` texts, or [`EvaluationTask`]s. Choices are made on their split
            `validation` unless they name another; test images of the Hub are refused.
        method (`str` or `Sequence[str]`): any method of [`merge`] that has an α, or several to
            compare; or `ada` alone, which learns a coefficient of each task in each weight instead,
            and uses no labels.
        alphas (`Sequence[float]` or `str`, *optional*): values of α to try: numbers, `"0.5,1,1.5"`,
            or `"FIRST:LAST:STEP"`; default `"0:2:0.1"`. Not for `ada`.
        slopes (`Sequence[float]` or `str`, *optional*): slopes s to try, from -1 to 1; α counts
            1 − s times in the first block of each tower, 1 + s times in the last; default 0. Not
            for `ada`.
        trials (`int`, *optional*): number of points of the grid to try; default: all. Not for
            `ada`.
        limit (`int`, *optional*): most images of each task. Not for `ada`.
        steps, learning_rate (*optional*): of Adam, for `ada`, as in [`Adaptation`].
        seed (`int`, *optional*): seed of the draw of the trials, or of `ada`; default 0.
        batch_size (`int`, *optional*): images of each task at a time; default 64, for `ada` 16.
        options: all other arguments of [`merge`], but `recipe`.

    Returns:
        [`MergeReport`]: what was done; `tuning` or `adaptation` has what was learned.

    Raises:
        [`HfTsvError`]: with the reason and what to do; nothing is written or pushed then.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.tune(["org/clip-a", "org/clip-b"], {"a": "org/images-a"}, output="merged")
        ... # doctest: +SKIP
    """
    found = to_learn(
        method, tasks, alphas=alphas, slopes=slopes, trials=trials, limit=limit, steps=steps,
        learning_rate=learning_rate, seed=seed, batch_size=batch_size,
    )  # fmt: skip
    if isinstance(found, Adaptation):
        return merge(checkpoints, method=methods_of(method)[0], adaptation=found, **options)
    return merge(checkpoints, search=found, **options)


_OWN = inspect.signature(tune).parameters
_MERGE = inspect.signature(merge).parameters
_TAKEN = {*_OWN, "more", "recipe", "adaptation", "search"}
_OTHERS = [p for n, p in _MERGE.items() if n not in _TAKEN]
tune.__signature__ = inspect.Signature([p for n, p in _OWN.items() if n != "options"] + _OTHERS)  # type: ignore[attr-defined]
