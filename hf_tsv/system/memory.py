"""Memory of a run: allocation in huge pages, reuse of freed blocks, and the resident size."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE_BLOCK, SPARE = 1 << 25, 1 << 23
CPU = torch.device("cpu")
LARGE = 1 << 20
HUGE_PAGE = 1 << 21


def share_one_heap() -> None:
    """Let all threads use one heap of the C library, and return its free end to the system.

    By default glibc gives every thread a heap of its own and moves the limit of what goes there
    while it runs; a block freed by one thread cannot be used by another: up to 150 MB more after
    48 layers. Blocks mapped from the system one by one cost a page fault for every 4 kB: 15 % of a
    merge. Without glibc nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 1)
        mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        mallopt(M_TRIM_THRESHOLD, SPARE)


class _Freed:
    """Freed blocks to use again, least recently freed first; kept while there are `users`."""

    def __init__(self) -> None:
        self.blocks: list[mmap.mmap] = []
        self.users = 0
        self.lock = threading.RLock()

    def take(self, size: int) -> mmap.mmap | None:
        """Return a freed block of this size; without one, free `size` bytes of the oldest ones."""
        with self.lock:
            for i in reversed(range(len(self.blocks))):
                if len(self.blocks[i]) == size:
                    return self.blocks.pop(i)
            while self.blocks and size > 0:
                size -= len(self.blocks.pop(0))
        return None

    def put(self, block: mmap.mmap) -> None:
        with self.lock:
            if self.users:
                self.blocks.append(block)


_freed = _Freed()


@contextmanager
def reused() -> Iterator[None]:
    """Reuse the memory of tensors from [`empty`] instead of returning it to the system.

    On a virtual machine a fresh page can cost as much as computing with it. Kept blocks of other
    sizes are freed first when a new size is wanted, so that live and kept blocks together never
    exceed the earlier peak of live ones. [`give_back`] makes room for large results of libraries.
    """
    with _freed.lock:
        _freed.users += 1
    try:
        yield
    finally:
        with _freed.lock:
            _freed.users -= 1
            if not _freed.users:
                _freed.blocks.clear()


def give_back() -> None:
    """Return the kept blocks to the system."""
    with _freed.lock:
        _freed.blocks.clear()


def empty(
    *shape: int, dtype: torch.dtype, device: torch.device = CPU, pinned: bool = False
) -> Tensor:
    """Make an uninitialised tensor; a large one on the CPU in huge pages where the system has them.

    Touching memory for the first time then takes a tenth of the time. Freed memory goes back to the
    system at once, or is used again inside [`reused`]. A pinned tensor is locked in memory, from
    where a GPU copies at full speed.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE or pinned or device.type != "cpu" or not _huge_pages():
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
    block = _freed.take(_rounded(nbytes)) or _block(nbytes)
    entries = np.frombuffer(block, np.uint8, nbytes)
    weakref.finalize(entries, _freed.put, block).atexit = False
    return torch.from_numpy(entries).view(dtype).reshape(shape)


def _rounded(nbytes: int) -> int:
    """Round up to whole huge pages, because Linux from 6.7 on aligns such sizes."""
    return -(-nbytes // HUGE_PAGE) * HUGE_PAGE


def _block(nbytes: int) -> mmap.mmap:
    try:
        block = mmap.mmap(-1, _rounded(nbytes), mmap.MAP_PRIVATE)
    except OSError as error:  # `disk_errors` would blame a disk for it
        raise MemoryError(f"no memory for {nbytes} bytes") from error
    if whole := nbytes // HUGE_PAGE * HUGE_PAGE:
        with suppress(OSError):  # small pages do as well
            block.madvise(mmap.MADV_HUGEPAGE, 0, whole)  # the last page stays small, unless full
    return block


@functools.cache
def _huge_pages() -> bool:
    """Tell whether the system gives huge pages to a process that asks for them."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    try:
        return "[never]" not in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def resident() -> int:
    """Bytes of memory this process has in use, or the peak where the system tells only that."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
