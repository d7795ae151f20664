"""Delivery of a result: a complete folder, a Hub repository, or both."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from hf_tsv import hub
from hf_tsv.checkpoints.names import MARKERS, OLD_WEIGHTS
from hf_tsv.checkpoints.reference import PinnedCheckpoint, repo_id_of
from hf_tsv.runs.publishing import published
from hf_tsv.system import folders
from hf_tsv.system.errors import OutputError, RepoError, UsageError
from hf_tsv.system.folders import absolute, check_output_folder, disk_errors
from hf_tsv.system.progress import logger, others_silent

UNPUSHED = Path(constants.HF_HOME) / "hf-tsv" / "unpushed"
"""Folder of results that are only to be uploaded, until their upload succeeds."""


@dataclass(frozen=True)
class Target:
    """Destination of a result, as the user asked: a folder to write, a repository to push to.

    `force` replaces an output folder that hf-tsv wrote; the rest is about the push, after which the
    repository is added to the `collection`, a slug or an address.
    """

    output: Path | None = None
    push_to: str | None = None
    force: bool = False
    private: bool | None = None
    revision: str | None = None
    create_pr: bool = False
    commit_message: str | None = None
    collection: str | None = None

    def refuse_unusable(self, *, dry_run: bool) -> None:
        """Refuse what no run can use; only a dry run may lack both a folder and a repository.

        Raises:
            [`UsageError`]: arguments are missing, or contradict one another.
        """
        about = {"private": self.private is not None, "revision": self.revision}
        about |= {"create_pr": self.create_pr, "commit_message": self.commit_message}
        about |= {"collection": self.collection}
        if self.collection is not None:
            hub.collection_slug(self.collection)
        if self.push_to is None and (given := [name for name, value in about.items() if value]):
            hint = "Add `push_to=REPO_ID`."
            if given[0] == "revision":
                hint += " To read a revision of an input, write org/name@revision."
            raise UsageError(f"`{given[0]}=` applies to an upload, and none is asked for.", hint)
        if self.create_pr and self.revision not in (None, "main"):
            problem = "`create_pr=True` and `revision=` cannot be combined."
            raise UsageError(problem, "Pull requests start from the main branch: give one of them.")
        if self.output is None and self.push_to is None and not dry_run:
            raise UsageError("No output given.", "Pass `output=DIR`, `push_to=REPO_ID`, or both.")

    def checked(self, token: str | None, *, dry_run: bool) -> Target:
        """Refuse now what would fail after the work: a taken folder, a token that cannot write.

        The result has an absolute folder and a full repository id.
        """
        self.refuse_unusable(dry_run=dry_run)
        target = self
        if self.output is not None:
            output = absolute(self.output)
            try:
                check_output_folder(output, MARKERS, force=self.force)
            except OutputError as error:
                if self.push_to and any((output / name).is_file() for name in MARKERS):
                    later = self.push_command(output)
                    error.hint = f"{error.hint} To upload what is there: `{later}`."
                raise
            target = replace(target, output=output)
        if self.push_to is not None:
            repo_id = hub.writable_repo_id(
                self.push_to, token=token, private=self.private, create_pr=self.create_pr
            )
            target = replace(target, push_to=repo_id)
        if self.collection is not None:
            slug = hub.writable_collection(self.collection, token=token)
            target = replace(target, collection=slug)
        return target

    def refuse_inputs(self, inputs: Sequence[PinnedCheckpoint]) -> None:
        """Refuse to replace an input: a folder that is or contains it, or its repository."""
        for item in inputs:
            if item.is_local and self.output is not None:
                output, path = self.output.resolve(), Path(item.ref).expanduser().resolve()
                links = [p.resolve() for p in path.iterdir()] if path.is_dir() else []
                if any(output in (p, *p.parents) for p in (path, *links)):
                    problem = f"The output folder {self.output} would replace the input {item.ref}."
                    raise OutputError(problem, "Choose another one with `output=DIR`.")
                if path in output.parents:
                    problem = f"The output folder {self.output} would be in the input {item.ref}."
                    raise OutputError(problem, "Choose a folder outside of it with `output=DIR`.")
                continue
            same = not item.is_local and repo_id_of(item.ref) == self.push_to
            if same and not self.create_pr and self._replaces(item):
                raise OutputError(
                    f"Pushing to {self.push_to} would replace the input {item}.",
                    "Choose another repository, `revision=BRANCH`, or `create_pr=True`.",
                )

    def _replaces(self, item: PinnedCheckpoint) -> bool:
        """Tell whether an input was, or may have been, read from the branch that is pushed to."""
        branch, asked = self.revision or "main", item.asked_revision or "main"
        return branch == asked or (asked == item.revision and branch == "main")

    def push_command(self, folder: Path) -> str:
        """Command that uploads a finished folder to this target."""
        words = ["hf-tsv", "push", str(folder), str(self.push_to)]
        if self.private is not None:
            words.append("--private" if self.private else "--no-private")
        words += ["--revision", self.revision] if self.revision else []
        words += ["--create-pr"] if self.create_pr else []
        words += ["--commit-message", self.commit_message] if self.commit_message else []
        words += ["--collection", self.collection] if self.collection else []
        return shlex.join(words)


def final_folder(target: Target, job: Mapping[str, Any]) -> Path:
    """Folder in which to assemble the result: the output, or one that the same job finds again."""
    if target.output is not None:
        return target.output
    text = json.dumps([target.push_to, job], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()[:16]
    name = (target.push_to or "merge").rsplit("/", 1)[-1]
    return UNPUSHED / key / name


@contextmanager
def waiting(folder: Path) -> Iterator[None]:
    """Lock a folder from [`final_folder`] that only waits for its upload, and then remove it.

    It stays where the body fails; other folders stay as they are. An [`OutputError`] says that
    another process is writing or uploading it.
    """
    if folder.parent.parent != UNPUSHED:
        yield
        return
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = folder.parent / "lock"
        with folders.locked(lock, folder):
            try:
                yield
            except BaseException:
                if list(folder.parent.iterdir()) == [lock]:
                    shutil.rmtree(folder.parent, ignore_errors=True)
                raise
            shutil.rmtree(folder.parent, ignore_errors=True)


def push(folder: Path, target: Target, token: str | None, *, show: bool) -> hub.Pushed | None:
    """Upload a folder if the target is a repository; an error has the command to do so later."""
    if target.push_to is None:
        return None
    later = f"The result is complete in {folder}. Upload it with `{target.push_command(folder)}`."
    try:
        return upload(folder, target, token, show=show)
    except RepoError as error:
        error.hint = f"{later} {error.hint or ''}".rstrip()
        raise
    except BaseException:
        logger.warning(later)
        raise


def collect(target: Target, pushed: hub.Pushed | None, token: str | None) -> None:
    """Add the repository of a target, once it is pushed, to the collection that was asked for."""
    if pushed is not None and target.collection is not None:
        hub.add_to_collection(target.collection, str(target.push_to), pushed.url, token=token)


def upload(folder: Path, target: Target, token: str | None, *, show: bool) -> hub.Pushed:
    """Upload a folder to a target's repository, as it is published."""
    logger.info("Uploading to %s.", target.push_to)
    with others_silent(visible=show):
        return hub.push(
            folder,
            str(target.push_to),
            hub.Names(MARKERS, OLD_WEIGHTS, published),
            token=token,
            private=target.private,
            revision=target.revision,
            create_pr=target.create_pr,
            commit_message=target.commit_message,
        )
