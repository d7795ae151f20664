"""Endpoints of collections: one that is private is hidden, and only its owner may change it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from .access import check_visible
from .routing import Call, Routes
from .store import HubError
from .wire import Response

routes = Routes()


@dataclass
class Collection:
    """A collection, with the ids of its models."""

    slug: str
    private: bool = False
    models: list[str] = field(default_factory=list)

    def described(self) -> dict[str, Any]:
        owner, _, title = self.slug.partition("/")
        items = [
            {"_id": f"item-{i}", "id": repo_id, "type": "model", "position": i, "repoType": "model"}
            for i, repo_id in enumerate(self.models)
        ]
        return {
            "slug": self.slug,
            "title": title,
            "owner": {"name": owner, "type": "user"},
            "items": items,
            "lastUpdated": "2024-01-01T00:00:00.000Z",
            "position": 0,
            "private": self.private,
            "theme": "green",
            "upvotes": 0,
            "gating": False,
        }


@routes("GET", "/api/collections/{collection}")
def collection(call: Call) -> Response:
    return Response.of_json(_found(call).described())


@routes("POST", "/api/collections/{collection}/items")
def add_item(call: Call) -> Response:
    found, item = _found(call), call.json()["item"]
    if call.user is None or not call.user.may_write(found.slug):
        raise HubError(403, "You have read access but not the required permissions")
    if item["type"] != "model":
        raise HubError(400, f"This Hub has only models, no {item['type']}")
    check_visible(call.user, item["id"], call.hub.repos.get(item["id"]))
    if item["id"] in found.models:
        raise HubError(409, "This item is already in the collection")
    found.models.append(item["id"])
    return Response.of_json(found.described())


def _found(call: Call) -> Collection:
    """The collection named in the path, if the user may know of it."""
    found = call.hub.collections.get(call.args["collection"])
    hidden = found is not None and found.private
    if found is None or (hidden and not (call.user and call.user.may_read_private(found.slug))):
        raise HubError(404, "Collection not found")
    return found
