"""`hf-tsv route`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, call
from hf_tsv.cli.images import pairs
from hf_tsv.cli.output import Out, pinned, shown, table
from hf_tsv.recipes.settings import Dtype, Settings
from hf_tsv.routing.rule import Rule, refuse_no_choice
from hf_tsv.system.text import counted, human_bytes

if TYPE_CHECKING:
    from hf_tsv.reports.routing import RouteReport

USAGE = ("CHECKPOINTS...", "-o DIR", "[OPTIONS]")
MISSING = "Name the fine-tunes or their task factors, and a folder for the result with -o."
EXAMPLES = (
    f"hf-tsv route {options.SUN397} {options.DTD} -o routed",
    "hf-tsv route me/clip-a-tsv me/clip-b-tsv org/clip-c --push-to me/clip-routed",
    "hf-tsv evaluate routed --task dtd=tanganke/dtd",
)


@dataclass(frozen=True)
class RuleOptions:
    PANEL = options.METHOD
    layer: Annotated[
        list[str] | None,
        "GLOB",
        "Layer whose input is looked at, such as 9.mlp.fc1; repeatable. [default: queries and MLP"
        " of the upper two thirds]",
    ] = None
    temperature: Annotated[
        float | None, "T", "Divides the sums before the softmax. [default: by number of layers]"
    ] = None
    threshold: Annotated[float, "F", "Score from which a task is chosen."] = Rule.threshold
    max_tasks: Annotated[int, "N", "Most tasks of an image."] = Rule.max_tasks
    classes: Annotated[
        list[str] | None,
        "NAME=FILE|DATASET",
        "Class names of a task: a text file (.txt), one a line, or a dataset, which is read;"
        " repeatable. Candidate labels of zero-shot requests then help to choose.",
    ] = None
    template: Annotated[
        list[str] | None,
        "TEXT",
        "Prompt of class names, with {} for the name; repeatable. [default: a photo of a {}.]",
    ] = None


@dataclass(frozen=True)
class FactorOptions:
    PANEL = options.TARGET
    dtype: Annotated[Dtype, "DTYPE", "Type of the factors that are made of whole checkpoints."] = (
        "bfloat16"
    )
    reference_factors: Annotated[
        bool, "Do not copy task factors on the Hub: refer to them at their commit."
    ] = False


def route(
    checkpoints: Annotated[
        list[str] | None,
        "CHECKPOINTS...",
        "Task factors, fine-tuned checkpoints or adapters: org/name, org/name@revision, or a local"
        " folder.",
    ] = None,
    *,
    source: options.SourceOptions,
    rule: RuleOptions,
    target: options.TargetOptions,
    factors: FactorOptions,
    files: Annotated[options.FileOptions, Only("max_shard_size")],
    compute: Annotated[options.ComputeOptions, Only("device", "max_memory")],
    run: options.RunOptions,
    access: Annotated[options.AccessOptions, Only("token", "cache_dir")],
) -> None:
    """Make one model that finds out by itself which tasks an image belongs to.

    The merge of all tasks, with the factors of each beside it. hf-tsv sends every image through the
    tower of the tasks whose updates span it best; transformers loads the merge.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    refuse_no_choice(checkpoints or [])
    Rule(temperature=rule.temperature, threshold=rule.threshold, max_tasks=rule.max_tasks)  # type: ignore[arg-type]
    from hf_tsv.verbs import route as route_

    size = files.shard_size or Settings.max_shard_size
    groups = (source, rule, target, factors, compute, run, access)
    known = pairs("--classes", "NAME=FILE", rule.classes or [], "--classes dtd=dtd.txt")
    own: dict[str, Any] = {"layers": rule.layer, "classes": known, "progress": run.progress}
    own |= {"templates": rule.template or (), "max_shard_size": size}
    report = call(route_.route, groups, checkpoints or [], **own)
    out.delivered(report, _summary, _preview, timed=run.timings)


def _summary(report: RouteReport) -> str:
    named = _with_classes(report)
    lines = [
        f"{counted(len(report.tasks), 'task')} in one model, in {report.seconds:.1f} s:"
        f" {_size(report)}, {report.ratio:.1%} of the size of the checkpoints.",
        f"Images are compared at {counted(len(report.rule['layers']), 'layer')}"
        + (f", candidate labels with the class names of {named}." if named else "."),
    ]
    if report.output:
        lines.append(f"Test it: `hf-tsv evaluate {shown(report.output)} --task NAME=DATASET`")
    return "\n".join(lines)


def _size(report: RouteReport) -> str:
    """Bytes of the folder, and of the factors that stay elsewhere."""
    far = report.elsewhere_bytes
    own = human_bytes(report.output_bytes)
    return f"{own} and {human_bytes(far)} of factors elsewhere" if far else own


def _with_classes(report: RouteReport) -> str:
    """Names of the tasks whose class names are known."""
    return ", ".join(name for name, task in report.tasks.items() if task["classes"])


def _preview(report: RouteReport) -> str:
    rule, entries = report.rule, zip(report.inputs, report.tasks.items(), strict=True)
    return table(
        [
            ("base model", pinned(report.base_model)),
            *(
                (
                    name,
                    f"{pinned(entry)}, {task['folder'] or 'not copied'},"
                    f" {human_bytes(task['bytes'])} at most",
                )
                for entry, (name, task) in entries
            ),
            ("layers", str(len(rule["layers"]))),
            ("temperature", f"{rule['temperature']:g}"),
            *([("class names", named)] if (named := _with_classes(report)) else []),
            ("threshold", f"{rule['threshold']:g}, at most {counted(rule['max_tasks'], 'task')}"),
            ("merge", human_bytes(report.merged_bytes)),
            ("output", f"{_size(report)} at most"),
            *([("folder", report.output)] if report.output else []),
            ("download", human_bytes(report.download_bytes)),
            ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
        ]
    )
