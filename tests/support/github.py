"""A loopback GitHub behind a proxy, for clients that know no other address than GitHub's own."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from ssl import PROTOCOL_TLS_SERVER, SSLContext
from threading import Thread

HOSTS = ("github.com", "raw.githubusercontent.com")


class _Handler(BaseHTTPRequestHandler):
    """One connection to the proxy: CONNECT, then TLS and requests as GitHub would get them."""

    protocol_version = "HTTP/1.1"
    tls: SSLContext
    pages: Mapping[str, bytes]
    asked: list[str]
    host = ""

    def do_CONNECT(self) -> None:
        self.host = self.path.removesuffix(":443")
        if self.host not in HOSTS:
            self.send_error(403)
            return
        self.send_response(200)
        self.end_headers()
        self.connection = self.tls.wrap_socket(self.connection, server_side=True)
        self.rfile, self.wfile = (self.connection.makefile(mode, 0) for mode in ("rb", "wb"))  # type: ignore[call-overload]
        self.close_connection = False

    def do_GET(self) -> None:
        page = f"{self.host}{self.path.partition('?')[0]}"
        self.asked.append(page)
        content = self.pages.get(page)
        self.send_response(404 if content is None else 200)
        self.send_header("Content-Length", str(len(content or b"")))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content or b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def finish(self) -> None:
        super().finish()
        self.connection.close()  # the server knows only the socket below

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def github(pages: Mapping[str, bytes], folder: Path) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Serve pages as GitHub's.

    Args:
        pages: content by host and path, without a query; whatever else is asked for is not found.
        folder: folder for the certificate, which lasts a day.

    Yields:
        Variables of the environment with which processes find it, and what they asked for.
    """
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    names = ",".join(f"DNS:{host}" for host in HOSTS)
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=loopback", "-addext", f"subjectAltName={names}",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = SSLContext(PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(certificate, key)
    asked: list[str] = []
    handler = type("Handler", (_Handler,), {"tls": tls, "pages": pages, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    proxy = f"http://127.0.0.1:{server.server_port}"
    names_of_certificate = ("SSL_CERT_FILE", "PIP_CERT", "REQUESTS_CA_BUNDLE")
    try:
        yield {"HTTPS_PROXY": proxy, **dict.fromkeys(names_of_certificate, str(certificate))}, asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
