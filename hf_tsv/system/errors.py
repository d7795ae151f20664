"""Errors that a user can meet."""

from __future__ import annotations

import os


def debugging() -> bool:
    """Tell whether all details are asked for: `HF_DEBUG=1`, as the Hub client reads it."""
    return os.environ.get("HF_DEBUG", "").upper() in {"1", "ON", "YES", "TRUE"}


class HfTsvError(Exception):
    """A problem the user can do something about.

    Args:
        message (`str`): the problem, naming the thing (checkpoint, tensor, option).
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


class CheckpointError(HfTsvError):
    """A checkpoint is damaged, or does not fit the base model."""


class LostFileError(CheckpointError):
    """A file of a checkpoint can no longer be read, although it was there."""


class RecipeError(HfTsvError):
    """A recipe or an option cannot be used."""


class OutputError(HfTsvError):
    """The output folder cannot be written."""


class DataError(HfTsvError):
    """A dataset cannot be read, or lacks something the evaluation needs."""


class LostProcessError(HfTsvError):
    """One of the processes that share a run is gone, or failed."""
