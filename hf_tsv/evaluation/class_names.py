"""Names of the classes of tasks, and their embeddings, by which candidate labels tell a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer

from hf_tsv.checkpoints.formats.routing import MOST_CLASSES
from hf_tsv.evaluation import data, zero_shot
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.models.building import ZERO_SHOT, understood
from hf_tsv.models.loading import load_model
from hf_tsv.recipes.images import EvaluationTask, lines
from hf_tsv.system.errors import UsageError

TEXT_FILE = ".txt"

Source = str | PathLike[str] | Sequence[str]
"""Names of classes, or where they are: a text file (`.txt`) with one a line, or a dataset."""


def named(
    classes: Mapping[str, Source],
    tasks: Sequence[str],
    templates: Sequence[str] = (),
    token: str | None = None,
) -> list[EvaluationTask]:
    """Tasks with the names of their classes, read from wherever they are.

    Args:
        classes: names, or their source, by task.
        tasks: names of all tasks.
        templates: prompts, with `{}` for the name of a class.
        token: for datasets on the Hub.

    Raises:
        [`HfTsvError`]: names cannot be read, or there is no such task.
    """
    if not isinstance(classes, Mapping):
        raise UsageError("`classes=` are not names by task.", "Give a dict of lists of texts.")
    if unknown := [name for name in classes if name not in tasks]:
        problem = f"`classes=` names {unknown[0]}, which is not one of the tasks."
        raise UsageError(problem, f"The tasks are: {', '.join(tasks)}.")
    if templates and not classes:
        problem = "`templates=` are prompts of class names, and there are none."
        raise UsageError(problem, "Give some with `classes=`.")
    prompts = (templates,) if isinstance(templates, str) else tuple(templates)
    return [
        EvaluationTask(
            name, name, classes=_names(name, source, token),
            templates=prompts or EvaluationTask.templates,
        )
        for name, source in classes.items()
    ]  # fmt: skip


def _names(task: str, source: Source, token: str | None) -> tuple[str, ...]:
    """Names of the classes of one task, checked."""
    if isinstance(source, str | PathLike):
        place = fspath(source)
        if place.lower().endswith(TEXT_FILE):
            names = lines(Path(place).expanduser())
        else:
            data.refuse_not_installed("Reading classes of a dataset")
            names = data.class_names(EvaluationTask.parse(f"{task}={place}"), token=token)
    else:
        names = tuple(source) if isinstance(source, list | tuple) else ()
    if not 0 < len(names) <= MOST_CLASSES or not all(map(_is_name, names)):
        problem = f"The classes of {task} must be 1 to {MOST_CLASSES:,} texts that are not blank."
        raise UsageError(problem, "Give a list of texts, a text file (.txt) or a dataset.")
    return names


def _is_name(name: Any) -> bool:
    """Tell whether something is a text that a file can hold."""
    if not isinstance(name, str) or not name.strip():
        return False
    return name.encode(errors="ignore").decode() == name


def embedded(
    folder: Path, tasks: Sequence[EvaluationTask], device: AnyDevice | None, *, show: bool
) -> dict[str, Tensor]:
    """Embeddings of class names, shape (classes, d), float32, of length 1, by task.

    Args:
        folder: a `CLIPModel` with its tokenizer.
        tasks: tasks with the names of their classes.
        device: where its text tower computes.
        show: whether progress is shown.
    """
    model = load_model(folder, kind=ZERO_SHOT, device=device, progress=show)
    with understood(folder.name):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    heads = {t.name: zero_shot.head(model, tokenizer, t.classes, t.templates) for t in tasks}
    return {name: head.float().cpu().contiguous() for name, head in heads.items()}
