"""`hf-tsv merge`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from hf_tsv.checkpoints.names import RECIPE_FILE, Format
from hf_tsv.cli import options
from hf_tsv.cli.groups import NotOffered, Only, call
from hf_tsv.cli.output import Out, method_text, pinned, shown, table
from hf_tsv.cli.usage import factors
from hf_tsv.linalg.choices import LayerScale, Orthogonalizer, Precision, WudiFilter
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.recipes.settings import steps_of
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import counted, human_bytes, rough_time

if TYPE_CHECKING:
    from hf_tsv.reports.merging import MergeReport

    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]

USAGE = ("CHECKPOINTS...", "-o DIR", "[OPTIONS]")
MISSING = "Name the checkpoints to merge, and a folder for the result with -o."
BOTH = f"{options.SUN397} {options.DTD}"
EXAMPLES = (
    f"hf-tsv merge {BOTH} -o merged",
    f"hf-tsv merge {BOTH} --push-to me/clip-sun397-dtd --private",
    "hf-tsv merge ./my-clip org/clip@v1 --base-model openai/clip-vit-base-patch32 -o merged",
    "hf-tsv merge --recipe merged -o again",
)
LEARNING = tuple(m.name for m in METHODS.values() if m.learns)
METHOD_HELP = "Merging method, see below. [default: tsv]"
TABLES = {"Methods (--method)": {m.name: m.says for m in METHODS.values() if not m.learns}}


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    PANEL = options.TARGET
    target: options.TargetOptions
    out_format: Annotated[
        Format | None, "NAME", "transformers or open_clip. [default: the base's]"
    ] = None
    keep_heads: Annotated[bool, "Also write the classification heads, one file each."] = False
    files: options.FileOptions


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    PANEL = options.METHOD
    alpha: Annotated[
        float | None,
        "A",
        "Scale of the merged update. [default: 1, or that of the method, see below]",
    ] = None
    weights: Annotated[
        list[str] | None, "W1,W2,...", "Factor of each task; or org/a=0.7,... [default: 1]"
    ] = None
    scale: Annotated[
        list[str] | None,
        "GLOB=F",
        "Factor of α in some weights; with TASK:GLOB=F of that task's update; repeatable.",
    ] = None
    keep_base: Annotated[list[str] | None, "GLOB", "Weights that stay the base's; repeatable."] = (
        None
    )
    precision: Annotated[
        Precision | None, "fast: each result is checked; exact: float64 SVDs. [default: fast]"
    ] = None
    orthogonalizer: Annotated[
        Orthogonalizer | None,
        "NAME",
        "With --precision exact: procrustes (SVD) or whitening. [default: procrustes]",
    ] = None
    layer_scale: Annotated[
        LayerScale | None,
        "NAME",
        "lines: more of the merged update in later layers. larv: also by what each update is like."
        " [default: none]",
    ] = None
    calibrate: Annotated[
        bool | None, "Scale down directions that several tasks add up in (SVC)."
    ] = None
    wudi_filter: Annotated[
        WudiFilter | None, "NAME", "Of wudi: swudi-a, swudi or tact. [default: swudi-a]"
    ] = None
    ranks: options.RankOptions


def merge(
    checkpoints: Annotated[
        list[str] | None,
        "CHECKPOINTS...",
        "Fine-tuned checkpoints, task factors or adapters: org/name, org/name@revision, or a local"
        " folder.",
    ] = None,
    *,
    source: options.SourceOptions,
    recipe: Annotated[
        str | None,
        options.INPUTS,
        "RECIPE",
        "Repeat a merge: a recipe file, an output folder, or org/name[@revision]. Options replace"
        " its settings; CHECKPOINTS supply local folders.",
    ] = None,
    result: ResultOptions,
    method: Annotated[
        MethodName | None, options.METHOD, NotOffered(*LEARNING), "NAME", METHOD_HELP
    ] = None,
    how: MethodOptions,
    compute: Annotated[options.ComputeOptions, Only("device", "max_memory")],
    report: Annotated[bool, options.TARGET, "Measure task interference for the card, too."] = False,
    run: options.RunOptions,
    access: options.AccessOptions,
) -> None:
    """Merge fine-tuned CLIP checkpoints into one multi-task model.

    Keeps the leading singular vectors of every task's weight update, makes those of different
    tasks orthogonal, and adds them to the base model (TSV-Merge). Needs neither data nor training;
    `hf-tsv tune` learns α or coefficients from images.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    if method in LEARNING:
        problem = f"The method {method} learns from images."
        raise UsageError(problem, f"Use `hf-tsv tune --method {method} --task NAME=DATASET`.")
    from hf_tsv.verbs import merge as merge_

    groups = (source, result, result.target, result.files, how, compute, run, access)
    own = {**settings(result, how), "recipe": recipe, "report": report, "progress": run.progress}
    own["method"] = method
    told(out, call(merge_.merge, groups, checkpoints or [], **own), result, run)


def settings(result: ResultOptions, how: MethodOptions) -> dict[str, Any]:
    """Arguments of a function whose options have another form."""
    chosen = {**how.ranks.arguments(), **factors(vars(how))}
    return {**chosen, "max_shard_size": result.files.shard_size}


def told(out: Out, report: MergeReport, result: ResultOptions, run: options.RunOptions) -> None:
    """Tell what was merged, or would be."""
    out.delivered(report, _summary, partial(_preview, result=result), timed=run.timings)


def _summary(report: MergeReport) -> str:
    lines = [
        f"Merged {counted(len(report.inputs), 'checkpoint')} in {report.seconds:.1f} s:"
        f" {human_bytes(report.output_bytes)}.",
        f"{_treated(report)}.",
        *(f"{line}." for line in report.selected),
    ]
    if report.tuning:
        lines.append(_best_of_each(report.tuning["best_of_each"]))
    if report.adaptation:
        before, after = report.adaptation["entropy"]
        lines.append(f"Entropy of predictions: {before:.3f} before, {after:.3f} after.")
    if report.heads:
        lines.append(f"Classification heads: {', '.join(report.heads)}.")
    if report.masks:
        lines.append(f"Masks, {human_bytes(report.mask_bytes)}: {', '.join(report.masks)}.")
    for name, heads in report.left_out.items():
        lines.append(f"Left out of {name}: {', '.join(heads)}.")
    if report.output:
        lines.append(f"Beside the weights: README.md (model card) and {RECIPE_FILE} (recipe).")
    if report.output and not report.masks:
        lines.append(f"Test it: `hf-tsv evaluate {shown(report.output)} --task NAME=DATASET`")
    return "\n".join(lines)


def _best_of_each(trials: Sequence[Mapping[str, Any]]) -> str:
    """Table of the best trial of each method."""
    rows = [[t["method"], f"{t['alpha']:g}", f"{t['slope']:g}", f"{t['mean']:.2%}"] for t in trials]
    return table(rows, ["best of each method", "α", "slope", "mean accuracy"])


def _treated(report: MergeReport) -> str:
    """Number of tensors by what was done with them."""
    texts = {
        "decomposed": f"merged with {report.method}",
        "combined": f"merged with {report.method}",
        "summed": "summed",
        "averaged": "averaged",
        "copied": "copied from the base model",
    }
    found = [(name, report.weights.get(name, 0)) for name in texts]
    parts = [f"{count:,} {texts[name]}" for name, count in found if count]
    first = next((name for name, count in found if count), "")
    noun = ("weight matrix", "weight matrices") if first == "decomposed" else ("tensor", "tensors")
    if parts:
        count = report.weights[first]
        parts[0] = f"{counted(count, *noun)} {texts[first]}"
    if len(parts) > 1 and first == "decomposed":
        parts[1] = parts[1].replace(" ", " other tensors ", 1)
    return ", ".join(parts)


def _preview(report: MergeReport, result: ResultOptions) -> str:
    rows = [("base model", pinned(report.base_model))]
    tasks = zip(report.inputs, report.scales, strict=True)
    for i, (entry, scale) in enumerate(tasks, start=1):
        rows.append((f"task {i}", pinned(entry) + (f", times {scale:g}" if scale != 1 else "")))
    ranks = []
    if METHODS[report.method].ranks:
        ranks = [entry["rank"] for entry in report.treatments.values() if entry.get("rank")]
    method = [("method", method_text(report.settings))]
    if report.tuning:
        counts = Counter(trial["method"] for trial in report.tuning["trials"])
        steps = [", ".join(counts), *steps_of(report.settings)]
        trials = f"{counts.total():,}, from {counted(len(counts), 'merge')}"
        method = [("methods", "; ".join(steps)), ("trials", trials)]
    rows += method
    rows += [("rank", _span(ranks))] if ranks else []
    rows += [("weights", part) for part in (*_treated(report).split(", "), *report.selected)]
    rows += [("head", f"{file}, of {name}") for file, name in report.heads.items()]
    if report.masks:
        rows.append(("masks", f"{human_bytes(report.mask_bytes)} at most"))
    rows += [("left out", f"{name}: {', '.join(h)}") for name, h in report.left_out.items()]
    dtype = report.settings["dtype"] or "as the base model"
    rough = report.expected_seconds and f"{rough_time(report.expected_seconds)} on the CPU"
    rows += [
        ("output", f"{human_bytes(report.output_bytes)}, {dtype}"),
        *([("folder", report.output)] if report.output else []),
        *([("push to", result.target.push_to)] if result.target.push_to else []),
        ("download", human_bytes(report.download_bytes)),
        ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
        *([("time", rough)] if rough else []),
    ]
    return table(rows)


def _span(numbers: list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"
