"""Processes of a test: how they end, and what each is told of the others."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from cli import Result, ended
from forks import Fork, fork

LIMIT = 120


def ranks(*words: str | Path, count: int, cwd: Path, freezing: bool = False) -> list[Fork]:
    """Processes with what a launcher tells them, on one machine or several."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    return [
        fork(*words, cwd=cwd, environment={**os.environ, **shared, "RANK": str(rank)},
             freezing=freezing)
        for rank in range(count)
    ]  # fmt: skip


def ends(processes: Sequence[Fork]) -> list[Result]:
    """How they end, by rank."""
    return [ended(process) for process in processes]
