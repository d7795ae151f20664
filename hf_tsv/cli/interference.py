"""`hf-tsv interference`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hf_tsv.cli import options
from hf_tsv.cli.output import Out
from hf_tsv.system.text import one_line

if TYPE_CHECKING:
    from hf_tsv.reports.interference import InterferenceReport


EXAMPLES = """\
**Examples**

`hf-tsv interference org/clip-a org/clip-b org/clip-c`

`hf-tsv interference org/clip-a org/clip-b -o report`

`hf-tsv interference org/clip-a org/clip-b --json | jq .total`
"""

SHOWN = 5
"""Weights that are listed."""


def interference(
    checkpoints: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it at run time on Python 3.10)
        typer.Argument(
            metavar="CHECKPOINTS...",
            help="Fine-tunes of one base model, whole or as task factors: org/name,"
            " org/name@revision, or a local folder.",
            show_default=False,
        ),
    ] = None,
    base_model: options.BaseModel = None,
    subfolder: options.Subfolder = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder for the report: interference.html, pictures and interference.json.",
            rich_help_panel=options.TARGET,
            show_default=False,
        ),
    ] = None,
    force: options.Force = False,
    rank: options.Rank = None,
    rank_fraction: options.RankFraction = None,
    exclude: options.Exclude = None,
    qkv: options.QkvForm = None,
    device: options.Device = None,
    max_memory: options.MaxMemory = None,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    stream: options.Stream = False,
) -> None:
    """Measure who disturbs whom, layer by layer, before merging.

    Singular task interference is 0 where the leading singular vectors of different tasks are
    orthogonal; it is shown as it is, and as the merge leaves it.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv.checkpoints.names import REPORT_PAGE
    from hf_tsv.verbs import interference as interference_

    choices: dict[str, Any] = {
        "rank": rank,
        "rank_fraction": rank_fraction,
        "qkv": None if qkv is None else qkv.value,
    }
    if exclude is not None:
        choices["exclude"] = [glob for glob in exclude if glob]
    report = interference_.interference(
        checkpoints or [],
        base_model=base_model,
        output=output,
        force=force,
        **choices,
        device=device,
        token=token,
        cache_dir=cache_dir,
        subfolder=subfolder,
        stream=stream,
        max_memory=max_memory,
        progress=False if quiet else None,
    )
    if output is not None:
        out.status(f"The report is {output / REPORT_PAGE}.")
    out.result(_text(report), report.to_dict())


def _text(report: InterferenceReport) -> str:
    names = [one_line(task["name"]) for task in report.tasks]
    width = max(map(len, ["task", *names]))
    lines = [f"{'task':<{width}}  share   update  of base  effective rank  energy kept"]
    for name, task in zip(names, report.tasks, strict=True):
        lines.append(
            f"{name:<{width}}  {task['share']:>5.1%}  {task['norm']:>7.3g}"
            f"  {task['relative_norm']:>7.2%}  {task['effective_rank']:>14.1f}"
            f"  {task['energy']:>11.1%}"
        )
    most, least = report.extremes()
    worst = sorted(report.weights.items(), key=lambda entry: -entry[1]["sti"])[:SHOWN]
    rows = [
        ("interference", f"{report.total:.4g}, {report.total_after:.2g} after orthogonalisation"),
        ("most" if most != least else "pair", _pair(report, most)),
        *([("least", _pair(report, least))] if most != least else []),
        *((f"{entry['sti']:.4g}", label) for label, entry in worst),
    ]
    return "\n".join([*lines, "", options.columns(rows)])


def _pair(report: InterferenceReport, pair: tuple[int, int]) -> str:
    first, second = (report.tasks[i]["name"] for i in pair)
    return f"{first} and {second}: {report.pairs[pair[0]][pair[1]]:.4g}"
