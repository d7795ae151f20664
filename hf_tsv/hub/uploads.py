"""Pushes: the right to write is checked before the work, and one commit is made after it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from json import JSONDecodeError
from logging import getLogger
from pathlib import Path
from typing import Any

from httpx2 import RequestError
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    constants,
    errors,
    get_token,
)
from huggingface_hub.hf_api import ModelInfo
from huggingface_hub.utils._validators import validate_repo_id

from hf_tsv.hub.client import MOVED_ON, RETRY_WAITS, SILENCE, api, first_line, retried, translated
from hf_tsv.system.errors import OutputError, RepoError
from hf_tsv.system.progress import logger
from hf_tsv.system.text import redacted

RACES = len(RETRY_WAITS) + 1
"""Most times that a push lists the repository, in order to commit on top of its newest state."""

TOGETHER = 250_000_000
"""Bytes of files that are uploaded side by side; hf_xet holds up to twice as much in memory."""

STORAGE_REFUSES = "LFS batch API returned errors"
"""First words of the client's error for a full storage, or a storage without the right to it."""

NOTHING_NEW = "No files have been modified"
"""First words of the client's warning about an empty commit, which is told here in other words."""

getLogger("huggingface_hub.hf_api").addFilter(
    lambda said: not str(said.msg).startswith(NOTHING_NEW)
)

RESULTS = f"{constants.EVAL_RESULTS_FOLDER}/"
"""Beginning of the names of files with evaluation results."""

HUB_ERRORS = (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.HFValidationError)


def check_repo_id(repo_id: str) -> None:
    """Refuse, without asking the Hub, what is no `org/name` and no `name`."""
    with translated(repo_id, None, writing=True):
        validate_repo_id(repo_id)


def writable_repo_id(
    repo_id: str, *, token: str | None = None, private: bool | None = None, create_pr: bool = False
) -> str:
    """Check before any heavy work that the token may write a repository, and return its full id.

    The id is `org/name`, or `name` for the token's own user; the token by default the one the
    client is logged in with. An existing repository must have the visibility `private`, unless that
    is None; with `create_pr` it must exist, and may be one that the token cannot write. A
    [`RepoError`] refuses all else.
    """
    if token is None and get_token() is None:
        hint = "Run `hf auth login` with a token that can write, or set HF_TOKEN."
        raise RepoError(f"Pushing to {repo_id} needs a token and none is set.", hint)
    with translated(repo_id, None, writing=True):
        user = retried(lambda: api(token).whoami())
        if "/" not in repo_id:
            repo_id = f"{user['name']}/{repo_id}"
        exists, there = _existing(repo_id, token)
        if there is not None and private is not None:
            _check_visibility(there, private)
    if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        problem = f"Pushing to {repo_id} needs a token that can write; this one can only read."
        raise RepoError(problem, "Create one with the role 'write' and run `hf auth login`.")
    if create_pr and not exists:
        problem = f"`create_pr=True` needs an existing repository, and {repo_id} does not exist."
        raise RepoError(problem, "Omit `create_pr=True` to create it.")
    if exists and not create_pr:
        with translated(repo_id, None, writing=True):
            retried(lambda: api(token).auth_check(repo_id, write=True))
    owner = repo_id.split("/")[0]
    if not exists and owner not in (namespaces := _writable_namespaces(user)):
        raise RepoError(
            f"This token cannot create {repo_id}: it writes to {', '.join(namespaces) or 'none'}.",
            "Choose one of these namespaces, or use `create_pr=True` on an existing repository.",
        )
    return repo_id


def _existing(repo_id: str, token: str | None) -> tuple[bool, ModelInfo | None]:
    """Tell whether a repository exists, and its visibility; a broken card is no obstacle."""
    try:
        return True, retried(lambda: api(token).model_info(repo_id, expand=["private"]))
    except errors.GatedRepoError:
        return True, None
    except errors.RepositoryNotFoundError:
        return False, None


def _writable_namespaces(user: dict[str, Any]) -> list[str]:
    """Users and organisations for which a token may create repositories, from `whoami`."""
    scopes = (user.get("auth") or {}).get("accessToken", {}).get("fineGrained")
    if scopes is None:
        return [user["name"], *(org["name"] for org in user.get("orgs", []))]
    return [
        scope["entity"]["name"]
        for scope in scopes.get("scoped", [])
        if "repo.write" in scope.get("permissions", []) and scope["entity"].get("type") != "model"
    ]


def _check_visibility(info: ModelInfo, private: bool) -> None:
    if info.private is not None and bool(info.private) != private:
        there, flag = (
            ("private", "`private=False`") if info.private else ("public", "`private=True`")
        )
        hint = f"Omit {flag}, or change the visibility in the settings of the repository."
        raise RepoError(f"{info.id} exists and is {there}, and {flag} does not change that.", hint)


def files_to_push(folder: Path, markers: Sequence[str]) -> dict[str, Path]:
    """Files of a finished folder that a push uploads, by name: all but hidden ones.

    Results in `.eval_results`, which the Hub shows, are not hidden. An [`OutputError`] says that
    the folder is absent or unfinished (no file of it is named in `markers`), or holds links that
    lead out of it or names that are not printable.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    hidden = {name for name in files if "/." in "/" + f"{name}/".removeprefix(RESULTS)}
    files = {name: path for name, path in files.items() if path.is_file() and name not in hidden}
    if not files.keys() & set(markers):
        problem = f"{folder} is not a finished output of hf-tsv (it has no {' or '.join(markers)})."
        raise OutputError(problem, "Name the output of a merge, a compression or a reconstruction.")
    root = folder.resolve()
    for name, path in files.items():
        if not path.resolve().is_relative_to(root):
            problem = f"{path} is a link to a file outside of {folder}."
            raise OutputError(problem, "Remove it from the folder.")
        if not name.isprintable():
            raise OutputError(f"{folder} has a file of the name {name!r}.", "Remove it.")
    if hidden:
        logger.info("Hidden files are not uploaded: %s.", ", ".join(sorted(hidden)))
    return files


@dataclass(frozen=True)
class Names:
    """Names, one of which every finished output has, and patterns of the files that it replaces.

    `published` gives the content of files that is uploaded instead of theirs, from the files and
    the repository.
    """

    markers: Sequence[str]
    replaced: Sequence[str]
    published: Callable[[dict[str, Path], str], dict[str, bytes]] = lambda files, repo_id: {}


@dataclass(frozen=True)
class Pushed:
    """Address of a commit or pull request, and whether the repository changed by it."""

    url: str
    changed: bool


def push(
    folder: Path,
    repo_id: str,
    names: Names,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
) -> Pushed:
    """Upload a finished folder as one commit; weights of an earlier upload are replaced.

    Large files are uploaded first, except those that the repository already has; then one commit
    makes all of them appear at once. `upload_folder` would make several commits. The repository is
    created if needed, `private` if asked for. If it has all files already, there is no new commit.
    """
    client = api(token)
    with translated(repo_id, revision, writing=True), _upload_errors(repo_id):
        if not create_pr:
            retried(lambda: client.create_repo(repo_id, private=private, exist_ok=True))
            if revision is not None and revision != "main" and not revision.startswith("refs/"):
                retried(lambda: client.create_branch(repo_id, branch=revision, exist_ok=True))
        files = files_to_push(folder, names.markers)  # once: the folder may be gone by the next try
        contents: dict[str, Path | bytes] = {**files, **names.published(files, repo_id)}
        for race in range(RACES):
            head = retried(
                lambda: client.model_info(
                    repo_id, revision=revision, expand=["sha", "siblings"], timeout=SILENCE
                )
            )
            there = [file.rfilename for file in head.siblings or []]
            old = [name for name in there if any(fnmatch(name, one) for one in names.replaced)]
            if old and race == 0 and not create_pr and not set(names.markers) & set(there):
                replacing = "The upload replaces %s of %s; earlier commits keep them."
                logger.warning(replacing, ", ".join(old), repo_id)
            added = [CommitOperationAdd(name, new) for name, new in contents.items()]
            gone = [CommitOperationDelete(name) for name in old if name not in files]
            branch: dict[str, Any] = {"revision": revision, "create_pr": create_pr}
            commit = partial(
                client.create_commit,
                repo_id,
                [*gone, *added],
                commit_message=commit_message or "Upload model made with hf-tsv",
                parent_commit=head.sha,
                **branch,
            )
            try:
                for group in _groups(added)[:-1]:  # the commit uploads the last one itself
                    send = partial(client.preupload_lfs_files, free_memory=False, **branch)
                    retried(partial(send, repo_id, group))
                made = _committed(commit, create_pr)
                new = race > 0 or made.oid != head.sha  # a race may be lost to our own commit
                return Pushed(redacted(str(made.pr_url or made.commit_url)), new)
            except errors.HfHubHTTPError as error:
                # Our own commit may have caused this, if its answer was lost: the retry is empty
                if error.response.status_code != MOVED_ON or race == RACES - 1:
                    raise
                logger.info("%s received another commit in the meantime; trying again.", repo_id)
                time.sleep(RETRY_WAITS[race])
            except RuntimeError:
                # The upload address may be too old (signed for an hour), or its answer was lost.
                if race:
                    raise
                logger.info("The storage of %s refused a file; trying again.", repo_id)
    raise AssertionError("the last try returns or raises")


def _groups(added: Sequence[CommitOperationAdd]) -> list[list[CommitOperationAdd]]:
    """Split files into groups of [`TOGETHER`] bytes; a larger file is a group of its own."""
    groups: list[list[CommitOperationAdd]] = [[]]
    size = 0
    for file in added:
        size += file.upload_info.size
        if groups[-1] and size > TOGETHER:
            groups.append([])
            size = file.upload_info.size
        groups[-1].append(file)
    return groups


def commit_files(
    repo_id: str,
    contents: Mapping[str, bytes],
    *,
    branch: str,
    parent: str | None,
    create_pr: bool,
    commit_message: str,
    token: str | None = None,
) -> str:
    """Write files of a repository by one commit on top of the commit they were read from.

    The result is the address of the commit or pull request. A [`RepoError`] says that nothing was
    written, for example because the branch has changed.
    """

    def commit() -> CommitInfo:
        return api(token).create_commit(
            repo_id,
            # new for each try, as they record the branch
            [CommitOperationAdd(name, content) for name, content in contents.items()],
            commit_message=commit_message,
            revision=branch,
            create_pr=create_pr,
            parent_commit=parent,
        )

    with translated(repo_id, branch, writing=True), _upload_errors(repo_id):
        made = _committed(commit, create_pr)
    return redacted(str(made.pr_url or made.commit_url))


def _committed(commit: Callable[[], CommitInfo], create_pr: bool) -> CommitInfo:
    """Make a commit, retried unless a retry after a lost answer would open two pull requests."""
    return commit() if create_pr else retried(commit)


@contextmanager
def _upload_errors(repo_id: str) -> Iterator[None]:
    """Turn errors that are not answers of the Hub into a [`RepoError`]."""
    try:
        yield
    except (RequestError, JSONDecodeError, *HUB_ERRORS):
        raise
    except (TypeError, ValueError) as error:  # the client or the Hub refuses the card
        if str(error).startswith(STORAGE_REFUSES):
            said = first_line(ValueError(" ".join(str(error).splitlines())))
            raise RepoError(f"{repo_id}: {said}.", "Check the storage of its owner.") from None
        said = f"{repo_id}: {first_line(error)}."
        raise RepoError(said, "Check the metadata of its model card.") from None
    except (RuntimeError, OSError) as error:  # from the storage
        why = error.__cause__ if isinstance(error.__cause__, Exception) else error
        if isinstance(why, errors.HfHubHTTPError):
            said = f"the storage answered {why.response.status_code}"
        elif isinstance(why, RequestError):
            said = f"the storage cannot be reached ({type(why).__name__})"
        else:
            said = getattr(why, "strerror", None) or first_line(why)
        raise RepoError(f"The upload to {repo_id} failed: {said}.", "Try again later.") from None
