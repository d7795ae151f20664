"""HTTP/1.1 on a socket: bodies, ranges, injected faults, and the record of what was sent."""

from __future__ import annotations

import json
import re
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from .store import Blob, HubError


@dataclass
class Request:
    """One request as answered; sizes are of bodies, in bytes, and `path` is decoded."""

    origin: str  # "api", "cdn" or "foreign"
    method: str
    path: str
    status: int
    body_sent: int
    headers: dict[str, str]  # names in lower case
    body_received: int
    query: str = ""
    body: bytes = field(default=b"", repr=False)


@dataclass
class Response:
    """What to answer; a Blob is streamed, and can be asked for in ranges."""

    status: int = 200
    body: bytes | Blob = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int | None = None

    @classmethod
    def of_json(
        cls, data: Any, status: int = 200, headers: Mapping[str, str] | None = None
    ) -> Response:
        body = json.dumps(data, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json", **(headers or {})})

    @classmethod
    def of_error(cls, error: HubError) -> Response:
        message = " ".join(error.message.split()).encode("ascii", "replace").decode()
        headers = {"X-Error-Message": message, **error.headers}
        if error.code:
            headers["X-Error-Code"] = error.code
        return cls.of_json({"error": error.message}, error.status, headers)

    @property
    def size(self) -> int:
        """Bytes of the body that are to be sent."""
        size = self.body.size if isinstance(self.body, Blob) else len(self.body)
        return (size if self.stop is None else self.stop) - self.start

    def chunks(self, stop: int) -> Iterator[bytes]:
        if isinstance(self.body, Blob):
            return self.body.chunks(self.start, stop)
        return iter([self.body[self.start : stop]])

    def narrowed(self, range_header: str | None) -> Response:
        """The part of a file that a Range header asks for: 206, or 416 if there is none."""
        match = re.fullmatch(r"bytes=(?=.*\d)(\d*)-(\d*)", (range_header or "").replace(" ", ""))
        if match is None or self.status != 200 or not isinstance(self.body, Blob):
            return self
        size, (first, last) = self.body.size, match.groups()
        start = int(first) if first else max(0, size - int(last))
        stop = min(size, int(last) + 1) if first and last else size
        if start >= stop:
            headers = {"Content-Range": f"bytes */{size}"}
            return Response.of_error(HubError(416, "Range Not Satisfiable", headers=headers))
        headers = {**self.headers, "Content-Range": f"bytes {start}-{stop - 1}/{size}"}
        return Response(206, self.body, headers, start, stop)


@dataclass
class Fault:
    """What goes wrong, and how many more times, with requests whose path matches.

    `after` of them go well first; a delay ends at once when the fault is over.
    """

    pattern: re.Pattern[str]
    method: str | None
    times: float
    status: int | None
    headers: Mapping[str, str]
    drop_after: int | None
    truncate: int | None
    ignore_range: bool
    delay: float
    after: int
    body: bytes | None
    action: Callable[[], object] | None
    over: threading.Event = field(default_factory=threading.Event)

    @property
    def spoils_body(self) -> bool:
        """Whether the request is carried out, and only what comes back is damaged."""
        return self.ignore_range or self.drop_after is not None or self.truncate is not None

    def matches(self, request: Request) -> bool:
        wanted = self.method is None or self.method.upper() == request.method
        return self.times > 0 and wanted and self.pattern.search(request.path) is not None


class Hooks(Protocol):
    """What a server asks of its Hub."""

    def respond(self, request: Request, raw_path: str, body: bytes) -> Response: ...

    def log(self, request: Request) -> None: ...

    def next_fault(self, request: Request, *, spoils_body: bool) -> Fault | None: ...


class Server(ThreadingMixIn, TCPServer):
    """One origin, "api", "cdn" or "foreign", on its own port."""

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, origin: str, hooks: Hooks) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.origin = origin
        self.hooks = hooks
        self.connections: set[socket.socket] = set()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.connections.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def cut_connections(self) -> None:
        """End the connections that clients keep alive; their threads then close them."""
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that left is no error
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Reads a request whole, asks the Hub for the response, and sends it, intact or not."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    server: Server

    def answer(self) -> None:
        hooks, body, url = self.server.hooks, self._read_body(), urlsplit(self.path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        request = Request(
            self.server.origin, self.command, unquote(url.path), 0, 0, headers, len(body),
            url.query, body,
        )  # fmt: skip
        hooks.log(request)
        response, damage = self._response(request, url.path, body), None
        if request.method != "HEAD" and response.status < 300:
            damage = hooks.next_fault(request, spoils_body=True)
        if request.method == "GET" and not (damage and damage.ignore_range):
            response = response.narrowed(headers.get("range"))
        self._send(response, request, damage)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer  # noqa: N815

    def _response(self, request: Request, raw_path: str, body: bytes) -> Response:
        fault = self.server.hooks.next_fault(request, spoils_body=False)
        try:
            if fault:
                fault.over.wait(fault.delay)
                if fault.action is not None:
                    fault.action()
                if fault.body is not None:
                    return Response(fault.status or 200, fault.body, dict(fault.headers))
                if fault.status is not None:
                    message = f"injected fault: {fault.pattern.pattern}"
                    raise HubError(fault.status, message, headers=fault.headers)
            return self.server.hooks.respond(request, raw_path, body)
        except HubError as error:
            return Response.of_error(error)
        except Exception:
            return Response.of_error(HubError(501, traceback.format_exc()))

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():  # trailers, up to the empty line
            pass
        return b"".join(chunks)

    def _send(self, response: Response, request: Request, damage: Fault | None) -> None:
        request.status = response.status
        stop = response.start + response.size
        if damage:
            damage.over.wait(damage.delay)
            response.headers.update(damage.headers)
            if damage.truncate is not None:
                response.stop = stop = min(stop, response.start + damage.truncate)
            if damage.drop_after is not None:
                stop = min(stop, response.start + damage.drop_after)
                self.close_connection = True
                if response.size == 0:  # no body to cut short: not even a status line
                    return
        self.send_response(response.status)
        for name, value in {"Content-Length": str(response.size), **response.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        for chunk in response.chunks(stop) if request.method != "HEAD" else ():
            request.body_sent += len(chunk)  # first: whoever has the bytes must find them counted
            self.wfile.write(chunk)
        self.wfile.flush()

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: `Hub.requests` is the log."""
