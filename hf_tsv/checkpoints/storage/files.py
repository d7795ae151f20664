"""Files of a checkpoint, read from a folder or from a Hub repository by HTTP range."""

from __future__ import annotations

import os
import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from hf_tsv import hub
from hf_tsv.system.errors import CheckpointError, LostFileError
from hf_tsv.system.untrusted import MAX_BYTES, parse_json

# Folder name of a repository in the Hub client's cache; its snapshots link to its `blobs`.
CACHED = re.compile(r"(models|datasets)--.+")
POINTER = b"version https://git-lfs."
AGAIN = "Download or save it again."  # for a file that is damaged or incomplete


class Files(Protocol):
    """Random access to the files of one checkpoint."""

    folder: Path | None = None  # on this machine
    downloads: hub.RepoSnapshot | None = None  # fetched before a run reads; None: read in place
    subfolder: str = ""  # of their repository; empty for all of it, and on this machine

    def names(self) -> list[str]:
        """Names of all files, in order; in a folder only those directly in it."""

    def folders(self) -> list[str]:
        """Names of the folders directly in it, in order."""

    def within(self, subfolder: str) -> Files:
        """Files of a subfolder, which may be absent."""

    def path(self, name: str) -> str:
        """Name of a file in the repository or folder as a whole."""
        return f"{self.subfolder}/{name}" if self.subfolder else name

    def uncached(self, names: Sequence[str]) -> list[str]:
        """Those of these files that have to be fetched to be read."""
        return []

    def expect(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Declare which bytes will be read next: file, first byte, and number of bytes."""
        return

    def stop(self) -> None:
        """End every wait for the Hub, from another thread."""
        return

    def size(self, name: str) -> int | None:
        """Size of a file in bytes, or None if there is none."""

    def is_elsewhere(self, name: str) -> bool:
        """Tell whether a file is a symbolic link that leaves the folder.

        Copying it would publish a file that the user, but not the checkpoint's author, can read.
        """
        return False

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """Read bytes `start` … `stop` − 1; exactly that many or an error."""

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        """Fill `buffer` from `start` on, completely or with an error."""

    def close(self) -> None:
        """Release the resources of reading; the files can still be read again."""
        return


class LocalFiles(Files):
    """Local folder, read into the caller's buffer: mapped pages would count as resident memory."""

    def __init__(self, root: Path) -> None:
        self.root = self.folder = root
        self._place = root.absolute()  # wherever the process goes
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._descriptors)

    def __reduce__(self) -> tuple[type[LocalFiles], tuple[Path]]:
        """A copy opens its files itself."""
        return LocalFiles, (self._place,)

    def within(self, subfolder: str) -> LocalFiles:
        return LocalFiles(self.root / subfolder)

    def names(self) -> list[str]:
        try:
            return sorted(path.name for path in self.root.iterdir() if path.is_file())
        except FileNotFoundError:
            return []
        except OSError as error:
            raise CheckpointError(f"{self.root} cannot be read: {error.strerror}.") from None

    def folders(self) -> list[str]:
        try:
            return sorted(path.name for path in self.root.iterdir() if path.is_dir())
        except OSError:  # told when its files are asked for
            return []

    def size(self, name: str) -> int | None:
        try:
            path = self.root / name
            return path.stat().st_size if path.is_file() else None
        except (OSError, ValueError):  # no file can have such a name
            return None

    def is_elsewhere(self, name: str) -> bool:
        try:
            place = (self.root / name).resolve()
            inside = place.is_relative_to(self.root.resolve())
        except (OSError, RuntimeError, ValueError):  # a link to itself, or an impossible name
            return False
        cached = place.parent.name == "blobs" and CACHED.fullmatch(place.parent.parent.name)
        return not inside and not cached

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is None and (stop := self.size(name)) is None:
            raise CheckpointError(f"{self.root} has no {name}.", AGAIN)
        buffer = bytearray(stop - start)
        self.read_into(name, start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        descriptor, stop = self._descriptor(name), start + len(buffer)
        while buffer:
            try:
                count = os.preadv(descriptor, [buffer], stop - len(buffer))
            except OSError as error:
                raise _lost(self.root / name, error) from None
            if count == 0:
                end = f"it ends before byte {stop}"
                raise CheckpointError(f"{self.root / name} is truncated: {end}.", AGAIN)
            buffer = buffer[count:]

    def close(self) -> None:
        """Close the opened files."""
        with self._lock:
            _close_all(self._descriptors)

    def _descriptor(self, name: str) -> int:
        with self._lock:
            if name not in self._descriptors:
                try:
                    self._descriptors[name] = os.open(self._place / name, os.O_RDONLY)
                except OSError as error:
                    raise _lost(self.root / name, error) from None
            return self._descriptors[name]


def _lost(path: Path, error: OSError) -> LostFileError:
    hint = "Restore it or download it again, then run the same command to resume."
    return LostFileError(f"{path} cannot be read: {error.strerror}.", hint)


def _close_all(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])


class HubFiles(Files):
    """Folder of a Hub repository at one commit, read by HTTP range without a copy on disk."""

    def __init__(self, repo: hub.RepoSnapshot, subfolder: str = "") -> None:
        self.repo = repo
        self.downloads: hub.RepoSnapshot | None = repo
        self.subfolder = subfolder

    def within(self, subfolder: str) -> HubFiles:
        return HubFiles(self.repo, self.path(subfolder))

    def uncached(self, names: Sequence[str]) -> list[str]:
        here = dict(zip(map(self.path, names), names, strict=True))
        return [here[path] for path in hub.uncached(self.repo, list(here))]

    def names(self) -> list[str]:
        start = self.path("")
        return sorted(n.removeprefix(start) for n in self.repo.sizes if n.startswith(start))

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self.names() if "/" in name})

    def size(self, name: str) -> int | None:
        return self.repo.sizes.get(self.path(name))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        if stop is None and (stop := self.size(name)) is None:
            raise CheckpointError(f"{self.repo.repo_id} has no {name}.")
        return bytes(hub.read_range(self.repo, self.path(name), start, stop))

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        buffer[:] = hub.read_range(self.repo, self.path(name), start, start + len(buffer))


def read_json(files: Files, name: str, owner: str) -> dict[str, Any]:
    """Read a JSON object of a checkpoint, which errors call `owner`."""
    size = files.size(name)
    if size is None:
        hint = "A checkpoint saved by transformers' save_pretrained has one."
        raise CheckpointError(f"{owner} has no {name}.", hint)
    try:
        value = parse_json(files.read(name, 0, min(size, MAX_BYTES + 1)))
    except OverflowError:
        raise CheckpointError(
            f"{owner}: {name} is larger than any {name} should be, and is not read.",
            "Do not use this checkpoint; no library saves such files.",
        ) from None
    except ValueError:
        refuse_stand_in(files, name, owner)
        raise CheckpointError(f"{owner}: {name} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{owner}: {name} is not a JSON object.")
    return value


def refuse_stand_in(files: Files, name: str, owner: str) -> None:
    """Refuse what a clone or a download has left in place of a file."""
    first = files.read(name, 0, min(files.size(name) or 0, 32)).lstrip().lower()
    if first.startswith(POINTER):
        raise CheckpointError(
            f"{owner}: {name} is a Git LFS pointer of a few bytes, not the file itself.",
            "Run `git lfs install` and `git lfs pull` in the clone, or name the repository itself.",
        )
    if first.startswith((b"<!doctype", b"<html")):
        raise CheckpointError(
            f"{owner}: {name} is a web page, not the file itself.",
            "Download it again with `hf download`; you may have to sign in first.",
        )
    if not files.size(name):
        raise CheckpointError(f"{owner}: {name} is empty.", AGAIN)


def inside_folder(name: object) -> bool:
    """Tell whether a file name from an index stays inside the checkpoint's folder."""
    if not isinstance(name, str) or not name.isprintable() or "\\" in name:
        return False
    parts = PurePosixPath(name).parts
    return bool(parts) and not {"/", "//", ".."} & set(parts) and ":" not in parts[0]
