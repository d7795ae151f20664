"""Inputs and settings of an evaluation, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from hf_tsv.evaluation import model_index, suites
from hf_tsv.recipes.images import EvaluationTask, listed
from hf_tsv.system.errors import RecipeError

RESULTS_FILE = "evaluation.json"


@dataclass(frozen=True)
class Evaluation:
    """Inputs and settings of an evaluation, the same in all processes.

    Args:
        ref (`str`): the model.
        revision (`str`, *optional*): commit sha; None for a folder.
        tasks (`list[EvaluationTask]`): all tasks.
        fine_tunes (`dict[str, str]`): fine-tune of each task that has one.
        suite ([`suites.Suite`], *optional*): suite of tasks.
        base_model (`str`, *optional*): base of all models.
        limit (`int`, *optional*): number of images per task.
        batch_size (`int`): images at a time.
        folder (`Path`, *optional*): folder to write.
        card ([`model_index.Card`], *optional*): card to write.
    """

    ref: str
    revision: str | None
    tasks: list[EvaluationTask]
    fine_tunes: dict[str, str]
    suite: suites.Suite | None
    base_model: str | None
    limit: int | None
    batch_size: int
    folder: Path | None
    card: model_index.Card | None


@dataclass(frozen=True)
class Chosen:
    """Choice of tasks and models.

    Args:
        tasks (`list[EvaluationTask]`): all tasks.
        fine_tunes (`dict[str, str]`): fine-tune of each task that has one.
        base_model (`str`, *optional*): base of all models.
        suite ([`suites.Suite`], *optional*): suite that some of the tasks come from.
    """

    tasks: list[EvaluationTask]
    fine_tunes: dict[str, str]
    base_model: str | None
    suite: suites.Suite | None


def chosen(
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    suite: str | None,
    references: Mapping[str, str | PathLike[str]] | None,
    base_model: str | PathLike[str] | None,
    templates: Sequence[str] = (),
) -> Chosen:
    """Tasks, fine-tunes and base model of a suite and of the user's own choice.

    Args:
        tasks (`Mapping[str, str]` or `Sequence`): tasks in a form that [`listed`] takes.
        suite (`str`, *optional*): suite with further tasks.
        references (`Mapping[str, str]`, *optional*): fine-tunes; default: those of the suite.
        base_model (`str`, *optional*): default: that of the suite.
        templates (`Sequence[str]`): prompts of tasks that are given as text.

    Raises:
        [`RecipeError`]: there is no task, or no such suite, or a reference without its task.
    """
    own = None if suite is None else suites.named(suite)
    given = [f"{n}={d}" for n, d in tasks.items()] if isinstance(tasks, Mapping) else tasks
    of_suite = () if own is None else own.tasks
    nothing = "There is nothing to evaluate on."
    every = listed([*of_suite, *given], nothing, templates=templates)
    base = None if base_model is None else fspath(base_model)
    if own is not None:
        references = own.references if references is None else references
        base = base or own.base_model
    names = [task.name for task in every]
    if unknown := sorted((references or {}).keys() - set(names)):
        raise RecipeError(
            f"There is a reference for {unknown[0]}, and no such task.",
            f"The tasks are {', '.join(names)}.",
        )
    fine_tunes = {name: fspath(ref) for name, ref in (references or {}).items()}
    return Chosen(every, fine_tunes, base, own)
