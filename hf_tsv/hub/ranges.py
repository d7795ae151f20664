"""Parts of files read by HTTP range, without a copy on disk."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager

from httpx2 import Response, TransportError
from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from hf_tsv.hub.client import RETRY_STATUS, OtherAnswerError, retried, translated, whole
from hf_tsv.hub.snapshots import RepoSnapshot
from hf_tsv.system.version import __version__

SMALL_FILE = 8_000_000
"""Largest file, in bytes, for which an answer with the whole file instead of a range is read."""


def read_range(repo: RepoSnapshot, filename: str, start: int, stop: int) -> bytearray:
    """Read bytes `start` … `stop` − 1 of one file by HTTP range; nothing is kept on disk.

    The Hub redirects to a storage host, which gets no token. Later ranges go to that address
    directly until it refuses, because it is signed for a limited time. A [`RepoError`] says that
    the file is missing, or the answer another range.
    """
    if start == stop:
        return bytearray()
    with translated(repo.repo_id, repo.revision), whole(repo.repo_id, filename):
        return retried(lambda: _range(repo, filename, start, stop), refusals=True)


def _range(repo: RepoSnapshot, filename: str, start: int, stop: int) -> bytearray:
    wanted = {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    size = repo.sizes.get(filename)
    direct = repo.locations.get(filename)
    if direct is not None:
        try:
            with _answer(direct, wanted) as response:
                if response.status_code < 400:
                    return _body(response, start, stop, size)
        except TransportError:
            _forget(repo, filename, direct)
            raise
        _forget(repo, filename, direct)
    url = hf_hub_url(repo.repo_id, filename, revision=repo.revision)
    headers = build_hf_headers(token=repo.token, library_name="hf-tsv", library_version=__version__)
    with _answer(url, {**headers, **wanted}) as response:
        elsewhere = response.history and response.url.netloc != response.history[0].url.netloc
        if elsewhere and response.status_code >= 400 and response.status_code not in RETRY_STATUS:
            # The storage's message contains a signed address, and it got no token to refuse.
            raise OtherAnswerError(f"{response.status_code} from its storage instead")
        hf_raise_for_status(response)
        if elsewhere:
            repo.locations[filename] = str(response.url)
        return _body(response, start, stop, size)


def _forget(repo: RepoSnapshot, filename: str, location: str) -> None:
    """Drop an address that no longer works, unless another thread has found a new one."""
    if repo.locations.get(filename) == location:
        repo.locations.pop(filename, None)


def _answer(url: str, headers: dict[str, str]) -> AbstractContextManager[Response]:
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    return get_session().stream("GET", url, headers=headers, timeout=timeout)


def _body(response: Response, start: int, stop: int, size: int | None) -> bytearray:
    """Range read from an answer that is the range, or the whole file where ranges are ignored."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise OtherAnswerError(f"{encoding} instead of bytes")
    partial = response.status_code == 206
    if partial:
        said = response.headers.get("Content-Range", "")
        total = r"\d+" if size is None else str(size)
        if not re.fullmatch(rf"bytes {start}-{stop - 1}/({total}|\*)", said):
            raise OtherAnswerError(f"{said or 'other bytes'} instead of bytes {start}-{stop - 1}")
    else:
        length = response.headers.get("Content-Length")
        if size is None or size > SMALL_FILE or length not in (None, str(size)):
            raise OtherAnswerError(f"{length or 'other'} bytes instead of {stop - start}")
    body, skipped = bytearray(), 0 if partial else start
    for chunk in response.iter_raw():
        body += chunk[skipped:]
        skipped = max(0, skipped - len(chunk))
        if len(body) > stop - start:
            break
    if not partial:
        del body[stop - start :]
    if len(body) != stop - start:
        raise OtherAnswerError(f"{len(body)} bytes instead of {stop - start}")
    return body
