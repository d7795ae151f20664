"""`hf-tsv interference`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, call
from hf_tsv.cli.output import Out, table
from hf_tsv.recipes.settings import refuse_one_alone

if TYPE_CHECKING:
    from hf_tsv.reports.interference import InterferenceReport

USAGE = ("CHECKPOINTS...", "[OPTIONS]")
MISSING = "Name at least two checkpoints."
EXAMPLES = (
    f"hf-tsv interference {options.SUN397} {options.DTD}",
    f"hf-tsv interference {options.SUN397} {options.DTD} {options.SVHN} -o report",
    "hf-tsv interference ./a ./b --base-model openai/clip-vit-base-patch32 --json | jq .total",
)

SHOWN = 5  # weights that are listed


def interference(
    checkpoints: Annotated[
        list[str],
        "CHECKPOINTS...",
        "Two or more fine-tuned checkpoints, task factors or adapters: org/name, org/name@revision,"
        " or a local folder.",
    ],
    *,
    source: options.SourceOptions,
    output: Annotated[
        Path | None,
        options.folder("Folder for the report: interference.html, pictures and interference.json."),
    ] = None,
    target: Annotated[options.TargetOptions, Only("force")],
    ranks: options.RankOptions,
    compute: Annotated[options.ComputeOptions, Only("device", "max_memory")],
    run: Annotated[options.RunOptions, Only("as_json", "quiet", "verbose")],
    access: options.AccessOptions,
) -> None:
    """Measure how much tasks interfere, layer by layer, before merging.

    Singular task interference is 0 where the leading singular vectors of different tasks are
    orthogonal. It is shown before and after TSV-Merge makes them so.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    refuse_one_alone(checkpoints or [])
    from hf_tsv.checkpoints import names
    from hf_tsv.verbs import interference as interference_

    groups = (source, target, compute, access)
    own = {**ranks.arguments(), "output": output, "progress": run.progress}
    report = call(interference_.interference, groups, checkpoints, **own)
    if output is not None:
        out.status(f"The report is {output / names.REPORT_PAGE}.")
    out.result(_text(report), report.to_dict())


def _text(report: InterferenceReport) -> str:
    told = {"share": ".1%", "norm": "#.3g", "relative_norm": ".2%", "effective_rank": ".1f"}
    told["energy"] = ".1%"
    tasks = [
        (t["name"], *(format(t[key], form) for key, form in told.items())) for t in report.tasks
    ]
    head = ("task", "share", "norm", "norm / base", "effective rank", "energy kept")
    most, least = report.extremes()
    worst = sorted(report.weights.items(), key=lambda entry: -entry[1]["sti"])[:SHOWN]
    rows = [
        (
            "interference",
            f"{report.total:.4g} before orthogonalisation, {report.total_after:.2g} after",
        ),
        ("mean", f"{report.per_pair:.3g} per pair of tasks in one weight matrix"),
        ("most" if most != least else "pair", _pair(report, most)),
        *([("least", _pair(report, least))] if most != least else []),
        *(("weight matrix", f"{label}: {entry['sti']:.4g}") for label, entry in worst),
    ]
    return f"{table(tasks, head)}\n\n{table(rows)}"


def _pair(report: InterferenceReport, pair: tuple[int, int]) -> str:
    first, second = (report.tasks[i]["name"] for i in pair)
    return f"{first} and {second}: {report.pairs[pair[0]][pair[1]]:.4g}"
