"""Compression against the plain algorithm, and merging from factors against from checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.speed import merges, plain, processes
from benchmarks.speed.merges import OURS, PLAIN, TRANSPOSED, Conditions
from benchmarks.speed.processes import Run
from benchmarks.speed.synthetic import Zoo

FACTORS, CHECKPOINTS = "from factors", "from checkpoints"


@dataclass(frozen=True)
class CompressRow:
    """Measurements of one set of tasks.

    Args:
        model: name of its size.
        tasks: number of tasks.
        layers: number of layers of the towers.
        spectrum: spectrum of the updates.
        rank_fraction: share of the rank that is kept, 1/T.
        conditions: conditions of the runs.
        compressing: runs of each command on one task.
        merging: runs of merges of all tasks, from factors and from checkpoints.
        factors_bytes: size of the factors of one task.
        checkpoint_bytes: size of its checkpoint.
    """

    model: str
    tasks: int
    layers: int
    spectrum: str
    rank_fraction: float
    conditions: Conditions
    compressing: Mapping[str, Sequence[Run]]
    merging: Mapping[str, Sequence[Run]]
    factors_bytes: int
    checkpoint_bytes: int


def plain_command(zoo: Zoo, task: Path, out: Path, device: str, *options: str) -> list[Any]:
    """Command of the plain algorithm for one task."""
    where = ("--base", zoo.base, "--out", out, "--device", device)
    share = ("--rank-fraction", _share(zoo))
    return ["benchmarks.speed.plain", "compress", *where, *share, *options, task]


def our_command(zoo: Zoo, task: Path, out: Path, device: str) -> list[Any]:
    """Command of hf-tsv for the same."""
    where = ("-o", out, "--base-model", zoo.base, "--device", device)
    return ["hf_tsv", "compress", task, *where, "--rank-fraction", _share(zoo), "--json", "--quiet"]


def _share(zoo: Zoo) -> float:
    return 1 / len(zoo.tasks)


def compare(zoo: Zoo, conditions: Conditions) -> CompressRow:
    """Measure compression of one task, then compress all and measure merges of the factors."""
    device, task = conditions.device, zoo.tasks[0]
    commands = {PLAIN: lambda out: plain_command(zoo, task, out, device)}
    if conditions.transposed:
        commands[TRANSPOSED] = lambda out: plain_command(zoo, task, out, device, "--transpose")
    commands[OURS] = lambda out: our_command(zoo, task, out, device)
    compressing = merges.in_turn(commands, conditions, zoo.files())
    factors = compressed(zoo, device)
    inputs = {FACTORS: factors, CHECKPOINTS: zoo.tasks}
    merging = merges.in_turn(
        {name: _merge(zoo, tasks, device) for name, tasks in inputs.items()},
        conditions,
        [*zoo.files(), *(file for folder in factors for file in _weights(folder))],
    )
    return CompressRow(
        zoo.model,
        len(zoo.tasks),
        zoo.layers,
        zoo.spectrum,
        _share(zoo),
        conditions,
        compressing,
        merging,
        sum(file.stat().st_size for file in _weights(factors[0])),
        (task / plain.FILE).stat().st_size,
    )


def compressed(zoo: Zoo, device: str) -> list[Path]:
    """Compress all tasks of a zoo, and return the folders of the factors."""
    folder = merges.OUT / "factors"
    shutil.rmtree(folder, ignore_errors=True)
    made = [folder / task.name for task in zoo.tasks]
    for task, out in zip(zoo.tasks, made, strict=True):
        processes.run(our_command(zoo, task, out, device))
    return made


def _merge(zoo: Zoo, tasks: Sequence[Path], device: str) -> Callable[[Path], list[Any]]:
    return lambda out: merges.our_command(zoo.base, tasks, out, device)


def _weights(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))
