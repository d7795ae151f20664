"""Tensors of Hub repositories fetched ahead, in the order they will be read."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from hf_tsv import hub
from hf_tsv.checkpoints.files import HubFiles

CONNECTIONS = 8
AHEAD_BYTES = 64_000_000
"""That are fetched or wait to be read, of all repositories together."""

LARGEST_PIECE, SMALLEST_PIECE = 4_000_000, 250_000
LARGEST_GAP = 4096
"""Between two tensors that are fetched with one request."""


@dataclass
class _Piece:
    """Bytes that one request fetches.

    Args:
        file (`str`): where they lie.
        start (`int`): the first.
        stop (`int`): after the last.
        data (`Future`, *optional*): the bytes, once they were asked for and until they are read.
    """

    file: str
    start: int
    stop: int
    data: Future[bytearray] | None = None

    @property
    def size(self) -> int:
        return self.stop - self.start


class AheadFiles(HubFiles):
    """A Hub repository of which the next bytes are fetched while others are read.

    Small tensors that lie together come with one request, large ones with several side by side.

    Args:
        repo ([`RepoSnapshot`]): which commit.
        subfolder (`str`): whose files these are; empty for all.
        pool (`ThreadPoolExecutor`): fetches, for several repositories.
        share (`int`): bytes that may wait to be read.
    """

    def __init__(
        self, repo: hub.RepoSnapshot, subfolder: str, pool: ThreadPoolExecutor, share: int
    ) -> None:
        super().__init__(repo, subfolder)
        self._pool, self._share = pool, share
        self._pieces: list[_Piece] = []
        self._places: dict[str, list[tuple[int, int]]] = {}
        self._read = self._begun = 0  # pieces before these were read, or asked for
        self._lock = threading.Lock()

    def expect(self, spans: Iterable[tuple[str, int, int]]) -> None:
        """Say what will be read next, and begin to fetch it.

        Args:
            spans (`Iterable[tuple[str, int, int]]`): file, first byte, and number of bytes, in the
                order they will be read. What is not among them can be read too.
        """
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
            self._read = self._begun = 0
            self._begin(0)

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            index, data = self._at(name, start + done)
            if data is None:
                super().read_into(name, start + done, buffer[done:])
                return
            piece = self._pieces[index]
            within = start + done - piece.start
            part = memoryview(data.result())[within : within + len(buffer) - done]
            buffer[done : done + len(part)] = part
            done += len(part)
            if within + len(part) == piece.size:
                with self._lock:
                    self._forget_before(index + 1)
                    self._begin(index + 1)

    def close(self) -> None:
        with self._lock:
            self._forget_before(len(self._pieces))
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _at(self, name: str, position: int) -> tuple[int, Future[bytearray] | None]:
        """The piece that holds a byte, and its data unless it was not expected or read before."""
        with self._lock:
            places = self._places.get(name, [])
            found = bisect_right(places, (position, len(self._pieces))) - 1
            if found < 0:
                return 0, None
            index = places[found][1]
            if self._pieces[index].stop <= position or index < self._read:
                return 0, None
            self._forget_before(index)  # tensors are read in the order that was said
            self._begin(index)
            return index, self._pieces[index].data

    def _begin(self, needed: int) -> None:
        """Ask for a piece, and for as many after it as may wait to be read."""
        waiting = sum(piece.size for piece in self._pieces[self._read : self._begun])
        for piece in self._pieces[self._begun :]:
            if self._begun > needed and waiting + piece.size > self._share:
                break
            path = self.path(piece.file)
            piece.data = self._pool.submit(hub.read_range, self.repo, path, piece.start, piece.stop)
            waiting += piece.size
            self._begun += 1

    def _forget_before(self, index: int) -> None:
        for piece in self._pieces[self._read : index]:
            if piece.data is not None:
                piece.data.cancel()
            piece.data = None
        self._read, self._begun = max(self._read, index), max(self._begun, index)


def _runs(spans: Iterable[tuple[str, int, int]]) -> list[tuple[str, int, int]]:
    """File, first byte and end of what lies together and is read in this order."""
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
