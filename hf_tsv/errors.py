"""Every error a user can meet.

HfTsvError
├── RepoError         a Hub repository cannot be read or written: unknown, gated, revision, token
├── CheckpointError   a checkpoint is damaged or does not fit the base model
│   └── LostFileError a file of it was there, and cannot be read any more
├── RecipeError       a recipe or an option cannot be used
├── OutputError       the output folder cannot be written
├── DataError         a dataset cannot be evaluated on
└── LostProcessError  one of several processes is gone, or failed
"""

from __future__ import annotations


class HfTsvError(Exception):
    """A problem the user can do something about.

    Args:
        message (`str`): what was wrong, naming the thing (checkpoint, tensor, option).
        hint (`str`, *optional*): what to do next.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} {self.hint}" if self.hint else self.message


class RepoError(HfTsvError):
    """A Hub repository cannot be read or written."""


class CheckpointError(HfTsvError):
    """A checkpoint is damaged, or does not fit the base model."""


class LostFileError(CheckpointError):
    """A file of a checkpoint was there, and cannot be read any more."""


class RecipeError(HfTsvError):
    """A recipe or an option cannot be used."""


class OutputError(HfTsvError):
    """The output folder cannot be written."""


class DataError(HfTsvError):
    """A dataset cannot be read, or does not have what is needed of it."""


class LostProcessError(HfTsvError):
    """One of the processes that share a run is gone, or failed."""
