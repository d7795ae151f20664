"""Progress bars on stderr, the logger of status lines and warnings, and readable text."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hf_tsv.system.text import one_line

logger = logging.getLogger("hf_tsv")


def visible_by_default() -> bool:
    """Tell whether bars are shown by default: on a terminal, unless the Hub client's are off."""
    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper() in {"1", "ON", "YES", "TRUE"}
    return sys.stderr.isatty() and not off


@contextmanager
def bar(
    description: str, total: int, *, in_bytes: bool = False, visible: bool = True
) -> Iterator[Callable[..., None]]:
    """Show one bar, of steps or of bytes with their speed, while the body runs.

    The function it gives, safe from any thread, takes the number of steps done, and a new
    description if it changes.
    """
    if not visible or total == 0:
        yield lambda steps, description=None: None
        return
    from rich import progress as rich
    from rich.console import Console

    amount = (
        [rich.DownloadColumn(), rich.TransferSpeedColumn()]
        if in_bytes
        else [rich.MofNCompleteColumn()]
    )
    with rich.Progress(
        rich.TextColumn("{task.description}", markup=False),
        rich.BarColumn(),
        *amount,
        rich.TimeElapsedColumn(),
        rich.TextColumn("left"),
        rich.TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task(one_line(description), total=total)
        yield lambda steps, description=None: progress.update(
            task, advance=steps, description=description and one_line(description)
        )
