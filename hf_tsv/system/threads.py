"""Calls in threads that do not delay Ctrl-C until the slowest one ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

S = TypeVar("S")


def in_parallel(call: Callable[[S], T], items: Iterable[S], threads: int = 8) -> list[T]:
    """Results of `call` on every item, in order; the first failure cancels those not yet begun.

    Args:
        call (`Callable`): function that is safe to run in several threads.
        items (`Iterable`): arguments of the calls.
        threads (`int`): largest number of calls at a time.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        return [job.result() for job in [pool.submit(call, item) for item in items]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
