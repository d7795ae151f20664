"""`hf-tsv merge`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from hf_tsv.checkpoints.names import Format
from hf_tsv.cli import images, options
from hf_tsv.cli.groups import Only, call, flag
from hf_tsv.cli.output import Out, pinned, table
from hf_tsv.linalg.choices import Orthogonalizer, Precision
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.text import human_bytes

if TYPE_CHECKING:
    from hf_tsv.reports.merging import MergeReport

    MethodName = str
else:
    MethodName = Literal[tuple(METHODS)]

EXAMPLES = """\
`hf-tsv merge org/clip-a org/clip-b@v1 ./clip-c --base-model openai/clip-vit-base-patch32 -o merged`
`hf-tsv merge org/clip-a org/clip-b org/clip-c --push-to me/clip-abc --private`
`hf-tsv merge org/clip-a org/clip-b -o merged --dry-run`
`hf-tsv merge org/clip-a org/clip-b --method ada --task a=org/images-a --task b=./images -o merged`
`hf-tsv merge org/clip-a org/clip-b --tune-alpha 0:2:0.1 --task a=org/images-a -o merged`
`hf-tsv merge --recipe merged/hf_tsv_recipe.yaml -o again`
**Methods**
""" + "\n".join(f"`{method.name}`: {method.does}" for method in METHODS.values())


@dataclass(frozen=True, kw_only=True)
class ResultOptions:
    PANEL = options.TARGET
    target: options.TargetOptions
    out_format: Annotated[Format | None, "Files of the output. [default: as the base model]"] = None
    keep_heads: Annotated[bool, "Write task heads beside the merged encoder, one file each."] = (
        False
    )
    files: Annotated[options.FileOptions, Only("max_shard_size")]


@dataclass(frozen=True, kw_only=True)
class MethodOptions:
    PANEL = options.METHOD
    method: Annotated[
        MethodName | None,
        "tsv, with coefficients learned on images (ada), one of its halves (low-rank, orthogonal),"
        " or another method. [default: tsv]",
    ] = None
    precision: Annotated[
        Precision | None, "Fast and checked, or full float64 SVDs throughout. [default: fast]"
    ] = None
    orthogonalizer: Annotated[
        Orthogonalizer | None,
        "With --precision exact: SVD or eigendecomposition; the same up to rounding."
        " [default: procrustes]",
    ] = None
    alpha: Annotated[
        float | None,
        "Scale of the merged update. [default: 1; 0.3 for task-arithmetic, low-rank and consensus]",
    ] = None
    tune_alpha: Annotated[
        str | None,
        "FIRST:LAST:STEP",
        "Choose it on validation images instead (--task): one merge, scored at each.",
    ] = None
    weights: Annotated[
        str | None, "W1,W2,...", "Factor of each task's update. [default: 1 for all]"
    ] = None
    ranks: options.RankOptions
    dtype: options.OutputDtype = None


@dataclass(frozen=True, kw_only=True)
class LearningOptions:
    PANEL = "With --method ada"
    pictures: Annotated[images.ImageOptions, Only("task", "datasets")]
    batch_size: Annotated[
        int | None,
        images.PANEL,
        "Images of each task at a time. [default: 16 in a step of ada; else 64]",
    ] = None
    limit: images.Limit = None
    steps: Annotated[int | None, "Steps of Adam. [default: 300]"] = None
    learning_rate: Annotated[float | None, "Adam's learning rate. [default: 0.002]"] = None
    seed: Annotated[int | None, "Seed for the order of the images. [default: 0]"] = None


def merge(
    checkpoints: Annotated[
        list[str] | None,
        "CHECKPOINTS...",
        "Fine-tunes to merge, whole or as task factors: org/name, org/name@revision, or a local"
        " folder.",
    ] = None,
    *,
    source: options.SourceOptions,
    recipe: Annotated[
        str | None,
        "RECIPE",
        "Repeat a merge from its recipe: a file, an output folder, or org/name@revision. Other"
        " options replace its own settings, and CHECKPOINTS are the local folders it names.",
    ] = None,
    result: ResultOptions,
    how: MethodOptions,
    learning: LearningOptions,
    compute: Annotated[options.ComputeOptions, Only("device", "max_memory")],
    report: Annotated[
        bool,
        options.RUN,
        "Measure who disturbs whom too: table and picture in the card, interference.json.",
    ] = False,
    run: options.RunOptions,
    access: options.AccessOptions,
) -> None:
    """Merge fine-tuned CLIP checkpoints into one multi-task checkpoint.

    Keeps the leading singular vectors of every task's weight update, makes those of different
    tasks orthogonal, and adds them to the base model (TSV-Merge). Needs neither data nor training,
    unless coefficients are learned on images without labels (`--method ada`) or α is chosen on
    images with labels (`--tune-alpha`): the options of what is classified are for these.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet)
    from hf_tsv.verbs import merge as merge_

    weights = None if how.weights is None else options.numbers("--weights", how.weights, "1,0.5,1")
    groups = (source, result, result.target, how, compute, run, access)
    own = {**how.ranks.arguments(), "recipe": recipe, "weights": weights, "report": report}
    own |= {"progress": run.progress, "max_shard_size": result.files.shard_size}
    done = call(merge_.merge, groups, checkpoints or [], **own, **_learned(how, learning))
    out.delivered(done, _summary, _preview, timed=run.timings)


def _learned(how: MethodOptions, learning: LearningOptions) -> dict[str, Any]:
    """Arguments for learning on images; none where no option asks for it."""
    given = {k: v for k, v in vars(learning).items() if v is not None and k != "pictures"}
    shown = {"task": learning.pictures.task, **vars(learning.pictures.datasets)}
    said = [*(name for name, value in shown.items() if value), *given]
    tasks = tuple(learning.pictures.tasks)
    if how.tune_alpha is not None:
        if other := given.keys() - {"limit", "batch_size"}:
            raise RecipeError(f"{flag(min(other))} is an option of --method ada.", "Leave it out.")
        from hf_tsv.recipes.learning import AlphaSearch

        return {"tune_alpha": AlphaSearch(tasks, how.tune_alpha, **given)}  # type: ignore[arg-type]
    if not said:
        return {}
    if how.method is None or not METHODS[how.method].learns:
        raise RecipeError(
            f"{flag(said[0])} is an option of --method ada and of --tune-alpha.", "Leave it out."
        )
    if "limit" in given:
        raise RecipeError("--limit is an option of --tune-alpha.", "Leave it out.")
    from hf_tsv.recipes.learning import Adaptation

    return {"adaptation": Adaptation(tasks, **given)}


def _summary(report: MergeReport) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in report.weights.items() if count)
    lines = [
        f"Merged {len(report.inputs)} checkpoints in {report.seconds:.1f} s:"
        f" {counts}; {human_bytes(report.output_bytes)}."
    ]
    if report.adaptation:
        before, after = report.adaptation["entropy"]
        lines.append(f"Entropy of predictions: {before:.3f} before, {after:.3f} after adaptation.")
    if report.heads:
        lines.append(f"Kept beside it: {', '.join(report.heads)}.")
    if report.masks:
        lines.append(f"Masks, {human_bytes(report.mask_bytes)}: {', '.join(report.masks)}.")
    for name, heads in report.left_out.items():
        lines.append(f"Left out of {name}: {', '.join(heads)}.")
    if report.url:
        lines.append(f"Uploaded: {report.url}")
    return "\n".join(lines)


def _preview(report: MergeReport) -> str:
    rows = [("base model", pinned(report.base_model))]
    rows += [(f"task {i}", pinned(entry)) for i, entry in enumerate(report.inputs, start=1)]
    rows += [(name, f"{count} tensors") for name, count in report.weights.items() if count]
    rows += [("head", f"{file}, of {name}") for file, name in report.heads.items()]
    if report.masks:
        rows.append(("masks", f"{human_bytes(report.mask_bytes)} at most"))
    rows += [("left out", f"{name}: {', '.join(h)}") for name, h in report.left_out.items()]
    rows += [
        ("method", report.method),
        ("download", human_bytes(report.download_bytes)),
        ("output", human_bytes(report.output_bytes)),
        ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
    ]
    return table(rows)
