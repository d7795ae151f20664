"""One environment for every template: where they lie, escaping, filters for foreign text."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from hf_tsv.runs.publishing import THIS_FOLDER
from hf_tsv.system.text import human_bytes, one_line

if TYPE_CHECKING:
    from jinja2 import Environment


def templates() -> Path:
    """Folder of the templates: inside the installed package, or beside it in the source."""
    package = Path(__file__).parents[1]
    installed = package / "model_cards"
    return installed if installed.is_dir() else package.parent / "model_cards"


@cache
def environment() -> Environment:
    """Environment of the Markdown cards and the HTML page; only HTML is escaped by itself."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    made = Environment(
        loader=FileSystemLoader(templates()),
        autoescape=select_autoescape(["html.jinja"], default=False),
        undefined=StrictUndefined,
    )
    own = (plain, code, cell, fenced, human_bytes, one_line, percent, counted, word)
    made.filters |= {"quoted": json.dumps, **{filter_.__name__: filter_ for filter_ in own}}
    url = homepage()
    made.globals |= {"this_folder": THIS_FOLDER, "url": url}
    made.globals["tool"] = f"[hf-tsv]({url})" if url else "`hf-tsv`"
    return made


def homepage() -> str | None:
    """Address of the project, as the installed package says; None until it has one."""
    from importlib.metadata import PackageNotFoundError, metadata

    try:
        said = metadata("hf-tsv").get_all("Project-URL") or []
    except PackageNotFoundError:
        return None
    urls = dict(line.split(", ", 1) for line in said)
    url = urls.get("Homepage") or urls.get("Repository")
    return None if url is None or "OWNER" in url else url


def percent(share: float) -> str:
    """Share as text, with as many digits as say something.

    Example:
        >>> percent(0.2394), percent(0.00421), percent(0.99996)
        ('23.9%', '0.42%', '100.0%')
    """
    return f"{100 * share:.1f}%" if share >= 0.01 or not share else f"{100 * share:.2g}%"


def counted(count: int, singular: str, plural: str = "") -> str:
    """Count with its noun.

    Example:
        >>> counted(1, "matrix", "matrices"), counted(2, "tensor")
        ('1 matrix', '2 tensors')
    """
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def plain(text: object) -> str:
    """Text from elsewhere as it reads, with nothing Markdown or HTML would act on."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", line)


def code(text: object) -> str:
    """Text from elsewhere as inline code, whatever it contains."""
    line = " ".join(str(text).split())
    fence = _longer_than_inside(line, 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def cell(text: object) -> str:
    """Inline code inside a table, whose cells end at a bar even in code."""
    return code(text).replace("|", r"\|")


def fenced(text: str, language: str) -> str:
    """Lines from elsewhere as a block of code, whatever they contain."""
    fence = _longer_than_inside(text, 3)
    lines = text.removesuffix("\n")
    return f"{fence}{language}\n{lines}\n{fence}"


def command(verb: str, checkpoint: str, base: str, words: Sequence[str]) -> str:
    """Command in three lines: references to a commit are long.

    Example:
        >>> print(command("reconstruct", "org/a-tsv", "org/base", ["-o", "full"]))
        hf-tsv reconstruct org/a-tsv \\
            --base-model org/base \\
            -o full
    """
    lines = ["hf-tsv", verb, checkpoint], ["--base-model", base], words
    return " \\\n    ".join(map(shlex.join, lines))


def word(text: str) -> str:
    """Name from elsewhere as one word of a command, in one line."""
    return shlex.quote(" ".join(text.split()))


def _longer_than_inside(text: str, least: int) -> str:
    """Backticks, at least so many, that do not occur in the text."""
    return "`" * max(least, max(map(len, re.findall("`+", text)), default=0) + 1)
