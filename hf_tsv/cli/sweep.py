"""`hf-tsv sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, Panel, call
from hf_tsv.cli.images import ImageOptions, notes
from hf_tsv.cli.output import Out, table
from hf_tsv.cli.usage import numbers
from hf_tsv.evaluation.job import chosen, refuse_no_fine_tune
from hf_tsv.recipes.settings import share

if TYPE_CHECKING:
    from hf_tsv.verbs.sweep import SweepReport

USAGE = ("--task NAME=DATASET...", "--reference NAME=REF...", "[OPTIONS]")
MISSING = "Name images with --task and their fine-tune with --reference, or --suite NAME."
EXAMPLES = (
    f"hf-tsv sweep --task dtd=tanganke/dtd --reference dtd={options.DTD} -o results",
    "hf-tsv sweep --suite vit-b-32-8 --limit 500 --rank-fraction 0.01,0.1",
)


def sweep(
    *,
    images: Annotated[ImageOptions, Only("task", "fine_tunes", "suite", "datasets", "limit")],
    rank_fraction: Annotated[
        str, Panel("Decomposition"), "F1,F2,...", "Ranks, as shares of each matrix's smaller side."
    ] = "0.01,0.02,0.05,0.1,0.2,0.5",
    source: Annotated[options.SourceOptions, Only("base_model")],
    compute: Annotated[options.ComputeOptions, Only("batch_size", "device")],
    output: Annotated[
        Path | None,
        options.folder("Folder for the results: sweep.json, and a picture with the extra `plots`."),
    ] = None,
    target: Annotated[options.TargetOptions, Only("force")],
    run: Annotated[options.RunOptions, Only("as_json", "quiet", "verbose")],
    access: Annotated[options.AccessOptions, Only("token", "cache_dir")],
) -> None:
    """Measure how accuracy falls as fine-tunes keep fewer singular vectors.

    Decomposes every fine-tune once and measures its accuracy on its own task at each rank: how far
    it can be compressed.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    shares = [share("rank_fraction", value) for value in numbers("rank_fraction", rank_fraction)]
    refuse_no_fine_tune(chosen(images.tasks, images.suite, images.references, source.base_model))
    from hf_tsv.verbs import sweep as sweep_

    groups = (images, source, compute, target, access)
    own = {"rank_fraction": shares, "output": output, "progress": run.progress}
    report = call(sweep_.sweep, groups, images.tasks, images.references, **own)
    out.result(_text(report), report.to_dict())
    if report.errors:
        raise typer.Exit(1)


def _text(report: SweepReport) -> str:
    """The accuracies as a table, a task a row."""
    head = ["task", *(f"{share:.3g}" for share in report.fractions), "fine-tune"]

    def row(name: str, values: list[float], *last: float) -> list[str]:
        return [name, *(f"{value:.1%}" for value in [*values, *last])]

    rows = [row(name, found["accuracies"], found["full"]) for name, found in report.tasks.items()]
    rows.append([*row("stored", report.stored), ""])
    found = table(rows, head, row("mean", report.mean, report.full))
    return "\n\n".join([found, *notes(report.limit, report.errors)])
