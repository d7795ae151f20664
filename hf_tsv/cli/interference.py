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

EXAMPLES = """\
`hf-tsv interference org/clip-a org/clip-b org/clip-c`
`hf-tsv interference org/clip-a org/clip-b -o report`
`hf-tsv interference org/clip-a org/clip-b --json | jq .total`
"""

SHOWN = 5  # weights that are listed


def interference(
    checkpoints: Annotated[
        list[str] | None,
        "CHECKPOINTS...",
        "Fine-tunes of one base model, whole or as task factors: org/name, org/name@revision, or a"
        " local folder.",
    ] = None,
    *,
    source: options.SourceOptions,
    output: Annotated[
        Path | None,
        options.folder("Folder for the report: interference.html, pictures and interference.json."),
    ] = None,
    target: Annotated[options.TargetOptions, Only("force")],
    ranks: options.RankOptions,
    compute: Annotated[options.ComputeOptions, Only("device", "max_memory")],
    run: Annotated[options.RunOptions, Only("as_json", "quiet")],
    access: options.AccessOptions,
) -> None:
    """Measure who disturbs whom, layer by layer, before merging.

    Singular task interference is 0 where the leading singular vectors of different tasks are
    orthogonal; it is shown as it is, and as the merge leaves it.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet)
    refuse_one_alone(checkpoints or [])
    from hf_tsv.checkpoints import names
    from hf_tsv.verbs import interference as interference_

    groups = (source, target, compute, access)
    own = {**ranks.arguments(), "output": output, "progress": run.progress}
    report = call(interference_.interference, groups, checkpoints or [], **own)
    if output is not None:
        out.status(f"The report is {output / names.REPORT_PAGE}.")
    out.result(_text(report), report.to_dict())


def _text(report: InterferenceReport) -> str:
    told = {"share": ".1%", "norm": ".3g", "relative_norm": ".2%", "effective_rank": ".1f"}
    told["energy"] = ".1%"
    tasks = [
        (t["name"], *(format(t[key], form) for key, form in told.items())) for t in report.tasks
    ]
    head = ("task", "share", "update", "of base", "effective rank", "energy kept")
    most, least = report.extremes()
    worst = sorted(report.weights.items(), key=lambda entry: -entry[1]["sti"])[:SHOWN]
    rows = [
        ("interference", f"{report.total:.4g}, {report.total_after:.2g} after orthogonalisation"),
        ("most" if most != least else "pair", _pair(report, most)),
        *([("least", _pair(report, least))] if most != least else []),
        *((f"{entry['sti']:.4g}", label) for label, entry in worst),
    ]
    return f"{table(tasks, head)}\n\n{table(rows)}"


def _pair(report: InterferenceReport, pair: tuple[int, int]) -> str:
    first, second = (report.tasks[i]["name"] for i in pair)
    return f"{first} and {second}: {report.pairs[pair[0]][pair[1]]:.4g}"
