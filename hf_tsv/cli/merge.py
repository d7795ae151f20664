"""`hf-tsv merge`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hf_tsv.cli import images, options
from hf_tsv.cli.output import Out
from hf_tsv.system.errors import RecipeError

if TYPE_CHECKING:
    from hf_tsv.recipes.learning import Adaptation, AlphaSearch
    from hf_tsv.verbs.merge import MergeReport


ADA = "With --method ada"

EXAMPLES = """\
**Examples**

`hf-tsv merge org/clip-a org/clip-b@v1 ./clip-c --base-model openai/clip-vit-base-patch32 -o merged`

`hf-tsv merge org/clip-a org/clip-b org/clip-c --push-to me/clip-abc --private`

`hf-tsv merge org/clip-a org/clip-b -o merged --dry-run`

`hf-tsv merge org/clip-a org/clip-b --method ada --task a=org/images-a --task b=./images -o merged`

`hf-tsv merge org/clip-a org/clip-b --tune-alpha 0:2:0.1 --task a=org/images-a -o merged`

`hf-tsv merge --recipe merged/hf_tsv_recipe.yaml -o again`
"""


class Method(str, Enum):
    """Values of `--method`."""

    tsv = "tsv"
    ada = "ada"
    low_rank = "low-rank"
    orthogonal = "orthogonal"
    task_arithmetic = "task-arithmetic"
    average = "average"
    ties = "ties"
    consensus = "consensus"
    iso_c = "iso-c"
    iso_cts = "iso-cts"
    tall_mask = "tall-mask"


class Precision(str, Enum):
    """Values of `--precision`."""

    fast = "fast"
    exact = "exact"


class Orthogonalizer(str, Enum):
    """Values of `--orthogonalizer`."""

    procrustes = "procrustes"
    whitening = "whitening"


def merge(
    checkpoints: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it at run time on Python 3.10)
        typer.Argument(
            metavar="CHECKPOINTS...",
            help="Fine-tunes to merge, whole or as task factors: org/name, org/name@revision, or a"
            " local folder.",
            show_default=False,
        ),
    ] = None,
    base_model: options.BaseModel = None,
    subfolder: options.Subfolder = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Repeat a merge from its recipe; names checkpoints and settings by itself.",
            show_default=False,
        ),
    ] = None,
    output: options.Output = None,
    force: options.Force = False,
    push_to: options.PushTo = None,
    private: options.Private = None,
    revision: options.Revision = None,
    create_pr: options.CreatePr = False,
    commit_message: options.CommitMessage = None,
    method: Annotated[
        Method,
        typer.Option(
            help="tsv, with coefficients learned on images (ada), one of its halves (low-rank,"
            " orthogonal), or another method.",
            rich_help_panel=options.METHOD,
        ),
    ] = Method.tsv,
    precision: Annotated[
        Precision,
        typer.Option(
            help="Fast and checked, or full float64 SVDs throughout.",
            rich_help_panel=options.METHOD,
        ),
    ] = Precision.fast,
    orthogonalizer: Annotated[
        Orthogonalizer,
        typer.Option(
            help="With --precision exact: SVD or eigendecomposition; the same up to rounding.",
            rich_help_panel=options.METHOD,
        ),
    ] = Orthogonalizer.procrustes,
    alpha: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Scale of the merged update. [default: 1; 0.3 for task-arithmetic, low-rank and"
            " consensus]",
            rich_help_panel=options.METHOD,
            show_default=False,
        ),
    ] = None,
    tune_alpha: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="FIRST:LAST:STEP",
            help="Choose it on validation images instead (--task): one merge, scored at each.",
            rich_help_panel=options.METHOD,
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="W1,W2,...",
            help="Factor of each task's update. [default: 1 for all]",
            rich_help_panel=options.METHOD,
            show_default=False,
        ),
    ] = None,
    task: images.Tasks = None,
    split: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Of every dataset. [default: test, else validation, else train; with --tune-alpha"
            " validation]",
            rich_help_panel=images.PANEL,
            show_default=False,
        ),
    ] = None,
    image_column: images.ImageColumn = None,
    label_column: images.LabelColumn = None,
    classes: images.Classes = None,
    template: images.Template = None,
    steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Steps of Adam. [default: 300]", rich_help_panel=ADA, show_default=False),
    ] = None,
    learning_rate: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Of Adam. [default: 0.002]", rich_help_panel=ADA, show_default=False),
    ] = None,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Images of each task at a time. [default: 16 in a step of ada; else 64]",
            rich_help_panel=images.PANEL,
            show_default=False,
        ),
    ] = None,
    limit: images.Limit = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Of the order of the images. [default: 0]",
            rich_help_panel=ADA,
            show_default=False,
        ),
    ] = None,
    rank: options.Rank = None,
    rank_fraction: options.RankFraction = None,
    exclude: options.Exclude = None,
    qkv: options.QkvForm = None,
    dtype: Annotated[
        Optional[options.Dtype],  # noqa: UP045
        typer.Option(
            help="Type of the written weights. [default: as the base model]",
            rich_help_panel=options.METHOD,
            show_default=False,
        ),
    ] = None,
    out_format: Annotated[
        Optional[options.OutFormat],  # noqa: UP045
        typer.Option(
            help="Files of the output. [default: as the base model]",
            rich_help_panel=options.TARGET,
            show_default=False,
        ),
    ] = None,
    keep_heads: Annotated[
        bool,
        typer.Option(
            "--keep-heads",
            help="Write task heads beside the merged encoder, one file each.",
            rich_help_panel=options.TARGET,
        ),
    ] = False,
    max_shard_size: options.MaxShardSize = "5GB",
    device: options.Device = None,
    max_memory: options.MaxMemory = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Measure who disturbs whom too: table and picture in the card, interference.json.",
            rich_help_panel=options.RUN,
        ),
    ] = False,
    timings: options.Timings = False,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    stream: options.Stream = False,
) -> None:
    """Merge fine-tuned CLIP checkpoints into one multi-task checkpoint.

    Keeps the leading singular vectors of every task's weight update, makes those of different
    tasks orthogonal, and adds them to the base model (TSV-Merge). Needs neither data nor training,
    unless coefficients are learned on images without labels (`--method ada`) or α is chosen on
    images with labels (`--tune-alpha`): the options of what is classified are for these.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv.verbs import merge as merge_

    choices: dict[str, Any] = {
        "method": method.value,
        **_learning(
            method,
            tune_alpha,
            {
                "task": task,
                "split": split,
                "image_column": image_column,
                "label_column": label_column,
                "classes": classes,
                "template": template,
            },
            steps=steps,
            learning_rate=learning_rate,
            batch_size=batch_size,
            seed=seed,
            limit=limit,
        ),
        "orthogonalizer": orthogonalizer.value,
        "precision": precision.value,
        "alpha": alpha,
        "weights": _numbers(weights),
        "rank": rank,
        "rank_fraction": rank_fraction,
        "qkv": qkv.value if qkv else None,
        "dtype": dtype.value if dtype else None,
        "max_shard_size": options.shard_size(max_shard_size),
        "out_format": out_format.value if out_format else None,
        "keep_heads": keep_heads,
    }
    if exclude is not None:
        choices["exclude"] = [glob for glob in exclude if glob]
    done = merge_.merge(
        checkpoints or [],
        base_model=base_model,
        output=output,
        push_to=push_to,
        recipe=recipe,
        **choices,
        device=device,
        force=force,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
        cache_dir=cache_dir,
        subfolder=subfolder,
        stream=stream,
        max_memory=max_memory,
        report=report,
        dry_run=dry_run,
        progress=False if quiet else None,
    )
    if not dry_run:
        out.status(_summary(done))
        if timings:
            out.status(options.timings(done.timings, done.treatments))
    text = _preview(done) if dry_run else (done.output or done.url or "")
    out.result(text, done.to_dict())


def _learning(
    method: Method,
    alphas: str | None,
    shown: dict[str, Any],
    **given: Any,
) -> dict[str, Adaptation | AlphaSearch]:
    """What is learned from images, and how; nothing where nothing is said of it."""
    given = {name: value for name, value in given.items() if value is not None}
    said = [*(name for name, value in shown.items() if value), *given]
    tasks = tuple(images.tasks_of(**shown))
    if method is Method.ada and alphas is None:
        if "limit" in given:
            raise RecipeError("--limit is an option of --tune-alpha.", "Leave it out.")
        if not said:
            return {}
        from hf_tsv.recipes.learning import Adaptation

        return {"adaptation": Adaptation(tasks, **given)}
    if alphas is not None:
        if other := given.keys() - {"limit", "batch_size"}:
            option = min(other).replace("_", "-")
            raise RecipeError(f"--{option} is an option of --method ada.", "Leave it out.")
        from hf_tsv.recipes.learning import AlphaSearch

        return {"tune_alpha": AlphaSearch(tasks, alphas, **given)}  # type: ignore[arg-type]
    if said:
        raise RecipeError(
            f"--{said[0].replace('_', '-')} is an option of --method ada and of --tune-alpha.",
            "Leave it out.",
        )
    return {}


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights is {text!r}.", "Write numbers: --weights 1,0.5,1.") from None


def _summary(report: MergeReport) -> str:
    from hf_tsv.system.text import human_bytes

    counts = ", ".join(f"{count} {name}" for name, count in report.weights.items())
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
    from hf_tsv.system.text import human_bytes

    rows = [("base model", options.pinned(report.base_model))]
    rows += [(f"task {i}", options.pinned(entry)) for i, entry in enumerate(report.inputs, start=1)]
    rows += [(name, f"{count} tensors") for name, count in report.weights.items()]
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
    return options.columns(rows)
