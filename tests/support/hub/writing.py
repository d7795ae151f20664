"""Endpoints that write: repositories and refs, the steps of an upload, commits, pull requests."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from . import cards
from .access import check_visible, check_write
from .reading import pull_request_info
from .routing import Call, Routes
from .store import MAIN, Blob, Commit, HubError, Repo, is_lfs
from .wire import Response

if TYPE_CHECKING:
    from .hub import Hub

routes = Routes()

GITATTRIBUTES = "".join(
    f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in ("bin", "png", "safetensors")
)


@routes("POST", "/api/repos/create")
def create_repo(call: Call) -> Response:
    repo_id, wanted = _named_repo(call)
    user = check_write(call.user, repo_id)
    url = {"url": f"{call.hub.endpoint}/{repo_id}"}
    if repo_id in call.hub.repos:
        error = "You already created this model repo"
        return Response.of_json({"error": error, **url}, 409, {"X-Error-Message": error})
    private = wanted.get("visibility") == "private" or wanted.get("private") is True
    repo = call.hub.repos[repo_id] = Repo(repo_id, private=private)
    attributes = Blob.of(GITATTRIBUTES.encode(), lfs=False)
    repo.commit(
        MAIN,
        {".gitattributes": attributes},
        parent=None,
        message="initial commit",
        author=user.name,
    )
    return Response.of_json({**url, "name": repo_id})


@routes("DELETE", "/api/repos/delete")
def delete_repo(call: Call) -> Response:
    repo_id, _ = _named_repo(call)
    check_visible(call.user, repo_id, call.hub.repos.get(repo_id))
    check_write(call.user, repo_id)
    del call.hub.repos[repo_id]
    return Response.of_json({})


def _named_repo(call: Call) -> tuple[str, dict[str, Any]]:
    """The repository that a body names; without a namespace it is the user's own."""
    body = call.json()
    if body.get("type", "model") != "model":
        raise HubError(400, f"This Hub has only models, no {body['type']}")
    namespace = body.get("organization") or (call.user.name if call.user else "")
    return f"{namespace}/{body['name']}", body


@routes("PUT", "/api/models/{repo}/settings")
def update_settings(call: Call) -> Response:
    repo, _ = call.writable()
    settings = call.json()
    if "visibility" in settings:
        repo.private = settings["visibility"] == "private"
    repo.private = settings.get("private", repo.private)
    repo.gated = settings.get("gated", repo.gated)
    return Response.of_json({"private": repo.private, "gated": repo.gated})


@routes("POST", "/api/models/{repo}/branch/{name}")
def create_branch(call: Call) -> Response:
    repo, _ = call.writable()
    return _create_ref(repo, f"refs/heads/{call.args['name']}", call.json().get("startingPoint"))


@routes("POST", "/api/models/{repo}/tag/{rev}")
def create_tag(call: Call) -> Response:
    repo, _ = call.writable()
    return _create_ref(repo, f"refs/tags/{call.json()['tag']}", call.args["rev"])


@routes("DELETE", "/api/models/{repo}/branch/{name}")
def delete_branch(call: Call) -> Response:
    repo, _ = call.writable()
    if call.args["name"] == "main":
        raise HubError(403, "The main branch cannot be deleted")
    return _delete_ref(repo, f"refs/heads/{call.args['name']}")


@routes("DELETE", "/api/models/{repo}/tag/{name}")
def delete_tag(call: Call) -> Response:
    repo, _ = call.writable()
    return _delete_ref(repo, f"refs/tags/{call.args['name']}")


def _create_ref(repo: Repo, ref: str, revision: str | None) -> Response:
    commit = repo.resolve(revision or "main")
    if ref in repo.refs:
        raise HubError(409, f"Reference {ref} already exists")
    repo.refs[ref] = commit.sha
    return Response.of_json({})


def _delete_ref(repo: Repo, ref: str) -> Response:
    if repo.refs.pop(ref, None) is None:
        raise HubError(404, f"Reference {ref} does not exist", "RevisionNotFound")
    return Response.of_json({})


@routes("POST", "/api/models/{repo}/preupload/{rev}")
def preupload(call: Call) -> Response:
    """Say for each file whether to upload it through LFS, and what is there already."""
    repo, _ = call.proposable() if "create_pr" in call.query else call.writable()
    present = repo.resolve(call.args["rev"]).files
    files: list[dict[str, Any]] = []
    for file in call.json()["files"]:
        path = file["path"]
        mode = "lfs" if is_lfs(path, file["size"]) else "regular"
        files.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
        if path in present:
            files[-1]["oid"] = present[path].oid
    return Response.of_json({"files": files})


@routes("POST", "/{repo}.git/info/lfs/objects/batch")
def lfs_batch(call: Call) -> Response:
    """Say where to upload each LFS object; the client names no ref if it will open a PR."""
    wanted = call.json()
    repo, _ = call.writable() if "ref" in wanted else call.proposable()
    objects = [_upload_actions(call, repo, item["oid"], item["size"]) for item in wanted["objects"]]
    return Response.of_json({"transfer": "basic", "objects": objects})


def _upload_actions(call: Call, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    if oid in repo.lfs:
        return {"oid": oid, "size": size}
    lfs = f"{call.hub.endpoint}/{repo.id}.git/info/lfs/objects"
    store = f"{call.hub.cdn}/upload/{repo.id}/{oid}"
    part_size = call.hub.multipart_above
    upload: dict[str, Any] = {"href": f"{store}{call.hub.signature}"}
    if size > part_size:
        count = -(-size // part_size)
        parts = {f"{n:05}": f"{store}/{n}{call.hub.signature}" for n in range(1, count + 1)}
        upload = {
            "href": f"{lfs}/complete/{oid}",
            "header": {"chunk_size": str(part_size), **parts},
        }
        repo.parts[oid] = {}
    verify = {"href": f"{lfs}/verify"}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


@routes("POST", "/{repo}.git/info/lfs/objects/complete/{oid}")
def lfs_complete(call: Call) -> Response:
    """Put the parts of a multipart upload together; like the PUTs, it carries no token."""
    repo, oid = call.stored(), call.args["oid"]
    parts = repo.parts.pop(oid, {})
    named = [(part["partNumber"], part["etag"].strip('"')) for part in call.json()["parts"]]
    if named != [(number, Blob.of(parts[number], lfs=True).oid) for number in sorted(parts)]:
        raise HubError(400, "The parts named are not the parts uploaded")
    blob = Blob.of(b"".join(parts[number] for number in sorted(parts)), lfs=True)
    if blob.oid != oid:
        raise HubError(400, "The parts do not add up to the object's sha256")
    repo.lfs[oid] = blob
    return Response.of_json({"success": True})


@routes("POST", "/{repo}.git/info/lfs/objects/verify")
def lfs_verify(call: Call) -> Response:
    repo, _ = call.proposable()
    expected = call.json()
    blob = repo.lfs.get(expected["oid"])
    if blob is None or blob.size != expected["size"]:
        raise HubError(404, "Object not found, or of another size")
    return Response.of_json({})


@routes("POST", "/api/models/{repo}/commit/{rev}")
def commit(call: Call) -> Response:
    """Apply the operations of an NDJSON body to a branch, or to a new pull request from it."""
    propose = "create_pr" in call.query
    repo, user = call.proposable() if propose else call.writable()
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    ref = repo.writable_ref(call.args["rev"])
    parent = _parent(repo, ref, header.get("parentCommit"), stale_ok=propose)
    changes = dict(
        change
        for line in lines
        for change in _changes(call.hub, repo, parent, line["key"], line["value"])
    )
    _check_card(changes.get("README.md"))
    said = {"description": header.get("description", ""), "author": user.name}
    answer: dict[str, Any] = {"success": True}
    if propose:
        request = repo.open_pull_request(parent, title=header["summary"], **said)
        ref = request.ref
        answer["pullRequestUrl"] = f"{call.hub.endpoint}/{repo.id}/discussions/{request.number}"
    new = repo.commit(ref, changes, parent=parent, message=header["summary"], **said)
    url = f"{call.hub.endpoint}/{repo.id}/commit/{new.sha}"
    return Response.of_json({**answer, "commitOid": new.sha, "commitUrl": url})


def _parent(repo: Repo, ref: str, named: str | None, *, stale_ok: bool) -> Commit:
    head = repo.resolve(ref)
    if named is None:
        return head
    parent = repo.resolve(named)
    if parent.sha != head.sha and not stale_ok:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    return parent


def _changes(
    hub: Hub, repo: Repo, parent: Commit, key: str, value: dict[str, Any]
) -> Iterator[tuple[str, Blob | None]]:
    """What one line of the commit's body changes: paths and their new content, None if deleted."""
    path = value.get("path", "")
    if key == "file":
        yield path, Blob.of(b64decode(value["content"]), lfs=False)
    elif key == "lfsFile":
        oid, storage = value["oid"], hub.xet
        if storage and oid not in repo.lfs and oid in storage.blobs:
            repo.lfs[oid], repo.xet[oid] = storage.blobs[oid], storage.hashes[oid]
        if oid not in repo.lfs:
            raise HubError(400, f"The LFS pointer of {path} points to a file that does not exist")
        if repo.lfs[oid].size != value["size"]:
            raise HubError(400, f"{path} has {repo.lfs[oid].size} bytes, not {value['size']}")
        yield path, repo.lfs[oid]
    elif key in ("deletedFile", "deletedFolder"):
        gone = [path] if key == "deletedFile" else _inside(parent, path)
        if not gone or (key == "deletedFile" and path not in parent.files):
            raise HubError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        yield from ((name, None) for name in gone)
    elif key != "header":
        raise HubError(400, f"Unknown operation: {key}")


def _inside(commit: Commit, folder: str) -> list[str]:
    return [path for path in commit.files if path.startswith(f"{folder.rstrip('/')}/")]


def _check_card(card: Blob | None) -> None:
    if card is not None:
        errors, _ = cards.problems(card.read().decode(errors="replace"))
        if errors:
            raise HubError(400, f"Invalid metadata in README.md: {'; '.join(errors)}")


@routes("POST", "/api/models/{repo}/discussions")
def open_pull_request(call: Call) -> Response:
    repo, user = call.proposable()
    wanted = call.json()
    if not wanted.get("pullRequest"):
        raise HubError(400, "This Hub has only pull requests, no plain discussions")
    request = repo.open_pull_request(
        repo.resolve("main"),
        title=wanted["title"],
        description=wanted["description"],
        author=user.name,
        status="draft",
    )
    return Response.of_json(pull_request_info(repo, request))


@routes("POST", "/api/models/{repo}/discussions/{num}/merge")
def merge_pull_request(call: Call) -> Response:
    repo, user = call.writable()
    repo.merge(repo.pull_request(call.args["num"]), user.name)
    return Response.of_json({})
