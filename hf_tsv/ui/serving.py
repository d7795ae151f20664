"""Servers of the page: one for this machine alone, and one in a Space."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

import gradio as gr
from huggingface_hub import constants, get_token, whoami
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hf_tsv.system.errors import OutputError
from hf_tsv.ui.desk import FREE_SPACE, Desk, Limits
from hf_tsv.ui.page import Page

HOST = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 100
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; object-src 'none';"
    f" img-src 'self' data: blob: {constants.ENDPOINT}; connect-src 'self' {constants.ENDPOINT}"
)
"""The page asks this server and the Hub, and no other, whatever stands in it."""

THEME = gr.themes.Default(
    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
).set(
    body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
    block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
    input_placeholder_color="*neutral_500", input_placeholder_color_dark="*neutral_400",
)  # fmt: skip
"""Fonts that are there: the page asks no other server for one."""


class Guard:
    """Middleware that refuses what other pages send, and sends `POLICY` with every answer.

    A browser sends cookies along when another page makes it ask this server.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""

        async def sent(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        if scope["type"] == "http" and _is_foreign(scope):
            await PlainTextResponse("Another page asks.", 403)(scope, receive, send)
        else:
            await self.app(scope, receive, sent)


def _is_foreign(scope: Scope) -> bool:
    """Tell whether a page of another server sends something."""
    headers = Headers(scope=scope)
    own = {headers.get("host"), headers.get("x-forwarded-host")}
    origin = headers.get("origin")
    reads = scope["method"] in ("GET", "HEAD", "OPTIONS")
    return not reads and origin is not None and urlsplit(origin).netloc not in own


SAFE = Middleware(Guard)
LOCAL = Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
"""A page elsewhere whose name is made to mean this machine must not reach the server."""

SERVED: dict[str, Any] = {
    "theme": THEME, "css_paths": Path(__file__).with_name("page.css"), "max_file_size": "20mb",
    "share": False, "ssr_mode": False, "quiet": True, "footer_links": [],
    "enable_monitoring": False, "mcp_server": False, "prevent_thread_lock": True,
}  # fmt: skip


def serve(port: int | None, *, max_memory: str | None, stream: bool) -> None:
    """Serve the page to this machine alone, until Ctrl-C.

    Args:
        port (`int`, *optional*): default: the first free one from 7860.
        max_memory (`str`, *optional*): of a merge.
        stream (`bool`): read weights from the Hub without a copy on disk.

    Raises:
        [`OutputError`]: the port is not free.
    """
    chosen = _free_port(port)
    limits = Limits(max_memory=max_memory, stream=stream)
    with _served(limits, _account(), server_name=HOST, server_port=chosen,
                 app_kwargs={"middleware": [SAFE, LOCAL]}) as address:  # fmt: skip
        print(f"Open {address} in a browser; Ctrl-C ends it.", file=sys.stderr, flush=True)
        Event().wait()


def serve_space() -> None:
    """Serve the page in a Space, until it is stopped."""
    with _served(FREE_SPACE, None, app_kwargs={"middleware": [SAFE]}):
        Event().wait()


@contextmanager
def _served(limits: Limits, account: str | None, **where: Any) -> Iterator[str]:
    """Serve while the body runs; it gets the address."""
    desk = Desk(limits)
    os.environ.update(GRADIO_TEMP_DIR=str(desk.uploads), GRADIO_ANALYTICS_ENABLED="False")
    try:
        page = Page(desk, account)
        page.blocks.queue(max_size=100, api_open=False)
        _, address, _ = page.blocks.launch(**SERVED, **where)
        yield address
        page.blocks.close(verbose=False)
    finally:
        desk.close()


def _account() -> str | None:
    """Name of this machine's account, if it is signed in and the Hub answers."""
    if get_token() is None:
        return None
    try:
        return str(whoami()["name"])
    except Exception:  # no connection, or a token that is no longer valid
        return None


def _free_port(port: int | None) -> int:
    """The port, or the first free one."""
    choices = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]
    for choice in choices:
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((HOST, choice))
            except (OSError, OverflowError):
                continue
            return choice
    raise OutputError(
        f"Port {port or FIRST_PORT} cannot be used.", "Give another one: `port=8000`."
    )
