"""Inputs and settings of an evaluation, checked before any work."""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING

from hf_tsv.evaluation import suites
from hf_tsv.recipes.images import EvaluationTask, listed
from hf_tsv.system.errors import DataError, HfTsvError, LostProcessError, UsageError, debugging
from hf_tsv.system.folders import absolute, check_output_folder
from hf_tsv.system.progress import logger
from hf_tsv.system.text import first_line

if TYPE_CHECKING:
    from hf_tsv.evaluation.model_index import Card


@dataclass(frozen=True)
class Chosen:
    """Tasks, fine-tunes by task, the base of all models, and the suite of some of the tasks."""

    tasks: list[EvaluationTask]
    fine_tunes: dict[str, str]
    base_model: str | None
    suite: suites.Suite | None


@dataclass(frozen=True, kw_only=True)
class Evaluation(Chosen):
    """Inputs and settings of an evaluation, the same in all processes.

    `limit` is the number of images per task, `batch_size` that of images at a time; folder and
    card are those to write.
    """

    ref: str
    revision: str | None
    limit: int | None
    batch_size: int
    folder: Path | None
    card: Card | None


def chosen(
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    suite: str | None,
    references: Mapping[str, str | PathLike[str]] | None,
    base_model: str | PathLike[str] | None,
    templates: Sequence[str] = (),
) -> Chosen:
    """Tasks, fine-tunes and base model of a suite and of the user's own choice."""
    own = None if suite is None else suites.named(suite)
    given = [f"{n}={d}" for n, d in tasks.items()] if isinstance(tasks, Mapping) else tasks
    both = [*(own.tasks if own else ()), *given]
    every = listed(both, "No task given.", templates=templates)
    base = None if base_model is None else fspath(base_model)
    if own is not None:
        references = own.references if references is None else references
        base = base or own.base_model
    names = [task.name for task in every]
    fine_tunes = {name: fspath(ref) for name, ref in (references or {}).items()}
    if unknown := sorted(fine_tunes.keys() - set(names)):
        raise UsageError(
            f"`references=` has {unknown[0]}, which is no task.",
            f"The tasks are: {', '.join(names)}.",
        )
    return Chosen(every, fine_tunes, base, own)


def refuse_no_card(*, card: bool, create_pr: bool) -> None:
    """Refuse a pull request of no card."""
    if create_pr and not card:
        raise UsageError("`create_pr=True` applies to the card.", "Add `card=True`.")


def refuse_no_fine_tune(choice: Chosen) -> None:
    """Refuse tasks without a fine-tune."""
    if without := [task.name for task in choice.tasks if task.name not in choice.fine_tunes]:
        hint = f"Name it as {without[0]}=REF with `references=`."
        raise UsageError(f"The task {without[0]} has no fine-tune.", hint)


@contextmanager
def noted(
    errors: dict[str, str], task: str, prefix: str = "", *, alone: bool = False
) -> Iterator[None]:
    """Note an error of one task, and leave the others alone, unless a process is lost.

    That of a task `alone` is not told: it is the error of the whole run.
    """
    try:
        yield
    except LostProcessError:
        raise
    except HfTsvError as error:
        errors[task] = f"{prefix}{error}"
        if not alone:
            logger.warning("%s%s", prefix, error)


@contextmanager
def in_one_line(task: str) -> Iterator[None]:
    """Turn an exception that no code expects into an error of the task; HF_DEBUG=1 shows it all."""
    try:
        yield
    except HfTsvError:
        raise
    except Exception as error:  # of any library that reads images or computes
        if debugging():
            logger.info(traceback.format_exc())
        problem = f"{task} failed with {type(error).__name__}: {first_line(error)}."
        raise DataError(problem, "HF_DEBUG=1 shows where.") from None


def nothing_measured(errors: Mapping[str, str]) -> DataError:
    """Error of a run in which every task failed; those of several tasks were told already."""
    why = next(iter(errors.values())) if len(errors) == 1 else "the warnings say why."
    return DataError(f"No task could be measured: {why}", "Correct that, and run it again.")


def checked_folder(output: str | Path | None, file: str, *, force: bool) -> Path | None:
    """Folder for the results, refused if it holds something else."""
    if output is None:
        return None
    folder = absolute(Path(output))
    check_output_folder(folder, [file], force=force)
    return folder
