"""Repositories, commits and file contents: what a Hub remembers, without HTTP."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property, lru_cache
from pathlib import Path

CHUNK = 1 << 16
LFS_SUFFIXES = (".safetensors", ".bin", ".png")
LFS_ABOVE = 10_000_000  # bytes
MAIN = "refs/heads/main"


class HubError(Exception):
    """A request refused: HTTP status, message, and the X-Error-Code by which clients tell why."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Blob:
    """One file's content, in memory or on disk.

    `oid` is what an ETag shows: the sha256 of an LFS file, the git blob sha1 of a regular one.
    """

    source: bytes | Path
    size: int
    lfs: bool
    oid: str

    @classmethod
    def of(cls, source: bytes | Path, *, lfs: bool) -> Blob:
        if isinstance(source, Path):
            stat = source.stat()
            size, oid = stat.st_size, _file_oid(source, stat.st_size, stat.st_mtime_ns, lfs)
        else:
            size, oid = len(source), _oid([source], len(source), lfs)
        return cls(source, size, lfs, oid)

    @cached_property
    def pointer(self) -> bytes:
        """What git itself stores for an LFS file."""
        spec = "version https://git-lfs.github.com/spec/v1"
        return f"{spec}\noid sha256:{self.oid}\nsize {self.size}\n".encode()

    @cached_property
    def git_oid(self) -> str:
        return _oid([self.pointer], len(self.pointer), lfs=False) if self.lfs else self.oid

    def chunks(self, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
        """The bytes [start, stop), in pieces; a file on disk is never held as a whole."""
        stop = self.size if stop is None else stop
        if isinstance(self.source, bytes):
            view = memoryview(self.source)[start:stop]
            yield from (bytes(view[at : at + CHUNK]) for at in range(0, len(view), CHUNK))
            return
        with self.source.open("rb") as file:
            file.seek(start)
            while start < stop and (chunk := file.read(min(CHUNK, stop - start))):
                start += len(chunk)
                yield chunk

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        return b"".join(self.chunks(start, stop))


def is_lfs(path: str, size: int) -> bool:
    """Whether the Hub wants this file through LFS (an empty one never is)."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_ABOVE)


def _oid(chunks: Iterator[bytes] | list[bytes], size: int, lfs: bool) -> str:
    digest = hashlib.sha256() if lfs else hashlib.sha1(b"blob %d\0" % size)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


@lru_cache(maxsize=1024)
def _file_oid(path: Path, size: int, mtime_ns: int, lfs: bool) -> str:
    with path.open("rb") as file:
        return _oid(iter(lambda: file.read(1 << 20), b""), size, lfs)


@dataclass(frozen=True)
class Commit:
    """All files of a repository at one point; the sha tells content, parent and message."""

    files: Mapping[str, Blob]
    parent: str | None
    message: str
    description: str
    author: str
    depth: int

    @cached_property
    def sha(self) -> str:
        files = [[path, self.files[path].git_oid] for path in sorted(self.files)]
        identity = [self.parent, self.message, self.description, files]
        return hashlib.sha1(json.dumps(identity).encode()).hexdigest()

    @property
    def date(self) -> str:
        """A date that tests can rely on: one minute after the parent's."""
        date = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=self.depth)
        return date.strftime("%Y-%m-%dT%H:%M:%S.000Z")

    def folders(self) -> set[str]:
        """Every folder that holds a file, at any depth; the root is ''."""
        folders = {""}
        for path in self.files:
            parts = path.split("/")[:-1]
            folders |= {"/".join(parts[: n + 1]) for n in range(len(parts))}
        return folders

    def folder_oid(self, folder: str) -> str:
        """An id that changes with what the folder holds."""
        content = json.dumps(_under(self.files, folder)).encode()
        return _oid([content], len(content), lfs=False)


@dataclass
class PullRequest:
    """Proposed changes; their commits are at refs/pr/<number>."""

    number: int
    title: str
    description: str
    author: str
    base: str  # the sha from which it started
    status: str = "open"  # "draft", "open" or "merged"
    merge_commit: str | None = None

    @property
    def ref(self) -> str:
        return f"refs/pr/{self.number}"


@dataclass
class Repo:
    """A repository: commits, the refs that point to them, the LFS files uploaded to it."""

    id: str
    kind: str = "models"  # or "datasets", which can be read only
    private: bool = False
    gated: str | bool = False  # False, "auto" or "manual"
    allowed: set[str] = field(default_factory=set)  # users let through the gate
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> sha
    pull_requests: dict[int, PullRequest] = field(default_factory=dict)
    lfs: dict[str, Blob] = field(default_factory=dict)  # sha256 -> content
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)  # multipart uploads under way
    xet: dict[str, str] = field(default_factory=dict)  # sha256 -> Xet hash, if it came that way
    downloads: int = 0
    likes: int = 0
    created: str = ""  # a date; empty: that of its first commit

    @property
    def key(self) -> str:
        """Of `Hub.repos`: the id, with its kind in front unless it is a model."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def branches(self) -> dict[str, str]:
        return self._refs_under("refs/heads/")

    @property
    def tags(self) -> dict[str, str]:
        return self._refs_under("refs/tags/")

    def _refs_under(self, prefix: str) -> dict[str, str]:
        return {ref[len(prefix) :]: sha for ref, sha in self.refs.items() if ref.startswith(prefix)}

    def resolve(self, revision: str) -> Commit:
        """The commit that a branch, tag, ref (refs/pr/1), sha or short sha names."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if re.fullmatch(r"[0-9a-fA-F]{5,40}", revision):
            found = [sha for sha in self.commits if sha.startswith(revision.lower())]
            if len(found) == 1:
                return self.commits[found[0]]
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def writable_ref(self, revision: str) -> str:
        """The full name of a branch or pull request; nothing else can be committed to."""
        ref = revision if revision.startswith("refs/") else f"refs/heads/{revision}"
        if ref not in self.refs or ref.startswith("refs/tags/"):
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return ref

    def blob(self, revision: str, path: str) -> tuple[Commit, Blob]:
        commit = self.resolve(revision)
        if path not in commit.files:
            headers = {"X-Repo-Commit": commit.sha}
            raise HubError(404, "Entry not found", "EntryNotFound", headers)
        return commit, commit.files[path]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        yield commit
        while commit.parent is not None:
            commit = self.commits[commit.parent]
            yield commit

    def last_change(self, commit: Commit, path: str) -> Commit:
        """The commit that gave a file or folder the content that it has in `commit`."""
        for ancestor in self.history(commit):
            parent = self.commits[ancestor.parent].files if ancestor.parent else {}
            if _under(parent, path) != _under(ancestor.files, path):
                return ancestor
        raise KeyError(path)

    def commit(
        self,
        ref: str,
        changes: Mapping[str, Blob | None],
        *,
        parent: Commit | None,
        message: str,
        description: str = "",
        author: str = "me",
    ) -> Commit:
        """Point `ref` to a new commit: the files of `parent` with `changes`, where None deletes."""
        files = {**(parent.files if parent else {}), **changes}
        commit = Commit(
            files={path: blob for path, blob in sorted(files.items()) if blob is not None},
            parent=parent.sha if parent else None,
            message=message,
            description=description,
            author=author,
            depth=parent.depth + 1 if parent else 0,
        )
        self.commits[commit.sha] = commit
        self.refs[ref] = commit.sha
        self.lfs.update({blob.oid: blob for blob in commit.files.values() if blob.lfs})
        return commit

    def open_pull_request(
        self, base: Commit, *, title: str, description: str, author: str, status: str = "open"
    ) -> PullRequest:
        number = len(self.pull_requests) + 1
        pull_request = PullRequest(number, title, description, author, base.sha, status)
        self.pull_requests[number] = pull_request
        self.refs[pull_request.ref] = base.sha
        return pull_request

    def pull_request(self, number: str) -> PullRequest:
        if not number.isdigit() or int(number) not in self.pull_requests:
            raise HubError(404, f"No pull request {number}")
        return self.pull_requests[int(number)]

    def merge(self, pull_request: PullRequest, author: str) -> Commit:
        """Apply to main what the pull request changed since its base, as one commit."""
        base = self.commits[pull_request.base].files
        proposed = self.resolve(pull_request.ref).files
        paths = {*base, *proposed}
        commit = self.commit(
            MAIN,
            {path: proposed.get(path) for path in paths if proposed.get(path) != base.get(path)},
            parent=self.resolve(MAIN),
            message=f"{pull_request.title} (#{pull_request.number})",
            author=author,
        )
        pull_request.status = "merged"
        pull_request.merge_commit = commit.sha
        return commit


def _under(files: Mapping[str, Blob], path: str) -> dict[str, str]:
    """Paths and ids of a file, or of all the files in a folder."""
    return {
        name: blob.git_oid
        for name, blob in files.items()
        if name == path or name.startswith(f"{path}/")
    }
