"""Options of a command as dataclasses: a parameter annotated with one stands for its fields.

A parameter is annotated as typer has it, or with its help alone, which the name of its value may
precede: `Annotated[int, "Images at a time."]`, `Annotated[str | None, "SIZE", "Memory limit."]`.
A `Panel` among these says where the help shows it. Those before `*` are arguments, all others are
options.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import is_dataclass
from importlib import import_module
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from hf_tsv.system.checks import choice
from hf_tsv.system.errors import RecipeError

KEYWORD_ONLY = inspect.Parameter.KEYWORD_ONLY

T = TypeVar("T")


class Panel(str):
    """Panel of the help that an option is shown in, if not in that of its group."""


class NotOffered:
    """Values of a choice that a command refuses with words of its own, and lists nowhere."""

    def __init__(self, *values: str) -> None:
        self.values = values


class Several:
    """A choice of which one option takes several values, between commas."""


class Only:
    """Fields of a group that a command takes, in this order; the others keep their defaults."""

    def __init__(self, *names: str) -> None:
        self.names = names


def flattened(command: Callable[..., None]) -> Callable[..., None]:
    """A command as typer reads it: with one parameter for each field of its groups.

    A group is a dataclass whose fields are annotated with their options, or are groups themselves.
    Its `PANEL` is where the help shows options that name no panel.
    """
    hints = get_type_hints(command, include_extras=True)
    given = inspect.signature(command).parameters
    options = [o for name in given for o in _options(given[name], hints[name])]
    flags = Counter(name for option in options for name in _flags(option))
    if twice := [name for name, count in flags.items() if count > 1]:
        raise TypeError(f"{command.__name__} declares {', '.join(twice)} twice.")

    @functools.wraps(command)
    def called(**values: Any) -> None:
        command(**{name: _collected(name, hints[name], values) for name in given})

    called.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    return called


def call(function: Callable[..., T], groups: Sequence[Any], *given: Any, **own: Any) -> T:
    """Call a function with those fields of groups that it has parameters for, and with its own."""
    taken = inspect.signature(function).parameters
    fields = {n: value for group in groups for n, value in vars(group).items() if n in taken}
    if (device := fields.get("device")) not in (None, "auto", "cuda"):  # before the Hub is asked
        import_module("hf_tsv.system.device").pick_device(device)
    return function(*given, **{**fields, **own})


@functools.cache
def _fields(group: type) -> dict[str, tuple[inspect.Parameter, Any]]:
    """Parameter and annotation of each field."""
    hints = get_type_hints(group, include_extras=True)
    given = inspect.signature(group).parameters
    return {name: (field, hints[name]) for name, field in given.items()}


def _group(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The dataclass that an annotation names, and which of its fields; None for an option."""
    kind, *notes = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    if not is_dataclass(kind):
        return None, ()
    chosen = [note.names for note in notes if isinstance(note, Only)]
    return kind, chosen[0] if chosen else tuple(_fields(kind))  # type: ignore[arg-type]


def _options(
    given: inspect.Parameter, hint: Any, panel: str | None = None
) -> Iterator[inspect.Parameter]:
    """Parameters that one parameter or field stands for."""
    group, names = _group(hint)
    for name in names:
        field, its_hint = _fields(group)[name]
        field = field.replace(kind=KEYWORD_ONLY)
        yield from _options(field, its_hint, getattr(group, "PANEL", None))
    if group is None:
        kind, *notes = get_args(hint)
        panel = next((note for note in notes if isinstance(note, Panel)), panel)
        refused = {v for note in notes if isinstance(note, NotOffered) for v in note.values}
        several = any(isinstance(note, Several) for note in notes)
        notes = [note for note in notes if not isinstance(note, Panel | NotOffered | Several)]
        info = copy(notes[0])
        if isinstance(info, str):
            declare: Any = typer.Option if given.kind is KEYWORD_ONLY else typer.Argument
            info = declare(help=notes[-1], metavar=notes[0] if len(notes) > 1 else None)
        if isinstance(info, OptionInfo) and given.default is False and not _names(info):
            info.param_decls = (flag(given.name),)  # otherwise typer adds its opposite
        info.rich_help_panel = info.rich_help_panel or panel
        if isinstance(info, OptionInfo) and (values := _choices(kind)):
            kind = str | None if type(None) in get_args(kind) else str
            info.metavar = info.metavar or "|".join(values)
            offered = tuple(value for value in values if value not in refused)
            one = _chosen(values, offered)
            info.callback = _each(one) if several else one
            info.autocompletion = _completed(offered)
        yield given.replace(kind=KEYWORD_ONLY, annotation=Annotated[kind, info])


def _choices(kind: Any) -> tuple[str, ...]:
    """Values of a `Literal` that an option takes, if it is one."""
    parts = [kind] if get_origin(kind) is Literal else get_args(kind)
    return next((get_args(part) for part in parts if get_origin(part) is Literal), ())


def _chosen(values: tuple[str, ...], offered: tuple[str, ...]) -> Callable[[Any], Any]:
    """Check of a value, which may be given by another name of it; an error lists those offered."""

    def chosen(value: Any) -> Any:
        with suppress(RecipeError):
            return value and choice("it", value, values)
        try:
            return choice("it", value, offered)
        except RecipeError as error:
            raise typer.BadParameter(f"{value!r}. {error.hint}") from None

    return chosen


def _each(one: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Check of each value between commas."""
    return lambda value: value and ",".join(one(part.strip()) for part in value.split(","))


def _completed(values: tuple[str, ...]) -> Callable[[str], list[str]]:
    def completed(incomplete: str) -> list[str]:
        before, comma, last = incomplete.rpartition(",")
        return [f"{before}{comma}{value}" for value in values if value.startswith(last)]

    return completed


def _names(info: OptionInfo) -> list[str]:
    """Names that an option declares itself."""
    first = [] if info.default is ... else [str(info.default)]  # where typer leaves a first name
    return [name for text in (*first, *(info.param_decls or ())) for name in text.split("/")]


def _flags(option: inspect.Parameter) -> list[str]:
    """Names of an option on the command line; none of an argument."""
    _, info = get_args(option.annotation)
    return (_names(info) or [flag(option.name)]) if isinstance(info, OptionInfo) else []


def flag(name: str) -> str:
    """A parameter as the command line has it."""
    return f"--{name.replace('_', '-')}"


def _collected(name: str, hint: Any, values: dict[str, Any]) -> Any:
    """The value of a parameter or field, of those that typer has read."""
    group, names = _group(hint)
    if group is None:
        return values[name]
    return group(**{field: _collected(field, _fields(group)[field][1], values) for field in names})
