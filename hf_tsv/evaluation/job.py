"""What an evaluation is of, checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path

from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.checkpoints.writer import check_output_folder
from hf_tsv.errors import RecipeError
from hf_tsv.evaluation import model_index, suites
from hf_tsv.evaluation.data import EvaluationTask

RESULTS_FILE = "evaluation.json"
NEEDED = {"datasets": "datasets", "PIL": "pillow", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class Job:
    """What an evaluation is of, the same in all processes.

    Args:
        ref (`str`): the model.
        revision (`str`, *optional*): commit sha; None for a folder.
        tasks (`list[EvaluationTask]`): all of them.
        fine_tunes (`dict[str, str]`): by task.
        suite ([`suites.Suite`], *optional*): of tasks.
        base_model (`str`, *optional*): of all models.
        limit (`int`, *optional*): images of each task.
        batch_size (`int`): images at a time.
        folder (`Path`, *optional*): to write.
        card ([`model_index.Card`], *optional*): to write.
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
    """Everything that can be refused before any work, checked."""
    _check_installed()
    if create_pr and not card:
        raise RecipeError("create_pr is about the card.", "Add --card.")
    _check_numbers(limit=limit, batch_size=batch_size)
    chosen = None if suite is None else suites.named(suite)
    listed = _listed(tasks, templates, chosen)
    base = None if base_model is None else fspath(base_model)
    if chosen is not None:
        references = chosen.references if references is None else references
        base = base or chosen.base_model
    fine_tunes = _fine_tunes(references or {}, listed)
    folder = None if output is None else _checked_folder(Path(output), force=force)
    pinned = pin(parse(reference, subfolder), token=token, cache_dir=cache_dir)
    to_write = model_index.open_card(pinned, token=token, create_pr=create_pr) if card else None
    return Job(
        pinned.ref, pinned.revision, listed, fine_tunes, chosen, base, limit, batch_size, folder,
        to_write,
    )  # fmt: skip


def _listed(
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    templates: Sequence[str],
    suite: suites.Suite | None,
) -> list[EvaluationTask]:
    named = [f"{n}={d}" for n, d in tasks.items()] if isinstance(tasks, Mapping) else list(tasks)
    choices = {"templates": tuple(templates)} if templates else {}
    listed = [] if suite is None else list(suite.tasks)
    for task in named:
        parsed = task if isinstance(task, EvaluationTask) else None
        listed.append(parsed or EvaluationTask.parse(str(task), **choices))
    names = [task.name for task in listed]
    if not names:
        raise RecipeError(
            "There is nothing to evaluate on.", "Name a task or suite: --task NAME=DATASET."
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"The task {twice} is given twice.", "Give each its own name.")
    return listed


def _fine_tunes(
    references: Mapping[str, str | PathLike[str]], tasks: Sequence[EvaluationTask]
) -> dict[str, str]:
    if unknown := sorted(references.keys() - {task.name for task in tasks}):
        raise RecipeError(
            f"There is a reference for {unknown[0]}, and no such task.",
            f"The tasks are {', '.join(task.name for task in tasks)}.",
        )
    return {name: fspath(ref) for name, ref in references.items()}


def _checked_folder(output: Path, *, force: bool) -> Path:
    folder = output.expanduser().absolute()
    check_output_folder(folder, [RESULTS_FILE], force=force)
    return folder


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise RecipeError(f"{name} is {number!r}.", "Give a whole number from 1 on.")


def _check_installed() -> None:
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise RecipeError(
            f"Evaluation needs {', '.join(missing)}.", "Run `pip install 'hf-tsv[eval]'`."
        )
