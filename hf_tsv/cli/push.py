"""`hf-tsv push`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, call
from hf_tsv.cli.output import Out, table
from hf_tsv.system.text import counted, human_bytes

if TYPE_CHECKING:
    from hf_tsv.verbs.push import PushReport

USAGE = ("DIR", "REPO_ID", "[OPTIONS]")
MISSING = "Name the folder to upload and the repository."
EXAMPLES = (
    "hf-tsv push merged me/clip-sun397-dtd --private",
    "hf-tsv push factors org/clip-sun397-tsv --create-pr",
    "hf-tsv push merged me/clip-sun397-dtd --dry-run",
)


def push(
    folder: Annotated[
        str,
        "DIR",
        "Folder that hf-tsv wrote: a merge, task factors, an adapter, or a reconstruction.",
    ],
    repo_id: Annotated[str, "REPO_ID", "Hub repository to upload to; created if needed."],
    *,
    target: Annotated[
        options.TargetOptions,
        Only("private", "revision", "create_pr", "commit_message", "collection"),
    ],
    run: Annotated[options.RunOptions, Only("dry_run", "as_json", "quiet", "verbose")],
    access: Annotated[options.AccessOptions, Only("token")],
) -> None:
    """Upload an output folder to the Hub as one commit; re-run it to resume.

    Large files that the repository already has are not sent again.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet, verbose=run.verbose)
    from hf_tsv.verbs import push as push_

    if Path(repo_id).is_dir() and not Path(folder).exists():  # in the order of `hf upload`
        folder, repo_id = repo_id, folder
        out.status(f"The folder is {folder}, the repository {repo_id}.")
    report = call(push_.push, (target, run, access), folder, repo_id, progress=run.progress)
    out.delivered(report, _summary, _preview)


def _summary(report: PushReport) -> str:
    files = counted(len(report.files), "file")
    if not report.changed:
        return f"Nothing was uploaded: {report.repo_id} has all {files} already."
    size = human_bytes(report.bytes)
    return f"Uploaded {files} ({size}) to {report.repo_id} in {report.seconds:.1f} s."


def _preview(report: PushReport) -> str:
    return table(
        [
            ("folder", report.folder),
            ("repository", report.repo_id),
            *(("file", f"{name}  {human_bytes(size)}") for name, size in report.files.items()),
            ("together", human_bytes(report.bytes)),
        ]
    )
