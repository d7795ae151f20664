"""The command line: in this process, in one of its own, or as the console script."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from forks import Fork, fork
from hub import Hub

SCRIPT = Path(sys.executable).with_name("hf-tsv")

READ_LATE = {"HF_TOKEN", "COLUMNS"}
"""Variables that no library freezes when it is imported."""


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


def hf_tsv_script(*args: str | Path, cwd: Path | None = None, **environment: str) -> Result:
    """Run the console script, as a user does."""
    done = subprocess.run(
        [str(SCRIPT), *map(str, args)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
        text=True,
        timeout=120,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


def hf_tsv_process(*args: str | Path, cwd: Path | None = None, **environment: str | None) -> Result:
    """Run what the console script runs, forked; a variable given as None is unset."""
    changed = {**os.environ, **environment}
    return ended(
        fork(*args, cwd=cwd, environment={k: v for k, v in changed.items() if v is not None})
    )


def ended(process: Fork) -> Result:
    """How a process ends."""
    out, err = process.communicate()
    assert process.returncode is not None
    return Result(process.returncode, out, err)


def hf_tsv(*args: str | Path, cwd: Path | None = None, **environment: str | None) -> Result:
    """Run what the console script runs, without the seconds in which a process imports torch.

    Whatever a process begins with is as in a new one, and as it was again afterwards. An error that
    hf-tsv does not know is raised.
    """
    from hf_tsv import cli
    from hf_tsv.cli import output

    assert set(environment) <= READ_LATE, "libraries freeze the others: see hf_tsv_process"
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2))
    with (
        pytest.MonkeyPatch.context() as patch,
        open(os.devnull) as nothing,
        redirect_stdout(out),
        redirect_stderr(err),
        _own_loggers(err),
        _own_warnings(err),
        _own_settings(),
        _own_threads(),
    ):
        patch.setattr(sys, "argv", [str(SCRIPT), *map(str, args)])
        patch.setattr(sys, "stdin", nothing)
        patch.setattr(output, "_leave", sys.exit)  # this process goes on
        patch.chdir(cwd or Path.cwd())
        for name, value in environment.items():
            patch.delenv(name, raising=False) if value is None else patch.setenv(name, value)
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code
    return Result(code, *(text.buffer.getvalue().decode() for text in (out, err)))


@contextmanager
def _own_loggers(err: io.TextIOWrapper) -> Iterator[None]:
    """Loggers of the libraries as they make them, which speak on this stderr."""
    import huggingface_hub
    import transformers

    known = [logging.getLogger(), *map(logging.getLogger, logging.root.manager.loggerDict)]
    before = [(log, log.handlers, log.level, log.propagate) for log in known]
    streams = [
        (handler, handler.stream)
        for log in known
        for handler in log.handlers
        if type(handler) is logging.StreamHandler
    ]
    try:
        logging.root.handlers = []  # pytest's
        for handler, _ in streams:
            handler.setStream(err)
        transformers.logging.set_verbosity_warning()
        huggingface_hub.logging.set_verbosity_warning()
        yield
    finally:
        for handler, stream in streams:
            handler.setStream(stream)
        for log, handlers, level, propagate in before:
            log.handlers, log.propagate = handlers, propagate
            if log.level != level:  # to set it empties the caches of all loggers
                log.setLevel(level)


@contextmanager
def _own_warnings(err: io.TextIOWrapper) -> Iterator[None]:
    """Python's own filters instead of pytest's, and warnings printed instead of collected."""

    def show(message: Any, kind: Any, file: str, line: int, *_: Any) -> None:
        err.write(warnings.formatwarning(message, kind, file, line))

    with warnings.catch_warnings():
        warnings.resetwarnings()
        for kind in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
            warnings.simplefilter("ignore", kind)
        warnings.showwarning = show
        yield


@contextmanager
def _own_settings() -> Iterator[None]:
    """Signals, threads and random numbers."""
    before = {kind: signal.getsignal(kind) for kind in (signal.SIGINT, signal.SIGTERM)}
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_rng_state(state)
        for kind, handler in before.items():
            signal.signal(kind, handler)


@contextmanager
def _own_threads() -> Iterator[None]:
    """Threads of the run end with it, as they would with its process."""
    before = set(threading.enumerate())
    try:
        yield
    finally:
        limit = time.monotonic() + 30
        while any(
            thread.name.startswith(("hf-tsv", "ThreadPoolExecutor"))
            for thread in set(threading.enumerate()) - before
        ):
            assert time.monotonic() < limit, threading.enumerate()
            time.sleep(0.002)


def copied(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint that a test may damage."""
    shutil.copytree(folder, target)
    return target


def refused(done: Result, world: Path, hub: Hub, *parts: str, code: int = 1) -> None:
    """One clear line that names the thing, an exit code, nothing written, nothing pushed."""
    assert done.code == code, (done.code, done.err)
    assert done.out == ""
    errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, done.err
    assert "Hint: " in done.err and "Traceback" not in done.err
    for part in parts:
        assert part in done.err, done.err
    left = {path.name for path in world.iterdir()}
    assert not {name for name in left if name.startswith(".") or name in ("merged", "out")}, left
    assert not any(r.method in ("POST", "PUT", "DELETE") for r in hub.requests)
