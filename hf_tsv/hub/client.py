"""Calls of the Hub client: retries, and failures as a [`RepoError`]."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import JSONDecodeError
from typing import TypeVar

from httpx2 import ConnectError, RequestError, TransportError, UnsupportedProtocol
from huggingface_hub import HfApi, constants, errors, get_token
from huggingface_hub.errors import HfHubHTTPError

from hf_tsv.system.errors import RepoError
from hf_tsv.system.progress import logger
from hf_tsv.system.text import redacted
from hf_tsv.system.version import __version__

T = TypeVar("T")

RETRY_WAITS = (1, 2, 4, 8)  # seconds, the same as in the client where it retries
RETRY_STATUS = {408, 429, 500, 502, 503, 504}
CLIENT_ERRORS = (errors.HFValidationError, RequestError, JSONDecodeError, OSError, RuntimeError)
MOVED_ON = 412  # status of a commit whose parent is no longer the head of its branch
SILENCE = 30.0
"""Seconds of silence after which a listing is requested again; the client itself never gives up."""


class OtherAnswerError(TransportError):
    """An answer other than the requested one, as from a proxy that lost the connection."""


def api(token: str | None = None) -> HfApi:
    """Make a Hub client that identifies itself as hf-tsv."""
    used = get_token() if token is None else token
    if used is not None and not re.fullmatch(r"[!-~]+", used):  # the client's errors would show it
        problem = "The token is empty or has characters that no token has."
        raise RepoError(problem, f"Copy it again from {constants.ENDPOINT}/settings/tokens.")
    return HfApi(token=token, library_name="hf-tsv", library_version=__version__)


def retried(call: Callable[[], T], *, refusals: bool = False) -> T:
    """Call until it succeeds, at most five times, as long as the failures are temporary.

    `Retry-After` is honoured up to a minute. Refused connections are retried only with `refusals`:
    without it a machine that has no network uses its cache at once.
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
    except ValueError:  # `Retry-After` may be a date
        return default
    return min(seconds, 60.0) if seconds >= 0 else default


@contextmanager
def whole(repo_id: str, filename: str) -> Iterator[None]:
    """Turn an [`OtherAnswerError`] that remains after the retries into a [`RepoError`]."""
    try:
        yield
    except OtherAnswerError as error:
        raise RepoError(
            f"{repo_id}: the Hub sent {error} of {filename}.",
            "Try again; if it stays, the file is damaged, or a server on the way serves no ranges"
            " or changes what it passes on.",
        ) from None


@contextmanager
def translated(repo_id: str, revision: str | None, *, writing: bool = False) -> Iterator[None]:
    """Turn the client's errors into a [`RepoError`] that says what to do."""
    try:
        yield
    except CLIENT_ERRORS as error:
        raise RepoError(*_explained(error, repo_id, revision, writing)) from None


def _explained(
    error: Exception, repo_id: str, revision: str | None, writing: bool
) -> tuple[str, str]:
    """Message and hint for an error of the client; a class comes before those it derives from."""
    match error:
        case errors.HFValidationError():
            said = f"{repo_id!r} is not a repository id."
            hint = "Give org/name, with letters, digits, '-', '_' and '.' only."
            hint = hint if writing else "Give org/name, org/name@revision, or a folder."
        case errors.GatedRepoError():
            said = f"{repo_id} is gated and this token has no access."
            conditions = f"Accept its conditions at {constants.ENDPOINT}/{repo_id}"
            hint = f"{conditions} and log in with `hf auth login`."
        case errors.RepositoryNotFoundError():
            said = f"{repo_id} does not exist on the Hub, or is private and this token cannot"
            said += " read it."
            hint = "Check the name; for a private repository run `hf auth login`;"
            hint += " for a local folder check the path."
        case errors.RevisionNotFoundError():
            said = f"{repo_id} has no revision {revision!r}."
            hint = f"Branches and tags are listed at {constants.ENDPOINT}/{repo_id}/tree/main;"
            hint += " a slash in the name of one is written %2F."
        case errors.RemoteEntryNotFoundError():
            said, hint = f"{repo_id}: {first_line(error)}.", "Check the files of the repository."
        case errors.LocalEntryNotFoundError():
            said, hint = _not_cached(error.__cause__, repo_id)
        case HfHubHTTPError():
            said, hint = _answered(error, repo_id, writing)
        case RequestError() | ConnectionError():
            said = f"{repo_id}: the Hub cannot be reached ({type(error).__name__})."
            hint = "Check the connection and HF_ENDPOINT; HF_HUB_OFFLINE=1 reads the cache alone."
        case JSONDecodeError():
            said, hint = _no_hub(repo_id)
        case OSError():
            why = error.strerror or first_line(error)
            said = f"{repo_id}: the cache cannot be written: {why}."
            hint = "Free some space, or choose another folder with `cache_dir=DIR`."
        case _:  # from the Xet storage
            said = f"{repo_id}: the storage of the Hub failed: {first_line(error)}."
            hint = "Try again later, or with HF_HUB_DISABLE_XET=1, which avoids that storage."
    return said, hint


def _not_cached(why: BaseException | None, repo_id: str) -> tuple[str, str]:
    """Message and hint for a file that is not cached, by the reason why it was not fetched."""
    if isinstance(why, HfHubHTTPError):
        return _answered(why, repo_id, writing=False)
    if isinstance(why, errors.FileMetadataError):
        return _no_hub(repo_id)
    said = f"{repo_id}: files are missing from the local cache and the Hub cannot be reached."
    return said, "Run once with a connection and without HF_HUB_OFFLINE."


def _no_hub(repo_id: str) -> tuple[str, str]:
    return f"{repo_id}: the answer is not that of a Hub.", "Check HF_ENDPOINT and any proxy."


def _answered(error: HfHubHTTPError, repo_id: str, writing: bool) -> tuple[str, str]:
    """Message and hint for a status that the Hub answered with."""
    status, action = error.response.status_code, "write to" if writing else "read"
    if status == 401:
        return f"{repo_id}: the Hub does not accept this token.", "Run `hf auth login` again."
    if status == 403:
        hint = f"Use a token that can {action} it: `hf auth login`."
        return f"This token may not {action} {repo_id}.", hint
    if status == MOVED_ON:
        said = f"{repo_id} received another commit in the meantime, so nothing was written."
        return said, "Run the same command again."
    return f"{repo_id}: the Hub answered {status}: {first_line(error)}.", "Try again later."


def first_line(error: Exception) -> str:
    """First line of an error's message, without the secrets in its addresses."""
    message = getattr(error, "server_message", None) or str(error)
    lines = (line.strip() for line in redacted(message).splitlines())
    return next(filter(None, lines), "no message").rstrip(".")
