"""`hf-tsv reconstruct`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, call
from hf_tsv.cli.output import Out, kept, pinned, table
from hf_tsv.recipes.settings import Settings
from hf_tsv.system.text import human_bytes

if TYPE_CHECKING:
    from hf_tsv.verbs.reconstruct import ReconstructReport

USAGE = ("FACTORS", "-o DIR", "[OPTIONS]")
MISSING = "Name the task factors, and a folder for the result with -o."
EXAMPLES = (
    "hf-tsv reconstruct me/clip-sun397-tsv -o full",
    "hf-tsv reconstruct ./factors --base-model openai/clip-vit-base-patch32 --push-to me/clip",
)


def reconstruct(
    factors: Annotated[
        str, "FACTORS", "Task factors: org/name, org/name@revision, or a local folder."
    ],
    *,
    source: Annotated[options.SourceOptions, Only("base_model", "subfolder")],
    target: options.TargetOptions,
    files: options.FileOptions,
    compute: Annotated[options.ComputeOptions, Only("device", "max_memory")],
    run: Annotated[options.RunOptions, Only("dry_run", "as_json", "quiet", "verbose")],
    access: options.AccessOptions,
) -> None:
    """Rebuild a full checkpoint from task factors and their base model.

    The result is the complete base model with the task's update, and its classification head if it
    had one.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    from hf_tsv.verbs import reconstruct as reconstruct_

    groups = (source, target, files, compute, run, access)
    size = files.shard_size or Settings.max_shard_size
    own = {"max_shard_size": size, "progress": run.progress}
    report = call(reconstruct_.reconstruct, groups, factors, **own)
    out.delivered(report, _summary, _preview)


def _summary(report: ReconstructReport) -> str:
    lines = [
        f"Reconstructed {pinned(report.source)} in {report.seconds:.1f} s:"
        f" {human_bytes(report.output_bytes)}; {kept(report.update_error)}."
    ]
    return "\n".join(lines)


def _preview(report: ReconstructReport) -> str:
    return table(
        [
            ("base model", pinned(report.base_model)),
            ("factors", pinned(report.factors)),
            ("task", pinned(report.source)),
            ("download", human_bytes(report.download_bytes)),
            ("output", human_bytes(report.output_bytes)),
            ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
        ]
    )
