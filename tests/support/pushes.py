"""What was pushed to the loopback Hub, and what was sent for it."""

from __future__ import annotations

from pathlib import Path

from hub import Hub, Request

from hf_tsv.runs import publishing


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def published(folder: Path, repo_id: str = "me/new") -> dict[str, bytes]:
    """Files of a folder as they are uploaded: the card names the repository, no file a folder."""
    files = {name: folder / name for name in contents(folder)}
    return {**contents(folder), **publishing.published(files, repo_id)}


def pushed(hub: Hub, repo_id: str = "me/new", revision: str = "main") -> dict[str, bytes]:
    return {n: c for n, c in hub.files(repo_id, revision).items() if n != ".gitattributes"}


def sent(hub: Hub) -> list[Request]:
    """Requests that carried the content of a large file."""
    return [request for request in hub.requests if request.method == "PUT"]
