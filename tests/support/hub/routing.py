"""Routes: from a method and a path to the function that answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode

from .access import User, check_gate, check_propose, check_visible, check_write
from .store import HubError, Repo
from .wire import Request, Response

if TYPE_CHECKING:
    from .hub import Hub

# A segment may hold a quoted slash: the revision refs/pr/1 arrives as refs%2Fpr%2F1.
SEGMENTS = {
    "kind": "models|datasets",
    "repo": "[^/]+(?:/[^/]+)?",
    "path": ".+",
    "collection": "[^/]+/[^/]+",
    "oid": "[0-9a-f]{64}",
}


@dataclass(frozen=True)
class Call:
    """One request on its way through a route."""

    hub: Hub
    request: Request
    raw_path: str
    body: bytes
    args: dict[str, str]  # the route's {names}, decoded
    user: User | None

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(self.request.query)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    @property
    def key(self) -> str:
        """Under which the Hub has the repository named in the path."""
        return Repo(self.args["repo"], self.args.get("kind", "models")).key

    def repo(self) -> Repo:
        """The repository named in the path, if the user may know of it."""
        return check_visible(self.user, self.args["repo"], self.hub.repos.get(self.key))

    def readable(self) -> Repo:
        """The same, if the user may also have its contents."""
        repo = self.repo()
        check_gate(self.user, repo)
        return repo

    def writable(self) -> tuple[Repo, User]:
        """The same, if the user may also change it."""
        repo = self.repo()
        return repo, check_write(self.user, repo.id)

    def proposable(self) -> tuple[Repo, User]:
        """The same, if the user may also open pull requests."""
        repo = self.repo()
        return repo, check_propose(self.user, repo.id)

    def stored(self) -> Repo:
        """The same, for URLs that were handed out with the right to use them."""
        if self.key not in self.hub.repos:
            raise HubError(404, "No such object")
        return self.hub.repos[self.key]

    def page(self, items: Sequence[Any], size: int | None = None) -> Response:
        """One page of a listing, with a Link header to the next."""
        start = int(self.query.get("cursor", ["0"])[0])
        stop = start + (self.hub.page_size if size is None else size)
        headers = {}
        if stop < len(items):
            query = urlencode({**self.query, "cursor": stop}, doseq=True)
            headers["Link"] = f'<{self.hub.endpoint}{self.raw_path}?{query}>; rel="next"'
        return Response.of_json(items[start:stop], headers=headers)


Answer = Callable[[Call], Response]


class Routes:
    """A table of method, path pattern and answering function; the first that matches answers."""

    def __init__(self) -> None:
        self.table: list[tuple[str, re.Pattern[str], Answer]] = []

    def __call__(self, method: str, path: str) -> Callable[[Answer], Answer]:
        """Decorator: `{name}` in the path matches a segment, `(…)?` an optional part."""

        def segment(match: re.Match[str]) -> str:
            return f"(?P<{match[1]}>{SEGMENTS.get(match[1], '[^/]+')})"

        pattern = re.compile(re.sub(r"\{(\w+)\}", segment, path))

        def register(answer: Answer) -> Answer:
            self.table.append((method, pattern, answer))
            return answer

        return register

    def match(self, method: str, path: str) -> tuple[Answer, dict[str, str]] | None:
        method = "GET" if method == "HEAD" else method
        for wanted, pattern, answer in self.table:
            if wanted == method and (match := pattern.fullmatch(path)):
                found = match.groupdict()
                return answer, {name: unquote(text) for name, text in found.items() if text}
        return None


def dispatch(
    hub: Hub, routes: Iterable[Routes], request: Request, raw_path: str, body: bytes
) -> Response:
    """Answer a request with the first route that takes it, on behalf of its token's user."""
    user = _user(hub, request)
    for table in routes:
        if found := table.match(request.method, raw_path):
            answer, args = found
            return answer(Call(hub, request, raw_path, body, args, user))
    raise HubError(404, f"No such endpoint: {request.method} {request.path}")


def _user(hub: Hub, request: Request) -> User | None:
    authorization = request.headers.get("authorization", "Basic")
    if authorization.startswith("Basic"):  # which no client of the Hub sends
        return None
    if request.origin == "xet":  # which has tokens of its own
        return None
    if request.origin != "api":
        raise HubError(400, "Only one auth mechanism allowed: the URL is signed already")
    user = hub.users.get(authorization.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user
