"""Progress on a terminal, in a notebook and in a log; the logger of status lines and warnings."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any

from hf_tsv.system.text import human_bytes, one_line, printable

logger = logging.getLogger("hf_tsv")

LINE_EVERY, LINE_SHARE, LINE_AFTER = 30.0, 0.1, 10.0
"""A log gets a line every so many seconds, or after that share of the work if that takes longer
than the last of the three."""

TICK = 1.0
"""Seconds after which the time that is shown is renewed, also within a long step."""

_drawn: list[Any] = []
"""Bars that are on the terminal now."""


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


class Pace:
    """Work that is done, and the time that is left by the costs of its steps.

    Args:
        work (`int` or `Sequence[tuple[str, float]]`): number of equal steps, or name and cost of
            each in the order in which they are done.
        clock (`Callable`): seconds.
    """

    def __init__(
        self, work: int | Sequence[tuple[str, float]], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._names, self._costs = [], [0.0]
        if not isinstance(work, int):
            self._names = [one_line(name) for name, _ in work]
            self._costs = list(accumulate((cost for _, cost in work), initial=0.0))
        self.steps = work if isinstance(work, int) else len(work)
        self.done = 0
        self._clock = clock
        self._began = self._stepped = clock()

    def advance(self, steps: int) -> None:
        """Count steps that are done."""
        self.done = min(self.done + steps, self.steps)
        self._stepped = self._clock()

    @property
    def share(self) -> float:
        """Share of the work that is done, 0 to 1."""
        whole = self._costs[-1]
        return self._costs[self.done] / whole if whole else self.done / self.steps

    @property
    def spent(self) -> float:
        """Seconds since the beginning."""
        return self._clock() - self._began

    @property
    def left(self) -> float | None:
        """Seconds until the end, as estimated at the last step; None before the first."""
        if not self.share:
            return None
        return max(0.0, (self._stepped - self._began) / self.share - self.spent)

    @property
    def name(self) -> str:
        """Name of the step in work, if it has one."""
        return self._names[self.done] if self.done < len(self._names) else ""


@contextmanager
def bar(
    description: str,
    work: int | Sequence[tuple[str, float]],
    *,
    in_bytes: bool = False,
    visible: bool = True,
) -> Iterator[Callable[..., None]]:
    """Show the progress of the body: a bar, or where there is no terminal a line now and then.

    The work is a number of steps or of bytes, or name and cost of each step, in the order in which
    they are done. The function it gives, safe from any thread, takes the number of steps done, and
    a new description if it changes.
    """
    pace, lock, ended = Pace(work), threading.RLock(), threading.Event()
    if not visible or not pace.steps:
        yield lambda steps, description=None: None
        return
    shown = (_Bar if drawable() else _Lines)(one_line(description), pace, in_bytes)

    def advance(steps: int, description: str | None = None) -> None:
        with lock:
            shown.description = one_line(description or shown.description)
            pace.advance(steps)
            shown.tell()

    def tick() -> None:
        while not ended.wait(TICK):
            with lock:
                shown.tell()

    ticking = threading.Thread(target=tick, name="hf-tsv-progress", daemon=True)
    ticking.start()
    try:
        yield advance
    finally:
        ended.set()
        ticking.join()
        shown.close()


class _Lines:
    """Progress as a line now and then."""

    def __init__(self, description: str, pace: Pace, in_bytes: bool) -> None:
        self.description = description
        self.pace = pace
        self._amount = human_bytes if in_bytes else str
        self._said = 0.0, 0.0

    def tell(self) -> None:
        pace = self.pace
        since, more = pace.spent - self._said[0], pace.share - self._said[1]
        if pace.done == pace.steps or since < LINE_AFTER:
            return
        if since >= LINE_EVERY or more >= LINE_SHARE:
            self._said = pace.spent, pace.share
            text = f"{self.description}: {pace.share:.0%}, {self.told()}"
            print(printable(text), file=sys.stderr, flush=True)

    def told(self) -> str:
        """Steps, seconds spent and left, and the step in work."""
        pace = self.pace
        done, steps = self._amount(pace.done), self._amount(pace.steps)
        left = "" if pace.left is None or pace.done == pace.steps else f"<{_clock(pace.left)}"
        return f"{done}/{steps} [{_clock(pace.spent)}{left}] {pace.name}".rstrip()

    def close(self) -> None:
        """Leave what is printed."""


class _Bar(_Lines):
    """Progress as a bar of tqdm, which notebooks show as a widget where they have ipywidgets."""

    def __init__(self, description: str, pace: Pace, in_bytes: bool) -> None:
        super().__init__(description, pace, in_bytes)
        from tqdm.auto import tqdm

        told = self.told

        class Told(tqdm):  # type: ignore[misc]
            monitor_interval = 0

            @property
            def format_dict(self) -> dict[str, Any]:
                return {**super().format_dict, "told": told()}

        Told.set_lock(threading.RLock())  # tqdm's own one starts a process
        self._drawn = Told(
            total=1.0,
            desc=description,
            bar_format="{l_bar}{bar}| {told}",
            dynamic_ncols=True,
            mininterval=0.1,
            miniters=0,
        )
        _drawn.append(self._drawn)

    def tell(self) -> None:
        self._drawn.set_description_str(self.description + ": ", refresh=False)
        self._drawn.update(self.pace.share - self._drawn.n)

    def close(self) -> None:
        _drawn.remove(self._drawn)
        self._drawn.close()


def _clock(seconds: float) -> str:
    """Time as minutes and seconds, with hours where there are some.

    Example:
        >>> _clock(3725)
        '1:02:05'
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
