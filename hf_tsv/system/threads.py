"""Calls in threads that do not delay Ctrl-C until the slowest one ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Generic, TypeVar

THREADS = 8
S = TypeVar("S")
T = TypeVar("T")


def in_parallel(call: Callable[[S], T], items: Iterable[S], *, threads: int = THREADS) -> list[T]:
    """Results of `call` on every item, in order; the first failure cancels those not yet begun."""
    pool = ThreadPoolExecutor(threads)
    try:
        return [job.result() for job in [pool.submit(call, item) for item in items]]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


class Once(Generic[T]):
    """Result of a call made once, by the first of several threads; or its failure, for all."""

    def __init__(self, call: Callable[[], T]) -> None:
        self._call, self._lock = call, threading.Lock()
        self._failure: Exception | None = None

    def __call__(self) -> T:
        with self._lock:
            if self._failure is not None:
                raise self._failure
            try:
                return self._result
            except Exception as error:
                self._failure = error
                raise

    @cached_property
    def _result(self) -> T:
        return self._call()
