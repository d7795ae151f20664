"""`hf-tsv evaluate`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, call
from hf_tsv.cli.images import ImageOptions, notes
from hf_tsv.cli.output import Out, table
from hf_tsv.evaluation.job import chosen, refuse_no_card
from hf_tsv.system.processes import is_leader
from hf_tsv.system.text import counted

if TYPE_CHECKING:
    from hf_tsv.verbs.evaluate import EvaluateReport

USAGE = ("REF", "--task NAME=DATASET...", "[OPTIONS]")
MISSING = "Name a model, and images with --task NAME=DATASET or --suite NAME."
SENT = 3
"""Most sets of tasks that a line names, of those that images were sent to."""
EXAMPLES = (
    "hf-tsv evaluate me/merged --task sun397=tanganke/sun397 --task dtd=tanganke/dtd",
    f"hf-tsv evaluate me/merged --task dtd=tanganke/dtd --reference dtd={options.DTD} -o results",
    "hf-tsv evaluate me/merged --suite vit-b-32-8 --card --create-pr",
    "hf-tsv evaluate ./merged --task mine=./images --limit 200 --json | jq .accuracy",
)


def evaluate(
    reference: Annotated[str, "REF", "Model: org/name, org/name@revision, or a local folder."],
    *,
    images: ImageOptions,
    compute: Annotated[options.ComputeOptions, Only("batch_size", "device")],
    source: Annotated[options.SourceOptions, Only("base_model", "subfolder")],
    output: Annotated[
        Path | None,
        options.folder(
            "Folder for the results: evaluation.json, and pictures with the extra `plots`."
        ),
    ] = None,
    target: Annotated[options.TargetOptions, Only("force")],
    card: Annotated[
        bool,
        options.TARGET,
        "Add the results to REF: to its card, and to .eval_results, which the Hub shows.",
    ] = False,
    create_pr: Annotated[bool, options.TARGET, "With --card: as a pull request."] = False,
    run: Annotated[options.RunOptions, Only("as_json", "quiet", "verbose")],
    access: Annotated[options.AccessOptions, Only("token", "cache_dir")],
) -> None:
    """Measure zero-shot accuracy on labelled images.

    Reports top-1 accuracy and a confusion matrix of every task; with --reference also the share of
    the fine-tune's accuracy that is kept. With -o, the same command resumes a stopped run; with
    --card, the Hub shows the results.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    refuse_no_card(card=card, create_pr=create_pr)
    chosen(images.tasks, images.suite, images.references, source.base_model)
    from hf_tsv.verbs import evaluate as evaluate_

    groups = (images, compute, source, target, access)
    own = {"references": images.references, "output": output, "card": card, "create_pr": create_pr}
    report = call(evaluate_.evaluate, groups, reference, images.tasks, **own, progress=run.progress)
    if report.card is not None:
        out.status(f"The results are in {report.card}.")
    out.result(text_of(report), report.to_dict())
    if report.errors and is_leader():  # a launcher ends the others with the first that fails
        raise typer.Exit(1)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def text_of(report: EvaluateReport) -> str:
    """Results as tables."""
    own = {n: t["reference"]["accuracy"] for n, t in report.tasks.items() if "reference" in t}
    head = ["task", "images", "accuracy", "fine-tune", "kept"][: 5 if own else 3]
    rows = [
        [name, str(found["images"]), _share(found["accuracy"])]
        + ([_share(own.get(name)), _share(found.get("normalised"))] if own else [])
        for name, found in report.tasks.items()
    ]
    mean = ["mean", "", _share(report.accuracy)]
    if own:
        mean += [_share(sum(own.values()) / len(own)), _share(report.normalised)]
    parts = [table(rows, head, mean)]
    if report.suite is not None:
        parts += _beside_published(report.suite, report)
    if any("sent_to" in found for found in report.tasks.values()):
        sent = [(name, _sent_to(found)) for name, found in report.tasks.items()]
        parts.append(table(sent, ("task", "images sent to")))
    return "\n\n".join([*parts, *notes(report.limit, report.errors)])


def _sent_to(found: Mapping[str, Any]) -> str:
    """Tasks that most images were sent to, with their shares."""
    sent = found.get("sent_to", {})
    told = [f"{tasks} {count / found['images']:.0%}" for tasks, count in sent.items()]
    return ", ".join(told[:SENT]) + (", …" if len(told) > SENT else "")


def _beside_published(suite: dict[str, Any], report: EvaluateReport) -> Iterator[str]:
    """Rows of each source, each below a line that says whether ours, at the end, compares."""
    done = set(suite["tasks"]) & report.tasks.keys()
    ours = ["this model"]
    if len(done) < len(suite["tasks"]):
        ours.append(f"{len(done)} of {len(suite['tasks'])} tasks")
    if report.limit is not None:
        ours.append(f"{counted(report.limit, 'image')} of each")
    mean = ", ".join(ours), _share(suite["accuracy"]), _share(suite["normalised"])
    for source in suite["published"]:
        ones, use, last = (
            ("the fine-tunes of this suite", "the rows to compare with", mean)
            if source["comparable"]
            else ("other fine-tunes", "not to compare with directly", ())
        )
        rows = [
            (method, _share(row["accuracy"]), _share(row.get("normalised")))
            for method, row in source["rows"].items()
        ]
        yield (
            f"Published by {source['source']} ({source['origin']}) for {ones}"
            f" ({source['fine_tunes']}); {use}:\n"
            + table(rows, ("method", "accuracy", "kept"), last)
        )
