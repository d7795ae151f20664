"""Output of a command: data on stdout, everything else on stderr; and its end."""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from hf_tsv.system.errors import HfTsvError, debugging
from hf_tsv.system.processes import LOST, is_leader
from hf_tsv.system.text import one_line, printable, redacted

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 130, 143

# Seconds for the first process to say what is wrong: launchers end it when another one fails.
TURN = 3.0


Text = Callable[[Any], str]


class Terminated(KeyboardInterrupt):
    """Somebody sent SIGTERM: a launcher whose other process died, or a batch system."""


class Out:
    """Results, warnings, hints and errors of one command; quiet, without its status lines."""

    def __init__(self, *, as_json: bool = False, quiet: bool = False) -> None:
        self.speaks = is_leader()
        self.as_json = as_json
        self.quiet = quiet or not self.speaks
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a terminal may not have every character
                stream.reconfigure(errors="backslashreplace")
        logger = logging.getLogger("hf_tsv")
        logger.handlers = [_StderrHandler()]
        level = logging.WARNING if quiet else logging.INFO
        logger.setLevel(level if self.speaks else logging.CRITICAL)
        logger.propagate = False
        from huggingface_hub.utils import logging as client_logging

        for handler in client_logging.get_logger("huggingface_hub").handlers:
            handler.addFilter(REDACTING)

    def result(self, text: str, data: Mapping[str, Any]) -> None:
        """Print the result of the command: `text` for people, or `data` with `--json`."""
        if self.speaks:
            print(json.dumps(data) if self.as_json else printable(text))

    def status(self, text: str) -> None:
        """Tell on stderr what was done, unless quiet."""
        if not self.quiet:
            _print_stderr(text)

    def delivered(self, report: Any, summary: Text, preview: Text, *, timed: bool = False) -> None:
        """Tell what a command wrote and where it is, or after a dry run what it would do."""
        place = getattr(report, "output", None) or report.url or ""
        if not report.dry_run:
            self.status(summary(report))
            if timed:
                self.status(_timings(report))
        self.result(preview(report) if report.dry_run else place, report.to_dict())


def table(
    rows: Sequence[Sequence[str]], head: Sequence[str] = (), footer: Sequence[str] = ()
) -> str:
    """Text in aligned columns, a line for each row, between a head and a footer.

    With a head all columns but the first are numbers, and stand to the right; without one all are
    text, and stand to the left.
    """
    from rich.cells import cell_len

    parts = [[list(map(one_line, row)) for row in part if row] for part in ([head], rows, [footer])]
    widths = [max(map(cell_len, column)) for column in zip(*chain(*parts), strict=True)]

    def line(cells: Sequence[str]) -> str:
        gaps = [" " * (width - cell_len(cell)) for cell, width in zip(cells, widths, strict=True)]
        pairs = [
            gap + cell if head and i else cell + gap
            for i, (cell, gap) in enumerate(zip(cells, gaps, strict=True))
        ]
        return "  ".join(pairs).rstrip()

    rule = "\n" + "─" * (sum(widths) + 2 * len(widths) - 2) + "\n"
    return rule.join("\n".join(map(line, part)) for part in parts if part)


def pinned(entry: Mapping[str, str | None]) -> str:
    """A checkpoint of a report, as one reference."""
    from hf_tsv.checkpoints.reference import at_revision

    return at_revision(str(entry["ref"]), entry["revision"])


def _timings(report: Any) -> str:
    """Seconds by what was done, and the weights of a merge that took longest."""
    weights = getattr(report, "treatments", {}).items()
    spent = [(entry["seconds"]["computing"], name) for name, entry in weights if "seconds" in entry]
    slowest = sorted(spent, key=lambda pair: -pair[0])[:3]
    rows = [(name, f"{value:.2f} s") for name, value in report.timings.items()]
    return table(rows + [(f"{value:.2f} s", name) for value, name in slowest])


class _Redacting(logging.Filter):
    """The Hub client logs addresses as they are, with the signatures of its storage."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = redacted(record.getMessage()), ()
        return True


REDACTING = _Redacting()


class _StderrHandler(logging.Handler):
    """Log records as the lines people expect; a warning says that it is one."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        _print_stderr(("Warning: " if warning else "") + record.getMessage())


def _print_stderr(text: str) -> None:
    """Names from repositories may hold escape codes; a terminal must not act on them."""
    print(printable(text), file=sys.stderr, flush=True)


@contextmanager
def guarded() -> Iterator[None]:
    """Known errors become one line, a hint and exit code 1; Ctrl-C becomes 130, SIGTERM 143.

    `HF_DEBUG=1` shows the traceback of a known error. Of several processes only the first speaks,
    unless it is gone.
    """
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except HfTsvError as error:
        if not is_leader() and error.message != LOST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(TURN)
            _leave(EXIT_ERROR)
        if debugging():
            raise
        _fail(error.message, error.hint)
    except MemoryError:
        _fail("There is not enough memory.", "Less goes on at a time with --max-memory.")
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        if is_leader():
            _print_stderr("Terminated." if terminated else "Interrupted.")
        _leave(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def _fail(message: str, hint: str | None) -> None:
    _print_stderr(f"Error: {message}" + (f"\nHint: {hint}" if hint else ""))
    _leave(EXIT_ERROR)


def _leave(code: int) -> None:
    """Exit at once: an ordinary exit would wait for downloads that are still running."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
