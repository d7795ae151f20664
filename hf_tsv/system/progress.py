"""Progress on a terminal, in a notebook and in a log; the logger of status lines and warnings."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from threading import Event, RLock, Thread
from typing import Any

from hf_tsv.system.text import human_bytes, one_line, printable

logger = logging.getLogger("hf_tsv")

LINE_EVERY, LINE_SHARE, LINE_AFTER = 30.0, 0.1, 10.0
"""A log has a line after so many seconds, or after that share of the work and the last seconds."""

watchers: list[Callable[[Progress], None]] = []
"""Functions that are called, from any thread, when there is progress and every second."""

_drawn: list[Any] = []
"""Bars on the terminal."""


class _Handler(logging.Handler):
    """Lines on stderr for a program that has no logging of its own; warnings say what they are."""

    def emit(self, record: logging.LogRecord) -> None:
        if not logging.root.handlers:
            level = record.levelname.capitalize() + ": "
            text = level * (record.levelno >= logging.WARNING) + record.getMessage()
            with above_bars():
                print(printable(text), file=sys.stderr, flush=True)


logger.addHandler(_Handler())


def visible_by_default() -> bool:
    """Tell whether progress is shown unless a call says otherwise: as the Hub client's is."""
    off = os.environ.get("HF_HUB_DISABLE_PROGRESS_BARS", "").upper()
    return off not in {"1", "ON", "YES", "TRUE"}


def drawable() -> bool:
    """Tell whether there are bars: on a terminal and in a notebook. Elsewhere there are lines."""
    return sys.stderr.isatty() or "ipykernel.zmqshell" in sys.modules


@contextmanager
def above_bars() -> Iterator[None]:
    """Take bars off the terminal while the body prints, and draw them below it then."""
    with _drawn[-1].external_write_mode(sys.stderr) if _drawn else nullcontext():
        yield


@contextmanager
def others_silent(*, visible: bool = False) -> Iterator[None]:
    """Hide the bars of the Hub client and of transformers, unless `visible` and drawable."""
    if visible and drawable():
        yield
        return
    from huggingface_hub import utils as client

    loading: Any = sys.modules.get("transformers.utils.logging")
    loads = loading is not None and loading.is_progress_bar_enabled()
    again = "disable" if client.are_progress_bars_disabled() else "enable"
    try:
        with warnings.catch_warnings(action="ignore"):  # of a variable that stands above this
            if loads:
                loading.disable_progress_bar()
            client.disable_progress_bars()
        yield
    finally:
        with warnings.catch_warnings(action="ignore"):
            if loads:
                loading.enable_progress_bar()
            getattr(client, f"{again}_progress_bars")()


class Progress:
    """Progress of some work: the share that is done, and the time left by the costs of its steps.

    Args:
        work (`int` or `Sequence[tuple[str, float]]`): number of equal steps, or name and cost of
            each in the order in which they are done.
        in_bytes (`bool`): steps are bytes.
        clock (`Callable`): seconds.
    """

    def __init__(
        self,
        description: str,
        work: int | Sequence[tuple[str, float]],
        *,
        in_bytes: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description, self.clock = description, clock
        self.steps, self.done = work if isinstance(work, int) else len(work), 0
        self._named = [] if isinstance(work, int) else [*work, ("", 0.0)]
        self._costs = list(accumulate((cost for _, cost in self._named), initial=0.0))
        self._amount: Callable[[int], str] = human_bytes if in_bytes else str
        self._began = self._stepped = clock()
        self._said = 0.0, 0.0  # seconds and share at the last line

    def advance(self, steps: int, description: str | None = None) -> None:
        """Count steps that are done."""
        self.done, self._stepped = min(self.done + steps, self.steps), self.clock()
        self.description = description or self.description

    @property
    def share(self) -> float:
        """Share of the work that is done, 0 to 1."""
        whole = self._costs[-1]
        return self._costs[self.done] / whole if whole else self.done / self.steps

    @property
    def left(self) -> float | None:
        """Seconds until the end, as estimated at the last step; None in the first hundredth."""
        if self.share < 0.01:
            return None
        return max(0.0, (self._stepped - self._began) / self.share + self._began - self.clock())

    def __str__(self) -> str:
        """Steps, seconds spent and left, and the step in work."""
        left = "" if self.left is None or self.done == self.steps else f"<{_minutes(self.left)}"
        spent = f"[{_minutes(self.clock() - self._began)}{left}]"
        amount = f"{self._amount(self.done)}/{self._amount(self.steps)}"
        name = self._named[self.done][0] if self._named else ""
        return one_line(f"{amount} {spent} {name}").rstrip()

    def line(self) -> str | None:
        """Line for a log, if it is time for one."""
        spent = self.clock() - self._began
        since, more = spent - self._said[0], self.share - self._said[1]
        late = since >= LINE_EVERY or (since >= LINE_AFTER and more >= LINE_SHARE)
        if not late or self.done == self.steps:
            return None
        self._said = spent, self.share
        return f"{one_line(self.description)}: {self.share:.0%}, {self}"


@contextmanager
def bar(
    description: str,
    work: int | Sequence[tuple[str, float]],
    *,
    in_bytes: bool = False,
    visible: bool = True,
) -> Iterator[Callable[..., None]]:
    """Show the progress of the body: as a bar, or in a log as a line now and then.

    The work is that of [`Progress`]. The function it gives, safe from any thread, takes the number
    of steps done, and a new description if it changes.
    """
    if not visible or not work:
        yield lambda steps, description=None: None
        return
    progress, lock, ended = Progress(description, work, in_bytes=in_bytes), RLock(), Event()
    drawn = _bar_of(progress) if drawable() else None

    def tell() -> None:
        with lock:
            if drawn is not None:
                drawn.set_description_str(one_line(progress.description), refresh=False)
                drawn.update(progress.share - drawn.n)
            elif line := progress.line():
                print(line, file=sys.stderr, flush=True)
            for watcher in watchers:
                watcher(progress)

    def advance(steps: int, description: str | None = None) -> None:
        with lock:
            progress.advance(steps, description)
            tell()

    def tick() -> None:
        while not ended.wait(1.0):
            tell()

    ticking = Thread(target=tick, name="hf-tsv-progress", daemon=True)
    ticking.start()
    try:
        yield advance
    finally:
        ended.set()
        ticking.join()
        if drawn is not None:
            _drawn.remove(drawn)
            drawn.close()


def _bar_of(progress: Progress) -> Any:
    """Bar of tqdm, which is a widget in a notebook that has ipywidgets."""
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[misc]
        monitor_interval = 0  # no thread of its own

        @property
        def format_dict(self) -> dict[str, Any]:
            return {**super().format_dict, "told": str(progress)}

    Bar.set_lock(RLock())  # tqdm's own lock starts a process
    form = "{desc}: {percentage:3.0f}%|{bar}| {told}"
    text = one_line(progress.description)
    drawn = Bar(total=1.0, desc=text, bar_format=form, dynamic_ncols=True, miniters=0)
    drawn.set_description_str(text)
    _drawn.append(drawn)
    return drawn


def _minutes(seconds: float) -> str:
    """Time as minutes and seconds, with hours where there are some.

    Example:
        >>> _minutes(3725)
        '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
