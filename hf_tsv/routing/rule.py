"""The rule by which a routed model chooses tasks: its layers and numbers, checked."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from hf_tsv.system.checks import argument, check_counts, check_number
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import counted

LAYER = re.compile(
    r"vision_model\.encoder\.layers\.(0|[1-9][0-9]{0,3})"
    r"\.(mlp\.fc1|mlp\.fc2|self_attn\.(?:q|k|v|out)_proj)"
)
"""Pattern of the linear layers whose inputs can be compared with the tasks' updates."""

KINDS = ("self_attn.q_proj", "mlp.fc1", "mlp.fc2")
"""Layers of a block that take part by default; keys and values have the input of the queries."""


LEAST = 1e-6  # temperature with which the scores stay finite
TEMPERATURE = 0.25
"""Temperature by default, per layer; it and the threshold were chosen on images of tiny CLIPs."""


@dataclass(frozen=True)
class Rule:
    """Layers that are looked at, and numbers by which tasks are chosen.

    Args:
        layers (`tuple[str, ...]`): names of linear layers, those of `CLIPModel`; empty until they
            are chosen.
        temperature (`float`): divides the sum of the standardised residuals before the softmax;
            by default in proportion to the number of layers.
        threshold (`float`): score from which a task is chosen, 0 to below 1.
        max_tasks (`int`): most tasks of an image.
        label_temperature (`float`): divides the cosines of candidate labels and class names.
    """

    layers: tuple[str, ...] = ()
    temperature: float = None  # type: ignore[assignment]  # a number once it is made
    threshold: float = 0.15
    max_tasks: int = 3
    label_temperature: float = 0.02

    def __post_init__(self) -> None:
        if self.temperature is None:
            object.__setattr__(self, "temperature", TEMPERATURE * max(1, len(self.layers)))
        for name in ("temperature", "threshold", "label_temperature"):
            check_number(name, getattr(self, name))
            object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("temperature", "label_temperature"):
            if not getattr(self, name) >= LEAST:
                problem = f"`{name}=` must be at least {LEAST:g} (got {getattr(self, name):g})."
                raise UsageError(problem)
        if not 0 <= self.threshold < 1:
            raise UsageError(f"`threshold=` must be from 0 to below 1 (got {self.threshold:g}).")
        check_counts(max_tasks=self.max_tasks)


def refuse_no_choice(checkpoints: Sequence[object]) -> None:
    """Refuse to choose among fewer than two tasks."""
    if len(checkpoints) < 2:
        problem = f"Routing chooses among tasks, and there is {len(checkpoints) or 'none'}."
        raise UsageError(problem, "Name at least two checkpoints.")


def short(layer: str) -> str:
    """Block and kind of a layer.

    Example:
        >>> short("vision_model.encoder.layers.9.mlp.fc1")
        '9.mlp.fc1'
    """
    return layer.removeprefix("vision_model.encoder.layers.")


def default_layers(layers: Iterable[str]) -> tuple[str, ...]:
    """Layers of the upper two thirds of the blocks that take part unless others are named.

    Example:
        >>> default_layers(f"vision_model.encoder.layers.{i}.mlp.fc1" for i in range(3))
        ('vision_model.encoder.layers.1.mlp.fc1', 'vision_model.encoder.layers.2.mlp.fc1')
    """
    places = {layer: (int(found[1]), found[2]) for layer in layers if (found := LAYER.match(layer))}
    blocks = 1 + max((block for block, _ in places.values()), default=0)
    own = {n: p for n, p in places.items() if p[0] >= blocks // 3 and p[1] in KINDS}
    return tuple(sorted(own, key=lambda name: (own[name][0], KINDS.index(own[name][1]))))


def chosen_layers(globs: Sequence[str], layers: Sequence[str]) -> tuple[str, ...]:
    """Layers that match globs of their names, whole or short; those by default without globs.

    Raises:
        [`UsageError`]: a glob matches none, or there is no layer.
    """
    if not layers:
        problem = "The tasks have no layer of the vision tower in common that is stored as factors."
        raise UsageError(problem, "Routing compares the updates of vision towers.")
    found: dict[str, None] = {}
    for glob in globs:
        own = [n for n in layers if fnmatchcase(n, glob) or fnmatchcase(short(n), glob)]
        if not own:
            raise UsageError(
                f"{argument('layers')} {glob!r} matches none of {counted(len(layers), 'layer')}.",
                f"They are named like {short(layers[0])}.",
            )
        found |= dict.fromkeys(own)
    if globs:
        return tuple(name for name in layers if name in found)
    return default_layers(layers) or tuple(layers)
