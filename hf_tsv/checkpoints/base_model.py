"""Inference of the base model from the fine-tunes, when the user does not name it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from hf_tsv.checkpoints.reference import PinnedCheckpoint, repo_id_of
from hf_tsv.checkpoints.storage.files import read_json
from hf_tsv.system.errors import CheckpointError, HfTsvError
from hf_tsv.system.text import one_of
from hf_tsv.system.threads import in_parallel

CONFIG = ("config.json", "_name_or_path")
LONGEST_NAME = 500
LONGEST_CHAIN = 8  # steps from a fine-tune back to its base, to the base of that one, and so on
MOST_ASKED = 40  # models that are looked up on the Hub for this
MOST_SHOWN = 5  # base models of one input that an error lists
NOT_ASKED = "not looked up"
ABOVE = "see above"


@dataclass(frozen=True)
class SaidBase:
    """Base models that a fine-tune names."""

    names: tuple[str, ...]  # repository ids, or a folder; empty when it names none
    made_with: bool = False  # it was made with exactly the one it names
    revision: str | None = None  # commit of that one; None for a folder
    fingerprint: str | None = None  # sha256 that stands for its weights


@dataclass(frozen=True)
class Ancestor:
    """Model that another one names as a parent, with the parents it names itself.

    `reason` says why those are not known, or not repeated.
    """

    ref: str
    parents: tuple[Ancestor, ...] = ()
    reason: str | None = None


def said_by(item: PinnedCheckpoint) -> SaidBase:
    """Base models in the card or config of a fine-tune."""
    return SaidBase(tuple(named_by(item)))


def named_by(item: PinnedCheckpoint) -> list[str]:
    """Repository ids of the base models that a fine-tune names, none if its config is damaged."""
    try:
        return parents_of(item)
    except HfTsvError:  # reported when the checkpoint is opened
        return []


def parents_of(item: PinnedCheckpoint) -> list[str]:
    """Repository ids of the models that a model names in its card, else in its config.

    Raises:
        [`HfTsvError`]: the config cannot be read.
    """
    value = item.card.get("base_model")
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and any(names):
        return [name for name in names if _is_name(name)]
    for file, key in (("adapter_config.json", "base_model_name_or_path"), CONFIG):
        if item.files.size(file) is None:
            continue
        name = read_json(item.files, file, str(item)).get(key)
        if _is_name(name) and name.count("/") == 1:
            return [name] if name != item.ref else []
    return []


def _is_name(value: Any) -> TypeGuard[str]:
    """Tell whether a value can be a repository's name, and is not a path on somebody's machine."""
    if not isinstance(value, str) or not 0 < len(value) < LONGEST_NAME:
        return False
    return value.isprintable() and not value.startswith((".", "/", "~"))


def lineage(
    ref: str, names: Sequence[str], parents: Callable[[str], Sequence[str]] | None
) -> tuple[Ancestor, ...]:
    """Parents that a model names, their parents, and so on up to those that name none.

    `parents` looks up those of a model; its error is the reason why they are unknown. Without it
    none are looked up. Models that several others descend from have their parents only once, and of
    the parents of one model there are `MOST_ASKED` at most.
    """
    names = list(dict.fromkeys(names))[:MOST_ASKED]
    reasons: dict[str, str] = {}

    def found(name: str) -> Sequence[str]:
        try:
            return () if parents is None else parents(name)[:MOST_ASKED]
        except HfTsvError as error:
            reasons[name] = error.message
            return ()

    known = {} if parents is None else _followed(names, found)
    told = {ref}

    def ancestor(name: str) -> Ancestor:
        if name in told and (name == ref or known.get(name)):
            return Ancestor(name, reason=ABOVE)
        told.add(name)
        own = tuple(ancestor(up) for up in dict.fromkeys(known.get(name, ())))
        return Ancestor(name, own, reasons.get(name) if name in known else NOT_ASKED)

    return tuple(map(ancestor, names))


def infer(
    said: Mapping[str, Sequence[str]], parents: Callable[[str], Sequence[str]]
) -> tuple[str, list[str]]:
    """Base model that the inputs agree on, and the inputs that name one.

    Inputs that name the same base agree. Otherwise the named models are followed to their own
    bases, which `parents` returns, to the nearest that all descend from: a fine-tune of a
    fine-tune descends from the first one's base too.

    Raises:
        [`CheckpointError`]: no input names a base, or they disagree; the error lists them.
    """
    names = dict.fromkeys(name for found in said.values() for name in found)
    speakers = [item for item, found in said.items() if found]
    hint = "Name it with `base_model=REF`."
    if not names:
        raise CheckpointError("No checkpoint says which base model it was fine-tuned from.", hint)
    if len(names) == 1:
        return names.popitem()[0], speakers
    known = _followed(list(names), parents)
    common = set[str].intersection(*({name, *_beyond(name, known)} for name in names))
    nearest = [
        one for one in common if not any(one in _beyond(other, known) for other in common - {one})
    ]
    if len(nearest) == 1:
        return nearest[0], speakers
    lines = [
        f"{item}: {', '.join(_shown(name, known) for name in found[:MOST_SHOWN]) or 'nothing'}"
        for item, found in said.items()
    ]
    problem = f"The checkpoints name different base models: {'; '.join(lines)}."
    raise CheckpointError(problem, hint)


def contradicted(
    said: Mapping[str, Sequence[str]],
    base: PinnedCheckpoint,
    parents: Callable[[str], Sequence[str]],
) -> list[str]:
    """Warnings about inputs that name other bases than the given one, and none it is the base of.

    `said` has the bases that each input names, and `parents` returns those of a model.
    """
    others = {
        item: names
        for item, names in said.items()
        if names and not any(_stands_for(base, name) for name in names)
    }
    known = _followed(list(dict.fromkeys(n for names in others.values() for n in names)), parents)
    return [
        f"{item} says it was fine-tuned from {one_of(names[:MOST_SHOWN])}, not {base}."
        for item, names in others.items()
        if not any(_stands_for(base, up) for name in names for up in _beyond(name, known))
    ]


def _stands_for(base: PinnedCheckpoint, name: str) -> bool:
    """Tell whether a base model may be the one of that name: a folder may be a copy of it."""
    if not base.is_local:
        return repo_id_of(base.ref).lower() == repo_id_of(name).lower()
    path = Path(base.ref).expanduser().resolve()
    cached = f"models--{name.replace('/', '--')}"  # the Hub client's cache
    return path.name.lower() == Path(name).name.lower() or cached in path.parts


def _followed(
    names: list[str], parents: Callable[[str], Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Bases of each model, of those bases, and so on; each level is looked up in parallel."""
    known: dict[str, tuple[str, ...]] = {}
    new = names
    for _ in range(LONGEST_CHAIN):
        new = new[: MOST_ASKED - len(known)]
        known |= dict(zip(new, map(tuple, in_parallel(parents, new)), strict=True))
        new = [up for up in dict.fromkeys(p for one in new for p in known[one]) if up not in known]
    return known


def _shown(name: str, known: Mapping[str, Sequence[str]]) -> str:
    """Text of a model and the bases it names."""
    own = ", ".join(known.get(name, ())[:MOST_SHOWN])
    return f"{name} (from {own})" if own else name


def _beyond(name: str, known: Mapping[str, Sequence[str]]) -> set[str]:
    """All known ancestors of a model."""
    found: set[str] = set()
    new = set(known.get(name, ()))
    while new - found:
        found |= new
        new = {up for one in new for up in known.get(one, ())}
    return found
