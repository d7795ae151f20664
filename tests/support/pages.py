"""The page of `hf-tsv ui` in a process of its own, and a browser that looks at it."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub import oauth

ROOT = Path(__file__).parents[2]
FLAGS = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]


@dataclass(frozen=True)
class Served:
    """A server: address, process, the folder of its temporary files, and what it says."""

    address: str
    process: subprocess.Popen[str]
    temporary: Path
    said: Path

    def files(self) -> list[Path]:
        """Files of visitors that are there now; folders may go while it looks."""
        return [
            Path(folder, name)
            for root in self.temporary.glob("hf-tsv-ui-*")
            for folder, _, names in os.walk(root)
            for name in names
        ]


@contextmanager
def served(endpoint: str, folder: Path, *, space: bool, **environment: str) -> Iterator[Served]:
    """Serve the page while the body runs: `hf-tsv ui`, or the Space with sign-in."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    temporary, home, said = folder / "tmp", folder / "home", folder / "said"
    for made in (temporary, home):
        made.mkdir(parents=True)
    variables = {**os.environ, "HF_ENDPOINT": endpoint, "TMPDIR": str(temporary),
                 "HF_HOME": str(home), "PYTHONPATH": str(ROOT)}  # fmt: skip
    words = ["-m", "hf_tsv", "ui", "--port", str(port)]
    if space:
        words = [str(ROOT / "space" / "app.py")]
        variables |= oauth.environment(endpoint)
        variables |= {"SYSTEM": "spaces", "SPACE_ID": "org/hf-tsv"}
        variables |= {"GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_SERVER_PORT": str(port)}
    with said.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env={**variables, **environment},
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        try:
            address = f"http://localhost:{port}"
            _answers(address, process, said)
            yield Served(address, process, temporary, said)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def _answers(address: str, process: subprocess.Popen[str], said: Path) -> None:
    for _ in range(600):
        assert process.poll() is None, said.read_text()
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(said.read_text())


@contextmanager
def chromium() -> Iterator[Any]:
    """Debian's Chromium, without a head."""
    from playwright.sync_api import sync_playwright

    path = shutil.which("chromium") or shutil.which("chromium-browser")
    assert path is not None, "These tests need Chromium: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=path, args=FLAGS, chromium_sandbox=os.geteuid() != 0
        )
        yield started
        started.close()


class Window:
    """A page in a browser, used by what stands on it."""

    def __init__(self, context: Any, address: str) -> None:
        from playwright.sync_api import TimeoutError as TooLate

        self.too_late = TooLate
        self.page = context.new_page()
        self.page.goto(address)
        self.page.wait_for_selector("#find")

    def sign_in(self) -> None:
        """Press the button, again if the page was not ready yet; the Hub agrees at once."""
        signed_in = self.page.locator("#sign-in").filter(has_text="Logout")
        for _ in range(6):
            if not signed_in.count():
                self.page.click("#sign-in")
            with suppress(self.too_late):
                signed_in.wait_for(timeout=15_000)
                return
        raise AssertionError(self.page.content())

    def write(self, part: str, text: str) -> None:
        """Fill in a field."""
        self.page.fill(f"#{part} textarea, #{part} input", text)

    def press(self, button: str) -> None:
        self.page.click(f"button#{button}, #{button} button")

    def tick(self, *names: str) -> None:
        """Tick models of the list."""
        for name in names:
            self.page.get_by_text(f"{name} ·").click()

    def said(self, part: str, *, kind: str = "", holding: str = "") -> str:
        """Wait until a part has a state of that kind, which holds a text, and return the state."""
        state = f"#{part} .hf-tsv-{kind or 'state'}"
        found = self.page.locator(state).filter(has_text=holding)
        found.wait_for(timeout=90_000)
        return str(found.inner_text())

    def text(self, part: str) -> str:
        return str(self.page.inner_text(f"#{part}"))
