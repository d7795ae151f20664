"""Commands in processes of their own, which a page starts, follows and stops."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from threading import Timer
from typing import Any

COMMANDS, TRYING = "hf_tsv.cli.worker", "hf_tsv.ui.trying"
"""Modules that are run."""

MARK = "\x1e"  # of a line of progress: ASCII's record separator, which no printable text has
KEPT_LINES = 200  # of a log
FOR_AUTHORS = "shows where it failed."  # end of a hint that is of no use on a page
PATIENCE = 10.0  # seconds to clean up in
SECRET = ("TOKEN", "SECRET", "PASSWORD", "KEY")
"""Parts of names of variables that the commands of other people must not see."""


@dataclass(frozen=True)
class Step:
    """Progress of a command: the share that is done, 0 to 1, and what it is doing."""

    doing: str
    share: float
    told: str


class CommandError(Exception):
    """A command that failed: its error, and the way out."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Command:
    """An `hf-tsv` command in a process of its own, which ends with this one.

    Args:
        words (`Sequence[str]`): its arguments, `--json` included.
        folder (`Path`): where it runs.
        environment (`Mapping[str, str]`): all of its variables, see [`environment`].
        seconds (`float`, *optional*): most time that it may take.
        module (`str`): module that is run.
    """

    def __init__(
        self,
        words: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        seconds: float | None = None,
        *,
        module: str = COMMANDS,
    ) -> None:
        self.log: deque[str] = deque(maxlen=KEPT_LINES)
        self.stopped = self.late = False
        self._error = CommandError("The command ended without a word.")
        self._printed = TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", module, *words],
            cwd=folder, env=dict(environment), text=True, encoding="utf-8", errors="replace",
            stdin=subprocess.PIPE, stdout=self._printed, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._timer = Timer(seconds, self._too_late) if seconds else None
        if self._timer is not None:
            self._timer.daemon = True
            self._timer.start()

    def followed(self) -> Iterator[Step | None]:
        """Progress as it comes, and None for each new line of the log."""
        assert self._process.stderr is not None
        try:
            for line in self._process.stderr:
                if line.startswith(MARK):
                    yield Step(**json.loads(line.removeprefix(MARK)))
                    continue
                text = line.rstrip("\n")
                self.log.append(text)
                if text.startswith("Error: "):
                    self._error = CommandError(text.removeprefix("Error: "))
                elif text.startswith("Hint: ") and not text.endswith(FOR_AUTHORS):
                    self._error.hint = text.removeprefix("Hint: ")
                yield None
        finally:
            self.stop()
            self._process.stderr.close()

    def result(self) -> dict[str, Any]:
        """JSON that it printed.

        Raises:
            [`CommandError`]: it failed, was stopped or took too long.
        """
        code = self._process.wait()
        self._printed.seek(0)
        text = self._printed.read().decode(errors="replace")
        self._printed.close()
        if self.late:
            raise CommandError(
                "This took too long for this page, and was stopped.",
                "Copy the command and run it on a machine of your own.",
            )
        if self.stopped or code in (-15, -9, 143, 130):
            raise CommandError("Stopped.")
        if code:
            raise self._error
        found: dict[str, Any] = json.loads(text)
        return found

    def stop(self) -> None:
        """End the process, if it runs, and wait for it."""
        if self._timer is not None:
            self._timer.cancel()
        self._ask_to_end()
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def cancel(self) -> None:
        """Stop it because somebody asks for it."""
        self.stopped = self._process.poll() is None
        self.stop()

    def _too_late(self) -> None:
        self.late = True
        self.stop()

    def _ask_to_end(self) -> None:
        """Close its input, which it takes as SIGTERM."""
        if self._process.stdin is not None and not self._process.stdin.closed:
            self._process.stdin.close()


def environment(token: str | None, home: Path | None) -> dict[str, str]:
    """Variables of a command.

    Args:
        token (`str`, *optional*): of the person that it works for.
        home (`Path`, *optional*): its own cache; nothing of this machine's account is seen then:
            no token, and no secret of the server.
    """
    found = dict(os.environ)
    if home is not None:
        found = {k: v for k, v in found.items() if not any(part in k.upper() for part in SECRET)}
        found = {k: v for k, v in found.items() if not (k.startswith("HF_") and "CACHE" in k)}
        found["HF_HOME"] = str(home)
    if token is not None:
        found["HF_TOKEN"] = token
    found.pop("HF_HUB_DISABLE_PROGRESS_BARS", None)
    found.pop("HF_DEBUG", None)
    return found
