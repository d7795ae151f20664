"""Listings: models that name another one as the model they were made from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from json import JSONDecodeError
from typing import Any

from httpx2 import URL, Response
from huggingface_hub import constants, get_session
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from hf_tsv.hub.client import SILENCE, retried, translated
from hf_tsv.system.version import __version__

EXPANDED = (
    "createdAt", "downloads", "gated", "lastModified", "likes", "pipeline_tag", "private", "tags",
)  # fmt: skip
"""Properties asked for; no card, which is read with the repository."""

LONGEST_TEXT = 100  # characters kept of a value
LARGEST_PAGE = 1000  # entries that the Hub sends at a time
LICENSE = "license:"


@dataclass(frozen=True)
class Listed:
    """A model as a listing shows it; texts are those of its owner, cut.

    `created` and `changed` are dates, `gated` is False or how access is granted.
    """

    repo_id: str
    task: str | None
    license: str | None
    downloads: int
    likes: int
    created: str
    changed: str
    private: bool
    gated: str | bool


def derived(
    base_id: str,
    relation: str,
    *,
    author: str | None = None,
    search: str | None = None,
    task: str | None = None,
    sort: str = "downloads",
    limit: int = LARGEST_PAGE,
    token: str | None = None,
) -> list[Listed]:
    """Models with a relation to a base model: `finetune`, `adapter` or `merge`.

    They are in the order of the Hub, which has the highest value of `sort`, a property, first. A
    [`RepoError`] says that the Hub cannot be reached, or does not answer as one.
    """
    wanted = {
        "filter": f"base_model:{relation}:{base_id}", "author": author, "search": search,
        "pipeline_tag": task, "sort": sort, "limit": min(limit, LARGEST_PAGE),
        "expand": EXPANDED,
    }  # fmt: skip
    query = URL(params={name: value for name, value in wanted.items() if value is not None}).query
    with translated(base_id, None):
        return [_listed(entry) for entry in islice(_entries(query, token), limit)]


def _entries(query: bytes, token: str | None) -> Iterator[Mapping[str, Any]]:
    """Entries of all pages; each next page is asked for at this Hub, wherever its link leads."""
    headers = build_hf_headers(token=token, library_name="hf-tsv", library_version=__version__)

    def answer() -> Response:
        url = URL(f"{constants.ENDPOINT}/api/models", query=query)
        found = get_session().get(url, headers=headers, timeout=SILENCE)
        hf_raise_for_status(found)
        return found

    while query:
        response = retried(answer)
        page = response.json()
        if not isinstance(page, list) or not all(isinstance(entry, dict) for entry in page):
            raise JSONDecodeError("not a list of models", "", 0)
        yield from page
        after = URL(response.links.get("next", {}).get("url", "")).query
        query = after if page and after != query else b""


def _listed(entry: Mapping[str, Any]) -> Listed:
    tags, gated = entry.get("tags"), entry.get("gated")
    licenses = [tag for tag in tags if isinstance(tag, str)] if isinstance(tags, list) else []
    found = next((tag.removeprefix(LICENSE) for tag in licenses if tag.startswith(LICENSE)), None)
    return Listed(
        _text(entry.get("id")) or "",
        _text(entry.get("pipeline_tag")),
        _text(found),
        _number(entry.get("downloads")),
        _number(entry.get("likes")),
        _text(entry.get("createdAt")) or "",
        _text(entry.get("lastModified")) or "",
        entry.get("private") is True,
        _text(gated) or gated is True,
    )


def _text(value: object) -> str | None:
    return value[:LONGEST_TEXT] if isinstance(value, str) else None


def _number(value: object) -> int:
    return value if type(value) is int else 0
