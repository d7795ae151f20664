"""Inputs and settings of an evaluation, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path

from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.evaluation import model_index, suites
from hf_tsv.evaluation.data import refuse_not_installed
from hf_tsv.recipes.images import EvaluationTask, listed
from hf_tsv.system.checks import check_counts
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.folders import absolute, check_output_folder

RESULTS_FILE = "evaluation.json"


@dataclass(frozen=True)
class Job:
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


def checked_job(
    reference: str,
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    suite: str | None,
    references: Mapping[str, str | PathLike[str]] | None,
    templates: Sequence[str],
    base_model: str | PathLike[str] | None,
    output: str | Path | None,
    limit: int | None,
    batch_size: int,
    token: str | None,
    cache_dir: str | None,
    subfolder: str | None,
    *,
    force: bool,
    card: bool,
    create_pr: bool,
) -> Job:
    """Check everything that can be refused before any work."""
    refuse_not_installed("Evaluation", sklearn="scikit-learn")
    if create_pr and not card:
        raise RecipeError("create_pr is about the card.", "Add --card.")
    check_counts(limit=limit, batch_size=batch_size)
    found = chosen(tasks, suite, references, base_model, templates)
    folder = None if output is None else _checked_folder(Path(output), force=force)
    pinned = pin(parse(reference, subfolder), token=token, cache_dir=cache_dir)
    to_write = model_index.open_card(pinned, token=token, create_pr=create_pr) if card else None
    return Job(
        pinned.ref, pinned.revision, found.tasks, found.fine_tunes, found.suite, found.base_model,
        limit, batch_size, folder, to_write,
    )  # fmt: skip


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


def _checked_folder(output: Path, *, force: bool) -> Path:
    folder = absolute(output)
    check_output_folder(folder, [RESULTS_FILE], force=force)
    return folder
