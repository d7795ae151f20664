"""Progress bars on stderr, the logger of status lines and warnings, and readable text."""

from __future__ import annotations

import logging
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("hf_tsv")

ADDRESS = re.compile(r"(https?://)(?:[^\s/'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?")


def visible_by_default() -> bool:
    """Tell whether bars are shown by default: on a terminal, unless the Hub client's are off."""
    disabled = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {
        "1",
        "ON",
        "YES",
        "TRUE",
    }
    return sys.stderr.isatty() and not disabled


@contextmanager
def bar(
    description: str, total: int, *, in_bytes: bool = False, visible: bool = True
) -> Iterator[Callable[..., None]]:
    """Show one bar while the body runs.

    Args:
        description (`str`): current activity.
        total (`int`): number of steps, or bytes.
        in_bytes (`bool`): show sizes and speed.
        visible (`bool`): show the bar at all.

    Yields:
        `Callable[[int, str], None]`: function to call with the number of steps done, and with a
            new description if it changes; safe from any thread.
    """
    if not visible or total == 0:
        yield lambda steps, description=None: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    amount = [DownloadColumn(), TransferSpeedColumn()] if in_bytes else [MofNCompleteColumn()]
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        *amount,
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task(one_line(description), total=total)
        yield lambda steps, description=None: progress.update(
            task, advance=steps, description=description and one_line(description)
        )


def human_bytes(size: float) -> str:
    """Size in bytes as readable text, in powers of 1000 like the Hub.

    Example:
        >>> human_bytes(605_157_884)
        '605.2 MB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def printable(text: str) -> str:
    """Text with its control characters escaped, except line breaks."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def one_line(text: str) -> str:
    """Text with its control characters escaped and line breaks replaced by spaces."""
    return printable(text).replace("\n", " ")


def redacted(text: str) -> str:
    """Text without the secrets in its addresses: passwords, and signatures in queries.

    Example:
        >>> redacted("GET http://me:secret@proxy/a?Signature=abc failed")
        'GET http://proxy/a failed'
    """
    return ADDRESS.sub(r"\1\2", text)


def quoted(value: object) -> str:
    """Untrusted value for an error message: a plain word as it is, the rest cut and quoted."""
    plain = isinstance(value, str) and len(value) < 100 and re.fullmatch(r"[\w.-]+", value)
    return str(value) if plain else shortened(value)


def shortened(value: object) -> str:
    """Untrusted value as Python prints it, cut to a short length."""
    try:
        return reprlib.repr(value)
    except ValueError:  # Python refuses to print very long integers
        return "a number of very many digits"


def first_line(error: Exception) -> str:
    """First line of an error of a library, cut short; its type if it has no message."""
    return next(iter(redacted(str(error)).splitlines()), "")[:200] or type(error).__name__
