"""Running calls in threads so that Ctrl-C is not held up by the slowest of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def in_parallel(call: Callable[[S], T], items: Iterable[S], threads: int = 8) -> list[T]:
    """Results of `call` on every item, in order; the first failure stops what has not begun.

    Args:
        call (`Callable`): safe to run in several threads.
        items (`Iterable`): its arguments.
        threads (`int`): how many at a time.
    """
    pool = ThreadPoolExecutor(threads)
    try:
        return [job.result() for job in [pool.submit(call, item) for item in items]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
