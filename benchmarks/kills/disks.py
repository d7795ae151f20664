"""File system in memory of a chosen size, in a namespace of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LARGE = "size=1g,rw"


UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


def in_namespace() -> bool:  # noqa: RET503
    """Restart this program where it may mount; return False where the system does not let it.

    The mounts are invisible to other processes.
    """
    if "UNSHARED" in os.environ:
        return True
    if shutil.which(UNSHARE[0]) is None:
        return False
    if subprocess.run([*UNSHARE, "true"], check=False, capture_output=True).returncode:
        return False
    command = [*UNSHARE, sys.executable, "-m", __name__.rpartition(".")[0], *sys.argv[1:]]
    os.execvpe(command[0], command, {**os.environ, "UNSHARED": "1"})


@contextmanager
def mounted(folder: Path) -> Iterator[None]:
    """Mount a large file system at a folder."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", LARGE, "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


@contextmanager
def changed(folder: Path, option: str) -> Iterator[None]:
    """Remount the file system with another option during the body."""
    _remount(folder, option)
    try:
        yield
    finally:
        _remount(folder, LARGE)


def _remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def used(folder: Path) -> int:
    """Bytes in use on the file system."""
    found = os.statvfs(folder)
    return found.f_frsize * (found.f_blocks - found.f_bfree)
