"""The Xet storage, as hf_xet speaks to it: blocks of chunks, and shards that say what files are.

An upload through Xet goes past the Hub: the client sends blocks of chunks (xorbs) and then a shard,
which names for each file its sha256 and its chunks. A commit gives the sha256 only, so the Hub has
hf_xet put the file together from here, and takes it only if its bytes have that sha256.

A token of the storage is not one of the Hub, and signed addresses take none.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .routing import Call, Routes
from .store import Blob, HubError
from .wire import Request, Response

if TYPE_CHECKING:
    from .hub import Hub

hub_routes, routes = Routes(), Routes()

TOKEN = "xet-token"
LAST = b"\xff" * 32
VERIFICATION, METADATA = 1 << 31, 1 << 30
"""Flags of a file in a shard: what else follows its terms."""

READ = """
import sys
from hf_xet import XetFileInfo, XetSession
address, token = sys.argv[1:]
session = XetSession()
with session.new_file_download_group(
    endpoint=address, token=token, token_expiry_unix_secs=4102444800
) as group:
    for line in sys.stdin:
        file, size, path = line.split()
        group.start_download_file(XetFileInfo(file, int(size)), path)
"""


@dataclass(frozen=True)
class Term:
    """A part of a file: chunks `start` to `stop` of a xorb, and the bytes that they unpack to."""

    xorb: str
    size: int
    start: int
    stop: int


@dataclass
class Storage:
    """What was uploaded through Xet, whatever repository it is for."""

    xorbs: dict[str, bytes] = field(default_factory=dict)
    shards: list[bytes] = field(default_factory=list)
    terms: dict[str, list[Term]] = field(default_factory=dict)  # by Xet hash
    hashes: dict[str, str] = field(default_factory=dict)  # sha256 -> Xet hash
    blobs: dict[str, Blob] = field(default_factory=dict)  # sha256 -> content, as read back


def _storage(call: Call) -> Storage:
    if call.hub.xet is None:
        raise HubError(404, "This Hub has no Xet storage")
    return call.hub.xet


def _authorised(call: Call) -> Storage:
    if call.request.headers.get("authorization") != f"Bearer {TOKEN}":
        raise HubError(401, "This is no token of the storage")
    return _storage(call)


# The Hub


@hub_routes("GET", "/api/{kind}/{repo}/xet-{right}-token/{rev}")
def token(call: Call) -> Response:
    """Say where the storage is, and give a token of it."""
    _storage(call)
    if call.args["right"] == "read":
        call.readable()
    else:
        call.proposable() if "create_pr" in call.query else call.writable()
    info = {"casUrl": call.hub.storage, "accessToken": TOKEN, "exp": 4102444800}
    headers = {
        "X-Xet-Cas-Url": call.hub.storage,
        "X-Xet-Access-Token": TOKEN,
        "X-Xet-Token-Expiration": str(info["exp"]),
    }
    return Response.of_json(info, headers=headers)


def receive(hub: Hub, request: Request) -> None:
    """Read back the files that a commit names and no repository has, before it is made."""
    if hub.xet is None or not re.search("/commit/", request.path) or request.method != "POST":
        return
    lines = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    large = {x["value"]["oid"]: x["value"]["size"] for x in lines if x["key"] == "lfsFile"}
    new = {o: n for o, n in large.items() if o in hub.xet.hashes and o not in hub.xet.blobs}
    if not new:
        return
    with tempfile.TemporaryDirectory(prefix="hub-xet-") as folder:
        orders = [f"{hub.xet.hashes[oid]} {size} {folder}/{oid}\n" for oid, size in new.items()]
        reader = subprocess.run(
            [sys.executable, "-c", READ, hub.storage, TOKEN],
            env={**os.environ, "HF_HOME": folder, "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "0"},
            input="".join(orders), capture_output=True, text=True, check=False,
        )  # fmt: skip
        if reader.returncode:
            said = reader.stderr.splitlines()[-1]
            raise HubError(400, f"The Xet storage cannot read a file: {said}")
        for oid in new:
            blob = Blob.of(Path(folder, oid).read_bytes(), lfs=True)
            if blob.oid != oid:
                raise HubError(400, f"The content uploaded through Xet has sha256 {blob.oid}")
            hub.xet.blobs[oid] = blob


# The storage


@routes("GET", "/v1/chunks/default/{hash}")
def chunk(call: Call) -> Response:
    """A shard that knows the chunk, by which the client finds what need not be sent."""
    wanted = struct.pack("<4Q", *(int(call.args["hash"][n : n + 16], 16) for n in range(0, 64, 16)))
    for shard in _authorised(call).shards:
        if wanted in shard:
            return Response(200, _with_footer(shard))
    raise HubError(404, "No shard has this chunk")


def _with_footer(shard: bytes) -> bytes:
    """The shard as hf_xet reads it: an uploaded one has no footer of 25 numbers."""
    blocks, end, never = shard.index(LAST) + 48, len(shard), 4102444800
    tables = (end, 0, end, 0, end, 0)
    key = (0,) * 4  # chunks are named openly
    footer = (1, 48, blocks, *tables, *key, never, never, *(0,) * 6, 0, 0, 0, end)
    return shard[:40] + struct.pack("<Q", 200) + shard[48:] + struct.pack("<25Q", *footer)


@routes("POST", "/v1/xorb-grants/default/{hash}")
def grant(call: Call) -> Response:
    """Give the address for a xorb, unless it is there."""
    if call.args["hash"] in _authorised(call).xorbs:
        return Response.of_json({})
    url = f"{call.hub.storage}/signed/{call.args['hash']}"
    return Response.of_json({"id": "1", "method": "PUT", "url": url, "headers": {}}, 201)


@routes("PUT", "/signed/{hash}")
def put_xorb(call: Call) -> Response:
    if "authorization" in call.request.headers:
        raise HubError(400, "The address is signed already")
    _storage(call).xorbs[call.args["hash"]] = call.body
    return Response()


@routes("POST", "/v1/xorb-commits/default/{hash}/grant/{id}")
def end_grant(call: Call) -> Response:
    return Response.of_json({"was_inserted": call.args["hash"] in _authorised(call).xorbs})


@routes("POST", "/v1/shards")
def put_shard(call: Call) -> Response:
    storage = _authorised(call)
    storage.shards.append(call.body)
    for sha256, file, terms in _files(call.body):
        if lost := {term.xorb for term in terms} - storage.xorbs.keys():
            raise HubError(400, f"There is no xorb {lost.pop()}")
        storage.terms[file] = terms
        storage.hashes[sha256] = file
    return Response.of_json({"result": 1})


def _files(shard: bytes) -> Iterator[tuple[str, str, list[Term]]]:
    """The files that a shard describes: sha256, Xet hash and terms, in records of 48 bytes each."""
    at = 48
    while (file := shard[at : at + 32]) != LAST:
        flags, count = struct.unpack_from("<II", shard, at + 32)
        terms = [_term(shard, at + 48 * (1 + n)) for n in range(count)]
        at += 48 * (1 + count * (2 if flags & VERIFICATION else 1))
        if flags & METADATA:
            yield _hash(shard[at : at + 32]), _hash(file), terms
            at += 48


def _term(shard: bytes, at: int) -> Term:
    _, size, start, stop = struct.unpack_from("<4I", shard, at + 32)
    return Term(_hash(shard[at : at + 32]), size, start, stop)


def _hash(words: bytes) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack("<4Q", words))


@routes("GET", "/v1/reconstructions/{hash}")
def reconstruction(call: Call) -> Response:
    """Say of which chunks a file consists, or the part of it that a Range header asks for."""
    storage = _authorised(call)
    terms = storage.terms.get(call.args["hash"])
    if terms is None:
        raise HubError(404, "No such file")
    size = sum(term.size for term in terms)
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", call.request.headers.get("range", ""))
    first, last = (int(asked[1]), int(asked[2])) if asked else (0, size)
    if first >= size:
        raise HubError(416, "Range Not Satisfiable")
    wanted, skipped, at = [], 0, 0
    for term in terms:
        if at + term.size <= first:
            skipped += term.size
        elif at <= last:
            wanted.append(term)
        at += term.size
    fetch: dict[str, list[dict[str, Any]]] = {}
    for term in wanted:
        start, stop = _place(storage.xorbs[term.xorb], term)
        url = f"{call.hub.storage}/signed/{term.xorb}"
        part = {"range": {"start": term.start, "end": term.stop}, "url": url}
        entry = {**part, "url_range": {"start": start, "end": stop - 1}}
        if entry not in fetch.setdefault(term.xorb, []):
            fetch[term.xorb].append(entry)
    parts = [
        {"hash": t.xorb, "unpacked_length": t.size, "range": {"start": t.start, "end": t.stop}}
        for t in wanted
    ]
    answer = {"offset_into_first_range": first - skipped, "terms": parts, "fetch_info": fetch}
    return Response.of_json(answer)


def _place(xorb: bytes, term: Term) -> tuple[int, int]:
    """First byte of a term's chunks, and the one after them: each chunk begins with its size."""
    at = start = 0
    for number in range(term.stop):
        if number == term.start:
            start = at
        at += 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
    return start, at


@routes("GET", "/signed/{hash}")
def get_xorb(call: Call) -> Response:
    if "authorization" in call.request.headers:
        raise HubError(400, "The address is signed already")
    return Response(200, Blob.of(_storage(call).xorbs[call.args["hash"]], lfs=True))


@routes("POST", "/v1/telemetry")
def telemetry(call: Call) -> Response:
    return Response()
