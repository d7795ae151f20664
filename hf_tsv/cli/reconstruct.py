"""`hf-tsv reconstruct`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, call
from hf_tsv.cli.output import Out, pinned, table
from hf_tsv.recipes.settings import Settings
from hf_tsv.system.text import human_bytes

if TYPE_CHECKING:
    from hf_tsv.verbs.reconstruct import ReconstructReport

EXAMPLES = """\
`hf-tsv reconstruct me/clip-sun397-tsv -o full`
`hf-tsv reconstruct ./factors --base-model openai/clip-vit-base-patch32 --push-to me/clip-sun397`
"""


def reconstruct(
    factors: Annotated[
        str, "FACTORS", "Task factors: org/name, org/name@revision, or a local folder."
    ],
    *,
    source: Annotated[options.SourceOptions, Only("base_model", "subfolder")],
    target: options.TargetOptions,
    files: options.FileOptions,
    compute: Annotated[options.ComputeOptions, Only("device", "max_memory")],
    run: Annotated[options.RunOptions, Only("dry_run", "as_json", "quiet")],
    access: options.AccessOptions,
) -> None:
    """Make a whole checkpoint of task factors and their base model again.

    The result is the complete base model with the task in it, and its task head if it had one.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet)
    from hf_tsv.verbs import reconstruct as reconstruct_

    groups = (source, target, files, compute, run, access)
    size = files.shard_size or Settings.max_shard_size
    own = {"max_shard_size": size, "progress": run.progress}
    report = call(reconstruct_.reconstruct, groups, factors, **own)
    out.delivered(report, _summary, _preview)


def _summary(report: ReconstructReport) -> str:
    lines = [
        f"Reconstructed {pinned(report.source)} in {report.seconds:.1f} s:"
        f" {human_bytes(report.output_bytes)}; relative error of the update"
        f" {report.update_error:.3g}."
    ]
    if report.url:
        lines.append(f"Uploaded: {report.url}")
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
