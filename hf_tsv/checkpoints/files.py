"""Where the files of a checkpoint are read: a folder, or a Hub repository by HTTP range."""

from __future__ import annotations

import os
import re
import threading
import weakref
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from hf_tsv import hub
from hf_tsv.errors import CheckpointError, LostFileError
from hf_tsv.untrusted import MAX_BYTES, parse_json

CACHED = re.compile(r"(models|datasets)--.+")
"""A repository in the Hub client's cache; the links of its snapshots lead to its `blobs`."""


class Files(Protocol):
    """Random access to the files of one checkpoint."""

    def names(self) -> list[str]:
        """All files, in order; of a folder those directly in it."""

    def within(self, subfolder: str) -> Files:
        """The files of a subfolder, which may not be there."""

    def size(self, name: str) -> int | None:
        """Bytes of a file, or None where there is none."""

    def is_elsewhere(self, name: str) -> bool:
        """Whether a file is a link to one outside, which whoever made the checkpoint may not read.

        The user may: what was meant to stay private would be in the output.
        """

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Bytes `start` … `stop` − 1; exactly that many or an error."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from `start` on, completely or with an error."""

    def close(self) -> None:
        """Give back what reading has taken; closed files may be read again."""


class LocalFiles:
    """A folder. Reads go into the caller's buffer: mapped pages would count as resident memory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def within(self, subfolder: str) -> LocalFiles:
        return LocalFiles(self.root / subfolder)

    def names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.root.iterdir() if path.is_file())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be read: {error.strerror}.") from None

    def size(self, name: str) -> int | None:
        try:
            path = self.root / name
            return path.stat().st_size if path.is_file() else None
        except (OSError, ValueError):  # a name that no file can have
            return None

    def is_elsewhere(self, name: str) -> bool:
        try:
            place = (self.root / name).resolve()
            inside = place.is_relative_to(self.root.resolve())
        except (OSError, RuntimeError, ValueError):  # a link to itself, a name that none can have
            return False
        cached = place.parent.name == "blobs" and CACHED.fullmatch(place.parent.parent.name)
        return not inside and not cached

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        buffer = bytearray((self._existing_size(name) if stop is None else stop) - start)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        descriptor = self._descriptor(name)
        done = 0
        while done < len(buffer):
            try:
                count = os.preadv(descriptor, [buffer[done:]], start + done)
            except OSError as error:
                raise _lost(self.root / name, error) from None
            if count == 0:
                raise CheckpointError(
                    f"{self.root / name} is truncated: it ends before byte {start + len(buffer)}.",
                    "Download or save it again.",
                )
            done += count

    def close(self) -> None:
        """Close what has been opened."""
        with self._lock:
            _close_all(self._descriptors)

    def _existing_size(self, name: str) -> int:
        size = self.size(name)
        if size is None:
            raise CheckpointError(f"{self.root} has no {name}.", "Download or save it again.")
        return size

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                try:
                    self._descriptors[name] = os.open(self.root / name, os.O_RDONLY)
                except OSError as error:
                    raise _lost(self.root / name, error) from None
            return self._descriptors[name]


def _lost(path: Path, error: OSError) -> LostFileError:
    return LostFileError(
        f"{path} cannot be read: {error.strerror}.",
        "Restore it, or download it again; the same command goes on then.",
    )


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class HubFiles:
    """A Hub repository at one commit, read by HTTP range without a copy on disk.

    Args:
        repo ([`RepoSnapshot`]): which commit.
        subfolder (`str`): whose files these are; empty for all.
    """

    def __init__(self, repo: hub.RepoSnapshot, subfolder: str = "") -> None:
        self.repo, self.subfolder = repo, subfolder

    def within(self, subfolder: str) -> HubFiles:
        return HubFiles(self.repo, self.path(subfolder))

    def path(self, name: str) -> str:
        """Name of a file in the repository."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def names(self) -> list[str]:
        start = self.path("")
        return sorted(n.removeprefix(start) for n in self.repo.sizes if n.startswith(start))

    def size(self, name: str) -> int | None:
        return self.repo.sizes.get(self.path(name))

    def is_elsewhere(self, name: str) -> bool:
        return False

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is None:
            stop = self.size(name)
            if stop is None:
                raise CheckpointError(f"{self.repo.repo_id} has no {name}.")
        return bytes(hub.read_range(self.repo, self.path(name), start, stop))

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = hub.read_range(self.repo, self.path(name), start, start + len(buffer))

    def close(self) -> None:
        pass


def read_json(files: Files, name: str, owner: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint.

    Args:
        files (`Files`): where to read.
        name (`str`): file name.
        owner (`str`): the checkpoint, for the error.

    Raises:
        [`CheckpointError`]: the file is missing, too large, or not a JSON object.
    """
    size = files.size(name)
    if size is None:
        raise CheckpointError(
            f"{owner} has no {name}.",
            "A checkpoint saved by transformers' save_pretrained has one.",
        )
    try:
        value = parse_json(files.read(name, 0, min(size, MAX_BYTES + 1)))
    except OverflowError:
        raise CheckpointError(
            f"{owner}: {name} says more than any {name} does, and is not read.",
            "Do not use this checkpoint; no library saves such files.",
        ) from None
    except ValueError:
        raise CheckpointError(f"{owner}: {name} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{owner}: {name} is not a JSON object.")
    return value


def inside_folder(name: object) -> bool:
    """Whether a file name from an index stays inside the checkpoint's folder."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        return False
    return ":" not in path.parts[0]
