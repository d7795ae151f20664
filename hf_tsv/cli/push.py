"""`hf-tsv push`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hf_tsv.cli import options
from hf_tsv.cli.output import Out

if TYPE_CHECKING:
    from hf_tsv.verbs.push import PushReport


EXAMPLES = """\
**Examples**

`hf-tsv push merged me/clip-abc --private`

`hf-tsv push factors org/clip-sun397-tsv --create-pr`

`hf-tsv push merged me/clip-abc --dry-run`  (checks the folder and the token)
"""


def push(
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR",
            help="Finished folder that hf-tsv wrote: a merge, task factors, an adapter, or a"
            " reconstruction.",
            show_default=False,
        ),
    ],
    repo_id: Annotated[
        str,
        typer.Argument(
            metavar="REPO_ID",
            help="Hub repository to upload to; created if needed.",
            show_default=False,
        ),
    ],
    private: options.Private = None,
    revision: options.Revision = None,
    create_pr: options.CreatePr = False,
    commit_message: options.CommitMessage = None,
    dry_run: options.DryRun = False,
    as_json: options.AsJson = False,
    quiet: options.Quiet = False,
    token: options.Token = None,
) -> None:
    """Upload a finished folder as one commit, at once or after an upload that failed.

    Large files that the repository has already are not sent again.
    """
    out = Out(as_json=as_json, quiet=quiet)
    from hf_tsv.verbs import push as push_

    report = push_.push(
        folder,
        repo_id,
        private=private,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        token=token,
        dry_run=dry_run,
    )
    if not dry_run:
        out.status(_summary(report))
    out.result(_preview(report) if dry_run else (report.url or ""), report.to_dict())


def _summary(report: PushReport) -> str:
    from hf_tsv.system.text import human_bytes

    return (
        f"Uploaded {len(report.files)} files ({human_bytes(report.bytes)}) to {report.repo_id}"
        f" in {report.seconds:.1f} s."
    )


def _preview(report: PushReport) -> str:
    from hf_tsv.system.text import human_bytes

    return options.columns(
        [
            ("folder", report.folder),
            ("repository", report.repo_id),
            *(("file", f"{name}  {human_bytes(size)}") for name, size in report.files.items()),
            ("together", human_bytes(report.bytes)),
        ]
    )
