"""`hf-tsv sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hf_tsv.cli import images, options
from hf_tsv.cli.output import Out, table
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.text import one_line

if TYPE_CHECKING:
    from hf_tsv.verbs.sweep import SweepReport


EXAMPLES = """\
**Examples**

`hf-tsv sweep --task dtd=tanganke/dtd --reference dtd=org/clip-dtd --rank-fraction 0.01,0.1 -o out`

`hf-tsv sweep --suite vit-b-32-8 --limit 500`
"""


def sweep(
    task: images.Tasks = None,
    fine_tunes: images.FineTunes = None,
    suite: images.Suite = None,
    split: images.Split = None,
    image_column: images.ImageColumn = None,
    label_column: images.LabelColumn = None,
    classes: images.Classes = None,
    template: images.Template = None,
    rank_fraction: Annotated[
        str,
        typer.Option(
            metavar="F1,F2,...", help="Shares of min(shape).", rich_help_panel=options.METHOD
        ),
    ] = "0.01,0.02,0.05,0.1,0.2,0.5",
    limit: images.Limit = None,
    batch_size: Annotated[
        int, typer.Option(help="Images at a time.", rich_help_panel=options.RUN)
    ] = 64,
    base_model: options.BaseModel = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for the results: sweep.json, and a picture with the extra `plots`.",
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
    """Measure what fine-tunes still score with fewer and fewer of their singular vectors.

    Every fine-tune is taken apart once and classifies the images of its own task with each share
    of the rank: how far it can be compressed.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv.verbs import sweep as sweep_

    report = sweep_.sweep(
        images.tasks_of(task, split, image_column, label_column, classes, template),
        dict(map(images.named, fine_tunes)) if fine_tunes else None,
        rank_fractions=_shares(rank_fraction),
        suite=suite,
        base_model=base_model,
        output=output,
        force=force,
        limit=limit,
        batch_size=batch_size,
        device=device,
        token=token,
        cache_dir=cache_dir,
        progress=False if quiet else None,
    )
    out.result(_text(report), report.to_dict())
    if report.errors:
        raise typer.Exit(1)


def _shares(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(
            f"--rank-fraction is {text!r}.", "Write numbers: --rank-fraction 0.01,0.1."
        ) from None


def _text(report: SweepReport) -> str:
    """The accuracies as a table, a task a row."""
    head = ["task", *(f"{share:.3g}" for share in report.fractions), "fine-tune"]

    def row(name: str, values: list[float], *last: float) -> list[str]:
        return [name, *(f"{value:.1%}" for value in [*values, *last])]

    rows = [
        row(one_line(name), found["accuracies"], found["full"])
        for name, found in report.tasks.items()
    ]
    rows.append([*row("stored", report.stored), ""])
    parts = [table(head, rows, row("mean", report.mean, report.full))]
    notes = []
    if report.limit is not None:
        notes.append(("of each task", f"{report.limit} images at most: a quick look"))
    notes += [("failed", f"{name}: {why}") for name, why in report.errors.items()]
    return "\n\n".join([*parts, *([options.columns(notes)] if notes else [])])
