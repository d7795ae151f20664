"""Commands run as processes of their own and measured from outside.

The kernel's peak memory of a process begins with the memory of the process that started it. So a
small interpreter starts each command: this file, as a program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRANSFORMERS_OFFLINE": "1"}
BUSY = """
import torch
torch.set_num_threads(1)
a = torch.randn(1024, 1024)
while True:
    a @ a
"""


class FailedError(RuntimeError):
    """A command ended with an error."""


@dataclass(frozen=True)
class Run:
    """Measurements of one process from outside.

    Args:
        wall: seconds from start to end.
        cpu: seconds of all its threads and children.
        peak_bytes: largest resident memory, of the largest process.
        seconds: seconds by phase, as it reports them.
        estimate_bytes: peak that it predicts, without the libraries.
    """

    wall: float
    cpu: float
    peak_bytes: int
    seconds: dict[str, float]
    estimate_bytes: int | None = None


def run(
    command: Sequence[str | Path],
    environment: Mapping[str, str] | None = None,
    python: str | Path = sys.executable,
) -> Run:
    """Run a Python module with its arguments, and wait for it.

    Args:
        command: words after `python -m`.
        environment: variables besides those of this process.
        python: interpreter of its environment.

    Raises:
        [`FailedError`]: it failed; the message has the last lines of its errors.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".json") as usage:
        done = subprocess.run(
            [sys.executable, __file__, usage.name, str(python), "-m", *map(str, command)],
            cwd=ROOT,
            env={**os.environ, **OFFLINE, **(environment or {})},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-6:])
            raise FailedError(f"{command[0]} ended with {done.returncode}.\n{tail}")
        measured = json.loads(usage.read())
    report = _first_object(done.stdout)
    seconds = report.get("timings") or {k: v for k, v in report.items() if k.endswith("ing")}
    numbers = {name: s for name, s in seconds.items() if isinstance(s, (int, float))}
    if "seconds" in report:  # hf-tsv counts from its first step on
        numbers["whole"] = report["seconds"]
    return Run(**measured, seconds=numbers, estimate_bytes=report.get("peak_memory_bytes"))


def _first_object(text: str) -> dict[str, Any]:
    """First JSON object in a program's output, or {}."""
    start = text.find("{")
    return json.JSONDecoder().raw_decode(text[start:])[0] if start >= 0 else {}


@contextmanager
def busy(wanted: bool) -> Iterator[None]:
    """Keep one core busy with matrix products during the body."""
    if not wanted:
        yield
        return
    beside = subprocess.Popen([sys.executable, "-c", BUSY])
    try:
        yield
    finally:
        beside.kill()
        beside.wait()


def main() -> None:
    """Run the command in `argv[2:]`, and write its measurements into the file `argv[1]`."""
    started = time.perf_counter()
    process = subprocess.Popen(sys.argv[2:])
    _, status, usage = os.wait4(process.pid, 0)
    unit = 1 if sys.platform == "darwin" else 1024
    measured = {
        "wall": time.perf_counter() - started,
        "cpu": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * unit,
    }
    Path(sys.argv[1]).write_text(json.dumps(measured))
    code = os.waitstatus_to_exitcode(status)
    sys.exit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
