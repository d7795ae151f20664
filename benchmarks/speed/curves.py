"""Growth of the time with tasks, layers and processes: measurements and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.speed import merges, synthetic
from benchmarks.speed.merges import OURS, PLAIN, TRANSPOSED, Conditions
from benchmarks.speed.processes import FailedError, Run
from benchmarks.speed.synthetic import Zoo

TASKS = (2, 4, 8, 14, 20)
LAYERS = (1, 2, 4)
PROCESSES = (1, 2)
FEW_TASKS = 8
COLOURS: Mapping[str, str] = {OURS: "#1f5fa8", PLAIN: "#c2571a", TRANSPOSED: "#5d8f2e"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Curve:
    """Runs of some commands over one quantity.

    Args:
        over: the quantity that varies.
        model: size of the checkpoints.
        fixed: description of what does not vary.
        conditions: conditions of the runs.
        runs: runs by command, then by the value of the quantity.
        missing: reason if there are no runs.
    """

    over: str
    model: str
    fixed: str
    conditions: Conditions
    runs: Mapping[str, Mapping[int, Sequence[Run]]]
    missing: str = ""


def over_tasks(model: str, conditions: Conditions) -> Curve:
    """Measure the time over the number of tasks."""
    zoos = {tasks: synthetic.checkpoints(model, tasks, 1) for tasks in TASKS}
    return Curve("tasks", model, "1 layer", conditions, _both(zoos, conditions))


def over_layers(model: str, conditions: Conditions) -> Curve:
    """Measure the time over the number of layers."""
    zoos = {layers: synthetic.checkpoints(model, FEW_TASKS, layers) for layers in LAYERS}
    return Curve("layers", model, f"{FEW_TASKS} tasks", conditions, _both(zoos, conditions))


def over_processes(model: str, conditions: Conditions, layers: int = 2) -> Curve:
    """Measure the time of hf-tsv over the number of processes of one thread each."""
    zoo = synthetic.checkpoints(model, FEW_TASKS, layers)
    runs: dict[int, list[Run]] = {}
    missing = ""
    for count in PROCESSES:
        command = {OURS: lambda out: _launched(zoo, out, conditions.device, count)}  # noqa: B023
        try:
            runs[count] = merges.in_turn(command, conditions, zoo.files(), ONE_THREAD)[OURS]
        except FailedError as error:
            missing = f"{count} processes: {str(error).splitlines()[0]}"
            break
    fixed = f"{FEW_TASKS} tasks, {layers} layers, one thread each"
    return Curve("processes", model, fixed, conditions, {} if missing else {OURS: runs}, missing)


def _launched(zoo: Zoo, out: Path, device: str, count: int) -> list[Any]:
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", count, "-m"]
    return [*launcher, *merges.our_command(zoo.base, zoo.tasks, out, device)]


def _both(zoos: Mapping[int, Zoo], conditions: Conditions) -> dict[str, dict[int, list[Run]]]:
    runs: dict[str, dict[int, list[Run]]] = {}
    for value, zoo in zoos.items():
        commands = merges.commands(zoo, conditions)
        for name, measured in merges.in_turn(commands, conditions, zoo.files()).items():
            runs.setdefault(name, {})[value] = measured
    return runs


def seconds(run: Mapping[str, Any]) -> float:
    """Seconds of a run without its start; the phases of the plain algorithm do not overlap."""
    said = run["seconds"]
    return float(said["whole"] if "whole" in said else sum(said.values()))


def draw(curve: Mapping[str, Any], file: Path) -> None:
    """Plot the median time over the quantity, with the range of the rounds, on a white card.

    The start of the interpreter and the loading of libraries are not counted.

    Args:
        curve: a [`Curve`] in the form of the results file.
        file: file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.8), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, by_value in curve["runs"].items():
        values = sorted(map(int, by_value))
        walls = [[seconds(run) for run in by_value[str(value)]] for value in values]
        colour = COLOURS[name]
        axes.plot(values, [median(w) for w in walls], marker="o", color=colour, label=name)
        axes.fill_between(
            values, [min(w) for w in walls], [max(w) for w in walls], color=colour, alpha=0.2
        )
    axes.set_xticks(sorted({int(v) for by_value in curve["runs"].values() for v in by_value}))
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"{curve['over']} ({curve['model']}, {curve['fixed']})")
    axes.set_ylabel("time (s)")
    axes.legend(loc="best", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
