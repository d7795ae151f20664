"""`hf-tsv merge`."""

from __future__ import annotations

import re
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from hf_tsv.cli.output import Out
from hf_tsv.errors import RecipeError

if TYPE_CHECKING:
    from hf_tsv.merging import MergeReport

EXAMPLES = """\
**Examples**

`hf-tsv merge org/clip-a org/clip-b@v1 ./clip-c --base-model openai/clip-vit-base-patch32 -o merged`

`hf-tsv merge org/clip-a org/clip-b org/clip-c --push-to me/clip-abc --private`

`hf-tsv merge org/clip-a org/clip-b -o merged --dry-run`

`hf-tsv merge --recipe merged/hf_tsv_recipe.yaml -o again`
"""


class Method(str, Enum):
    """Values of `--method`."""

    tsv = "tsv"
    low_rank = "low-rank"
    orthogonal = "orthogonal"
    task_arithmetic = "task-arithmetic"
    average = "average"


class Orthogonalizer(str, Enum):
    """Values of `--orthogonalizer`."""

    procrustes = "procrustes"
    whitening = "whitening"


class Qkv(str, Enum):
    """Values of `--qkv`."""

    split = "split"  # type: ignore[assignment]
    fused = "fused"


class Dtype(str, Enum):
    """Values of `--dtype`."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


METHOD = "How to merge"
TARGET = "Where the result goes"
RUN = "How to run"


def merge(
    checkpoints: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it at run time on Python 3.10)
        typer.Argument(
            metavar="CHECKPOINTS...",
            help="Fine-tunes to merge: org/name, org/name@revision, or a local folder.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="REF",
            help="What they were fine-tuned from. [default: what their model cards say]",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            metavar="FILE",
            help="Repeat a merge from its recipe; names checkpoints and settings by itself.",
            show_default=False,
        ),
    ] = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Folder to write.",
            rich_help_panel=TARGET,
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Replace an output folder that hf-tsv wrote.", rich_help_panel=TARGET
        ),
    ] = False,
    push_to: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="REPO_ID",
            help="Hub repository to upload to; created if needed.",
            rich_help_panel=TARGET,
            show_default=False,
        ),
    ] = None,
    private: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option(
            "--private/--no-private",
            help="Make a new repository private.",
            rich_help_panel=TARGET,
            show_default=False,
        ),
    ] = None,
    revision: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="BRANCH",
            help="Branch to push to; created if needed.",
            rich_help_panel=TARGET,
            show_default=False,
        ),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Push as a pull request.", rich_help_panel=TARGET)
    ] = False,
    commit_message: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="TEXT",
            help="Summary of the commit.",
            rich_help_panel=TARGET,
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Method,
        typer.Option(
            help="tsv, one of its halves (low-rank, orthogonal), or a baseline.",
            rich_help_panel=METHOD,
        ),
    ] = Method.tsv,
    orthogonalizer: Annotated[
        Orthogonalizer,
        typer.Option(
            help="SVD or eigendecomposition; the same result up to rounding.",
            rich_help_panel=METHOD,
        ),
    ] = Orthogonalizer.procrustes,
    alpha: Annotated[
        float, typer.Option(help="Scale of the merged update.", rich_help_panel=METHOD)
    ] = 1.0,
    weights: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="W1,W2,...",
            help="Factor of each task's update. [default: 1 for all]",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Singular vectors kept of each task. [default: min(shape) / number of tasks]",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    rank_fraction: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="The same as a share of min(shape).", rich_help_panel=METHOD, show_default=False
        ),
    ] = None,
    exclude: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            metavar="GLOB",
            help="Weights to average instead of decomposing; repeatable, replaces the default."
            " [default: text_projection.weight]",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    qkv: Annotated[
        Qkv,
        typer.Option(
            help="Decompose attention projections one by one, or stacked as OpenCLIP stores them.",
            rich_help_panel=METHOD,
        ),
    ] = Qkv.split,
    dtype: Annotated[
        Optional[Dtype],  # noqa: UP045
        typer.Option(
            help="Type of the written weights. [default: as the base model]",
            rich_help_panel=METHOD,
            show_default=False,
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest output file.", rich_help_panel=TARGET)
    ] = "5GB",
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="NAME",
            help="cpu, cuda, … [default: the best there is]",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show what would be done; reads headers only, writes nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=RUN)
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("-q", "--quiet", help="No progress, no status.", rich_help_panel=RUN),
    ] = False,
    token: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="Hub token. [default: HF_TOKEN, or the one of `hf auth login`]",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    cache_dir: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            help="Hub cache. [default: as the Hub client]", rich_help_panel=RUN, show_default=False
        ),
    ] = None,
) -> None:
    """Merge fine-tuned CLIP checkpoints into one multi-task checkpoint.

    Keeps the leading singular vectors of every task's weight update, makes those of different
    tasks orthogonal, and adds them to the base model (TSV-Merge). Needs neither data nor training.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv import merging

    choices: dict[str, Any] = {
        "method": method.value,
        "orthogonalizer": orthogonalizer.value,
        "alpha": alpha,
        "weights": _numbers(weights),
        "rank": rank,
        "rank_fraction": rank_fraction,
        "qkv": qkv.value,
        "dtype": dtype.value if dtype else None,
        "max_shard_size": int(max_shard_size)
        if re.fullmatch("[0-9]+", max_shard_size)
        else max_shard_size,
    }
    if exclude is not None:
        choices["exclude"] = [glob for glob in exclude if glob]
    report = merging.merge(
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
        dry_run=dry_run,
        progress=False if quiet else None,
    )
    if not dry_run:
        out.status(_summary(report))
    text = _preview(report) if dry_run else (report.output or report.url or "")
    out.result(text, report.to_dict())


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise RecipeError(f"--weights is {text!r}.", "Write numbers: --weights 1,0.5,1.") from None


def _summary(report: MergeReport) -> str:
    from hf_tsv.progress import human_bytes

    counts = ", ".join(f"{count} {name}" for name, count in report.weights.items())
    lines = [
        f"Merged {len(report.inputs)} checkpoints in {report.seconds:.1f} s:"
        f" {counts}; {human_bytes(report.output_bytes)}."
    ]
    for name, heads in report.left_out.items():
        lines.append(f"Left out of {name}: {', '.join(heads)}.")
    if report.url:
        lines.append(f"Uploaded: {report.url}")
    return "\n".join(lines)


def _preview(report: MergeReport) -> str:
    from hf_tsv.progress import human_bytes

    def pinned(entry: dict[str, str | None]) -> str:
        return f"{entry['ref']}@{entry['revision']}" if entry["revision"] else str(entry["ref"])

    rows = [("base model", pinned(report.base_model))]
    rows += [(f"task {i}", pinned(entry)) for i, entry in enumerate(report.inputs, start=1)]
    rows += [(name, f"{count} tensors") for name, count in report.weights.items()]
    rows += [("left out", f"{name}: {', '.join(h)}") for name, h in report.left_out.items()]
    rows += [
        ("method", report.method),
        ("download", human_bytes(report.download_bytes)),
        ("output", human_bytes(report.output_bytes)),
        ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)
