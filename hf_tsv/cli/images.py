"""Options of the commands that classify images, and how their values are read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hf_tsv.system.errors import RecipeError

if TYPE_CHECKING:
    from hf_tsv.recipes.images import EvaluationTask


PANEL = "What is classified"

# `Optional` because typer reads the annotations at run time on Python 3.10.
Tasks = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        metavar="NAME=DATASET",
        help="Labelled images: a dataset on the Hub (org/name, org/name:config@revision), a folder"
        " of images, or a parquet file; repeatable.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Suite = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="NAME",
        help="Tasks, base model and fine-tunes of a paper, beside the rows it reports:"
        " vit-b-32-8; b-16 or l-14, 14 or 20 tasks.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
FineTunes = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        "--reference",
        metavar="NAME=REF",
        help="The fine-tune of a task, which accuracy is compared with; repeatable."
        " [default: those of the suite]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Split = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        help="Of the datasets of --task. [default: test, else validation, else train]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
ImageColumn = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="COLUMN",
        help="Images of --task. [default: the only column of images]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
LabelColumn = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        metavar="COLUMN",
        help="Labels of --task. [default: the only column of class labels]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Classes = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        metavar="FILE",
        help="Names of the classes of a single --task, one a line, in the order of the labels."
        " [default: those of the dataset]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Template = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(
        help="Prompt of --task, with {} for the name of a class; repeatable."
        " [default: a photo of a {}.]",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]
Limit = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(
        help="So many images of each task, for a quick look.",
        rich_help_panel=PANEL,
        show_default=False,
    ),
]


def tasks_of(
    task: Sequence[str] | None,
    split: str | None,
    image_column: str | None,
    label_column: str | None,
    classes: Path | None,
    template: Sequence[str] | None,
) -> list[EvaluationTask]:
    """What `--task` names, with the options that say more of it."""
    choices: dict[str, Any] = {"split": split, "image": image_column, "label": label_column}
    if template:
        choices["templates"] = tuple(template)
    if classes is not None:
        choices["classes"] = _names(classes, task or [])
    if not task:
        return []
    from hf_tsv.recipes.images import EvaluationTask  # a second, for transformers

    return [EvaluationTask.parse(text, **choices) for text in task]


def named(text: str) -> tuple[str, str]:
    """A `--reference`: the name of its task, and the checkpoint."""
    name, equals, ref = text.partition("=")
    if not equals or not name or not ref:
        raise RecipeError(f"--reference is {text!r}.", "Write NAME=REF.")
    return name, ref


def _names(file: Path, tasks: Sequence[str]) -> tuple[str, ...]:
    """Lines of a file."""
    if len(tasks) != 1:
        raise RecipeError("--classes is for a single --task.", "Name one task at a time.")
    try:
        names = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{file} cannot be read: {getattr(error, 'strerror', None) or 'it is not UTF-8'}.",
            "Give a text file with the name of one class on every line.",
        ) from None
    if not names or not all(name.strip() for name in names):
        raise RecipeError(f"{file} has an empty line or none.", "Write a class on every line.")
    return tuple(name.strip() for name in names)
