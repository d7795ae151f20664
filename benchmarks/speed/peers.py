"""TSV-Merge by hf-tsv and by fusion_bench, in turn on the same files.

`python -m benchmarks.speed.peers --model ViT-B/32 --tasks 8` makes an environment for the peer in
`.bench/peers`, merges whole towers by both, and compares the merged weights of one run, all of
them, with float64. It writes `benchmarks/speed/results/peers.json` and `peers.md`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from benchmarks.speed import exact, machine, merges, plain, processes, synthetic
from benchmarks.speed.accuracy import changes
from benchmarks.speed.processes import Run
from benchmarks.speed.synthetic import MODELS, PREFIX, Zoo

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "peers.json"
PINNED = HERE / "peers.txt"
ENVIRONMENT = synthetic.CACHE / "peers"
PEER, OURS = "fusion_bench", "hf-tsv"
COPIES = 2.2
"""Memory of the peer over the bytes of all checkpoints: models and task vectors, in float32."""

Found = dict[str, Any]


def interpreter() -> Path:
    """Python of the peer's environment, which is made if it is not there."""
    python = ENVIRONMENT / "bin" / "python"
    if not (ENVIRONMENT / "made").exists():
        shutil.rmtree(ENVIRONMENT, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        pins = ["-c", processes.ROOT / "constraints.txt", "-r", PINNED]
        subprocess.run([python, "-m", "pip", "install", "--quiet", *pins], check=True)
        (ENVIRONMENT / "made").touch()
    return python


def fits(zoo: Zoo) -> bool:
    """Tell whether the peer, which holds all checkpoints at once, has enough memory here."""
    memory = machine.facts([], "cpu")["memory_bytes"]
    return COPIES * sum(file.stat().st_size for file in zoo.files()) < memory


def merged_by(name: str, zoo: Zoo, out: Path, python: Path) -> Run:
    """Merge a zoo by one of the two."""
    merges.clear(out)
    if name == OURS:
        return processes.run(merges.our_command(zoo.base, zoo.tasks, out, "cpu"))
    words = ["benchmarks.speed.peer", "--base", zoo.base, "--out", out, *zoo.tasks]
    return processes.run(words, python=python)


def errors(zoo: Zoo, files: Mapping[str, Path]) -> Found:
    """Relative Frobenius errors of all decomposed weights of merged files, W0 included.

    Args:
        zoo: checkpoints that were merged.
        files: merged file by the name of the program.
    """
    found: dict[str, list[float]] = {name: [] for name in files}
    with safe_open(zoo.base / plain.FILE, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    names = [name for name, shape in shapes.items() if len(shape) == 2 and ".layers." in name]
    for name in names:
        base, *stored = (_read(file, name) for file in zoo.files())
        deltas, floors = changes(base, stored)
        expected = base.double() + exact.merge(
            deltas, plain.rank_of(base.shape, len(deltas)), floors
        )
        for program, file in files.items():
            found[program].append(exact.relative_error(_read(file, name), expected))
    return {
        program: {"largest": max(own), "median": statistics.median(own), "weights": len(own)}
        for program, own in found.items()
    }


def _read(file: Path, name: str) -> Tensor:
    """A weight, whatever prefix the writer gives it."""
    with safe_open(file, "pt") as opened:
        names = set(opened.keys())
        return opened.get_tensor(name if name in names else name.removeprefix(PREFIX))


def measured(zoo: Zoo, rounds: int, *, check: bool) -> Found:
    """Measure both programs on a zoo, A B A B …"""
    programs = [PEER, OURS] if fits(zoo) else [OURS]
    python = interpreter() if PEER in programs else Path(sys.executable)
    outputs = {name: merges.output_of(f"peers, {name}") for name in programs}
    runs: dict[str, list[Run]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name in programs:
            runs[name].append(merged_by(name, zoo, outputs[name], python))
    files = {name: out / plain.FILE for name, out in outputs.items()}
    return {
        "model": zoo.model,
        "tasks": len(zoo.tasks),
        "layers": zoo.layers,
        "spectrum": zoo.spectrum,
        "bytes": sum(file.stat().st_size for file in zoo.files()),
        "facts": machine.facts([], "cpu") | {"command": _command()},
        "runs": {
            name: [
                {"wall": run.wall, "computing": run.seconds["computing"], "cpu": run.cpu,
                 "peak": run.peak_bytes}
                for run in own
            ]
            for name, own in runs.items()
        },
        "errors": errors(zoo, files) if check else None,
    }  # fmt: skip


def _command() -> str:
    return " ".join(["python -m benchmarks.speed.peers", *sys.argv[1:]])


def ratio(row: Found, what: str) -> str:
    """The peer's number over ours: median (least … most) of the rounds."""
    pairs = zip(row["runs"][PEER], row["runs"][OURS], strict=True)
    found = [peer[what] / own[what] for peer, own in pairs]
    if len(found) == 1:
        return f"{found[0]:.1f} ×"
    return f"{statistics.median(found):.1f} ({min(found):.1f} … {max(found):.1f}) ×"


def markdown(rows: Sequence[Found]) -> str:
    """Results as tables."""
    lines = [
        "# Beside fusion_bench",
        "",
        "`python -m benchmarks.speed.peers`: TSV-Merge of synthetic fine-tunes by fusion_bench"
        f" {_version()} and by hf-tsv, whole processes in turn on {rows[0]['facts']['cpus']} cores."
        " Ratios are the peer's number over that of hf-tsv in the same round. Errors are those of"
        " the merged weights against float64, relative, over all decomposed weights of one run.",
        "",
        "| model | layers | tasks | faster, whole process | faster, computing | processor time"
        " | memory | largest and median error, fusion_bench | hf-tsv |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        name = [row["model"], str(row["layers"]), str(row["tasks"])]
        if PEER not in row["runs"]:
            lines.append(f"| {' | '.join(name)} | does not fit into memory | | | | | |")
            continue
        ratios = [ratio(row, what) for what in ("wall", "computing", "cpu", "peak")]
        lines.append(f"| {' | '.join([*name, *ratios, *_error_cells(row)])} |")
    lines += [
        "",
        "| model | layers | tasks | | wall | computing | processor | peak |",
        "|---|---:|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        for program, runs in row["runs"].items():
            cells = [row["model"], str(row["layers"]), str(row["tasks"]), program]
            for what in ("wall", "computing", "cpu"):
                cells.append(f"{statistics.median(run[what] for run in runs):.1f} s")
            cells.append(f"{max(run['peak'] for run in runs) / 1e6:,.0f} MB")
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _error_cells(row: Found) -> list[str]:
    found = row["errors"]
    if found is None:
        return ["–", "–"]
    return [f"{found[p]['largest']:.0e}, {found[p]['median']:.0e}" for p in (PEER, OURS)]


def _version() -> str:
    line = next(t for t in PINNED.read_text("utf-8").splitlines() if t.startswith(PEER))
    return line.partition("==")[2]


def _key(row: Found) -> tuple[Any, ...]:
    return row["model"], row["layers"], row["tasks"]


def main() -> None:
    """Run, add the row to the results, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--layers", type=int, help="[default: all]")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--no-check", action="store_true", help="skip float64, which takes longest")
    parser.add_argument("--cache", type=Path, default=synthetic.CACHE, help="for checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    chosen = parser.parse_args()
    layers = chosen.layers or MODELS[chosen.model].layers
    zoo = synthetic.checkpoints(chosen.model, chosen.tasks, layers, folder=chosen.cache)
    row = measured(zoo, chosen.rounds, check=not chosen.no_check)
    before = json.loads(chosen.results.read_text("utf-8")) if chosen.results.exists() else []
    rows = sorted([*(r for r in before if _key(r) != _key(row)), row], key=_key)
    machine.publish(chosen.results, rows, markdown(rows))


if __name__ == "__main__":
    main()
