"""Files in the client's cache: fetched in parallel, resumable, shared with transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from httpx2 import URL
from huggingface_hub import constants, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from tqdm.auto import tqdm

from hf_tsv.hub.client import RETRY_STATUS, OtherAnswerError, api, retried, translated, whole
from hf_tsv.hub.snapshots import RepoSnapshot
from hf_tsv.system.errors import RepoError
from hf_tsv.system.progress import bar, logger
from hf_tsv.system.threads import in_parallel

WRONG_SIZE = "Consistency check failed"
"""First words of the client's error for a body whose length differs from the file's."""

STOPPED = (
    "The download stopped. Complete files stay in the cache: run the same command again for the"
    " rest. `hf cache prune` deletes partial files."
)


def uncached(repo: RepoSnapshot, filenames: Sequence[str]) -> list[str]:
    """Files of `filenames` that are not in the cache, or are cut short there."""
    if repo.folder is not None:
        return []
    paths = {name: _cached(repo, name) for name in filenames}
    return [name for name in filenames if not (path := paths[name]) or _is_cut(repo, name, path)]


def _cached(repo: RepoSnapshot, name: str) -> str | None:
    """Path of a file in the cache, if it is there."""
    path = try_to_load_from_cache(
        repo.repo_id, name, cache_dir=repo.cache_dir, revision=repo.revision
    )
    return path if isinstance(path, str) else None


def _is_cut(repo: RepoSnapshot, name: str, path: str) -> bool:
    """Tell whether a cached file's size differs from the Hub's, as after a power failure."""
    return bool(size := repo.sizes.get(name)) and Path(path).stat().st_size != size


@dataclass(frozen=True)
class Wanted:
    """Files that a run needs from one repository, to be found offline by the revision asked for."""

    repo: RepoSnapshot
    asked_revision: str | None
    names: tuple[str, ...]


def missing(wanted: Sequence[Wanted]) -> list[tuple[RepoSnapshot, str]]:
    """Files that a download would fetch, each of them once."""
    files = {
        (item.repo.repo_id, item.repo.revision, name): (item.repo, name)
        for item in wanted
        for name in uncached(item.repo, item.names)
    }
    return list(files.values())


def download(wanted: Sequence[Wanted], *, visible: bool = True) -> list[Path]:
    """Fetch files of several repositories into the client's cache, in parallel, resumable.

    One progress bar shows everything. The result is the cached folder of each repository, or the
    folder that it was found in.
    """
    files = missing(wanted)
    total = sum(repo.sizes[name] for repo, name in files)
    with bar("Downloading", total, in_bytes=True, visible=visible) as advance:
        counting = _counting_tqdm(advance)
        try:
            in_parallel(lambda file: _download_file(*file, counting), files)
        except KeyboardInterrupt:
            if files:
                logger.warning(STOPPED)
            raise
    return [_cached_folder(item) for item in wanted]


def _download_file(repo: RepoSnapshot, filename: str, progress: type[tqdm[Any]]) -> None:
    with translated(repo.repo_id, repo.revision), whole(repo.repo_id, filename):
        path = retried(lambda: _fetched(repo, filename, progress))
        if _is_cut(repo, filename, path):
            logger.warning(
                "%s of %s is damaged in the cache and is fetched again.", filename, repo.repo_id
            )
            path = retried(lambda: _fetched(repo, filename, progress, anew=True))
        if _is_cut(repo, filename, path):
            said = f"{Path(path).stat().st_size} bytes instead of {repo.sizes[filename]}"
            raise OtherAnswerError(said)


def _fetched(
    repo: RepoSnapshot, filename: str, progress: type[tqdm[Any]], *, anew: bool = False
) -> str:
    try:
        return api(repo.token).hf_hub_download(
            repo.repo_id,
            filename,
            revision=repo.revision,
            cache_dir=repo.cache_dir,
            tqdm_class=progress,
            force_download=anew,
        )
    except HfHubHTTPError as error:
        status, host = error.response.status_code, error.response.url.netloc
        if host != URL(constants.ENDPOINT).netloc and status not in RETRY_STATUS:
            # The storage got no token it could refuse; its signed addresses expire.
            raise OtherAnswerError(f"{status} from its storage instead") from None
        raise
    except OSError as error:
        if not str(error).startswith(WRONG_SIZE):
            raise
        raise OtherAnswerError("a wrong number of bytes") from None


def _cached_folder(item: Wanted) -> Path:
    repo, first = item.repo, item.names[0]
    if repo.folder is not None:
        return repo.folder
    asked, resolve = item.asked_revision, api(repo.token).resolve_revision
    with translated(repo.repo_id, asked):
        retried(lambda: resolve(repo.repo_id, revision=asked, cache_dir=repo.cache_dir))
    path = _cached(repo, first)
    if path is None:
        raise RepoError(f"{repo.repo_id}: {first} vanished from the cache.", "Run again.")
    return Path(path).parents[first.count("/")]


def _counting_tqdm(advance: Callable[[int], None]) -> type[tqdm[Any]]:
    """Make a tqdm class that shows nothing and reports to the shared bar."""

    class CountingTqdm(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            advance(int(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return CountingTqdm
