"""The Hub itself: its users and repositories, two listening servers, faults and a request log."""

from __future__ import annotations

import atexit
import re
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import cdn, collections, jobs, oauth, reading, writing, xet
from .access import User
from .collections import Collection
from .routing import dispatch
from .store import MAIN, Blob, Repo, is_lfs
from .wire import Fault, Request, Response, Server
from .xet import Storage

Content = bytes | str | Path | None
OWN = [module.routes for module in (collections, jobs, oauth, reading, writing)]
ROUTES = {
    "api": [xet.hub_routes, *OWN],
    "cdn": [cdn.routes],
    "foreign": [cdn.routes],
    "xet": [xet.routes],
}


class Hub:
    """A Hub on 127.0.0.1: `endpoint` is its API, `cdn` the other origin, which stores LFS files.

    `foreign` is a third one that nothing points to, and that has the same files. `storage` is what
    hf_xet speaks to, once `xet` is a `Storage`.

    Users, repositories and faults may be changed at any time, from any thread.
    """

    users: dict[str, User]  # token -> user
    signing_in: str  # token of the one who signs in to a Space
    repos: dict[str, Repo]
    collections: dict[str, Collection]  # by their slugs
    requests: list[Request]
    page_size: int  # entries per page of a listing
    multipart_above: int  # bytes; larger LFS files are uploaded in parts of this size
    signature: str  # query of every address of the storage
    jobs: list[dict[str, Any]]  # as they were asked for
    xet: Storage | None  # what is uploaded through Xet; None: the Hub has no such storage

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self._ports = {"api": 0, "cdn": 0, "foreign": 0, "xet": 0}
        self._faults: list[Fault] = []
        self._servers: list[Server] = []
        self._threads: list[threading.Thread] = []
        self._bind()
        self.reset()

    def reset(self) -> None:
        """Forget repositories, faults and requests; the default users and settings again."""
        with self.lock:
            self.users = {
                "hf_write": User("me", orgs=["org"], role="write"),
                "hf_read": User("reader", role="read"),
            }
            self.signing_in = "hf_write"
            self.repos = {}
            self.collections = {}
            self.requests = []
            self.page_size = 1000
            self.multipart_above = 20_000_000
            self.signature = ""
            self.jobs = []
            self.xet = None
            self.heal()

    # Listening

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._ports['api']}"

    @property
    def cdn(self) -> str:
        return f"http://127.0.0.1:{self._ports['cdn']}"

    @property
    def foreign(self) -> str:
        return f"http://127.0.0.1:{self._ports['foreign']}"

    @property
    def storage(self) -> str:
        return f"http://127.0.0.1:{self._ports['xet']}"

    def start(self) -> None:
        """Serve, in daemon threads; after `stop`, on the same ports again."""
        if self._threads:
            return
        self._bind()
        for server in self._servers:
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self._threads.append(thread)
        atexit.register(self.stop)

    def stop(self) -> None:
        """Close the ports and every connection: from outside, the Hub is down."""
        for server, thread in zip(self._servers, self._threads, strict=False):
            server.shutdown()
            thread.join()
        for server in self._servers:
            server.server_close()
            server.cut_connections()
        self._servers, self._threads = [], []
        atexit.unregister(self.stop)

    def cut(self) -> None:
        """End every connection; the one that asks for it gets no answer."""
        for server in self._servers:
            server.cut_connections()

    def _bind(self) -> None:
        if not self._servers:
            self._servers = [Server(port, origin, self) for origin, port in self._ports.items()]
            self._ports = {server.origin: server.server_address[1] for server in self._servers}

    # What tests prepare

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, Content] | Path,
        *,
        private: bool = False,
        gated: bool | str = False,
        branch: str = "main",
        kind: str = "models",
    ) -> str:
        """Create a repository from files or a folder, and return the sha of its commit.

        Where it exists already, add a commit on that branch, as `commit` does; it stays as private
        and as gated as it was. A repository of `kind` "datasets" is under `datasets/org/name` here
        and elsewhere. `gated` is True, "auto" or "manual"; `hub.repos[id].allowed` names
        the users let in.
        """
        if isinstance(files, Path):
            paths = sorted(path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path for path in paths}
        with self.lock:
            gate = "auto" if gated is True else gated
            repo = Repo(repo_id, kind, private=private, gated=gate)
            self.repos.setdefault(repo.key, repo)
            return self.commit(repo.key, files, branch=branch)

    def commit(
        self,
        repo_id: str,
        files: Mapping[str, Content],
        branch: str = "main",
        parent: str | None = None,
        message: str = "Add files",
    ) -> str:
        """Commit files over those of the parent (by default the branch's head) and return the sha.

        A Path is not read into memory but served from disk, so it must stay as it is; None deletes.
        A new branch starts from `parent`, or else from main.
        """
        changes = {path: _blob(path, content) for path, content in files.items()}
        with self.lock:
            repo = self.repos[repo_id]
            ref = f"refs/heads/{branch}"
            start = parent or repo.refs.get(ref) or repo.refs.get(MAIN)
            base = repo.resolve(start) if start else None
            return repo.commit(ref, changes, parent=base, message=message).sha

    def add_collection(self, slug: str, *, private: bool = False) -> Collection:
        """Create an empty collection, `owner/title-id`."""
        return self.collections.setdefault(slug, Collection(slug, private))

    def tag(self, repo_id: str, name: str, sha: str) -> None:
        self.repos[repo_id].refs[f"refs/tags/{name}"] = self.repos[repo_id].resolve(sha).sha

    def fail(
        self,
        pattern: str,
        status: int | None = None,
        *,
        times: float = 1,
        headers: Mapping[str, str] | None = None,
        drop_after: int | None = None,
        truncate: int | None = None,
        ignore_range: bool = False,
        delay: float = 0,
        after: int = 0,
        method: str | None = None,
        body: bytes | None = None,
        action: Callable[[], object] | None = None,
    ) -> None:
        """Let the next `times` requests go wrong whose path, on either origin, matches a regex.

        The first `after` of them still go well.

        status: the error answered, with `headers`; 503 if nothing else is to go wrong.
        body: what to answer with that status instead of a message.
        action: called before the request is answered as it then should be: repositories, users and
            branches may have changed.
        drop_after: announce the whole body, send that many bytes and cut the connection.
        truncate: send a well-formed response of only the first that many bytes.
        ignore_range: answer 200 with the whole file to a request for a range of it.
        delay: seconds to wait before the response, or until `reset`.

        With drop_after, truncate and ignore_range the request is carried out, and `headers` are
        added; they wait for a successful response to something other than HEAD, so a redirect to
        the CDN does not use them up. `times=math.inf` lasts until `reset`.
        """
        spoils = drop_after is not None or truncate is not None or ignore_range
        harmless = not spoils and not delay and action is None
        fault = Fault(
            pattern=re.compile(pattern),
            method=method,
            times=times,
            status=503 if status is None and harmless else status,
            headers=headers or {},
            drop_after=drop_after,
            truncate=truncate,
            ignore_range=ignore_range,
            delay=delay,
            after=after,
            body=body,
            action=action,
        )
        with self.lock:
            self._faults.append(fault)

    def heal(self) -> None:
        """Let everything go well again; requests that are being delayed end."""
        with self.lock:
            for fault in self._faults:
                fault.over.set()
            self._faults = []

    # What tests look at

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The files of a revision, as they are now."""
        commit = self.repos[repo_id].resolve(revision)
        return {path: blob.read() for path, blob in commit.files.items()}

    def sent(self, pattern: str = "") -> int:
        """Bytes of response bodies sent so far for paths that match a regex, on both origins."""
        return sum(r.body_sent for r in list(self.requests) if re.search(pattern, r.path))

    # What the servers ask

    def log(self, request: Request) -> None:
        self.requests.append(request)

    def next_fault(self, request: Request, *, spoils_body: bool) -> Fault | None:
        with self.lock:
            for fault in self._faults:
                if fault.spoils_body != spoils_body or not fault.matches(request):
                    continue
                if fault.after == 0:
                    fault.times -= 1
                    return fault
                fault.after -= 1
        return None

    def respond(self, request: Request, raw_path: str, body: bytes) -> Response:
        xet.receive(self, request)  # without the lock, which the storage needs for its answers
        with self.lock:
            return dispatch(self, ROUTES[request.origin], request, raw_path, body)


def _blob(path: str, content: Content) -> Blob | None:
    if content is None:
        return None
    source = content.encode() if isinstance(content, str) else content
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    return Blob.of(source, lfs=is_lfs(path, size))
