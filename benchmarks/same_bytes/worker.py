"""A process that has imported one checkout's hf_tsv and forks one child a command.

Run as a program of its own, `worker.py CHECKOUT`, with the checkout first on PYTHONPATH. It reads
one JSON object a line, the fields of [`Order`], and answers with how the child ended.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

LIMIT = 240
"""Seconds that a command may take."""

LIBRARIES = (
    "accelerate", "datasets", "jinja2", "matplotlib.pyplot", "peft", "PIL.Image", "pydantic",
    "scipy.linalg", "sklearn.metrics", "torch", "transformers.models.clip.modeling_clip",
    "transformers.models.clip.tokenization_clip",
    "transformers.models.clip.image_processing_clip", "transformers.pipelines", "typer.main",
)  # fmt: skip
"""What commands would import, each for itself; what is not there is left to them."""


@dataclass(frozen=True)
class Order:
    """A command to run.

    Args:
        folder: to run in; gets `stdout` and `stderr`.
        arguments: of hf-tsv, or with `-c` first, a program in Python.
        kill_after: finished weights in the journal after which it is killed; 0: never.
    """

    folder: str
    arguments: list[str]
    kill_after: int = 0


def main() -> None:
    """Serve orders until stdin ends."""
    del sys.path[0]  # this folder
    import hf_tsv
    import hf_tsv.cli

    if not Path(hf_tsv.__file__).is_relative_to(sys.argv[1]):
        sys.exit(f"hf_tsv is {hf_tsv.__file__}, not that of {sys.argv[1]}")
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    for name in hf_tsv.__all__:
        getattr(hf_tsv, name)
    print("ready", flush=True)
    for line in sys.stdin:
        order = Order(**json.loads(line))
        pid = os.fork()
        if not pid:
            _run(order)
        if order.kill_after:
            _kill_in_time(pid, order)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _kill_in_time(pid: int, order: Order) -> None:
    """Kill a child as soon as its journals hold so many weights, unless it ends before."""
    while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        journals = Path(order.folder).glob(".*/done.*.jsonl")
        with suppress(FileNotFoundError):
            if sum(file.read_bytes().count(b"\n") for file in journals) >= order.kill_after:
                os.kill(pid, signal.SIGKILL)
                return
        time.sleep(0.0005)


def _run(order: Order) -> None:
    """Be the command; never returns."""
    os.chdir(order.folder)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    signal.alarm(LIMIT)
    if order.kill_after:
        os.nice(10)
    code: int | str | None = 1
    try:
        if order.arguments[0] == "-c":
            exec(order.arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = ["hf-tsv", *order.arguments]
            from hf_tsv import cli

            cli.main()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    main()
