"""The real console script, in a subprocess."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hub import Hub

SCRIPT = Path(sys.executable).with_name("hf-tsv")


@dataclass(frozen=True)
class Result:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one object on stdout."""
        return json.loads(self.out)


def hf_tsv(*args: str | Path, cwd: Path | None = None, **environment: str | None) -> Result:
    """Run `hf-tsv ARGS`; an environment variable given as None is unset."""
    env = {k: v for k, v in {**os.environ, **environment}.items() if v is not None}
    done = subprocess.run(
        [str(SCRIPT), *map(str, args)],
        cwd=cwd,
        env=env,
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def copied(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    shutil.copytree(folder, target)
    return target


def refused(done: Result, world: Path, hub: Hub, *parts: str) -> None:
    """One clear line that names the thing, exit code 1, nothing written, nothing pushed."""
    assert done.code == 1, (done.code, done.err)
    assert done.out == ""
    errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.err
    assert "Hint: " in done.err and "Traceback" not in done.err
    for part in parts:
        assert part in done.err, done.err
    left = {path.name for path in world.iterdir()}
    assert not {name for name in left if name.startswith(".") or name in ("merged", "out")}, left
    assert not any(r.method in ("POST", "PUT", "DELETE") for r in hub.requests)
