"""Calls in threads: once for all who ask, in order, and failures that nobody waits for twice."""

from __future__ import annotations

import pytest

from hf_tsv.system.threads import Once, in_parallel


def test_a_result_is_made_once_for_all() -> None:
    made: list[int] = []
    once = Once(lambda: made.append(1) or len(made))
    assert in_parallel(lambda _: once(), range(20)) == [1] * 20


def test_a_failure_is_made_once_for_all() -> None:
    tries: list[int] = []

    def fail() -> None:
        tries.append(1)
        raise ValueError("no base")

    once = Once(fail)
    for _ in range(3):
        with pytest.raises(ValueError, match="no base"):
            once()
    assert len(tries) == 1
