"""Options of the commands that classify images, and how their values are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_tsv.cli.groups import Panel
from hf_tsv.cli.output import table
from hf_tsv.recipes.images import EvaluationTask, lines
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import counted

PANEL = Panel("Images")


@dataclass(frozen=True)
class DatasetOptions:
    PANEL = PANEL
    split: Annotated[
        str | None,
        "NAME",
        "Dataset split. [default: test, else validation or train; to tune α, validation]",
    ] = None
    image_column: Annotated[
        str | None, "COLUMN", "Column of the images. [default: the only one there is]"
    ] = None
    label_column: Annotated[
        str | None, "COLUMN", "Column of the labels. [default: the only one there is]"
    ] = None
    classes: Annotated[
        Path | None,
        "FILE",
        "Class names, one a line in the order of the labels, for a single --task. [default: those"
        " of the dataset]",
    ] = None
    template: Annotated[
        list[str] | None,
        "TEXT",
        "Prompt, with {} for the class name; repeatable. [default: a photo of a {}.]",
    ] = None


@dataclass(frozen=True, kw_only=True)
class ImageOptions:
    PANEL = PANEL
    task: Annotated[
        list[str] | None,
        "NAME=DATASET",
        "Labelled images: a dataset on the Hub (org/name, org/name:config@revision), a folder of"
        " images (FOLDER, FOLDER:config), or a parquet file; repeatable.",
    ] = None
    suite: Annotated[
        str | None,
        "NAME",
        "Tasks of the paper with their base model and public fine-tunes, beside published results:"
        " vit-b-32-8; also b-16 or l-14, with 14 or 20 tasks.",
    ] = None
    fine_tunes: Annotated[
        list[str] | None,
        typer.Option(
            "--reference",
            metavar="NAME=REF",
            help="Fine-tune of a task, to compare with; repeatable. With --suite those of the"
            " suite are used.",
        ),
    ] = None
    no_references: Annotated[bool, "Do not evaluate the fine-tunes of the suite."] = False
    datasets: DatasetOptions
    limit: Annotated[int | None, "N", "Use at most N images per task, for a quick check."] = None

    @property
    def tasks(self) -> list[EvaluationTask]:
        """Tasks that `--task` names, with the options that say more of them."""
        given = self.datasets
        choices: dict[str, Any] = {"split": given.split}
        choices |= {"image": given.image_column, "label": given.label_column}
        if given.template:
            choices["templates"] = tuple(given.template)
        if given.classes is not None:
            if len(self.task or []) != 1:
                problem = "--classes needs exactly one --task."
                raise UsageError(problem, "Name one task at a time.")
            choices["classes"] = lines(given.classes)
        if not self.task:
            return []
        return [EvaluationTask.parse(text, **choices) for text in self.task]

    @property
    def references(self) -> dict[str, str] | None:
        """The fine-tunes by the name of their task; None: those of the suite."""
        if not self.fine_tunes and not self.no_references:
            return None
        example = "--reference dtd=org/clip-dtd"
        return pairs("--reference", "NAME=REF", self.fine_tunes or [], example)


def notes(limit: int | None, errors: Mapping[str, str]) -> list[str]:
    """A table of what limits results on images; empty where nothing does."""
    rows = [] if limit is None else [("limit", f"at most {counted(limit, 'image')} per task")]
    rows += [("failed", ", ".join(errors))] if errors else []
    return [table(rows)] if rows else []


def pairs(option: str, form: str, texts: Sequence[str], example: str) -> dict[str, str]:
    """Values of an option of the form NAME=VALUE, by name."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"{option}: {text!r} is not {form}.", f"Write {example}.")
        if name in found:
            raise UsageError(f"{option}: {name} is given twice.", "Give each task once.")
        found[name] = value
    return found
