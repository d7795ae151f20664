"""Checks of the words on the command line, before a verb, and torch with it, is imported."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.recipes.scaling import factors_of
from hf_tsv.recipes.settings import Settings, refuse_no_report
from hf_tsv.system.checks import check_counts, size_in_bytes
from hf_tsv.system.errors import HfTsvError, UsageError

T = TypeVar("T")

REFERENCES = ("checkpoints", "checkpoint", "factors", "reference")

NAMED = re.compile("(.+?)=([^=,]*)(?:,|$)")
"""Name and number in `a=1,b=0.5`; a name may have commas and equals signs."""

EXAMPLES = {"weights": "Example: org/a=0.7,org/b=1.", "scale": "Example: vision_model.*=0.5."}


def checked(command: Callable[..., None]) -> Callable[..., None]:
    """A command that refuses its options before it runs; whatever is wrong now is wrong usage."""

    @functools.wraps(command)
    def called(**values: Any) -> None:
        try:
            _check({name: value for name, value in values.items() if value is not None}, values)
        except HfTsvError as error:
            raise UsageError(error.message, error.hint) from error
        command(**values)

    return called


def _check(given: Mapping[str, Any], names: Mapping[str, Any]) -> None:
    """Make of the options given, by name, what the verb makes of them; `names` has all options."""
    given = {**given, **factors(given)}
    check_counts(limit=given.get("limit"), batch_size=given.get("batch_size"))
    if "max_memory" in given:
        size_in_bytes(given["max_memory"], name="max_memory")
    if "energy" in names:
        _made(Options, given, rule=_made(RankRule, given))
    elif not isinstance(given.get("rank_fraction"), str):  # several: the command reads them
        for method in given.get("method", Settings.method).split(","):
            settings = _made(Settings, {**given, "method": method})
            if given.get("report"):
                refuse_no_report(settings)
    if "recipe" in names and "recipe" not in given:
        factors_of(given.get("checkpoints", []), given.get("weights"), given.get("scale", {}))
    if "push_to" in names:
        from hf_tsv.runs.target import Target

        _made(Target, given).refuse_unusable(dry_run=given.get("dry_run", False))
    repo_id = given.get("push_to", given.get("repo_id"))
    if repo_id and not Path(repo_id).is_dir():
        from hf_tsv import hub

        hub.check_repo_id(repo_id)
    _refuse_twice(given.get("checkpoints", []))
    for reference, subfolder in _references(given):
        from hf_tsv.checkpoints.reference import parse

        parse(reference, subfolder)


def _refuse_twice(checkpoints: Sequence[str]) -> None:
    """Refuse a checkpoint that the same word names again."""
    for item in checkpoints:
        if checkpoints.count(item) > 1:
            hint = "Omit one; a larger weight counts a task more."
            raise UsageError(f"{item} is given twice.", hint)


def _references(given: Mapping[str, Any]) -> Iterator[tuple[str, str | None]]:
    """References with the subfolder that is meant."""
    for name in REFERENCES:
        found = given.get(name, [])
        for reference in [found] if isinstance(found, str) else found:
            yield reference, given.get("subfolder")
    if "base_model" in given:
        yield given["base_model"], None


def _made(kind: Callable[..., T], given: Mapping[str, Any], **own: Any) -> T:
    """A dataclass of those options that are its fields, and of its own."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in given.items() if name in names}, **own)


def numbers(name: str, text: str) -> Sequence[float]:
    """Numbers between commas, as an option has them; the error calls it `name`."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise UsageError(f"`{name}=` must be numbers (got {text!r}).", "Example: 1,0.5.") from None


def factors(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a verb for the options about factors that are given; an empty text is none."""
    found: dict[str, Any] = {}
    for name in ("weights", "scale", "keep_base"):
        texts = given.get(name)
        if texts is None:
            continue
        texts = [text for text in texts if text]
        if name == "scale" or (name == "weights" and any("=" in text for text in texts)):
            found[name] = _by_name(name, texts)
        else:
            found[name] = numbers(name, ",".join(texts)) if name == "weights" else texts
    return found


def _by_name(option: str, texts: Sequence[str]) -> dict[str, float]:
    """Numbers by name of texts such as `NAME=1`, each name once; weights also between commas."""
    found: dict[str, float] = {}
    for text in texts:
        pairs = NAMED.findall(text) if option == "weights" else [text.rpartition("=")[::2]]
        if not all(name for name, _ in pairs) or (option == "weights" and NAMED.sub("", text)):
            problem = f"`{option}=` must be NAME=NUMBER (got {text!r})."
            raise UsageError(problem, EXAMPLES[option])
        for name, number in pairs:
            if name in found:
                raise UsageError(f"`{option}=` names {name} twice.", "Give it one number.")
            try:
                found[name] = float(number)
            except ValueError:
                problem = f"`{option}=` gives {name} {number!r}, which is no number."
                raise UsageError(problem, EXAMPLES[option]) from None
    return found
