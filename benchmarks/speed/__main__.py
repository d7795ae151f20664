"""The whole program against the plain algorithm, in time, memory and error.

`python -m benchmarks.speed` makes checkpoints of real sizes in `.bench/`, merges them by the plain
algorithm and by hf-tsv in turn, and writes tables to `benchmarks/speed/results/`. Options that name
other measurements replace the merges.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from rich.console import Console

from benchmarks.speed import (
    accuracy,
    compressions,
    curves,
    machine,
    merges,
    reports,
    results,
    synthetic,
)
from benchmarks.speed.merges import Conditions
from benchmarks.speed.synthetic import MODELS, SPECTRA, Zoo

TASKS = (8, 14, 20)
LAYERS = 2
CURVE_MODEL = "ViT-B/32"


@dataclass(frozen=True)
class Session:
    """Options of the command line, and the results so far."""

    arguments: argparse.Namespace
    conditions: Conditions
    found: results.Results
    facts: dict[str, Any]
    console: Console

    def add(self, section: str, key: Sequence[object], row: Any) -> None:
        """Save a row at once, whatever happens afterwards."""
        self.found.add(section, key, row, self.facts)


def parser() -> argparse.ArgumentParser:
    """Make the parser of the options."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    sizes = made.add_argument_group("what is merged")
    sizes.add_argument("--model", action="append", choices=MODELS, help="[default: all three]")
    sizes.add_argument("--tasks", action="append", type=int, help="[default: 8, 14 and 20]")
    sizes.add_argument("--depth", type=_depth, help="layers, or `full` [default: 2]")
    sizes.add_argument("--spectrum", choices=SPECTRA, default=synthetic.DEFAULT_SPECTRUM)
    sizes.add_argument("--quick", action="store_true", help="ViT-B/32 × 8, one layer, one round")
    how = made.add_argument_group("how")
    how.add_argument("--rounds", type=int, help="of all commands in turn [default: 3]")
    how.add_argument("--device", default="cpu")
    how.add_argument("--busy", action="store_true", help="another process keeps a core busy")
    how.add_argument("--cold", action="store_true", help="read files from disk every time")
    how.add_argument(
        "--transposed", action="store_true", help="also the plain algorithm on tall matrices only"
    )
    how.add_argument("--name", default="cpu", help="of the results [default: cpu]")
    what = made.add_argument_group("what is measured [default: --merge]")
    what.add_argument("--merge", action="store_true", help="merges against the plain algorithm")
    what.add_argument("--compress", action="store_true", help="compression, merging from factors")
    what.add_argument("--reports", action="store_true", help="merge --report, and interference")
    what.add_argument("--spectra", action="store_true", help="errors of one weight, all spectra")
    what.add_argument("--curves", action="store_true", help="time over tasks, layers, processes")
    what.add_argument(
        "--full-depth", action="append", metavar="MODEL:T", default=[], help="hf-tsv alone"
    )
    return made


def _depth(text: str) -> int | str:
    return text if text == "full" else int(text)


def _zoos(session: Session) -> Iterator[Zoo]:
    chosen = session.arguments
    if chosen.quick:
        models, tasks, depth = ["ViT-B/32"], [8], 1
    else:
        models, tasks, depth = [name for name in MODELS if name != "tiny"], list(TASKS), LAYERS
    depth = chosen.depth or depth
    for model, count in product(chosen.model or models, chosen.tasks or tasks):
        yield _made(session, model, count, MODELS[model].layers if depth == "full" else depth)


def _made(session: Session, model: str, tasks: int, layers: int) -> Zoo:
    session.console.print(f"{model}, {tasks} tasks, {layers} layers")
    return synthetic.checkpoints(model, tasks, layers, session.arguments.spectrum)


def _key(zoo: Zoo, conditions: Conditions) -> list[object]:
    words = [word for word in ("busy", "cold") if getattr(conditions, word)]
    return [zoo.model, len(zoo.tasks), zoo.layers, zoo.spectrum, conditions.device, *words]


def measure_merges(session: Session) -> None:
    """Measure both programs on every set of checkpoints."""
    conditions, interpreter = (
        session.conditions,
        merges.interpreter_bytes(session.conditions.device),
    )
    for zoo in _zoos(session):
        rates = machine.rates(zoo, conditions.device)
        row = merges.compare(zoo, conditions, rates, interpreter)
        session.add("merge", _key(zoo, conditions), row)


def measure_full_depth(session: Session) -> None:
    """Measure merges of whole towers by hf-tsv alone."""
    conditions, interpreter = (
        session.conditions,
        merges.interpreter_bytes(session.conditions.device),
    )
    for text in session.arguments.full_depth:
        model, tasks = text.rsplit(":", 1)
        zoo = _made(session, model, int(tasks), MODELS[model].layers)
        rates = machine.rates(zoo, conditions.device)
        row = merges.ours_alone(zoo, conditions, rates, interpreter)
        session.add("alone", _key(zoo, conditions), row)


def measure_reports(session: Session) -> None:
    """Measure the cost of reports on interference."""
    conditions = session.conditions
    interpreter = merges.interpreter_bytes(conditions.device)
    for zoo in _zoos(session):
        rates = machine.rates(zoo, conditions.device)
        row = reports.compare(zoo, conditions, rates, interpreter)
        session.add("reports", _key(zoo, conditions), row)


def measure_compressions(session: Session) -> None:
    """Measure compression, and merging from factors."""
    for zoo in _zoos(session):
        row = compressions.compare(zoo, session.conditions)
        session.add("compress", _key(zoo, session.conditions), row)


def measure_spectra(session: Session) -> None:
    """Measure the errors of one weight."""
    counts = accuracy.TASKS[:1] if session.arguments.quick else accuracy.TASKS
    for name, tasks in product(SPECTRA, session.arguments.tasks or counts):
        session.console.print(f"{name}, {tasks} tasks")
        device = session.conditions.device
        row = accuracy.spectrum_errors(name, tasks, device=device)
        session.add("spectra", [name, tasks, device], row)


def measure_curves(session: Session) -> None:
    """Measure the time over tasks, layers, processes."""
    model = (session.arguments.model or [CURVE_MODEL])[0]
    for measure in (curves.over_tasks, curves.over_layers, curves.over_processes):
        session.console.print(f"time {measure.__name__.replace('_', ' ')}, {model}")
        curve = measure(model, session.conditions)
        session.add("curves", [curve.over], curve)


def main() -> None:
    """Run the chosen measurements and write the results."""
    chosen = parser().parse_args()
    conditions = Conditions(
        chosen.rounds or (1 if chosen.quick else 3),
        chosen.device,
        chosen.busy,
        chosen.cold,
        chosen.transposed,
    )
    facts = machine.facts(sys.argv[1:], chosen.device)
    console = Console(stderr=True)
    session = Session(chosen, conditions, results.opened(chosen.name), facts, console)
    others = {
        measure_compressions: chosen.compress,
        measure_reports: chosen.reports,
        measure_spectra: chosen.spectra,
        measure_curves: chosen.curves,
        measure_full_depth: chosen.full_depth,
    }
    if chosen.merge or not any(others.values()):
        measure_merges(session)
    for measure, wanted in others.items():
        if wanted:
            measure(session)
    print((session.found.folder / f"{chosen.name}.md").read_text())


if __name__ == "__main__":
    main()
