"""`hf-tsv evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hf_tsv.cli import options
from hf_tsv.cli.output import Out, table
from hf_tsv.errors import RecipeError
from hf_tsv.processes import is_leader

if TYPE_CHECKING:
    from hf_tsv.evaluation import EvaluateReport

EXAMPLES = """\
**Examples**

`hf-tsv evaluate me/merged --task sun397=tanganke/sun397 --task dtd=tanganke/dtd`

`hf-tsv evaluate me/merged --task dtd=tanganke/dtd --reference dtd=org/clip-dtd -o results`

`hf-tsv evaluate me/merged --suite vit-b-32-8 --card --create-pr`

`hf-tsv evaluate ./merged --task mine=./images --limit 200 --json | jq .accuracy`
"""

DATA = "What is classified"


def evaluate(
    reference: Annotated[
        str,
        typer.Argument(
            metavar="REF",
            help="The model: org/name, org/name@revision, or a local folder.",
            show_default=False,
        ),
    ],
    task: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it at run time on Python 3.10)
        typer.Option(
            metavar="NAME=DATASET",
            help="Labelled images: a dataset on the Hub (org/name, org/name:config@revision), a"
            " folder of images, or a parquet file; repeatable.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    suite: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME",
            help="Tasks, base model and fine-tunes of a paper, beside the rows it reports:"
            " vit-b-32-8; b-16 or l-14, 14 or 20 tasks.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    fine_tunes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--reference",
            metavar="NAME=REF",
            help="The fine-tune of a task, which accuracy is divided by; repeatable."
            " [default: those of the suite]",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    no_references: Annotated[
        bool,
        typer.Option(
            "--no-references",
            help="Leave the fine-tunes of the suite out.",
            rich_help_panel=DATA,
        ),
    ] = False,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Of the datasets of --task. [default: test, else validation, else train]",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    image: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--image-column",
            metavar="COLUMN",
            help="Images of --task. [default: the only column of images]",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    label: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--label-column",
            metavar="COLUMN",
            help="Labels of --task. [default: the only column of class labels]",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Names of the classes of a single --task, one a line, in the order of the labels."
            " [default: those of the dataset]",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Prompt of --task, with {} for the name of a class; repeatable."
            " [default: a photo of a {}.]",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    limit: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="So many images of each task, for a quick look.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    batch_size: Annotated[
        int, typer.Option(help="Images at a time.", rich_help_panel=options.RUN)
    ] = 64,
    base_model: options.BaseModel = None,
    subfolder: options.Subfolder = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for the results: evaluation.json, and pictures with the extra `plots`.",
            rich_help_panel=options.TARGET,
            show_default=False,
        ),
    ] = None,
    force: options.Force = False,
    card: Annotated[
        bool,
        typer.Option(
            "--card",
            help="Add the results to the card of REF: the README.md of a folder, or by a commit.",
            rich_help_panel=options.TARGET,
        ),
    ] = False,
    create_pr: Annotated[
        bool,
        typer.Option(
            "--create-pr",
            help="Commit the card as a pull request.",
            rich_help_panel=options.TARGET,
        ),
    ] = False,
    device: options.Device = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Measure what a model scores on labelled images, zero-shot.

    Top-1 accuracy of every task and confusion matrices; with the fine-tunes, the share of their
    own accuracy that is kept. With -o a run that was stopped goes on with the next task.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv import evaluation

    choices: dict[str, Any] = {"split": split, "image": image, "label": label}
    if template:
        choices["templates"] = tuple(template)
    if classes is not None:
        choices["classes"] = _names(classes, task or [])
    tasks = [evaluation.EvaluationTask.parse(text, **choices) for text in task or []]
    references = dict(map(_named, fine_tunes or [])) if fine_tunes or no_references else None
    report = evaluation.evaluate(
        reference,
        tasks,
        suite=suite,
        references=references,
        output=output,
        force=force,
        card=card,
        create_pr=create_pr,
        limit=limit,
        batch_size=batch_size,
        base_model=base_model,
        device=device,
        token=token,
        cache_dir=cache_dir,
        subfolder=subfolder,
        progress=False if quiet else None,
    )
    if report.card is not None:
        out.status(f"The results are in {report.card}.")
    out.result(text_of(report), report.to_dict())
    if report.errors and is_leader():  # a launcher ends the others with the first that fails
        raise typer.Exit(1)


def _named(text: str) -> tuple[str, str]:
    name, equals, ref = text.partition("=")
    if not equals or not name or not ref:
        raise RecipeError(f"--reference is {text!r}.", "Write NAME=REF.")
    return name, ref


def _names(file: Path, tasks: Sequence[str]) -> tuple[str, ...]:
    """Lines of a file."""
    if len(tasks) != 1:
        raise RecipeError("--classes is for a single --task.", "Evaluate one task at a time.")
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


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def text_of(report: EvaluateReport) -> str:
    """The results as tables."""
    compared = any("reference" in found for found in report.tasks.values())
    rows = [_row(name, found, compared) for name, found in report.tasks.items()]
    head = ["task", "images", "accuracy", *(["fine-tune", "kept"] if compared else [])]
    own = [*report.tasks.values()]
    mean = ["mean", "", _share(report.accuracy)]
    if compared:
        known = [found["reference"]["accuracy"] for found in own if "reference" in found]
        mean += [_share(sum(known) / len(known)), _share(report.normalised)]
    parts = [table(head, rows, mean)]
    if report.suite is not None:
        parts.append(_beside_the_paper(report))
    notes = []
    if report.limit is not None:
        notes.append(("of each task", f"{report.limit} images at most: a quick look"))
    notes += [("failed", f"{name}: {why}") for name, why in report.errors.items()]
    return "\n\n".join([*parts, *([options.columns(notes)] if notes else [])])


def _beside_the_paper(report: EvaluateReport) -> str:
    """Rows of the suite's paper, and ours; what makes them differ stands beside its name."""
    from hf_tsv.evaluation.suites import PUBLISHED

    assert report.suite is not None
    suite, done = report.suite, set(report.suite["tasks"]) & report.tasks.keys()
    rows = [
        (method, _share(row["accuracy"]), _share(row.get("normalised")))
        for method, row in suite["published"].items()
    ]
    ours = ["this model"]
    if len(done) < len(suite["tasks"]):
        ours.append(f"{len(done)} of {len(suite['tasks'])} tasks")
    if report.limit is not None:
        ours.append(f"{report.limit} images of each")
    means = _share(suite["accuracy"]), _share(suite["normalised"])
    return table((PUBLISHED, "accuracy", "kept"), rows, (", ".join(ours), *means))


def _row(name: str, found: dict[str, Any], compared: bool) -> list[str]:
    cells = [options.one_line(name), str(found["images"]), _share(found["accuracy"])]
    if compared:
        own = found.get("reference", {}).get("accuracy")
        cells += [_share(own), _share(found.get("normalised"))]
    return cells
