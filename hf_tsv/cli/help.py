"""Help pages of commands: plain text in two columns, like those of `hf`."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping, Sequence
from inspect import cleandoc
from typing import Any

from typer.core import TyperCommand, TyperGroup

HYPHEN = "\N{NON-BREAKING HYPHEN}"
WIDEST = 100
"""Columns of the widest page: longer lines are hard to read."""

NAMES = 26
"""Columns of the names of options; longer names have a line of their own."""

NARROW = 56
"""Columns below which every name has a line of its own."""


class Page:
    """Layout of a command's help, mixed into a class of typer.

    `last` is the panel at the end, and of options that name none.
    """

    last = "Run"
    usage: Sequence[str] = ()
    examples: Sequence[str] = ()
    tables: Mapping[str, Mapping[str, str]] = {}
    get_params: Any
    help: Any

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """Words after the name of the command."""
        return list(self.usage)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the whole page, as wide as the terminal."""
        formatter.width = min(shutil.get_terminal_size().columns, WIDEST)
        formatter.write_usage(ctx.command_path, " ".join(self.collect_usage_pieces(ctx)))
        for paragraph in cleandoc(self.help or "").split("\n\n"):
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write_text(_unbroken(paragraph))
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if not getattr(param, "hidden", False):
                panel = getattr(param, "rich_help_panel", None) or self.last
                title = "Arguments" if param.param_type_name == "argument" else panel
                sections.setdefault(title, []).append((named(param), described(param)))
        sections[self.last] = sections.pop(self.last)
        tables = {title: list(rows.items()) for title, rows in self.tables.items()}
        sections = tables | sections if isinstance(self, Group) else sections | tables
        names = [name for rows in sections.values() for name, _ in rows]
        first = max((len(name) for name in names if len(name) <= NAMES), default=0)
        first = first if formatter.width >= NARROW else 2
        for title, rows in sections.items():
            with formatter.section(title):
                width = first if title not in self.tables else max(map(len, dict(rows)))
                formatter.write_dl(
                    [(f"{n:<{width}}", _unbroken(text)) for n, text in rows], col_max=width
                )
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(shell_lines(line, formatter.width) + "\n")
        formatter.buffer[:] = [text.replace(HYPHEN, "-") for text in formatter.buffer]


def _unbroken(text: str) -> str:
    """Text that is not broken at a hyphen: names of options and commands have some."""
    return text.replace("-", HYPHEN)


class Command(Page, TyperCommand):
    """One command; called without any word it says what is missing, and shows an example."""

    missing = ""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words, of which there must be some where the command needs an argument."""
        if self.missing and not args and not ctx.resilient_parsing:
            ctx.fail(f"{self.missing}\nExample: {self.examples[0]}")
        found: list[str] = super().parse_args(ctx, args)
        return found


class Group(Page, TyperGroup):
    """The list of commands."""

    last = "Options"


def named(param: Any) -> str:
    """Option or argument as the first column has it."""
    if param.param_type_name == "argument":
        return str(param.metavar or param.name.upper())
    names = ", ".join(sorted(param.opts, key=len))
    if param.secondary_opts:
        return f"{names} / {', '.join(param.secondary_opts)}"
    return names if param.is_flag else f"{names} {param.metavar or 'TEXT'}"


def described(param: Any) -> str:
    """Help of a parameter, with its default."""
    text, default = str(param.help or ""), param.default
    shown = default not in (None, ..., False, (), []) and not (default is True or callable(default))
    return f"{text} [default: {default}]" if shown and "[default" not in text else text


def shell_lines(line: str, width: int) -> str:
    """A command as it is pasted into a shell: a long one is continued on the next line.

    Example:
        >>> print(shell_lines("hf-tsv merge org/a org/b -o merged", 30))
          $ hf-tsv merge org/a org/b \\
              -o merged
    """
    line = re.sub(r" (--?[a-z][\w-]*) (?=[^-|])", " \\1\N{NO-BREAK SPACE}", line)
    line = line.replace("| jq ", "|\N{NO-BREAK SPACE}jq\N{NO-BREAK SPACE}")
    parts = textwrap.wrap(
        line, max(width - 6, 10), break_long_words=False, break_on_hyphens=False,
        initial_indent="  $ ", subsequent_indent=" " * 6,
    )  # fmt: skip
    return " \\\n".join(parts).replace("\N{NO-BREAK SPACE}", " ")
