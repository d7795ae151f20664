"""Collections: the right to write one is checked before the work, a model is added after it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError

from hf_tsv.hub.client import api, retried, translated
from hf_tsv.system.errors import CollectionError, RepoError, UsageError
from hf_tsv.system.progress import logger
from hf_tsv.system.text import quoted

SLUG = re.compile(r"\w[\w.-]*/\w[\w.-]*")
PAGES = ("https://huggingface.co/collections/", "https://hf.co/collections/")
HIDDEN = (403, 404)  # statuses of a collection that is private, or none


def collection_slug(text: str) -> str:
    """Slug of a collection, `owner/title-id`, or of the one with this address.

    Example:
        >>> collection_slug("https://huggingface.co/collections/me/clip-64f9a55bb3115b4f513ec026")
        'me/clip-64f9a55bb3115b4f513ec026'
    """
    slug = text.partition("?")[0].rstrip("/")
    for page in (f"{constants.ENDPOINT}/collections/", *PAGES):
        slug = slug.removeprefix(page)
    if not SLUG.fullmatch(slug):
        raise UsageError(
            f"{quoted(text)} is not a collection.",
            "Give the address of its page, or the end of it, such as me/clip-64f9a55bb3115b4f.",
        )
    return slug


def writable_collection(text: str, *, token: str | None = None) -> str:
    """Slug of a collection, which exists and the token can write as far as the Hub tells before.

    What is checked is that the user, or an organisation that it may write for, owns the collection.
    A [`RepoError`] says what is wrong.
    """
    slug = collection_slug(text)
    with _explained(slug):
        try:
            retried(lambda: api(token).get_collection(slug))
        except HfHubHTTPError as error:
            if error.response.status_code not in HIDDEN:
                raise
            problem = f"There is no collection {slug}, or it is private and this token cannot read"
            raise RepoError(
                f"{problem} it.",
                "Copy the address of its page, or make one with `hf collections create TITLE`.",
            ) from None
        user = retried(lambda: api(token).whoami())
        orgs = [org["name"] for org in user.get("orgs", []) if org.get("roleInOrg") != "read"]
        writable = [str(name) for name in (user["name"], *orgs)]
    owner = slug.partition("/")[0]
    if owner.lower() not in map(str.lower, writable):
        raise RepoError(
            f"The collection {slug} belongs to {owner}, and this token writes to"
            f" {', '.join(writable)}.",
            "Name a collection of one of these, or omit `collection=`.",
        )
    return slug


def add_to_collection(slug: str, repo_id: str, url: str, *, token: str | None = None) -> None:
    """Add a model, which is uploaded already, to a collection, unless it is in there.

    A [`CollectionError`] says where the upload is, and how to add it by hand.
    """
    try:
        with _explained(slug):
            add = api(token).add_collection_item
            retried(lambda: add(slug, repo_id, "model", exists_ok=True))
    except RepoError as error:
        raise CollectionError(
            f"The upload to {repo_id} is complete ({url}), but it is not in the collection {slug}:"
            f" {error.message}",
            f"Add it with `hf collections add-item {slug} {repo_id} model`.",
        ) from None
    logger.info("%s is in the collection %s.", repo_id, slug)


@contextmanager
def _explained(slug: str) -> Iterator[None]:
    """Turn the client's errors, and those of an answer that is none, into a [`RepoError`]."""
    try:
        with translated(f"collection {slug}", None, writing=True):
            yield
    except (AttributeError, KeyError, TypeError, ValueError):
        problem = f"collection {slug}: the answer is not that of a Hub."
        raise RepoError(problem, "Check HF_ENDPOINT and any proxy.") from None
