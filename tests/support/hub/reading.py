"""Endpoints that read: who am I, model info, listings, files."""

from __future__ import annotations

from typing import Any
from urllib.parse import parse_qs, quote

from . import cards
from .routing import Call, Routes
from .store import Blob, Commit, HubError, PullRequest, Repo
from .wire import Response

routes = Routes()


@routes("GET", "/api/whoami-v2")
def whoami(call: Call) -> Response:
    if call.user is None:
        raise HubError(401, "Invalid username or password.")
    return Response.of_json(call.user.whoami())


@routes("POST", "/api/validate-yaml")
def validate_yaml(call: Call) -> Response:
    errors, warnings = cards.problems(call.json()["content"])
    body = {
        "errors": [{"message": message} for message in errors],
        "warnings": [{"message": message} for message in warnings],
    }
    return Response.of_json(body, status=400 if errors else 200)


@routes("GET", "/api/models/{repo}/auth-check")
def auth_check(call: Call) -> Response:
    call.readable()
    return Response.of_json({})


@routes("GET", "/api/models/{repo}/auth-check/write")
def auth_check_write(call: Call) -> Response:
    call.writable()
    return Response.of_json({})


@routes("GET", "/api/{kind}/{repo}/refs")
def refs(call: Call) -> Response:
    repo = call.repo()

    def listed(prefix: str) -> list[dict[str, str]]:
        return [
            {"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha}
            for ref, sha in repo.refs.items()
            if ref.startswith(prefix)
        ]

    found: dict[str, Any] = {
        "branches": listed("refs/heads/"),
        "tags": listed("refs/tags/"),
        "converts": [],
    }
    if "include_prs" in call.query:
        found["pullRequests"] = listed("refs/pr/")
    return Response.of_json(found)


@routes("GET", "/api/models/{repo}/commits/{rev}")
def commits(call: Call) -> Response:
    repo = call.repo()
    history = [
        {
            "id": commit.sha,
            "title": commit.message,
            "message": commit.description,
            "date": commit.date,
            "authors": [{"user": commit.author}],
        }
        for commit in repo.history(repo.resolve(call.args["rev"]))
    ]
    return call.page(history)


@routes("GET", "/api/{kind}/{repo}/tree/{rev}(/{path})?")
def tree(call: Call) -> Response:
    repo = call.repo()
    commit = repo.resolve(call.args["rev"])
    folder = call.args.get("path", "").strip("/")
    if folder not in commit.folders():
        message = f"{folder} does not exist on {call.args['rev']}"
        raise HubError(404, message, "EntryNotFound", {"X-Repo-Commit": commit.sha})
    prefix = f"{folder}/" if folder else ""
    inside = sorted(p for p in {*commit.files, *commit.folders()} if p and p.startswith(prefix))
    if call.query.get("recursive", [""])[0].lower() not in ("true", "1"):
        inside = [path for path in inside if "/" not in path[len(prefix) :]]
    expand = call.query.get("expand", [""])[0].lower() == "true"
    return call.page([_path_info(repo, commit, path, expand) for path in inside])


@routes("POST", "/api/{kind}/{repo}/paths-info/{rev}")
def paths_info(call: Call) -> Response:
    repo = call.repo()
    commit = repo.resolve(call.args["rev"])
    form = parse_qs(call.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    paths = [path.strip("/") for path in form.get("paths", [])]
    known = {*commit.files, *commit.folders()} - {""}
    return Response.of_json([_path_info(repo, commit, p, expand) for p in paths if p in known])


def _path_info(repo: Repo, commit: Commit, path: str, expand: bool) -> dict[str, Any]:
    if path in commit.files:
        blob = commit.files[path]
        info: dict[str, Any] = {
            "type": "file",
            "path": path,
            "size": blob.size,
            "oid": blob.git_oid,
        }
        if blob.lfs:
            info["lfs"] = {"oid": blob.oid, "size": blob.size, "pointerSize": len(blob.pointer)}
            if blob.oid in repo.xet:
                info["xetHash"] = repo.xet[blob.oid]
    else:
        info = {"type": "directory", "path": path, "size": 0, "oid": commit.folder_oid(path)}
    if expand:
        last = repo.last_change(commit, path)
        info["lastCommit"] = {"id": last.sha, "title": last.message, "date": last.date}
    return info


@routes("GET", "/api/models/{repo}/discussions")
def pull_requests(call: Call) -> Response:
    repo = call.repo()
    found = [pull_request_info(repo, request) for request in repo.pull_requests.values()]
    return Response.of_json({"discussions": found, "count": len(found), "start": 0})


@routes("GET", "/api/models/{repo}/discussions/{num}")
def pull_request(call: Call) -> Response:
    repo = call.repo()
    return Response.of_json(pull_request_info(repo, repo.pull_request(call.args["num"])))


def pull_request_info(repo: Repo, request: PullRequest) -> dict[str, Any]:
    return {
        "num": request.number,
        "title": request.title,
        "author": {"name": request.author},
        "createdAt": repo.commits[request.base].date,
        "status": request.status,
        "repo": {"name": repo.id, "type": "model"},
        "isPullRequest": True,
        "events": [],
        "filesWithConflicts": [],
        "changes": {"base": "refs/heads/main", "mergeCommitId": request.merge_commit},
    }


@routes("GET", "(/{kind})?/{repo}/resolve/{rev}/{path}")
def resolve(call: Call) -> Response:
    repo = call.readable()
    commit, blob = repo.blob(call.args["rev"], call.args["path"])
    headers = {
        "X-Repo-Commit": commit.sha,
        "ETag": f'"{blob.oid}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(call.args['path'], safe='')}",
    }
    if not blob.lfs:
        return Response(200, blob, headers)
    place = f"{call.hub.cdn}/{repo.key}/{blob.oid}/{quote(call.args['path'])}"
    headers |= {
        "Location": place + call.hub.signature,
        "X-Linked-Size": str(blob.size),
        "X-Linked-Etag": f'"{blob.oid}"',
    }
    if blob.oid in repo.xet:
        api = f"{call.hub.endpoint}/api/{repo.kind}/{repo.id}"
        headers["X-Xet-Hash"] = repo.xet[blob.oid]
        headers["Link"] = f'<{api}/xet-read-token/{commit.sha}>; rel="xet-auth"'
    return Response(302, b"", headers)


LISTED = ("_id", "id", "modelId", "createdAt", "downloads", "library_name", "likes",
          "pipeline_tag", "private", "tags")  # fmt: skip
"""What a listing says of a repository if nothing else is asked for."""

ORDERS = ("createdAt", "downloads", "lastModified", "likes", "trendingScore")


@routes("GET", "/api/models")
def models(call: Call) -> Response:
    """Repositories with all of the tags asked for, the highest first; `limit` is that of a page."""
    asked = {name: values[0] for name, values in call.query.items()}
    order, limit = asked.get("sort", "trendingScore"), asked.get("limit", "1000")
    if order not in ORDERS or asked.get("direction", "-1") != "-1" or not limit.isdigit():
        raise HubError(400, "Invalid query: sort, direction or limit")
    found = []
    for repo in call.hub.repos.values():
        mine = call.user is not None and call.user.may_read_private(repo.id)
        if repo.kind != "models" or (repo.private and not mine):
            continue
        info = _info(repo, repo.resolve("main"), blobs=False)
        if (
            set(call.query.get("filter", [])) <= {*info["tags"]}
            and asked.get("author", repo.namespace).lower() == repo.namespace.lower()
            and asked.get("search", "").lower() in repo.id.lower()
            and asked.get("pipeline_tag") in (None, info.get("pipeline_tag"))
        ):
            found.append(info)
    found.sort(key=lambda info: info.get(order, 0), reverse=True)
    wanted = {"_id", "id", *call.query["expand"]} if "expand" in call.query else {*LISTED}
    listed = [{key: value for key, value in info.items() if key in wanted} for info in found]
    return call.page(listed, min(int(limit), call.hub.page_size))


@routes("GET", "/api/{kind}/{repo}(/revision/{rev})?")
def repo_info(call: Call) -> Response:
    repo = call.repo()
    commit = repo.resolve(call.args.get("rev", "main"))
    info = _info(repo, commit, blobs="blobs" in call.query)
    if wanted := call.query.get("expand"):
        if "evalResults" in wanted:
            info["evalResults"] = cards.eval_results(commit.files)
        info = {key: value for key, value in info.items() if key in ("_id", "id", *wanted)}
    return Response.of_json(info)


def _info(repo: Repo, commit: Commit, *, blobs: bool) -> dict[str, Any]:
    card = cards.card_data(commit.files)
    info = {
        "_id": f"model-{repo.id}",
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.namespace,
        "sha": commit.sha,
        "lastModified": commit.date,
        "createdAt": repo.created or next(iter(repo.commits.values())).date,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": repo.downloads,
        "likes": repo.likes,
        "tags": cards.tags(card, commit.files),
        "siblings": [_sibling(path, blob, blobs) for path, blob in commit.files.items()],
        "usedStorage": sum(blob.size for blob in repo.lfs.values()),
        "spaces": [],
    }
    info |= {key: card[key] for key in ("library_name", "pipeline_tag") if key in card}
    if card:
        info["cardData"] = card
    if parameters := cards.parameter_counts(commit.files):
        info["safetensors"] = {"parameters": parameters, "total": sum(parameters.values())}
    return info


def _sibling(path: str, blob: Blob, details: bool) -> dict[str, Any]:
    sibling: dict[str, Any] = {"rfilename": path}
    if details:
        sibling |= {"size": blob.size, "blobId": blob.git_oid}
        if blob.lfs:
            size = len(blob.pointer)
            sibling["lfs"] = {"sha256": blob.oid, "size": blob.size, "pointerSize": size}
    return sibling
