"""The verb `tune`: a merge whose α or coefficients are learned from images."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.recipes.learning import Adaptation, to_learn
from hf_tsv.recipes.settings import Settings
from hf_tsv.reports.merging import MergeReport
from hf_tsv.system.errors import public
from hf_tsv.verbs.merge import merge


@public
def tune(
    checkpoints: str | PathLike[str] | Sequence[str | PathLike[str]],
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    *,
    method: str = Settings.method,
    alphas: Sequence[float] | str | None = None,
    limit: int | None = None,
    steps: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> MergeReport:
    """Merge with the α that scores best on labelled images, or with learned coefficients.

    Args:
        checkpoints (`Sequence[str]`): as in [`merge`].
        tasks (`Mapping[str, str]` or `Sequence`): datasets by the name of the task, or
            `NAME=DATASET` texts, or [`EvaluationTask`]s. α is chosen on their split `validation`
            unless they name another.
        method (`str`): any method of [`merge`] that has an α; or `ada`, which learns a coefficient
            of each task in each weight instead, and uses no labels.
        alphas (`Sequence[float]` or `str`, *optional*): values of α to try: numbers, `"0.5,1,1.5"`,
            or `"FIRST:LAST:STEP"`; default `"0:2:0.1"`. Not for `ada`.
        limit (`int`, *optional*): most images of each task. Not for `ada`.
        steps, learning_rate, seed (*optional*): of Adam, for `ada`, as in [`Adaptation`].
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
        method, tasks, alphas=alphas, limit=limit, steps=steps, learning_rate=learning_rate,
        seed=seed, batch_size=batch_size,
    )  # fmt: skip
    options["adaptation" if isinstance(found, Adaptation) else "tune_alpha"] = found
    return merge(checkpoints, method=method, **options)


_OWN = inspect.signature(tune).parameters
_MERGE = inspect.signature(merge).parameters
_TAKEN = {*_OWN, "more", "recipe", "adaptation", "tune_alpha"}
_OTHERS = [p for n, p in _MERGE.items() if n not in _TAKEN]
tune.__signature__ = inspect.Signature([p for n, p in _OWN.items() if n != "options"] + _OTHERS)  # type: ignore[attr-defined]
