"""`hf-tsv evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hf_tsv.cli import options
from hf_tsv.cli.output import Out
from hf_tsv.errors import RecipeError

if TYPE_CHECKING:
    from hf_tsv.evaluation import EvaluateReport

EXAMPLES = """\
**Examples**

`hf-tsv evaluate me/merged --task sun397=tanganke/sun397 --task dtd=tanganke/dtd`

`hf-tsv evaluate me/merged --task dtd=tanganke/dtd --reference dtd=org/clip-dtd -o results`

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
    fine_tunes: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--reference",
            metavar="NAME=REF",
            help="The fine-tune of a task, which accuracy is divided by; repeatable.",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Of every dataset. [default: test, else validation, else train]",
            rich_help_panel=DATA,
            show_default=False,
        ),
    ] = None,
    template: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="Of prompts, with {} for the name of a class; repeatable."
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
            help="Folder for the results: evaluation.json.",
            rich_help_panel=options.TARGET,
            show_default=False,
        ),
    ] = None,
    force: options.Force = False,
    device: options.Device = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
) -> None:
    """Measure what a model scores on labelled images, zero-shot.

    Top-1 accuracy of every task and confusion matrices; with the fine-tunes, the share of their
    own accuracy that is kept.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv import evaluation

    choices = {"split": split, **({"templates": tuple(template)} if template else {})}
    tasks = [evaluation.EvaluationTask.parse(text, **choices) for text in task or []]
    report = evaluation.evaluate(
        reference,
        tasks,
        references=dict(map(_named, fine_tunes or [])),
        output=output,
        force=force,
        limit=limit,
        batch_size=batch_size,
        base_model=base_model,
        device=device,
        token=token,
        cache_dir=cache_dir,
        subfolder=subfolder,
        progress=False if quiet else None,
    )
    out.result(_text(report), report.to_dict())
    if report.errors:
        raise typer.Exit(1)


def _named(text: str) -> tuple[str, str]:
    name, equals, ref = text.partition("=")
    if not equals or not name or not ref:
        raise RecipeError(f"--reference is {text!r}.", "Write NAME=REF.")
    return name, ref


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _text(report: EvaluateReport) -> str:
    names = [options.one_line(name) for name in report.tasks]
    width = max(map(len, ["normalised", *names]))
    lines = [f"{'task':<{width}}  images  accuracy  fine-tune   kept"]
    for name, found in zip(names, report.tasks.values(), strict=True):
        own = found.get("reference", {}).get("accuracy")
        kept = found.get("normalised")
        lines.append(
            f"{name:<{width}}  {found['images']:>6}  {found['accuracy']:>8.1%}"
            f"  {_share(own):>9}  {_share(kept):>5}"
        )
    rows = [("accuracy", f"{report.accuracy:.1%}")]
    if report.normalised is not None:
        rows.append(("normalised", f"{report.normalised:.1%}"))
    if report.limit is not None:
        rows.append(("of each task", f"{report.limit} images at most: a quick look"))
    rows += [("failed", f"{name}: {why}") for name, why in report.errors.items()]
    return "\n".join([*lines, "", options.columns(rows)])
