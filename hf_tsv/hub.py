"""The Hugging Face Hub: pinned reads, parallel downloads, checked pushes.

The client retries some calls and not others; here every call is retried, and every failure comes
out as a [`RepoError`] that says what to do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from json import JSONDecodeError
from pathlib import Path
from typing import Any, TypeVar

from httpx2 import (
    ConnectError,
    RequestError,
    Response,
    TransportError,
    UnsupportedProtocol,
)
from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_session,
    get_token,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status
from tqdm.auto import tqdm

from hf_tsv import __version__
from hf_tsv.errors import RepoError
from hf_tsv.parallel import in_parallel
from hf_tsv.progress import bar, logger

T = TypeVar("T")

RETRY_WAITS = (1, 2, 4, 8)  # seconds, as the client does where it retries
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
DOWNLOAD_THREADS = 8
CONFIGS = ("config.json", "tsv_config.json", "open_clip_config.json", "adapter_config.json")
STEMS = ("model", "task_factors", "open_clip_model")
WEIGHT_FILES = tuple(f"{stem}.safetensors{end}" for stem in STEMS for end in ("", ".index.json"))
CONVERTER = "SFconvertbot"
CONVERSION = "Adding `safetensors` variant of this model"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
MARKERS = ("hf_tsv_recipe.yaml", "tsv_config.json", "hf_tsv_reconstruction.json")
"""One of them is in everything that hf-tsv writes."""

OLD_WEIGHTS = (
    *WEIGHT_FILES,
    *(f"{stem}-?????-of-?????.safetensors" for stem in STEMS),
    *MARKERS,
    "heads/*.safetensors",
    "adapter_model.safetensors",
    "adapter_config.json",
    "interference.json",
    "interference.png",
    "compression.png",
)
"""Files of an earlier upload that a new one replaces; other files of the repository stay."""


@dataclass(frozen=True)
class RepoSnapshot:
    """One repository at one commit.

    Args:
        repo_id (`str`): `org/name`.
        revision (`str`): the commit sha everything is read at.
        sizes (`dict[str, int]`): bytes of each file.
        card (`dict[str, Any]`): front matter of the model card.
        token (`str`, *optional*): for private and gated repositories; never printed.
        cache_dir (`str`, *optional*): the client's cache folder.
        folder (`Path`, *optional*): the cached copy, when the Hub cannot be reached.
        locations (`dict[str, str]`): where the storage has each file that was read by range.
    """

    repo_id: str
    revision: str
    sizes: dict[str, int]
    card: dict[str, Any]
    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    folder: Path | None = None
    locations: dict[str, str] = field(default_factory=dict, repr=False, compare=False)


def api(token: str | None = None) -> HfApi:
    """The client, introducing itself as hf-tsv."""
    if token is not None and not re.fullmatch(r"[!-~]+", token):
        raise RepoError(
            "The token is empty or has characters that no token has.",
            "Copy it again from https://huggingface.co/settings/tokens.",
        )
    return HfApi(token=token, library_name="hf-tsv", library_version=__version__)


def snapshot(
    repo_id: str,
    revision: str | None,
    subfolder: str = "",
    *,
    token: str | None = None,
    cache_dir: str | None = None,
) -> RepoSnapshot:
    """Pin a repository to a commit and list its files; writes nothing to disk.

    Falls back to the client's cache when the Hub cannot be reached or `HF_HUB_OFFLINE=1`; then
    `subfolder` has to be there.

    Raises:
        [`RepoError`]: unknown, private or gated repository, unknown revision, or not cached.
    """
    with translated(repo_id, revision):
        try:
            info = retried(
                lambda: api(token).model_info(repo_id, revision=revision, files_metadata=True)
            )
        except (OfflineModeIsEnabled, TransportError) as error:
            return _cached_snapshot(repo_id, revision, subfolder, cache_dir, error)
        except TypeError as error:  # a card with keys the client trips over
            raise RepoError(
                f"The model card of {repo_id} cannot be read: {_first_line(error)}",
                "Download the repository and merge the folder.",
            ) from None
    card = {} if info.card_data is None else card_dict(info.card_data)
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    return RepoSnapshot(repo_id, str(info.sha), sizes, card, token, cache_dir)


def card_dict(data: Any) -> dict[str, Any]:
    """Front matter of a card; {} where the client cannot write it, as with broken eval_results."""
    try:
        return dict(data.to_dict())
    except (AttributeError, TypeError, ValueError):
        return {}


def _cached_snapshot(
    repo_id: str, revision: str | None, subfolder: str, cache_dir: str | None, error: Exception
) -> RepoSnapshot:
    try:
        sha = (
            api()
            .resolve_revision(
                repo_id, revision=revision, cache_dir=cache_dir, local_files_only=True
            )
            .resolved
        )
    except RevisionResolutionError:
        sha = revision or "main"
    inside = f"{subfolder}/" if subfolder else ""
    configs = (
        try_to_load_from_cache(repo_id, inside + name, cache_dir=cache_dir, revision=sha)
        for name in CONFIGS
    )
    config = next((path for path in configs if isinstance(path, str)), None)
    if config is None:
        raise RepoError(
            f"{repo_id} is not in the local cache and the Hub cannot be reached"
            f" ({type(error).__name__}).",
            "Run once with a connection and without HF_HUB_OFFLINE.",
        ) from None
    folder = Path(config).parents[inside.count("/")]
    if not any(file.suffix in WEIGHT_SUFFIXES for file in Path(config).parent.iterdir()):
        raise RepoError(
            f"The weights of {repo_id} are not in the local cache and the Hub cannot be reached"
            f" ({type(error).__name__}).",
            "Run once with a connection and without HF_HUB_OFFLINE.",
        ) from None
    if not isinstance(error, OfflineModeIsEnabled):
        logger.warning("The Hub cannot be reached: %s is taken from the local cache.", repo_id)
    sizes = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in folder.rglob("*")
        if file.is_file()
    }
    return RepoSnapshot(repo_id, folder.name, sizes, {}, None, cache_dir, folder)


def conversion(repo: RepoSnapshot) -> str | None:
    """The pull request in which the Hub's own bot offers this very commit as safetensors.

    Those of other authors are not taken, nor those of earlier commits: as in transformers.
    """
    client = api(repo.token)
    with translated(repo.repo_id, repo.revision):
        offers = retried(
            lambda: list(
                client.get_repo_discussions(
                    repo.repo_id,
                    author=CONVERTER,
                    discussion_type="pull_request",
                    discussion_status="open",
                )
            )
        )
        for offer in offers:
            reference = offer.git_reference
            if (offer.author, offer.title) != (CONVERTER, CONVERSION) or reference is None:
                continue
            commits = retried(
                lambda: client.list_repo_commits(repo.repo_id, revision=reference)  # noqa: B023
            )
            if len(commits) > 1 and commits[1].commit_id == repo.revision:
                return str(reference)
    return None


def read_range(repo: RepoSnapshot, filename: str, start: int, stop: int) -> bytearray:
    """Bytes `start` … `stop` − 1 of one file, by HTTP range; nothing is kept on disk.

    The Hub redirects to a storage host, which gets no token, and is asked directly from then on
    until it refuses: its addresses are signed for a while.

    Raises:
        [`RepoError`]: the file is missing, or the answer is another range.
    """
    if start == stop:
        return bytearray()
    with translated(repo.repo_id, repo.revision):
        try:
            return retried(lambda: _range(repo, filename, start, stop), refusals=True)
        except _OtherRangeError as error:
            raise RepoError(
                f"{repo.repo_id}: the Hub sent {error} of {filename}.",
                "Try again; if it stays, the file in the repository is truncated.",
            ) from None


class _OtherRangeError(TransportError):
    """An answer that is not what was asked for, as of a proxy that lost the connection."""


def _range(repo: RepoSnapshot, filename: str, start: int, stop: int) -> bytearray:
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    direct = repo.locations.pop(filename, None)
    if direct is not None:
        with _answer(direct, wanted) as response:
            if response.status_code < 400:
                body = _body(response, start, stop)
                repo.locations[filename] = direct
                return body
    url = hf_hub_url(repo.repo_id, filename, revision=repo.revision)
    headers = build_hf_headers(token=repo.token, library_name="hf-tsv", library_version=__version__)
    with _answer(url, {**headers, **wanted}) as response:
        hf_raise_for_status(response)
        if response.history and response.url.netloc != response.history[0].url.netloc:
            repo.locations[filename] = str(response.url)
        return _body(response, start, stop)


def _answer(url: str, headers: dict[str, str]) -> AbstractContextManager[Response]:
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    return get_session().stream("GET", url, headers=headers, timeout=timeout)


def _body(response: Response, start: int, stop: int) -> bytearray:
    """The range out of an answer: all of it, or a part where the server ignores ranges."""
    skipped = start
    if response.status_code == 206:
        said = response.headers.get("Content-Range", "")
        if not re.fullmatch(rf"bytes {start}-{stop - 1}/(\d+|\*)", said):
            raise _OtherRangeError(f"{said or 'other bytes'} instead of bytes {start}-{stop - 1}")
        skipped = 0
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk[skipped:]
        skipped = max(0, skipped - len(chunk))
        if len(body) > stop - start:
            break
    if response.status_code != 206:
        del body[stop - start :]
    if len(body) != stop - start:
        raise _OtherRangeError(f"{len(body)} bytes instead of {stop - start}")
    return body


def uncached(repo: RepoSnapshot, filenames: Sequence[str]) -> list[str]:
    """The files of `filenames` that a download would fetch."""
    if repo.folder is not None:
        return []
    return [
        name
        for name in filenames
        if not isinstance(
            try_to_load_from_cache(
                repo.repo_id, name, cache_dir=repo.cache_dir, revision=repo.revision
            ),
            str,
        )
    ]


@dataclass(frozen=True)
class Wanted:
    """Files that a run needs of one repository.

    Args:
        repo ([`RepoSnapshot`]): which commit.
        asked_revision (`str`, *optional*): the revision the user named, so that a later offline
            run finds the commit under that name.
        names (`tuple[str, ...]`): the files.
    """

    repo: RepoSnapshot
    asked_revision: str | None
    names: tuple[str, ...]


def missing(wanted: Sequence[Wanted]) -> list[tuple[RepoSnapshot, str]]:
    """What a download would fetch, each file once."""
    files = {
        (item.repo.repo_id, item.repo.revision, name): (item.repo, name)
        for item in wanted
        for name in uncached(item.repo, item.names)
    }
    return list(files.values())


def download(wanted: Sequence[Wanted], *, visible: bool = True) -> list[Path]:
    """Fetch files of several repositories into the client's cache, in parallel, resumable.

    Args:
        wanted (`Sequence[Wanted]`): what is needed.
        visible (`bool`): show one progress bar over everything.

    Returns:
        `list[Path]`: the cached folder of each repository.
    """
    files = missing(wanted)
    total = sum(repo.sizes[name] for repo, name in files)
    with bar("Downloading", total, in_bytes=True, visible=visible) as advance:
        counting = _counting_tqdm(advance)
        in_parallel(lambda file: _download_file(*file, counting), files, DOWNLOAD_THREADS)
    return [_cached_folder(item) for item in wanted]


def _download_file(repo: RepoSnapshot, filename: str, progress: type[tqdm[Any]]) -> None:
    with translated(repo.repo_id, repo.revision):
        retried(
            lambda: api(repo.token).hf_hub_download(
                repo.repo_id,
                filename,
                revision=repo.revision,
                cache_dir=repo.cache_dir,
                tqdm_class=progress,
            )
        )


def _cached_folder(item: Wanted) -> Path:
    repo, first = item.repo, item.names[0]
    if repo.folder is not None:
        return repo.folder
    with translated(repo.repo_id, item.asked_revision):
        retried(
            lambda: api(repo.token).resolve_revision(
                repo.repo_id, revision=item.asked_revision, cache_dir=repo.cache_dir
            )
        )
    path = try_to_load_from_cache(
        repo.repo_id, first, cache_dir=repo.cache_dir, revision=repo.revision
    )
    if not isinstance(path, str):
        raise RepoError(f"{repo.repo_id}: {first} vanished from the cache.", "Run again.")
    return Path(path).parents[first.count("/")]


def _counting_tqdm(advance: Callable[[int], None]) -> type[tqdm[Any]]:
    """A tqdm that shows nothing and reports to our one bar."""

    class CountingTqdm(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            advance(int(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return CountingTqdm


def writable_repo_id(
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    create_pr: bool = False,
) -> str:
    """Check before any heavy work that the token may write `repo_id`.

    Args:
        repo_id (`str`): `org/name`, or `name` for the token's own user.
        token (`str`, *optional*): default: the one the client is logged in with.
        private (`bool`, *optional*): wanted visibility; an existing repository must have it.
        create_pr (`bool`): a pull request needs an existing repository, not the right to write it.

    Returns:
        `str`: the full repository id.

    Raises:
        [`RepoError`]: no token, an invalid or read-only one, or a namespace it cannot write.
    """
    if token is None and get_token() is None:
        raise RepoError(
            f"Pushing to {repo_id} needs a token and none is set.",
            "Run `hf auth login` with a token that can write, or set HF_TOKEN.",
        )
    with translated(repo_id, None, writing=True):
        user = retried(lambda: api(token).whoami())
        if "/" not in repo_id:
            repo_id = f"{user['name']}/{repo_id}"
        exists = retried(lambda: api(token).repo_exists(repo_id))
        if exists and private is not None:
            _check_visibility(retried(lambda: api(token).model_info(repo_id)), private)
    if (user.get("auth") or {}).get("accessToken", {}).get("role") == "read":
        raise RepoError(
            f"Pushing to {repo_id} needs a token that can write; this one can only read.",
            "Create one with the role 'write' and run `hf auth login`.",
        )
    if create_pr:
        if not exists:
            raise RepoError(
                f"--create-pr needs an existing repository and {repo_id} does not exist.",
                "Leave --create-pr out to create it.",
            )
        return repo_id
    if exists:
        with translated(repo_id, None, writing=True):
            retried(lambda: api(token).auth_check(repo_id, write=True))
        return repo_id
    namespaces = _writable_namespaces(user)
    if repo_id.split("/")[0] not in namespaces:
        raise RepoError(
            f"This token cannot create {repo_id}: it writes to {', '.join(namespaces) or 'none'}.",
            "Choose one of these namespaces, or use --create-pr on an existing repository.",
        )
    return repo_id


def _writable_namespaces(user: dict[str, Any]) -> list[str]:
    """Users and organisations that a token may create repositories for, from `whoami`."""
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
        there, flag = ("private", "--no-private") if info.private else ("public", "--private")
        raise RepoError(
            f"{info.id} exists and is {there}, and {flag} does not change that.",
            f"Leave {flag} out, or change the visibility in the settings of the repository.",
        )


def push(
    folder: Path,
    repo_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload merged model",
) -> str:
    """Upload a finished folder as one commit; weights of an earlier upload are replaced.

    Returns:
        `str`: address of the commit or pull request.
    """
    client = api(token)
    with translated(repo_id, revision, writing=True):
        if not create_pr:
            retried(lambda: client.create_repo(repo_id, private=private, exist_ok=True))
            if revision is not None and revision != "main" and not revision.startswith("refs/"):
                retried(lambda: client.create_branch(repo_id, branch=revision, exist_ok=True))
        if not create_pr:
            _warn_of_replaced_files(client, repo_id, revision)
        attempt = _once if create_pr else retried  # a lost answer would open a second one
        try:
            commit = attempt(
                lambda: client.upload_folder(
                    repo_id=repo_id,
                    folder_path=folder,
                    revision=revision,
                    create_pr=create_pr,
                    commit_message=commit_message,
                    delete_patterns=list(OLD_WEIGHTS),
                )
            )
        except (TypeError, ValueError) as error:  # a card that the client or the Hub does not take
            if isinstance(error, HfHubHTTPError | JSONDecodeError | HFValidationError):
                raise
            raise RepoError(
                f"{repo_id}: {_first_line(error)}", "Check the metadata of its model card."
            ) from None
    return str(commit.pr_url or commit.commit_url)


def _warn_of_replaced_files(client: HfApi, repo_id: str, revision: str | None) -> None:
    """Say which weights of somebody else's making the upload takes the place of."""
    there = retried(lambda: client.list_repo_files(repo_id, revision=revision))
    old = [name for name in there if any(fnmatch(name, pattern) for pattern in OLD_WEIGHTS)]
    if old and not set(MARKERS) & set(there):
        logger.warning(
            "The upload replaces %s of %s; earlier commits keep them.", ", ".join(old), repo_id
        )


def _once(call: Callable[[], T]) -> T:
    return call()


def retried(call: Callable[[], T], *, refusals: bool = False) -> T:
    """Call until it succeeds, at most five times, on answers and faults that pass by themselves.

    `Retry-After` is honoured up to a minute.

    Args:
        call (`Callable`): safe to repeat.
        refusals (`bool`): refused connections too; without it a machine that has no network falls
            back to its cache at once.
    """
    for wait in RETRY_WAITS:
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response.status_code not in RETRY_STATUS:
                raise
            seconds = _retry_after(error, wait)
        except TransportError as error:
            if isinstance(error, UnsupportedProtocol | ConnectError) and not refusals:
                raise
            seconds = wait
        logger.info("The Hub did not answer; trying again in %g s.", seconds)
        time.sleep(seconds)
    return call()


def _retry_after(error: HfHubHTTPError, default: float) -> float:
    try:
        seconds = float(error.response.headers.get("Retry-After", default))
    except ValueError:  # a date; the default wait will do
        return default
    return min(seconds, 60.0) if seconds >= 0 else default


@contextmanager
def translated(repo_id: str, revision: str | None, *, writing: bool = False) -> Iterator[None]:
    """Turn the client's errors into one [`RepoError`] with the way out."""
    try:
        yield
    except HFValidationError as error:
        raise RepoError(
            f"{repo_id!r} is not a repository id: {error}",
            "Give org/name." if writing else "Give org/name, org/name@revision, or a folder.",
        ) from None
    except GatedRepoError:  # a subclass of RepositoryNotFoundError: first
        raise RepoError(
            f"{repo_id} is gated and this token has no access.",
            f"Accept its conditions at https://huggingface.co/{repo_id} and log in with"
            " `hf auth login`.",
        ) from None
    except RepositoryNotFoundError:
        raise RepoError(
            f"{repo_id} does not exist on the Hub, or is private and this token cannot read it.",
            "Check the name; for a private repository run `hf auth login`;"
            " for a local folder check the path.",
        ) from None
    except RevisionNotFoundError:
        raise RepoError(
            f"{repo_id} has no revision {revision!r}.",
            f"Branches and tags are listed at https://huggingface.co/{repo_id}/tree/main.",
        ) from None
    except RemoteEntryNotFoundError as error:
        raise RepoError(
            f"{repo_id}: {_first_line(error)}", "Check the files of the repository."
        ) from None
    except LocalEntryNotFoundError:
        raise RepoError(
            f"{repo_id}: files are missing from the local cache and the Hub cannot be reached.",
            "Run once with a connection and without HF_HUB_OFFLINE.",
        ) from None
    except HfHubHTTPError as error:
        raise _http_error(error, repo_id, writing) from None
    except (RequestError, OfflineModeIsEnabled) as error:
        raise RepoError(
            f"{repo_id}: the Hub cannot be reached ({type(error).__name__}).",
            "Check the connection and HF_ENDPOINT; with a warm cache use HF_HUB_OFFLINE=1.",
        ) from None
    except JSONDecodeError:
        raise RepoError(
            f"{repo_id}: the answer is not that of a Hub.", "Check HF_ENDPOINT and any proxy."
        ) from None
    except OSError as error:  # after the client's own, some of which are OSErrors
        raise RepoError(
            f"{repo_id}: the cache cannot be written: {error.strerror or _first_line(error)}.",
            "Free some space, or choose another folder with --cache-dir.",
        ) from None


def _http_error(error: HfHubHTTPError, repo_id: str, writing: bool) -> RepoError:
    status = error.response.status_code
    if status == 401:
        return RepoError(
            f"{repo_id}: the Hub does not accept this token.", "Run `hf auth login` again."
        )
    if status == 403:
        action = "write to" if writing else "read"
        return RepoError(
            f"This token may not {action} {repo_id}.",
            f"Use a token that can {action} it: `hf auth login`.",
        )
    return RepoError(
        f"{repo_id}: the Hub answered {status}: {_first_line(error)}", "Try again later."
    )


def _first_line(error: Exception) -> str:
    message = getattr(error, "server_message", None) or str(error)
    return next((line.strip() for line in message.splitlines() if line.strip()), "no message")
