"""Keeping the memory of a run to what it holds."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
LARGE_BLOCK = 1 << 25
SPARE = 1 << 23


def share_one_heap() -> None:
    """Let all threads use one heap of the C library, and give back what is free at its end.

    By default every thread has its own, glibc decides anew while it runs which blocks go there, and
    what one thread frees another cannot use: up to 150 MB more after 48 layers. Blocks that come
    from the system one by one cost a page fault for every 4 kB: 15 % of a merge. Nothing happens
    where the C library is another.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_ARENA_MAX, 1)
            mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
            mallopt(M_TRIM_THRESHOLD, SPARE)


CPU = torch.device("cpu")


def empty(
    *shape: int, dtype: torch.dtype, device: torch.device = CPU, pinned: bool = False
) -> Tensor:
    """An uninitialised tensor; on the CPU in huge pages where the system offers them.

    NumPy asks for them from 4 MB; touching 32 MB for the first time takes a quarter of the time.

    Args:
        shape (`int`): sizes of its dimensions.
        dtype (`torch.dtype`): of its entries.
        device (`torch.device`): where it lies.
        pinned (`bool`): locked in memory, from where a GPU copies at full speed.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if not nbytes or pinned or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned)
    return torch.from_numpy(np.empty(nbytes, np.uint8)).view(dtype).reshape(shape)


def resident() -> int:
    """Bytes of memory this process has in use; where the system does not say, the most it had."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
