"""Output of a command: data on stdout, everything else on stderr; and its end."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

from hf_tsv.cli.groups import flag
from hf_tsv.system.errors import HfTsvError, UsageError, debugging
from hf_tsv.system.processes import LOST, is_leader
from hf_tsv.system.progress import above_bars
from hf_tsv.system.text import ARGUMENT, one_line, printable, redacted

EXIT_ERROR, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143

RED, GREEN, YELLOW, GREY = "1;31", "32", "33", "90"  # as the Hub client's command line has them

NAMES = {
    "checkpoints": "CHECKPOINTS", "image": "--image-column", "label": "--label-column",
    "output": "-o", "progress": "--quiet",
    "references": "--reference", "tasks": "--task", "templates": "--template",
}  # fmt: skip
"""Arguments whose option has another name."""

# Seconds for the first process to say what is wrong: launchers end it when another one fails.
TURN = 3.0


Text = Callable[[Any], str]


class Terminated(KeyboardInterrupt):
    """Somebody sent SIGTERM: a launcher whose other process died, or a batch system."""


class Out:
    """Results, warnings, hints and errors of one command; quiet, without its status lines."""

    def __init__(
        self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False
    ) -> None:
        self.speaks = is_leader()
        self.as_json = as_json
        self.quiet = quiet or not self.speaks
        self.verbose = verbose
        logger = logging.getLogger("hf_tsv")
        logger.handlers = [_StderrHandler()]
        level = logging.WARNING if quiet else logging.INFO
        if verbose and self.speaks:
            for name in ("httpx", "httpx2"):  # requests of the Hub client
                requests = logging.getLogger(name)
                requests.handlers, requests.propagate = [_StderrHandler()], False
                requests.setLevel(logging.INFO)
        logger.setLevel(level if self.speaks else logging.CRITICAL)
        logger.propagate = False
        from huggingface_hub.utils import logging as client_logging

        for handler in client_logging.get_logger("huggingface_hub").handlers:
            handler.addFilter(REDACTING)

    def result(self, text: str, data: Mapping[str, Any]) -> None:
        """Print the result of the command: `text` for people, or `data` with `--json`."""
        if self.speaks:
            indent = 2 if sys.stdout.isatty() else None
            said = json.dumps(data, indent=indent) if self.as_json else printable(as_options(text))
            print(said)

    def status(self, text: str, *, done: bool = False) -> None:
        """Tell on stderr what is under way, or with a mark what is done, unless quiet."""
        if not self.quiet:
            _print_stderr(text, _mark() if done else "", GREEN)

    def delivered(self, report: Any, summary: Text, preview: Text, *, timed: bool = False) -> None:
        """Tell what a command wrote and where it is, or after a dry run what it would do."""
        folder, page, data = getattr(report, "output", None), _page(report.url), report.to_dict()
        if not timed:
            for entry in data.get("treatments", {}).values():
                entry.pop("seconds", None)
        if not report.dry_run:
            self.status(summary(report), done=True)
            if timed or self.verbose:
                self.status(_timings(report))
            if folder and page:
                self.status(f"Uploaded to {page}.")
            elif folder:
                self.status(f"Upload it: `hf-tsv push {shown(folder)} REPO_ID`")
        self.result(preview(report) if report.dry_run else folder or page, data)


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


def method_text(settings: Mapping[str, Any]) -> str:
    """Method of a merge, with α if it has one, and its steps."""
    from hf_tsv.methods.catalogue import METHODS
    from hf_tsv.recipes.settings import steps_of

    name = settings["method"]
    has_alpha = name not in METHODS or METHODS[name].alpha is not None
    alpha = [f"α = {settings['alpha']:g}"] if has_alpha else []
    return ", ".join([str(name), *alpha, *steps_of(settings)])


def _page(url: str | None) -> str:
    """Page of the model, or of the pull request, that an upload made or changed."""
    return (url or "").partition("/commit/")[0]


def shown(folder: str) -> str:
    """A folder as a command names it, from the current folder if it is in there."""
    path, here = Path(folder), Path.cwd()
    return shlex.quote(str(path.relative_to(here) if path.is_relative_to(here) else path))


def kept(error: float | None) -> str:
    """Share of an update's squared norm that is kept, given the relative error of the rest."""
    found = error or 0.0
    energy = max(0.0, 1 - found**2)
    return f"keeps {energy:.1%} of the fine-tuning update's energy (relative error {found:.3g})"


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
        REDACTING.filter(record)
        label = "Warning:" if record.levelno >= logging.WARNING else ""
        _print_stderr(record.getMessage(), label, YELLOW)


def as_options(text: str) -> str:
    """Text in which arguments, as Python code in backticks, are options.

    Example:
        >>> as_options('Give `output=DIR`, or add `force=True` and `out_format="peft"`.')
        'Give -o DIR, or add --force and --out-format peft.'
    """

    def option(found: re.Match[str]) -> str:
        name, value = NAMES.get(found[1]) or flag(found[1]), found[2].strip("\"'")
        if value in ("True", "False"):
            return name if value == "True" else name.replace("--", "--no-", 1)
        return f"{name} {value}".rstrip()

    return ARGUMENT.sub(option, text)


def _print_stderr(text: str, label: str = "", colour: str = "") -> None:
    """Print a line in words of the command line, after a label in its colour.

    Names from repositories may hold escape codes; a terminal must not act on them.
    """
    said = printable(as_options(text))
    with above_bars():
        print(*filter(None, [_coloured(label, colour), said]), file=sys.stderr, flush=True)


def _coloured(text: str, colour: str) -> str:
    """Text in a colour, where stderr is a terminal that shows colours and may."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return text if plain or not text or not sys.stderr.isatty() else f"\033[{colour}m{text}\033[0m"


def _mark() -> str:
    """Mark before what is done, on a terminal that has the character."""
    utf8 = (sys.stderr.encoding or "").lower().startswith("utf")
    return "✓" if utf8 and sys.stderr.isatty() else ""


@contextmanager
def guarded(command: str) -> Iterator[None]:
    """Known errors become one line, a hint and exit code 1, or 2 for wrong usage.

    Ctrl-C becomes 130, SIGTERM 143. `HF_DEBUG=1` shows the traceback of a known error. Of several
    processes only the first speaks, unless it is gone.
    """
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may not have every character
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except HfTsvError as error:
        if not is_leader() and error.message != LOST:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(TURN)
            _leave(EXIT_USAGE if isinstance(error, UsageError) else EXIT_ERROR)
        if debugging():
            raise
        if isinstance(error, UsageError):
            hint = error.hint or f"See `hf-tsv {command} --help`."
            fail(error.message, hint, code=EXIT_USAGE)
        fail(error.message, error.hint, wraps=error.__cause__ or error.__context__)
    except MemoryError:
        fail("There is not enough memory.", "Hold fewer weights at once with `max_memory=2GB`.")
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        if is_leader():
            _print_stderr("Terminated." if terminated else "Interrupted.")
        _leave(EXIT_TERMINATED if terminated else EXIT_INTERRUPTED)


def _terminate(signum: int, frame: object) -> None:
    raise Terminated


def fail(
    message: str,
    hint: str | None = None,
    *,
    code: int = EXIT_ERROR,
    wraps: BaseException | None = None,
) -> NoReturn:
    """Print an error and its hint, and exit; `wraps` is an error of a library behind it."""
    _print_stderr(message, "Error:", RED)
    if hint:
        _print_stderr(hint, "Hint:", GREY)
    if wraps is not None and not isinstance(wraps, HfTsvError):
        _print_stderr("HF_DEBUG=1 shows where it failed.", "Hint:", GREY)
    _leave(code)


def _leave(code: int) -> NoReturn:
    """Exit at once: an ordinary exit would wait for downloads that are still running."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
