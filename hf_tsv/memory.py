"""Keeping the memory of a run to what it holds."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGE_BLOCK = 1 << 20


def give_back_large_blocks() -> None:
    """Let the C library return large blocks to the system as soon as they are freed.

    glibc raises its own threshold to 32 MB while it runs, and from then on keeps tensors of that
    size in heaps that fragment: up to 150 MB more after 48 layers of 4 MB each. Nothing happens
    where the C library is another.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
            mallopt(M_TRIM_THRESHOLD, LARGE_BLOCK)
