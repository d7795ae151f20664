"""`hf-tsv reconstruct`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Optional

import typer

from hf_tsv.cli import options
from hf_tsv.cli.output import Out

if TYPE_CHECKING:
    from hf_tsv.verbs.reconstruct import ReconstructReport


EXAMPLES = """\
**Examples**

`hf-tsv reconstruct me/clip-sun397-tsv -o full`

`hf-tsv reconstruct ./factors --base-model openai/clip-vit-base-patch32 --push-to me/clip-sun397`
"""


def reconstruct(
    factors: Annotated[
        str,
        typer.Argument(
            metavar="FACTORS",
            help="Task factors: org/name, org/name@revision, or a local folder.",
            show_default=False,
        ),
    ],
    base_model: options.BaseModel = None,
    subfolder: options.Subfolder = None,
    output: options.Output = None,
    force: options.Force = False,
    push_to: options.PushTo = None,
    private: options.Private = None,
    revision: options.Revision = None,
    create_pr: options.CreatePr = False,
    commit_message: options.CommitMessage = None,
    dtype: Annotated[
        Optional[options.Dtype],  # noqa: UP045
        typer.Option(
            help="Type of the written weights. [default: as the base model]",
            rich_help_panel=options.TARGET,
            show_default=False,
        ),
    ] = None,
    max_shard_size: options.MaxShardSize = "5GB",
    device: options.Device = None,
    max_memory: options.MaxMemory = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    token: options.Token = None,
    cache_dir: options.CacheDir = None,
    stream: options.Stream = False,
) -> None:
    """Make a whole checkpoint of task factors and their base model again.

    The result is the complete base model with the task in it, and its task head if it had one.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv.verbs import reconstruct as reconstruct_

    report = reconstruct_.reconstruct(
        factors,
        base_model=base_model,
        output=output,
        push_to=push_to,
        dtype=dtype.value if dtype else None,
        max_shard_size=options.shard_size(max_shard_size),
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
        dry_run=dry_run,
        progress=False if quiet else None,
    )
    if not dry_run:
        out.status(_summary(report))
    text = _preview(report) if dry_run else (report.output or report.url or "")
    out.result(text, report.to_dict())


def _summary(report: ReconstructReport) -> str:
    from hf_tsv.system.text import human_bytes

    lines = [
        f"Reconstructed {options.pinned(report.source)} in {report.seconds:.1f} s:"
        f" {human_bytes(report.output_bytes)}; relative error of the update"
        f" {report.update_error:.3g}."
    ]
    if report.url:
        lines.append(f"Uploaded: {report.url}")
    return "\n".join(lines)


def _preview(report: ReconstructReport) -> str:
    from hf_tsv.system.text import human_bytes

    return options.columns(
        [
            ("base model", options.pinned(report.base_model)),
            ("factors", options.pinned(report.factors)),
            ("task", options.pinned(report.source)),
            ("download", human_bytes(report.download_bytes)),
            ("output", human_bytes(report.output_bytes)),
            ("peak memory", f"about {human_bytes(report.peak_memory_bytes)} beside the libraries"),
        ]
    )
