"""`hf-tsv compress`."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hf_tsv.cli import options
from hf_tsv.cli.output import Out
from hf_tsv.system.errors import RecipeError

if TYPE_CHECKING:
    from hf_tsv.reports.compression import CompressReport


EXAMPLES = """\
**Examples**

`hf-tsv compress org/clip-sun397 --rank-fraction 0.1 --push-to me/clip-sun397-tsv`

`hf-tsv compress org/clip-sun397 --budget 10% --factor-dtype bfloat16 -o factors`

`hf-tsv compress org/clip-sun397 --format peft --push-to me/clip-sun397-lora`

`hf-tsv compress ./clip-c --base-model openai/clip-vit-base-patch32 --energy 0.95 -o factors`
"""
RANKS = "How much is kept (give one)"
FORMAT = "How it is stored"


class Format(str, Enum):
    """Values of `--format`."""

    factors = "factors"
    peft = "peft"


def compress(
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Fine-tune to compress: org/name, org/name@revision, or a local folder.",
            show_default=False,
        ),
    ],
    base_model: options.BaseModel = None,
    subfolder: options.Subfolder = None,
    rank_fraction: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Share of min(shape) of every matrix. [default: 0.1]",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            help="Singular vectors of every matrix.", rich_help_panel=RANKS, show_default=False
        ),
    ] = None,
    energy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            help="Share of the squared singular values of every matrix.",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None,
    budget: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="SIZE",
            help="Bytes for everything, spent where they keep most: 10% of the checkpoint, 35MB.",
            rich_help_panel=RANKS,
            show_default=False,
        ),
    ] = None,
    factor_dtype: Annotated[
        options.Dtype,
        typer.Option(help="Type of the stored updates.", rich_help_panel=FORMAT),
    ] = options.Dtype.float32,
    compress_conv: Annotated[
        bool,
        typer.Option(
            "--compress-conv",
            help="Decompose the patch convolution too, the largest part stored whole.",
            rich_help_panel=FORMAT,
        ),
    ] = False,
    file_format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="Task factors, or a LoRA adapter that PEFT loads without hf-tsv.",
            rich_help_panel=FORMAT,
        ),
    ] = Format.factors,
    dense: Annotated[
        bool,
        typer.Option(
            "--dense/--no-dense",
            help="With peft: also biases, norms and embeddings. Without, PEFT can combine it with"
            " other adapters.",
            rich_help_panel=FORMAT,
        ),
    ] = True,
    model_class: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            metavar="CLASS",
            help="With peft: the class it is for, such as CLIPModel. [default: the checkpoint's]",
            rich_help_panel=FORMAT,
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
    max_shard_size: options.MaxShardSize = "5GB",
    device: options.Device = None,
    report: Annotated[
        bool,
        typer.Option(
            "--report",
            help="Put what is kept of which layer into the card, as a table and a picture.",
            rich_help_panel=options.TARGET,
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
    """Compress a fine-tuned CLIP checkpoint into small task factors.

    Keeps the leading singular vectors of the update of every matrix, and the update itself of
    everything else (TSV-Compress). Together with the base model they give the fine-tune again.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv.checkpoints.sources import Access
    from hf_tsv.recipes.compressing import Options, RankRule
    from hf_tsv.runs.target import Target
    from hf_tsv.verbs.compress import run

    if not checkpoint:
        raise RecipeError("There is nothing to compress.", "Name a checkpoint.")
    done = run(
        checkpoint,
        base_model,
        Options(
            RankRule(rank_fraction, rank, energy, budget),
            factor_dtype.value,
            compress_conv,
            file_format.value,
            dense,
            model_class,
            options.shard_size(max_shard_size),
            report,
        ),
        Target(output, push_to, force, private, revision, create_pr, commit_message),
        device=device,
        access=Access.of(token, cache_dir, subfolder, stream=stream),
        dry_run=dry_run,
        progress=False if quiet else None,
    )
    if not dry_run:
        out.status(_summary(done))
        if timings:
            out.status(options.timings(done.timings, {}))
    text = _preview(done) if dry_run else (done.output or done.url or "")
    out.result(text, done.to_dict())


def _summary(report: CompressReport) -> str:
    from hf_tsv.system.text import human_bytes

    kinds = [weight["stored"] for weight in report.weights.values()]
    shares = (f"{T} such tasks take {100 * r:.0f} %" for T, r in report.ratio_for_tasks.items())
    lines = [
        f"Compressed in {report.seconds:.1f} s: {human_bytes(report.factors_bytes or 0)},"
        f" {100 * (report.ratio or 0):.1f} % of the checkpoint's"
        f" {human_bytes(report.checkpoint_bytes)}; relative error of the update"
        f" {report.update_error:.3g}.",
        f"{kinds.count('factors')} weights low-rank, {kinds.count('dense')} whole,"
        f" {kinds.count('none')} unchanged or left out.",
        f"With the base model, {', '.join(shares)} of their checkpoints.",
    ]
    if report.left_out:
        names = report.left_out[:4]
        more = f" and {len(report.left_out) - 4} more" if len(report.left_out) > 4 else ""
        lines.append(f"Changed, but not in the adapter: {', '.join(names)}{more}.")
    if report.url:
        lines.append(f"Uploaded: {report.url}")
    return "\n".join(lines)


def _preview(report: CompressReport) -> str:
    from hf_tsv.system.text import human_bytes

    size = "depends on the weights"
    if report.factors_bytes is not None:
        share = 100 * (report.ratio or 0)
        size = f"at most {human_bytes(report.factors_bytes)}, {share:.1f} % of the checkpoint"
    kinds = [weight["stored"] for weight in report.weights.values()]
    rule = ", ".join(f"{name} {value}" for name, value in report.rank_rule.items())
    return options.columns(
        [
            ("base model", options.pinned(report.base_model)),
            ("task", options.pinned(report.source)),
            ("rule", rule),
            ("low-rank", f"{kinds.count('factors')} weights"),
            ("whole", f"{kinds.count('dense')} weights"),
            ("checkpoint", human_bytes(report.checkpoint_bytes)),
            ("output", size),
            ("download", human_bytes(report.download_bytes)),
            ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
        ]
    )
