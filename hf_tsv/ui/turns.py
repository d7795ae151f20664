"""Turns: one merge at a time, in the order in which people asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

from hf_tsv.ui.commands import CommandError


class Turns:
    """A queue of people of whom the first one works, each in it once.

    Args:
        most (`int`): people in it at most.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._lock = Lock()
        self._people: list[str] = []

    @contextmanager
    def entered(self, person: str) -> Iterator[Callable[[], int]]:
        """Queue up for the time of the body; it gets a function: the number of people before.

        Raises:
            [`CommandError`]: they are in the queue already, or it is full.
        """
        with self._lock:
            if person in self._people:
                raise CommandError(
                    "You have a merge that is running or waiting already.",
                    "Wait for it, or stop it in its window.",
                )
            if len(self._people) >= self.most:
                raise CommandError(
                    f"{len(self._people)} people are waiting already.", "Try again later."
                )
            self._people.append(person)
        try:
            yield lambda: self._people.index(person)
        finally:
            with self._lock:
                self._people.remove(person)
