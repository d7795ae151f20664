"""Options declared as fields of dataclasses, as they reach a command."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
import typer
from typer.testing import CliRunner

from hf_tsv.cli.groups import Only, flattened

COLOURS = ("red", "green")
Colour = Literal[COLOURS]  # type: ignore[valid-type]


@dataclass(frozen=True)
class Inner:
    """Options in a group in a group."""

    PANEL: ClassVar[str] = "Inner panel"

    number: Annotated[int | None, typer.Option(help="A whole number.")] = None
    share: Annotated[float, typer.Option(help="A share.", rich_help_panel="Own panel")] = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    """An option of each type."""

    PANEL: ClassVar[str] = "Outer panel"

    text: Annotated[str, typer.Option(help="A text.")] = "none"
    inner: Inner
    flag: Annotated[bool, typer.Option("--flag", help="A flag.")] = False
    either: Annotated[bool | None, typer.Option("--either/--or", help="Two flags.")] = None
    names: Annotated[list[str] | None, typer.Option("-n", "--name", help="Names.")] = None
    colour: Annotated[Colour, typer.Option(help="A colour.")] = "red"
    maybe: Annotated[Colour | None, typer.Option(help="Another colour.")] = None
    path: Annotated[Path | None, typer.Option(metavar="DIR", help="A path.")] = None


def called(*words: str, standalone: bool = False) -> Any:
    """The group that a command gets for words on the command line."""
    got = []

    def take(word: Annotated[str, typer.Argument()], *, outer: Outer) -> None:
        got.append((word, outer))

    app = typer.Typer()
    app.command()(flattened(take))
    app(["word", *words], standalone_mode=standalone)
    [(word, outer)] = got
    assert word == "word"
    return outer


def test_what_is_not_given_has_its_default() -> None:
    assert called() == Outer(inner=Inner())


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        ("--text a", "text", "a"),
        ("--flag", "flag", True),
        ("--either", "either", True),
        ("--or", "either", False),
        ("-n a --name b", "names", ["a", "b"]),
        ("--colour green", "colour", "green"),
        ("--maybe red", "maybe", "red"),
        ("--path a/b", "path", Path("a/b")),
        ("--number 3", "inner", Inner(number=3)),
        ("--share 0.25 --number 0", "inner", Inner(number=0, share=0.25)),
    ],
)
def test_an_option_reaches_its_field(words: str, name: str, value: Any) -> None:
    assert called(*words.split()) == Outer(**{"inner": Inner(), name: value})


@pytest.mark.parametrize("words", ["--colour blue", "--maybe blue", "--number x", "--share x"])
def test_a_value_of_another_type_is_refused(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        called(*words.split(), standalone=True)
    assert f"Invalid value for '{words.split(maxsplit=1)[0]}'" in capsys.readouterr().err


def test_a_command_may_take_some_fields_in_its_own_order() -> None:
    got = []

    def take(outer: Annotated[Outer, Only("path", "text", "inner")]) -> None:
        got.append(outer)

    options = flattened(take)
    assert list(options.__signature__.parameters) == ["path", "text", "number", "share"]  # type: ignore[attr-defined]
    options(path=None, text="a", number=1, share=1.0)
    assert got == [Outer(text="a", inner=Inner(1, 1.0))]


def test_options_stand_in_the_panel_of_their_group_unless_they_name_one() -> None:
    def take(outer: Outer) -> None: ...

    found = flattened(take).__signature__.parameters  # type: ignore[attr-defined]
    panels = {n: option.annotation.__metadata__[0].rich_help_panel for n, option in found.items()}
    assert panels.pop("number") == "Inner panel" and panels.pop("share") == "Own panel"
    assert set(panels.values()) == {"Outer panel"}


def test_an_option_that_is_declared_twice_is_an_error() -> None:
    def same_field(first: Outer, second: Annotated[Outer, Only("text")]) -> None: ...

    def same_flag(
        outer: Annotated[Outer, Only("names")], other: Annotated[str, typer.Option("-o", "-n")] = ""
    ) -> None: ...

    def other_half(
        outer: Annotated[Outer, Only("either")], wrong: Annotated[bool, typer.Option("--or")]
    ) -> None: ...

    for command, flag in ((same_field, "--text"), (same_flag, "-n"), (other_half, "--or")):
        with pytest.raises(TypeError, match=rf"^{command.__name__} declares {flag} twice\.$"):
            flattened(command)


def test_a_command_with_an_option_twice_cannot_be_called() -> None:
    code = """
from typing import Annotated
import typer
from typer.testing import CliRunner
from hf_tsv.cli import options, push as module

def push(target: options.TargetOptions, again: Annotated[bool, typer.Option("--force")]): ...

module.push = push
from hf_tsv.cli import _command
_command("push")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "TypeError: push declares --force twice." in done.stderr


def test_help_alone_declares_an_argument_an_option_and_a_flag() -> None:
    got = []

    def take(
        word: Annotated[str, "WORD", "A word."],
        *,
        size: Annotated[str | None, "BYTES", "A size."] = None,
        is_loud: Annotated[bool, "Whether it is loud."] = False,
    ) -> None:
        got.append((word, size, is_loud))

    app = typer.Typer()
    app.command()(flattened(take))
    runner = CliRunner()
    assert runner.invoke(app, ["a", "--size", "2", "--is-loud"]).exit_code == 0
    assert got == [("a", "2", True)]
    assert runner.invoke(app, ["a", "--no-is-loud"]).exit_code == 2
    shown = runner.invoke(app, ["--help"], terminal_width=100).output
    assert all(text in shown for text in ("WORD", "BYTES", "A size.", "Whether it is loud."))
