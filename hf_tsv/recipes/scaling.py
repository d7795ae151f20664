"""Factors of updates: of each task, and in the weights whose names match a glob."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from os import PathLike, fspath
from pathlib import Path

from hf_tsv.system.checks import argument, check_number
from hf_tsv.system.errors import UsageError
from hf_tsv.system.folders import local_kind
from hf_tsv.system.text import counted, shortened

REVISION = re.compile(r"@(refs/(pr|convert)/\w+|[^/]+)")


@dataclass(frozen=True)
class Factor:
    """Factor of the update of one task.

    Args:
        weight (`float`): factor in all weights.
        scale (`Mapping[str, float]`): further factors by glob, in the weights that match.
    """

    weight: float = 1.0
    scale: Mapping[str, float] = field(default_factory=dict)


Weights = Sequence[float] | Mapping[str, float]
"""Factor of each task's update: in the order of the checkpoints, or by their names."""


def scales_of(checkpoints: Sequence[str], weights: Weights | None) -> list[float]:
    """Factor of each task's update; 1 without weights, and for a task that they do not name."""
    if not checkpoints:
        raise UsageError("No checkpoint given.", "Name the fine-tunes to merge.")
    if isinstance(weights, Mapping):
        weights = by_name(checkpoints, weights, [1.0] * len(checkpoints))
    scales = [1.0] * len(checkpoints) if weights is None else list(weights)
    if len(scales) != len(checkpoints):
        counts = f"{counted(len(scales), 'number')} for {counted(len(checkpoints), 'checkpoint')}"
        raise UsageError(f"`weights=` has {counts}.", "Give one number for each checkpoint.")
    for scale in scales:
        check_number("Each of `weights=`", scale)
    if not any(scales):
        raise UsageError("`weights=` are all 0.", "Give at least one task another weight.")
    return list(map(float, scales))


def by_name(
    checkpoints: Sequence[str], weights: Mapping[str, float], before: Sequence[float]
) -> list[float]:
    """Weights in the order of the checkpoints; `before` has those of tasks that are not named."""
    places = {name: place_of(name, checkpoints, "weights") for name in weights}
    for name, place in places.items():
        if list(places.values()).count(place) > 1:
            problem = f"`weights=` names {checkpoints[place]} twice, also as {shortened(name)}."
            raise UsageError(problem, "Give it one weight.")
    given = {place: weights[name] for name, place in places.items()}
    return [given.get(i, weight) for i, weight in enumerate(before)]


def factors_of(
    checkpoints: Sequence[str],
    weights: Weights | Sequence[Factor] | None,
    scale: Mapping[str, float],
) -> tuple[dict[str, float], list[Factor]]:
    """Factors by glob that concern α, and the factor of each task.

    `scale` has both, by `GLOB` or `TASK:GLOB`; a task may also bring its own as a [`Factor`].
    """
    own: list[dict[str, float]] = [{} for _ in checkpoints]
    if weights is not None and not isinstance(weights, Mapping):
        own = [dict(one.scale) if isinstance(one, Factor) else {} for one in weights]
        weights = [one.weight if isinstance(one, Factor) else one for one in weights]
    scales, of_alpha = scales_of(checkpoints, weights), {}
    for key, value in scale.items():
        task, _, glob = key.rpartition(":")
        if task:
            place = place_of(task, checkpoints, "scale")
            own[place][glob] = own[place].get(glob, 1.0) * value
        else:
            of_alpha[glob] = value
    return of_alpha, [Factor(*pair) for pair in zip(scales, own, strict=True)]


def place_of(name: object, checkpoints: Sequence[str], option: str) -> int:
    """Place of the checkpoint that a name means; the error is about the option.

    A name is a reference as it is given, the same without its revision, or its last part.
    """
    text = fspath(name).rstrip("/") if isinstance(name, str | PathLike) else ""
    found = [i for i, ref in enumerate(checkpoints) if text == ref.rstrip("/")]
    found = found or [i for i, ref in enumerate(checkpoints) if text in _names(ref)]
    if len(found) == 1:
        return found[0]
    listed = ", ".join(checkpoints[i] for i in found or range(len(checkpoints)))
    what = "may be any of" if found else "is none of the checkpoints"
    raise UsageError(
        f"{argument(option)} names {shortened(name)}, which {what} {listed}.",
        "Write a checkpoint as it is given, or the last part of its name.",
    )


def _names(ref: str) -> set[str]:
    """Names of a checkpoint beside the reference as given."""
    if local_kind(ref) == "folder":
        return {Path(ref).expanduser().resolve().name}
    bare = REVISION.sub("", ref.removeprefix("hf://"), count=1).rstrip("/")
    return {bare, Path(bare).name}


def checked_scale(value: object, what: str = "scale") -> dict[str, float]:
    """Factors by glob, as plain numbers; the error calls them `what`."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        said = f"{argument(what)} must be factors by glob (got {shortened(value)})."
        raise UsageError(said, 'Example: {"vision_model.*": 0.5}.')
    for key, factor in value.items():
        if not key.rpartition(":")[2]:
            raise UsageError(f"{argument(what)} has a factor without a glob, {shortened(key)}.")
        check_number(f"The scale of {shortened(key)}", factor)
    return {key: float(factor) for key, factor in value.items()}


def matches(name: str, globs: Iterable[str]) -> bool:
    """Tell whether the canonical name of a weight matches one of several globs."""
    return any(fnmatchcase(name, glob) for glob in globs)


def factor_in(names: Sequence[str], scale: Mapping[str, float]) -> float:
    """Product of the factors whose globs match a weight, or weights that are merged as one.

    Example:
        >>> factor_in(["vision_model.a.bias"], {"vision_model.*": 0.5, "*.bias": 3, "text*": 7})
        1.5
    """
    found = {n: prod((f for g, f in scale.items() if fnmatchcase(n, g)), start=1.0) for n in names}
    if len(set(found.values())) > 1:
        raise _apart(names, "scale", "different factors")
    return found[names[0]]


def kept(names: Sequence[str], globs: Sequence[str]) -> bool:
    """Tell whether a weight, or several that are merged as one, is kept from the base."""
    found = {matches(name, globs) for name in names}
    if len(found) > 1:
        raise _apart(names, "keep_base", "different answers")
    return found.pop()


def _apart(names: Sequence[str], option: str, what: str) -> UsageError:
    problem = f"`{option}=` has {what} for {', '.join(names)}, which are merged as one matrix."
    return UsageError(problem, "Use a glob that matches all of them, or `qkv=split`.")
