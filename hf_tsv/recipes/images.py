"""Choices of images: the data set, split and classes of each task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_tsv.system.errors import UsageError
from hf_tsv.system.folders import local_kind

PARQUET = ".parquet"


@dataclass(frozen=True)
class EvaluationTask:
    """Classification task on a dataset.

    Args:
        name (`str`): name of the task.
        dataset (`str`): repository on the Hub (`org/name`), folder, or parquet file.
        revision (`str`, *optional*): revision of a repository.
        config (`str`, *optional*): configuration of a repository or folder that has several.
        split (`str`, *optional*): default: `test`, else `validation`, else `train`.
        image (`str`, *optional*): column of the images; default: the only one there is.
        label (`str`, *optional*): column of the labels, numbers or names; default: the only class
            label.
        classes (`tuple[str, ...]`): names in the order of the labels; default: the dataset's.
        templates (`tuple[str, ...]`): prompts, with `{}` for the name of a class.
    """

    name: str
    dataset: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    image: str | None = None
    label: str | None = None
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @property
    def shown(self) -> str:
        """Name of the dataset, without the path of a folder or file on this machine."""
        on_hub = self.dataset.count("/") == 1 and not self.dataset.startswith((".", "/", "~"))
        return self.dataset if on_hub else Path(self.dataset).name

    @property
    def is_local(self) -> bool:
        """Tell whether the dataset is a folder or file, or a path where one should be."""
        path = self.dataset.startswith((".", "/", "~")) or self.dataset.endswith(PARQUET)
        return path or local_kind(self.dataset) is not None

    def __post_init__(self) -> None:
        try:
            f"{self.name}{self.dataset}".encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"{self.dataset!r} is not valid text.", "Rename it: results are UTF-8."
            ) from None
        if not self.name.isprintable() or not self.name.strip() or not self.dataset.strip():
            raise UsageError(f"The task {self.name!r} is incomplete.", "Write NAME=DATASET.")
        for template in self.templates:
            if template.count("{}") != 1:
                raise UsageError(
                    f"The template {template!r} of {self.name} has no single {{}}.",
                    "Write {} where the name of the class goes.",
                )

    @staticmethod
    def parse(text: str, **choices: Any) -> EvaluationTask:
        """Read `NAME=DATASET`, `NAME=DATASET@REVISION` or `NAME=DATASET:CONFIG`.

        A folder may have a configuration too. The other fields are `choices`.

        Example:
            >>> EvaluationTask.parse("dtd=tanganke/dtd@main").revision
            'main'
        """
        name, equals, dataset = text.partition("=")
        if not equals:
            raise UsageError(f"The task {text!r} names no dataset.", "Write NAME=DATASET.")
        if local_kind(dataset) is not None:
            return EvaluationTask(name, dataset, **choices)
        folder, _, config = dataset.rpartition(":")
        if local_kind(folder) is not None:
            return EvaluationTask(name, folder, config=config or None, **choices)
        found = re.fullmatch(r"([^@:]+)(?::([^@]+))?(?:@(.+))?", dataset)
        if found is None:
            raise UsageError(
                f"{dataset!r} is neither a path nor a dataset.", "Write org/name or a path."
            )
        if found[3] is not None and local_kind(found[1]) is not None:
            problem = f"{found[1]} is here, and has no revision {found[3]!r}."
            raise UsageError(problem, "Omit the revision.")
        return EvaluationTask(name, found[1], found[3], found[2], **choices)


def listed(
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    nothing: str,
    *,
    templates: Sequence[str] = (),
) -> list[EvaluationTask]:
    """Parse tasks in any of the forms that users give; templates are for those given as text.

    If there is none, `nothing` is the message of the error.
    """
    tasks = [tasks] if isinstance(tasks, str | EvaluationTask) else tasks
    named = [f"{n}={d}" for n, d in tasks.items()] if isinstance(tasks, Mapping) else tasks
    choices = {"templates": tuple(templates)} if templates else {}
    found = [
        task if isinstance(task, EvaluationTask) else EvaluationTask.parse(task, **choices)
        for task in named
    ]
    names = [task.name for task in found]
    if not names:
        raise UsageError(nothing, "Name one as NAME=DATASET with `tasks=`.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"The task {twice} is given twice.", "Give each task its own name.")
    return found


def lines(file: Path) -> tuple[str, ...]:
    """Names of classes in a text file, one a line.

    Raises:
        [`UsageError`]: it cannot be read, or has an empty line.
    """
    try:
        names = file.read_text(encoding="utf-8-sig").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.",
            "Give a text file with one class name per line.",
        ) from None
    if not all(name.strip() for name in names):
        raise UsageError(f"{file} is empty or has an empty line.", "Write one class name per line.")
    return tuple(name.strip() for name in names)
