"""`hf-tsv push`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only, call
from hf_tsv.cli.output import Out, table
from hf_tsv.system.text import human_bytes

if TYPE_CHECKING:
    from hf_tsv.verbs.push import PushReport

EXAMPLES = """\
`hf-tsv push merged me/clip-abc --private`
`hf-tsv push factors org/clip-sun397-tsv --create-pr`
`hf-tsv push merged me/clip-abc --dry-run`  (checks the folder and the token)
"""


def push(
    folder: Annotated[
        str,
        "DIR",
        "Finished folder that hf-tsv wrote: a merge, task factors, an adapter, or a"
        " reconstruction.",
    ],
    repo_id: Annotated[str, "REPO_ID", "Hub repository to upload to; created if needed."],
    *,
    target: Annotated[
        options.TargetOptions, Only("private", "revision", "create_pr", "commit_message")
    ],
    run: Annotated[options.RunOptions, Only("dry_run", "as_json", "quiet")],
    access: Annotated[options.AccessOptions, Only("token")],
) -> None:
    """Upload a finished folder as one commit, at once or after an upload that failed.

    Large files that the repository has already are not sent again.
    """
    out = Out(as_json=run.as_json, quiet=run.quiet)
    from hf_tsv.verbs import push as push_

    report = call(push_.push, (target, run, access), folder, repo_id)
    out.delivered(report, _summary, _preview)


def _summary(report: PushReport) -> str:
    if not report.changed:
        return f"Nothing was uploaded: {report.repo_id} has all {len(report.files)} files already."
    return (
        f"Uploaded {len(report.files)} files ({human_bytes(report.bytes)}) to {report.repo_id}"
        f" in {report.seconds:.1f} s."
    )


def _preview(report: PushReport) -> str:
    return table(
        [
            ("folder", report.folder),
            ("repository", report.repo_id),
            *(("file", f"{name}  {human_bytes(size)}") for name, size in report.files.items()),
            ("together", human_bytes(report.bytes)),
        ]
    )
