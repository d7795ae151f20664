"""Processes of their own without the seconds in which a process imports torch.

`python tests/support/forks.py` imports torch once and forks a child for every order. It imports no
library that freezes its settings, so the environment of a child counts as that of any new process
does; only OMP_NUM_THREADS, which torch reads early, and the seed of hashes are those of the first.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from hf_tsv.cli import COMMANDS

LIBRARIES = (
    "torch.distributed", "scipy.linalg", "safetensors.torch", "threadpoolctl", "typer.main",
    "rich.console", "jinja2", "yaml", "hf_tsv.cli.groups",
    *(f"hf_tsv.cli.{name}" for name in COMMANDS),
)  # fmt: skip
"""Modules that commands import and that freeze nothing."""

FREEZING = ("datasets", "sklearn.metrics", "transformers.models.clip")
"""Modules that take seconds too; children of a process with them have its variables of the Hub."""


@dataclass
class Fork:
    """A process, as `subprocess.Popen` shows one.

    Args:
        nursery: the process that it was forked from.
        pid: its number.
        said: files with its stdout and stderr.
    """

    nursery: Nursery
    pid: int
    said: tuple[IO[bytes], IO[bytes]]
    returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, once there is one."""
        if self.returncode is None:
            self.returncode = self.nursery.asked(self.pid)
        return self.returncode

    def send_signal(self, kind: int) -> None:
        os.kill(self.pid, kind)

    def communicate(self, timeout: float = 120) -> tuple[str, str]:
        """Wait for the end; stdout and stderr."""
        limit = time.monotonic() + timeout
        while self.poll() is None:
            assert time.monotonic() < limit, f"{self.pid} still runs after {timeout} s"
            time.sleep(0.005)
        texts = []
        for file in self.said:
            file.seek(0)
            texts.append(file.read().decode())
            file.close()
        return texts[0], texts[1]


class Nursery:
    """The process that forks, seen from the tests.

    Args:
        freezing: whether it imports what freezes the variables of the Hub too.
    """

    def __init__(self, freezing: bool) -> None:
        modules = [*LIBRARIES, *(FREEZING if freezing else ())]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        atexit.register(self._process.communicate)  # it ends with its orders

    def asked(self, order: Any) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps(order), file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


nursery = functools.cache(Nursery)


def fork(
    *words: str | Path,
    cwd: Path | None = None,
    environment: Mapping[str, str] | None = None,
    file_size: int | None = None,
    freezing: bool = False,
) -> Fork:
    """Begin a command in a process of its own.

    Args:
        words: of hf-tsv, or `-c` and Python.
        cwd: where.
        environment: all its variables.
        file_size: bytes that a file may have.
        freezing: whether it may share the variables of the Hub with the tests.
    """
    said = (tempfile.TemporaryFile(), tempfile.TemporaryFile())  # noqa: SIM115
    order = {
        "words": [*map(str, words)],
        "cwd": str(cwd or Path.cwd()),
        "environment": dict(os.environ if environment is None else environment),
        "files": [os.devnull, *(f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in said)],
        "file_size": file_size,
    }
    forking = nursery(freezing)
    return Fork(forking, forking.asked(order), said)


def main() -> None:
    """Fork for every order; a number asks for the exit code of that process."""
    for name in sys.argv[1:]:
        importlib.import_module(name)
    assert FREEZING[-1] in sys.argv or "huggingface_hub" not in sys.modules
    for line in sys.stdin:
        order = json.loads(line)
        if isinstance(order, int):
            ended, status = os.waitpid(order, os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if ended else None), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            be(**order)
            return


def be(
    words: list[str], cwd: str, environment: dict[str, str], files: list[str], file_size: int | None
) -> None:
    """Be the command."""
    for number, name in enumerate(files):
        file = os.open(name, os.O_RDWR | os.O_APPEND)
        os.dup2(file, number)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if file_size is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(words[1], {"__name__": "__main__"})
        return
    from hf_tsv import cli

    sys.argv = ["hf-tsv", *words]
    cli.main()


if __name__ == "__main__":
    main()
