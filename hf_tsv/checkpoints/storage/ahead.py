"""Read-ahead of Hub repositories: bytes are fetched in the order they will be read."""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from concurrent.futures import CancelledError, Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass

from hf_tsv import hub
from hf_tsv.checkpoints.storage.files import HubFiles
from hf_tsv.system.errors import RepoError

CONNECTIONS = 8
AHEAD_BYTES = 64_000_000  # of all repositories together are being fetched or wait to be read
LARGEST_PIECE, SMALLEST_PIECE = 4_000_000, 250_000
LARGEST_GAP = 4096  # bytes between two tensors that are fetched with one request


@dataclass
class _Piece:
    """Bytes `start` … `stop` − 1 that one request fetches; held from the request to the read."""

    file: str
    start: int
    stop: int
    data: Future[bytearray] | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start


_Job = tuple[Future[bytearray], hub.RepoSnapshot, str, int, int]


class Connections:
    """Daemon threads that fetch bytes for several repositories.

    An executor's threads would hold up the end of the program: for a minute after Ctrl-C, where
    the Hub does not answer.
    """

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        for _ in range(CONNECTIONS):
            threading.Thread(target=self._work, name="hf-tsv-fetch", daemon=True).start()

    def fetch(self, repo: hub.RepoSnapshot, path: str, start: int, stop: int) -> Future[bytearray]:
        """Fetch bytes `start` … `stop` − 1 of a file later; cancelling ends any wait for them."""
        result: Future[bytearray] = Future()
        if self._closed.is_set():
            result.cancel()
        self._jobs.put((result, repo, path, start, stop))
        return result

    def close(self) -> None:
        """End each thread after the request it is working on."""
        if not self._closed.is_set():
            self._closed.set()
            for _ in range(CONNECTIONS):
                self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            result, repo, path, start, stop = job
            if result.cancelled():
                continue
            with suppress(InvalidStateError):  # cancelled meanwhile
                try:
                    result.set_result(hub.read_range(repo, path, start, stop))
                except BaseException as error:
                    result.set_exception(error)


class AheadFiles(HubFiles):
    """Hub repository whose next bytes are fetched while others are read.

    One request fetches several small neighbouring tensors; several parallel requests fetch a
    large one. At most `share` bytes may wait to be read.
    """

    def __init__(
        self, repo: hub.RepoSnapshot, subfolder: str, connections: Connections, share: int
    ) -> None:
        super().__init__(repo, subfolder)
        self.downloads = None
        self._connections, self._share = connections, share
        self._pieces: list[_Piece] = []
        self._places: dict[str, list[tuple[int, int]]] = {}
        self._read = self._begun = self._waiting = 0  # indices of the first pieces; bytes
        self._direct: Future[bytearray] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def uncached(self, names: Sequence[str]) -> list[str]:
        return list(names)

    def stop(self) -> None:
        self.close()

    def expect(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Declare what will be read next, in this order, and begin to fetch it."""
        largest = min(LARGEST_PIECE, max(SMALLEST_PIECE, self._share // 2))
        with self._lock:
            self._pieces = [
                _Piece(file, at, min(at + largest, stop))
                for file, start, stop in _runs(spans)
                for at in range(start, stop, largest)
            ]
            self._places = {}
            for i, piece in enumerate(self._pieces):
                self._places.setdefault(piece.file, []).append((piece.start, i))
            for places in self._places.values():
                places.sort()
            self._read = self._begun = self._waiting = 0
            self._begin(0)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            index, data = self._at(name, start + done)
            if data is None:
                buffer[done:] = self._now(name, start + done, start + len(buffer))
                return
            piece = self._pieces[index]
            within = start + done - piece.start
            part = memoryview(self._result(data))[within : within + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)
            if within + len(part) == piece.size:
                with self._lock:
                    self._forget_before(index + 1)
                    self._begin(index + 1)

    def close(self) -> None:
        """Stop fetching; a thread that waits for bytes gets an error."""
        with self._lock:
            self._closed = True
            self._forget_before(len(self._pieces))
            if self._direct is not None:
                self._direct.cancel()
        self._connections.close()

    def _now(self, name: str, start: int, stop: int) -> bytearray:
        """Fetch bytes that were not announced, or were already read."""
        with self._lock:
            data = self._connections.fetch(self.repo, self.path(name), start, stop)
            self._direct = data
            if self._closed:
                data.cancel()
        return self._result(data)

    def _result(self, data: Future[bytearray]) -> bytearray:
        try:
            return data.result()
        except CancelledError:
            raise RepoError(f"{self.repo.repo_id} is no longer being read.", "Run again.") from None

    def _at(self, name: str, position: int) -> tuple[int, Future[bytearray] | None]:
        """Piece that holds a byte, and its data unless it was not announced or already read."""
        with self._lock:
            places = self._places.get(name, [])
            found = bisect_right(places, (position, len(self._pieces))) - 1
            if found < 0:
                return 0, None
            index = places[found][1]
            if self._pieces[index].stop <= position or index < self._read:
                return 0, None
            self._forget_before(index)  # tensors are read in the announced order
            self._begin(index)
            return index, self._pieces[index].data

    def _begin(self, needed: int) -> None:
        """Request a piece, and as many after it as may wait to be read."""
        while self._begun < len(self._pieces) and not self._closed:
            piece = self._pieces[self._begun]
            if self._begun > needed and self._waiting + piece.size > self._share:
                break
            path = self.path(piece.file)
            piece.data = self._connections.fetch(self.repo, path, piece.start, piece.stop)
            self._waiting += piece.size
            self._begun += 1

    def _forget_before(self, index: int) -> None:
        for piece in self._pieces[self._read : index]:
            if piece.data is not None:
                piece.data.cancel()
                piece.data = None
                self._waiting -= piece.size
        self._read, self._begun = max(self._read, index), max(self._begun, index)


def _runs(spans: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """File, first byte and end of each run of neighbouring spans that are read in order."""
    runs: list[tuple[str, int, int]] = []
    seen = set()
    for file, start, length in spans:
        if (file, start) in seen or not length:
            continue
        seen.add((file, start))
        last, first, stop = runs[-1] if runs else ("", 0, 0)
        if last == file and 0 <= start - stop <= LARGEST_GAP:
            runs[-1] = (file, first, start + length)
        else:
            runs.append((file, start, start + length))
    return runs
