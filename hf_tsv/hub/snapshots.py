"""Repositories at one commit, resolved once from the Hub or from the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from httpx2 import TransportError
from huggingface_hub import RepoFile, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled, RevisionResolutionError

from hf_tsv.hub import client
from hf_tsv.hub.client import api, first_line, retried, translated
from hf_tsv.system.errors import RepoError
from hf_tsv.system.progress import logger

CONVERTER = "SFconvertbot"
CONVERSION = "Adding `safetensors` variant of this model"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pth.tar")


@dataclass(frozen=True)
class RepoSnapshot:
    """One repository at one commit: the sizes of its files, in bytes, and the metadata of its card.

    `revision` is the sha; the token is never printed. `folder` is the cached copy, if the Hub
    cannot be reached; `locations` are the storage addresses of files that were read by range.
    """

    repo_id: str
    revision: str
    sizes: dict[str, int]
    card: dict[str, Any]
    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    folder: Path | None = None
    locations: dict[str, str] = field(default_factory=dict, repr=False, compare=False)


def snapshot(
    repo_id: str,
    revision: str | None,
    subfolder: str = "",
    *,
    configs: Sequence[str] = ("config.json",),
    token: str | None = None,
    cache_dir: str | None = None,
) -> RepoSnapshot:
    """Pin a repository to a commit and list its files; writes nothing to disk.

    Falls back to the client's cache when the Hub cannot be reached or `HF_HUB_OFFLINE=1`; the cache
    must then contain `subfolder`, found by files of the names `configs`, one of which every
    checkpoint has. The revision is a branch, tag or commit, main by default; token and cache folder
    are the client's by default. A [`RepoError`] tells of an unknown, private or gated repository,
    an unknown revision, or one that is not cached.
    """
    with translated(repo_id, revision):
        try:
            info = retried(
                lambda: api(token).model_info(
                    repo_id, revision=revision, files_metadata=True, timeout=client.SILENCE
                )
            )
        except (OfflineModeIsEnabled, TransportError) as error:
            return _cached_snapshot(repo_id, revision, subfolder, configs, cache_dir, error)
        except TypeError as error:  # raised by the client for some keys of a card
            problem = f"The model card of {repo_id} cannot be read: {first_line(error)}."
            raise RepoError(problem, "Download the repository and merge the folder.") from None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    card = card_dict(info.card_data)
    return RepoSnapshot(repo_id, str(info.sha), sizes, card, token, cache_dir)


def dataset_commit(repo_id: str, revision: str | None, *, token: str | None = None) -> str | None:
    """Commit sha of a revision of a dataset, or None when the Hub cannot be reached."""
    with translated(repo_id, revision):
        try:
            info = retried(
                lambda: api(token).dataset_info(repo_id, revision=revision, timeout=client.SILENCE)
            )
        except (OfflineModeIsEnabled, TransportError):
            return None
    return info.sha


def dataset_file(
    repo_id: str,
    name: str,
    revision: str | None,
    *,
    most: int,
    token: str | None = None,
    cache_dir: str | None = None,
) -> bytes | None:
    """Content of a small file of a dataset, or None where there is none.

    A [`RepoError`] says that the Hub cannot be reached, or that the file has more than `most`
    bytes.
    """
    where: dict[str, Any] = {"repo_type": "dataset", "revision": revision}
    with translated(repo_id, revision):
        found = retried(lambda: api(token).get_paths_info(repo_id, [name], **where))
        size = next((item.size for item in found if isinstance(item, RepoFile)), None)
        if size is None:
            return None
        if size > most:
            raise RepoError(f"{name} of {repo_id} has {size} bytes and is not read.")
        path = retried(
            lambda: api(token).hf_hub_download(repo_id, name, cache_dir=cache_dir, **where)
        )
        return Path(path).read_bytes()


def card_dict(data: Any) -> dict[str, Any]:
    """Front matter of a card; {} where it has none or the client cannot convert it."""
    try:
        return dict(data.to_dict())
    except (AttributeError, TypeError, ValueError):
        return {}


def _cached_snapshot(
    repo_id: str,
    revision: str | None,
    subfolder: str,
    configs: Sequence[str],
    cache_dir: str | None,
    error: Exception,
) -> RepoSnapshot:
    try:
        found = api().resolve_revision(
            repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True
        )
        sha = found.resolved
    except RevisionResolutionError:
        sha = revision or "main"
    inside = f"{subfolder}/" if subfolder else ""
    paths = (
        try_to_load_from_cache(repo_id, inside + name, cache_dir=cache_dir, revision=sha)
        for name in configs
    )
    config = next((path for path in paths if isinstance(path, str)), None)
    beside = Path(config).parent.iterdir() if config else ()
    if config is None or not any(file.name.endswith(WEIGHT_SUFFIXES) for file in beside):
        lacking = f"The weights of {repo_id} are" if config else f"{repo_id} is"
        raise RepoError(
            f"{lacking} not in the local cache and the Hub cannot be reached"
            f" ({type(error).__name__}).",
            "Run once with a connection, without HF_HUB_OFFLINE and `stream=True`.",
        ) from None
    folder = Path(config).parents[inside.count("/")]
    if not isinstance(error, OfflineModeIsEnabled):
        logger.warning("The Hub cannot be reached: %s is taken from the local cache.", repo_id)
    files = filter(Path.is_file, folder.rglob("*"))
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    return RepoSnapshot(repo_id, folder.name, sizes, {}, None, cache_dir, folder)


def conversion(repo: RepoSnapshot) -> str | None:
    """Find the pull request in which the Hub's own bot offers this very commit as safetensors.

    As in transformers, pull requests of other authors or from earlier commits are ignored.
    """
    hub = api(repo.token)
    asked = partial(
        hub.get_repo_discussions,
        author=CONVERTER,
        discussion_type="pull_request",
        discussion_status="open",
    )
    with translated(repo.repo_id, repo.revision):
        for offer in retried(lambda: list(asked(repo.repo_id))):
            reference = offer.git_reference
            if (offer.author, offer.title) != (CONVERTER, CONVERSION) or reference is None:
                continue
            commits = retried(
                lambda: hub.list_repo_commits(repo.repo_id, revision=reference)  # noqa: B023
            )
            if len(commits) > 1 and commits[1].commit_id == repo.revision:
                return str(reference)
    return None
