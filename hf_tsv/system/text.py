"""Text for people: bytes, counts, one line, quoting, redaction."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping, Sequence

ADDRESS = re.compile(r"(https?://)(?:[^\s/'\"]*@)?([^\s?'\"]*)(?:\?[^\s'\"]*)?")

ARGUMENT = re.compile(r"`(\w+)=([^`]*)`")
"""An argument in a message, as Python code."""


def one_of(names: Mapping[str, object] | Sequence[str]) -> str:
    """List of names as text.

    Example:
        >>> one_of(["a", "b", "c"])
        'a, b or c'
    """
    *most, last = names
    return f"{', '.join(most)} or {last}" if most else last


def as_keys(text: str) -> str:
    """Text in which arguments, as Python code in backticks, are keys of a file.

    Example:
        >>> as_keys("`rank=` and `alpha=2` cannot be combined.")
        'rank and alpha: 2 cannot be combined.'
    """
    return ARGUMENT.sub(lambda found: ": ".join(filter(None, found.groups())), text)


def counted(count: int, noun: str, plural: str = "") -> str:
    """Number of things, in the singular or plural.

    Example:
        >>> counted(1, "checkpoint"), counted(2, "checkpoint"), counted(0, "copy", "copies")
        ('1 checkpoint', '2 checkpoints', '0 copies')
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"


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


def rough_time(seconds: float) -> str:
    """Time that is only roughly known.

    Example:
        >>> rough_time(3), rough_time(42), rough_time(200), rough_time(9000)
        ('a few seconds', 'about 40 s', 'about 3 min', 'about 2.5 h')
    """
    if seconds < 10:
        return "a few seconds"
    if seconds < 90:
        return f"about {seconds:.0f} s" if seconds < 20 else f"about {round(seconds, -1):.0f} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"


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
    """First line of an error of a library, cut short and without its period; else its type."""
    line = next(iter(redacted(str(error)).splitlines()), "")[:200].rstrip().rstrip(".")
    return line or type(error).__name__
