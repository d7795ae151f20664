"""`hf-tsv compress`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only
from hf_tsv.cli.output import Out, pinned, table
from hf_tsv.recipes.compressing import FactorFormat
from hf_tsv.recipes.settings import Dtype, Settings
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.text import human_bytes

if TYPE_CHECKING:
    from hf_tsv.reports.compression import CompressReport

EXAMPLES = """\
`hf-tsv compress org/clip-sun397 --rank-fraction 0.1 --push-to me/clip-sun397-tsv`
`hf-tsv compress org/clip-sun397 --budget 10% --factor-dtype bfloat16 -o factors`
`hf-tsv compress org/clip-sun397 --format peft --push-to me/clip-sun397-lora`
`hf-tsv compress ./clip-c --base-model openai/clip-vit-base-patch32 --energy 0.95 -o factors`
"""


@dataclass(frozen=True)
class KeepOptions:
    PANEL = "How much is kept (give one)"
    rank_fraction: Annotated[
        float | None, "Share of min(shape) of every matrix. [default: 0.1]"
    ] = None
    rank: Annotated[int | None, "Singular vectors of every matrix."] = None
    energy: Annotated[float | None, "Share of the squared singular values of every matrix."] = None
    budget: Annotated[
        str | None,
        "SIZE",
        "Bytes for everything, spent where they keep most: 10% of the checkpoint, 35MB.",
    ] = None


@dataclass(frozen=True)
class StoreOptions:
    PANEL = "How it is stored"
    factor_dtype: Annotated[Dtype, "Type of the stored updates."] = "float32"
    compress_conv: Annotated[
        bool,
        "Decompose the patch convolution too (otherwise it is the largest tensor stored whole).",
    ] = False
    format: Annotated[
        FactorFormat, "Task factors, or a LoRA adapter that PEFT loads without hf-tsv."
    ] = "factors"
    dense: Annotated[
        bool,
        "With peft: also biases, norms and embeddings. Without, PEFT can combine it with other"
        " adapters.",
    ] = True
    model_class: Annotated[
        str | None,
        "CLASS",
        "With peft: the class it is for, such as CLIPModel. [default: the checkpoint's]",
    ] = None


def compress(
    checkpoint: Annotated[
        str, "CHECKPOINT", "Fine-tune to compress: org/name, org/name@revision, or a local folder."
    ],
    *,
    source: options.SourceOptions,
    keep: KeepOptions,
    store: StoreOptions,
    target: options.TargetOptions,
    files: Annotated[options.FileOptions, Only("max_shard_size")],
    report: Annotated[
        bool,
        options.TARGET,
        "Put what is kept of which layer into the card, as a table and a picture.",
    ] = False,
    compute: Annotated[options.ComputeOptions, Only("device")],
    run: options.RunOptions,
    access: options.AccessOptions,
) -> None:
    """Compress a fine-tuned CLIP checkpoint into small task factors.

    Keeps the leading singular vectors of the update of every matrix, and the update itself of
    everything else (TSV-Compress). Together with the base model they give the fine-tune again.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet)
    from hf_tsv.checkpoints.sources import Access
    from hf_tsv.recipes.compressing import Options, RankRule
    from hf_tsv.runs.target import Target
    from hf_tsv.verbs import compress as compress_

    if not checkpoint:
        raise RecipeError("There is nothing to compress.", "Name a checkpoint.")
    rule, size = RankRule(**vars(keep)), files.shard_size or Settings.max_shard_size
    more = {"report": report, "allow_other_base": source.allow_other_base}
    done = compress_.run(
        checkpoint,
        source.base_model,
        Options(rule, **vars(store), max_shard_size=size, **more),  # type: ignore[arg-type]
        Target(**vars(target)),
        device=compute.device,
        access=Access.of(**vars(access), subfolder=source.subfolder),
        dry_run=run.dry_run,
        progress=run.progress,
    )
    out.delivered(done, _summary, _preview, timed=run.timings)


def _summary(report: CompressReport) -> str:
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
    if names := report.left_out:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"Changed, but not in the adapter: {', '.join(names[:4])}{more}.")
    if report.url:
        lines.append(f"Uploaded: {report.url}")
    return "\n".join(lines)


def _preview(report: CompressReport) -> str:
    size = "depends on the weights"
    if report.factors_bytes is not None:
        share = 100 * (report.ratio or 0)
        size = f"at most {human_bytes(report.factors_bytes)}, {share:.1f} % of the checkpoint"
    kinds = [weight["stored"] for weight in report.weights.values()]
    rule = ", ".join(f"{name} {value}" for name, value in report.rank_rule.items())
    return table(
        [
            ("base model", pinned(report.base_model)),
            ("task", pinned(report.source)),
            ("rule", rule),
            ("low-rank", f"{kinds.count('factors')} weights"),
            ("whole", f"{kinds.count('dense')} weights"),
            ("checkpoint", human_bytes(report.checkpoint_bytes)),
            ("output", size),
            ("download", human_bytes(report.download_bytes)),
            ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
        ]
    )
