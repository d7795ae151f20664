"""Visitors of the page: the folder, the commands and the limits of each."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any

from hf_tsv.system.text import human_bytes
from hf_tsv.ui.commands import COMMANDS, Command, CommandError, environment
from hf_tsv.ui.turns import Turns

MERGED, INTERFERENCE, HOME = "merged", "interference", "home"
PREFIX = "hf-tsv-ui-"
FOLDER = re.compile(rf"{PREFIX}(\d+)-")
MOST_BYTES = 30_000_000_000  # of all results on a page with limits
TRIAL_BYTES = 6_000_000_000  # of memory, of a model that is tried
SHORT = 120.0  # seconds of a command that reads headers
QUEUE = 20  # people who wait at most


@dataclass(frozen=True)
class Limits:
    """Limits of what visitors may use.

    Args:
        public (`bool`): strangers use it: each signs in to merge, only repositories of the Hub are
            read, and nothing of the server's own account or cache is used.
        stream (`bool`): read weights from the Hub without a copy on disk.
        max_memory (`str`, *optional*): of a merge, such as `"12GB"`.
        max_output (`int`, *optional*): bytes of a result.
        seconds (`float`, *optional*): of a command.
        kept_seconds (`float`, *optional*): that an idle visitor's files stay.
    """

    public: bool = False
    stream: bool = False
    max_memory: str | None = None
    max_output: int | None = None
    seconds: float | None = None
    kept_seconds: float | None = None

    def words(self) -> list[str]:
        """Options of a command that reads checkpoints."""
        words = ["--stream"] if self.stream else []
        return [*words, *(["--max-memory", self.max_memory] if self.max_memory else [])]


FREE_SPACE = Limits(
    public=True,
    stream=True,
    max_memory="8GB",
    max_output=4_000_000_000,
    seconds=3600,
    kept_seconds=3600,
)
"""For a Space on the free hardware: 2 processors, 16 GB of memory and 50 GB of disk. Beside a merge
there are the server, a model that is tried, and three short commands."""


@dataclass
class Visitor:
    """One open window: its folder, and the commands that run in it."""

    folder: Path
    seen: float
    commands: list[Command] = field(default_factory=list)
    uploads: set[Path] = field(default_factory=set)
    waiting: bool = False
    left: bool = False


class Desk:
    """All visitors; their files are in one temporary folder, which `close` removes.

    Args:
        limits ([`Limits`]): of everybody.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits, self.turns = limits, Turns(QUEUE)
        _remove_leftovers()
        self.root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-"))
        self.uploads = self.root / "uploads"
        self._lock = RLock()
        self._visitors: dict[str, Visitor] = {}

    def visitor(self, window: str) -> Visitor:
        """The visitor of a window; a new one gets a folder."""
        with self._lock:
            self._forget_idle(window)
            if window not in self._visitors:
                folder = Path(tempfile.mkdtemp(dir=self.root))
                self._visitors[window] = Visitor(folder, time.monotonic())
            found = self._visitors[window]
            found.seen = time.monotonic()
            return found

    def leave(self, window: str) -> None:
        """Stop what a visitor has running, and remove the files."""
        with self._lock:
            visitor = self._visitors.pop(window, None)
            if visitor is None:
                return
            visitor.left = True
            others = (other.uploads for other in self._visitors.values())
            uploads = visitor.uploads.difference(*others)
        self.cancel(visitor)
        for path in uploads:
            shutil.rmtree(path, ignore_errors=True)
        shutil.rmtree(visitor.folder, ignore_errors=True)

    def close(self) -> None:
        """Let everybody leave, and remove all files."""
        for window in list(self._visitors):
            self.leave(window)
        shutil.rmtree(self.root, ignore_errors=True)

    def cancel(self, visitor: Visitor) -> None:
        """Stop the commands of a visitor, and their waiting for them."""
        visitor.waiting = False
        for command in list(visitor.commands):
            command.cancel()

    @contextmanager
    def running(
        self, visitor: Visitor, words: Sequence[str], token: str | None, *, short: bool = False,
        module: str = COMMANDS,
    ) -> Iterator[Command]:  # fmt: skip
        """Run a command for a visitor while the body follows it; a short one gets less time."""
        most = SHORT if short and self.limits.seconds else self.limits.seconds
        home = visitor.folder / HOME if self.limits.public else None
        with self._lock:
            if visitor.left:
                raise CommandError("Stopped.")
            command = Command(words, visitor.folder, environment(token, home), most, module=module)
            visitor.commands.append(command)
        try:
            yield command
        finally:
            command.stop()
            visitor.commands.remove(command)
            visitor.seen = time.monotonic()

    def finished(
        self, visitor: Visitor, words: Sequence[str], token: str | None, *, module: str = COMMANDS
    ) -> dict[str, Any]:
        """Run a short command, and return what it found."""
        with self.running(visitor, words, token, short=True, module=module) as command:
            for _ in command.followed():
                pass
            return command.result()

    def upload_of(self, visitor: Visitor, path: str) -> Path:
        """An uploaded file, which lies in a folder of its own and goes with its visitors.

        Raises:
            [`CommandError`]: it is none.
        """
        file = Path(path)
        if file.parent.parent != self.uploads or ".." in file.parts or not file.is_file():
            raise CommandError("There is no such image.", "Upload it again.")
        visitor.uploads.add(file.parent)
        return file

    def check_size(self, plan: dict[str, Any]) -> None:
        """Refuse a merge whose result is too large for this page, by its dry run."""
        size, most = plan["output_bytes"], self.limits.max_output
        if most is not None and size > most:
            raise CommandError(
                f"The result has {human_bytes(size)}, and this page makes at most"
                f" {human_bytes(most)}.",
                "Copy the command and run it on a machine of your own.",
            )
        files = (path for path in self.root.rglob("*") if path.is_file())
        if most is not None and sum(path.stat().st_size for path in files) + size > MOST_BYTES:
            raise CommandError("This page has no room for another result.", "Try again later.")

    def _forget_idle(self, window: str) -> None:
        """Let visitors leave who have been idle for long; not the one of this window."""
        if self.limits.kept_seconds is None:
            return
        latest = time.monotonic() - self.limits.kept_seconds
        for other, visitor in list(self._visitors.items()):
            if other != window and not visitor.commands and visitor.seen < latest:
                self.leave(other)


def _remove_leftovers() -> None:
    """Remove folders of servers that were killed."""
    for path in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        found = FOLDER.match(path.name)
        if found and path.lstat().st_uid == os.getuid() and not _runs(int(found[1])):
            shutil.rmtree(path, ignore_errors=True)


def _runs(process: int) -> bool:
    """Tell whether a process of ours runs."""
    try:
        os.kill(process, 0)
    except (OSError, OverflowError):
        return False
    return True
