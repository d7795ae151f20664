"""`hf-tsv compress`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only
from hf_tsv.cli.output import Out, kept, pinned, table
from hf_tsv.recipes.compressing import FactorFormat
from hf_tsv.recipes.settings import Dtype, Settings
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import counted, human_bytes

if TYPE_CHECKING:
    from hf_tsv.reports.compression import CompressReport

USAGE = ("CHECKPOINT", "-o DIR", "[OPTIONS]")
MISSING = "Name the checkpoint to compress, and a folder for the result with -o."
EXAMPLES = (
    f"hf-tsv compress {options.SUN397} -o sun397-tsv",
    f"hf-tsv compress {options.SUN397} --budget 10% --dtype bfloat16 --compress-conv -o sun397-tsv",
    f"hf-tsv compress {options.SUN397} --rank 16 --out-format peft -o sun397-lora",
    "hf-tsv compress ./my-clip --base-model openai/clip-vit-base-patch32 --push-to me/my-clip-tsv",
)


@dataclass(frozen=True)
class KeepOptions:
    PANEL = "Size (give one)"
    rank_fraction: Annotated[
        float | None, "F", "Rank, as a share of each matrix's smaller side. [default: 0.1]"
    ] = None
    rank: Annotated[int | None, "N", "Rank: singular vectors kept of every matrix."] = None
    energy: Annotated[
        float | None, "E", "Share of the squared singular values kept of every matrix."
    ] = None
    budget: Annotated[
        str | None, "SIZE", "Total size, spent where it keeps most: 35MB, or 10% of the checkpoint."
    ] = None


@dataclass(frozen=True)
class StoreOptions:
    PANEL = "Storage"
    dtype: Annotated[Dtype, "DTYPE", "float32, float16 or bfloat16, which halves the size."] = (
        "float32"
    )
    compress_conv: Annotated[
        bool, "Decompose the patch convolution too, the largest tensor otherwise stored in full."
    ] = False
    out_format: Annotated[
        FactorFormat, "Task factors, or a LoRA adapter that PEFT loads without hf-tsv."
    ] = "factors"
    dense: Annotated[
        bool,
        "With peft: also store biases, norms and embeddings. PEFT can combine adapters only without"
        " them. [default: --dense]",
    ] = True
    model_class: Annotated[
        str | None,
        "CLASS",
        "With peft: model class it is loaded on, such as CLIPModel. [default: the checkpoint's]",
    ] = None


def compress(
    checkpoint: Annotated[
        str, "CHECKPOINT", "Fine-tuned checkpoint: org/name, org/name@revision, or a local folder."
    ],
    *,
    source: options.SourceOptions,
    keep: KeepOptions,
    store: StoreOptions,
    target: options.TargetOptions,
    files: Annotated[options.FileOptions, Only("max_shard_size")],
    report: Annotated[
        bool, options.TARGET, "Add a table and a picture of what is kept of each layer to the card."
    ] = False,
    compute: Annotated[options.ComputeOptions, Only("device")],
    run: options.RunOptions,
    access: options.AccessOptions,
) -> None:
    """Compress a fine-tuned CLIP checkpoint into small task factors.

    Keeps the leading singular vectors of every weight matrix's update, and the update of all other
    tensors in full (TSV-Compress). Added to the base model, they approximate the fine-tune.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    from hf_tsv.recipes.compressing import Options, RankRule

    size = files.shard_size or Settings.max_shard_size
    more = {"report": report, "allow_other_base": source.allow_other_base}
    chosen = Options(RankRule(**vars(keep)), **vars(store), max_shard_size=size, **more)  # type: ignore[arg-type]
    if not checkpoint:
        raise UsageError("There is nothing to compress.", "Name a checkpoint.")
    from hf_tsv.checkpoints.sources import Access
    from hf_tsv.runs.target import Target
    from hf_tsv.verbs import compress as compress_

    done = compress_.run(
        checkpoint,
        source.base_model,
        chosen,
        Target(**vars(target)),
        device=compute.device,
        access=Access.of(**vars(access), subfolder=source.subfolder),
        dry_run=run.dry_run,
        progress=run.progress,
    )
    out.delivered(done, _summary, _preview, timed=run.timings)


def _summary(report: CompressReport) -> str:
    from hf_tsv.reports.kept import stored_text

    counts, shares = report.ratio_for_tasks, report.ratio_for_tasks.values()
    lines = [
        f"Compressed in {report.seconds:.1f} s: {human_bytes(report.factors_bytes or 0)},"
        f" {report.ratio or 0:.1%} of the checkpoint's {human_bytes(report.checkpoint_bytes)}.",
        f"It {kept(report.update_error)}.",
        f"{stored_text(weight['stored'] for weight in report.weights.values())}.",
        f"Base model + {' / '.join(counts)} tasks like this:"
        f" {' / '.join(f'{100 * share:.0f}' for share in shares)}% of the full checkpoints' size.",
    ]
    if names := report.left_out:
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines.append(f"Changed, but not in the adapter: {', '.join(names[:4])}{more}.")
    return "\n".join(lines)


def _preview(report: CompressReport) -> str:
    size = "depends on the weights"
    if report.factors_bytes is not None:
        share = 100 * (report.ratio or 0)
        size = f"at most {human_bytes(report.factors_bytes)}, {share:.1f}% of the checkpoint"
    kinds = [weight["stored"] for weight in report.weights.values()]
    rule = ", ".join(f"{name} {value}" for name, value in report.rank_rule.items())
    return table(
        [
            ("base model", pinned(report.base_model)),
            ("task", pinned(report.source)),
            ("rule", rule),
            ("stored as", f"{report.out_format}, {report.dtype}"),
            ("low-rank", counted(kinds.count("factors"), "matrix", "matrices")),
            ("in full", counted(kinds.count("dense"), "tensor")),
            ("checkpoint", human_bytes(report.checkpoint_bytes)),
            ("output", size),
            *([("folder", report.output)] if report.output else []),
            ("download", human_bytes(report.download_bytes)),
            ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
        ]
    )
