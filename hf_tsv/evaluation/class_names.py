"""Names of the classes of tasks, and their embeddings, by which candidate labels tell a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from pathlib import Path

from torch import Tensor

from hf_tsv.evaluation import data, zero_shot
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.models.building import ZERO_SHOT
from hf_tsv.models.loading import pipeline
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
    if unknown := [name for name in classes if name not in tasks]:
        problem = f"`classes=` has {unknown[0]}, which is no task."
        raise UsageError(problem, f"The tasks are: {', '.join(tasks)}.")
    if templates and not classes:
        problem = "`templates=` are prompts of class names, and there are none."
        raise UsageError(problem, "Give some with `classes=`.")
    prompts = tuple(templates) or EvaluationTask.templates
    found = []
    for task, source in classes.items():
        if isinstance(source, str | PathLike):
            place = fspath(source)
            if place.endswith(TEXT_FILE):
                own = lines(Path(place))
            else:
                data.refuse_not_installed("Reading classes of a dataset")
                own = data.class_names(EvaluationTask.parse(f"{task}={place}"), token=token)
        else:
            own = tuple(source)
        if not own or not all(isinstance(name, str) and name.strip() for name in own):
            problem = f"The classes of {task} are not names."
            raise UsageError(problem, "Give a list of texts, a text file or a dataset.")
        found.append(EvaluationTask(task, task, classes=own, templates=prompts))
    return found


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
    pipe = pipeline(ZERO_SHOT, folder, device=device, progress=show)
    heads = {
        t.name: zero_shot.head(pipe.model, pipe.tokenizer, t.classes, t.templates) for t in tasks
    }
    return {name: head.float().cpu().contiguous() for name, head in heads.items()}
