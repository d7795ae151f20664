"""The other origin, where LFS contents come from and go to; it takes no token."""

from __future__ import annotations

from urllib.parse import quote

from .routing import Call, Routes
from .store import Blob, HubError
from .wire import Response

routes = Routes()


@routes("PUT", "/upload/{repo}/{oid}")
def upload(call: Call) -> Response:
    repo, oid = call.stored(), call.args["oid"]
    blob = Blob.of(call.body, lfs=True)
    if blob.oid != oid:
        raise HubError(400, f"The body's sha256 is {blob.oid}, not {oid}")
    repo.lfs[oid] = blob
    return Response(headers={"ETag": f'"{oid}"'})


@routes("PUT", "/upload/{repo}/{oid}/{part}")
def upload_part(call: Call) -> Response:
    parts = call.stored().parts.get(call.args["oid"])
    if parts is None:
        raise HubError(404, "No such upload")
    parts[int(call.args["part"])] = call.body
    return Response(headers={"ETag": f'"{Blob.of(call.body, lfs=True).oid}"'})


@routes("GET", "(/{kind})?/{repo}/{oid}/{path}")
def download(call: Call) -> Response:
    blob = call.stored().lfs.get(call.args["oid"])
    if blob is None:
        raise HubError(404, "No such object")
    name = quote(call.args["path"], safe="")
    headers = {
        "ETag": f'"{blob.oid}"',
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"inline; filename*=UTF-8''{name}",
    }
    return Response(200, blob, headers)
