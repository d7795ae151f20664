"""Process that has imported everything and forks a child per command, so a kill costs no import.

It reads one JSON object per line, [`Order`], and answers with the child's exit status.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ON_DISK = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate"}
"""Audit events that Python raises before steps on the disk."""

FOLDERS = {"os.mkdir": 2, "os.remove": 1, "os.rmdir": 1}
"""Index of the event's argument that is the folder a path is relative to."""

FREEING = {"os.rename", "os.remove", "os.rmdir", "os.truncate"}
"""Steps that a full disk still allows."""

CHANGING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Order:
    """Command to run.

    Args:
        arguments: arguments of hf-tsv.
        watched: folders in which steps count.
        log: file for the command's output.
        steps: file for the number of steps, written if the command ends by itself.
        last: step before which the child kills itself, or in the middle of which if it is a write;
            0: none.
        seconds: time after which it is killed if it still runs; 0: never.
        full: from the last step on the disk is full, instead of the kill.
    """

    arguments: list[str]
    watched: list[str]
    log: str
    steps: str
    last: int = 0
    seconds: float = 0.0
    full: bool = False


class Zygote:
    """Handle of the process in the one that started it.

    Args:
        environment: environment variables of the process and its children.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.kills.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )

    def run(self, order: Order) -> int:
        """Run a command in a child; return its exit status, or minus the signal that ended it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(asdict(order)) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def main() -> None:
    """Serve orders until stdin ends."""

    import accelerate  # noqa: F401  isort: skip
    import jinja2  # noqa: F401  isort: skip
    import scipy.linalg  # noqa: F401  isort: skip
    import threadpoolctl  # noqa: F401  isort: skip
    import typer.main  # noqa: F401  isort: skip

    for line in sys.stdin:
        order = Order(**json.loads(line))
        pid = os.fork()
        if not pid:
            _run(order)
        if order.seconds:
            time.sleep(order.seconds)
            os.kill(pid, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(order: Order) -> None:
    """Run the command in this process; never returns."""
    from hf_tsv import cli

    log = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    steps = _count_steps(order)
    sys.argv = ["hf-tsv", *order.arguments]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not code:
            Path(order.steps).write_text(str(steps[0]))
        os._exit(code)


def _count_steps(order: Order) -> list[int]:
    """Count steps on the disk from now on; the last one is not taken, or half if it is a write."""
    taken, pwrite = [0], os.pwrite

    def here(event: str, arguments: tuple[Any, ...]) -> bool:
        try:
            path = os.fsdecode(arguments[0])
        except TypeError:  # a descriptor
            return False
        folder = arguments[FOLDERS[event]] if event in FOLDERS else -1
        if folder >= 0:  # the path is relative when a tree is removed
            path = os.path.join(os.readlink(f"/proc/self/fd/{folder}"), path)
        return any(os.path.abspath(path).startswith(folder) for folder in order.watched)

    def due() -> bool:
        taken[0] += 1
        if order.full and 0 < order.last <= taken[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return taken[0] == order.last

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in ON_DISK or not here(event, arguments):
            return
        if order.full and event in FREEING:
            return
        reading = event == "open" and not (arguments[2] or 0) & CHANGING
        if reading and not os.path.isdir(arguments[0]):  # folders are opened to be flushed
            return
        if due():
            os.kill(os.getpid(), signal.SIGKILL)

    def writing(descriptor: int, data: Any, offset: int) -> int:
        if due():
            pwrite(descriptor, data[: len(data) // 2], offset)
            os.kill(os.getpid(), signal.SIGKILL)
        return pwrite(descriptor, data, offset)

    sys.addaudithook(hook)
    os.pwrite = writing
    return taken


if __name__ == "__main__":
    main()
