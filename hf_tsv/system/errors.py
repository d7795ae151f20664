"""Errors that a user can meet."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class HfTsvError(Exception):
    """A problem the user can do something about.

    Arguments are written as Python code in backticks, `` `force=True` ``, also in the hint; the
    command line prints them as options.

    Args:
        message (`str`): the problem, naming the thing (checkpoint, tensor, argument) and its value.
        hint (`str`, *optional*): what the user can do next.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class RepoError(HfTsvError):
    """A Hub repository cannot be read or written: unknown, gated, a wrong revision or token."""


class CollectionError(RepoError):
    """A model is uploaded, and could not be added to a collection."""


class CheckpointError(HfTsvError):
    """A checkpoint is damaged, or does not fit the base model."""


class LostFileError(CheckpointError):
    """A file of a checkpoint can no longer be read, although it was there."""


class RecipeError(HfTsvError):
    """A recipe or an argument cannot be used."""


class UsageError(RecipeError):
    """An argument, or a word on the command line, that no run can use."""


class OutputError(HfTsvError):
    """The output folder cannot be written."""


class DataError(HfTsvError):
    """A dataset cannot be read, or lacks something the evaluation needs."""


class LostProcessError(HfTsvError):
    """One of the processes that share a run is gone, or failed."""


def debugging() -> bool:
    """Tell whether `HF_DEBUG` asks for whole tracebacks, as the Hub client reads it."""
    return os.environ.get("HF_DEBUG", "").upper() in {"1", "ON", "YES", "TRUE"}


def public(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a public function: the traceback of a known error ends where it was called.

    With `HF_DEBUG=1` the traceback is whole.
    """

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except HfTsvError as error:
            if debugging():
                raise
            raise error.with_traceback(None) from None

    return called
