"""Whole merges against the plain algorithm: time, memory, errors."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.speed import machine, plain, processes, synthetic
from benchmarks.speed.accuracy import FileErrors, file_errors
from benchmarks.speed.machine import Rates
from benchmarks.speed.processes import Run
from benchmarks.speed.synthetic import Zoo
from hf_tsv.runs.journal import work_of

PLAIN, TRANSPOSED, OURS = "plain", "plain, transposed", "hf-tsv"
OUT = synthetic.CACHE / "out"
Command = Callable[[Path], Sequence[Any]]
"""Function from an output folder to the words after `python -m`."""


@dataclass(frozen=True)
class Conditions:
    """Conditions of all runs.

    Args:
        rounds: number of runs of each command, in turn with the others.
        device: device that computes.
        busy: another process keeps a core busy.
        cold: files are read from disk, not from the memory of the operating system.
        transposed: also run the plain algorithm with wide matrices transposed first.
    """

    rounds: int = 3
    device: str = "cpu"
    busy: bool = False
    cold: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class MergeRow:
    """Measurements of one set of checkpoints.

    Args:
        model: name of its size.
        tasks: number of tasks.
        layers: number of layers of the towers.
        spectrum: spectrum of the updates.
        conditions: conditions of the runs.
        runs: runs of each command, in order.
        interpreter_bytes: peak of a merge of almost nothing.
        weights_bytes: largest weight of the base and all tasks in float32.
        rates: rates of the machine, measured just before.
        floor: seconds at those rates.
        errors: errors of the merges; None if only one command ran.
    """

    model: str
    tasks: int
    layers: int
    spectrum: str
    conditions: Conditions
    runs: Mapping[str, Sequence[Run]]
    interpreter_bytes: int
    weights_bytes: int
    rates: Rates
    floor: float
    errors: FileErrors | None = field(default=None)


def clear(out: Path) -> None:
    """Remove an output, and an unfinished run of it, which the next one would resume."""
    for folder in (out, work_of(out)):
        shutil.rmtree(folder, ignore_errors=True)


def plain_command(zoo: Zoo, out: Path, device: str, *options: str) -> list[Any]:
    """Command of the plain algorithm for a zoo."""
    where = ("--base", zoo.base, "--out", out, "--device", device)
    return ["benchmarks.speed.plain", "merge", *where, *options, *zoo.tasks]


def our_command(base: Path, tasks: Sequence[Path], out: Path, device: str) -> list[Any]:
    """Command of hf-tsv for the same; tasks are checkpoints or factors."""
    where = ("-o", out, "--base-model", base, "--device", device)
    return ["hf_tsv", "merge", *tasks, *where, "--json", "--quiet"]


def commands(zoo: Zoo, conditions: Conditions) -> dict[str, Command]:
    """Commands of the plain algorithm and hf-tsv for a zoo."""
    device = conditions.device
    found: dict[str, Command] = {PLAIN: lambda out: plain_command(zoo, out, device)}
    if conditions.transposed:
        found[TRANSPOSED] = lambda out: plain_command(zoo, out, device, "--transpose")
    found[OURS] = lambda out: our_command(zoo.base, zoo.tasks, out, device)
    return found


def in_turn(
    commands: Mapping[str, Command],
    conditions: Conditions,
    files: Sequence[Path],
    environment: Mapping[str, str] | None = None,
) -> dict[str, list[Run]]:
    """Run commands in turn, A B A B …; the output of each stays in a folder of its name.

    Args:
        commands: functions from an output folder to a command.
        conditions: conditions of the runs.
        files: files that the commands read.
        environment: environment variables for all.
    """
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(conditions.rounds):
        for name, command in commands.items():
            out = output_of(name)
            clear(out)
            if conditions.cold:
                machine.forget(files)
            with processes.busy(conditions.busy):
                runs[name].append(processes.run(command(out), environment))
    return runs


def output_of(name: str) -> Path:
    """Output folder of the command of this name."""
    return OUT / name.replace(", ", "-")


def compare(zoo: Zoo, conditions: Conditions, rates: Rates, interpreter: int) -> MergeRow:
    """Measure the plain algorithm and hf-tsv on a zoo, and check their outputs."""
    runs = in_turn(commands(zoo, conditions), conditions, zoo.files())
    outputs = (output_of(name) / plain.FILE for name in (PLAIN, OURS))
    errors = file_errors(zoo, *outputs, conditions.device)
    return row(zoo, conditions, rates, interpreter, runs, errors)


def ours_alone(zoo: Zoo, conditions: Conditions, rates: Rates, interpreter: int) -> MergeRow:
    """Measure hf-tsv alone, where the plain algorithm does not have enough memory."""
    command = {OURS: lambda out: our_command(zoo.base, zoo.tasks, out, conditions.device)}
    runs = in_turn(command, conditions, zoo.files())
    return row(zoo, conditions, rates, interpreter, runs)


def row(
    zoo: Zoo,
    conditions: Conditions,
    rates: Rates,
    interpreter: int,
    runs: Mapping[str, Sequence[Run]],
    errors: FileErrors | None = None,
) -> MergeRow:
    """Collect the measurements on a zoo."""
    return MergeRow(
        zoo.model,
        len(zoo.tasks),
        zoo.layers,
        zoo.spectrum,
        conditions,
        runs,
        interpreter,
        machine.weights_bytes(zoo),
        rates,
        machine.floor_seconds(zoo, rates, conditions.cold),
        errors,
    )


def interpreter_bytes(device: str) -> int:
    """Peak memory of a merge of almost nothing: the interpreter and its libraries."""
    zoo = synthetic.checkpoints("tiny", 2, 1)
    command = {OURS: lambda out: our_command(zoo.base, zoo.tasks, out, device)}
    (done,) = in_turn(command, Conditions(rounds=1), zoo.files())[OURS]
    return done.peak_bytes
