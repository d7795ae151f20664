"""Everything worth knowing of a GPU, in one short loan of a machine that has one.

`python -m benchmarks.speed.gpu` runs the steps one after the other, each in a process of its own
with a limit of time, and writes one JSON after each; what a step had measured when it was stopped
is kept. `--from FILE` makes the tables in `benchmarks/speed/results/` of it. `--device cpu --small`
rehearses.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "benchmarks" / "speed" / "results"
DRIVERS = ("gesvdj", "gesvda", "gesvd")
BESIDES = ("pytest", "rich")
"""Packages that the steps need besides those of hf-tsv."""
PLAIN_LAYERS = 1
"""Layers of the towers that the plain algorithm merges; hf-tsv also merges deeper ones."""


Row = Mapping[str, Any]
Table = tuple[Sequence[str], Sequence[Sequence[object]]]
"""Head and lines of a table."""


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured.

    Args:
        shapes: shapes of single weights.
        tasks: numbers of tasks of single weights.
        model: model of which all weights of one layer are compared with float64.
        zoos: model, tasks and layers of the checkpoints that are merged, the most wanted first.
        rounds: runs of everything that is timed.
        tests: what pytest collects.
    """

    shapes: Sequence[tuple[int, int]]
    tasks: Sequence[int]
    model: str
    zoos: Sequence[tuple[str, int, int]]
    rounds: int
    tests: Sequence[str]


FULL = Scale(
    shapes=[(768, 768), (3072, 768), (768, 3072), (1024, 1024), (1024, 4096)],
    tasks=(8, 20),
    model="ViT-B/32",
    zoos=[
        ("ViT-B/32", 8, 1), ("ViT-B/32", 8, 12), ("ViT-L/14", 8, 1), ("ViT-L/14", 8, 6),
        ("ViT-L/14", 20, 4), ("ViT-L/14", 20, 1), ("ViT-L/14", 8, 24),
    ],
    rounds=3,
    tests=["tests/linalg", "tests/merging/test_pipeline.py"],
)  # fmt: skip
SMALL = Scale(
    shapes=[(48, 64)],
    tasks=(2,),
    model="tiny",
    zoos=[("tiny", 2, 1), ("tiny", 2, 2)],
    rounds=1,
    tests=["tests/merging/test_pipeline.py"],
)


@dataclass(frozen=True)
class Session:
    """Device and sizes of a step; `say` writes a row under a key at once."""

    device: str
    scale: Scale
    say: Callable[[str, Row], None]

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU of CUDA."""
        return self.device.startswith("cuda")

    @property
    def drivers(self) -> Sequence[str | None]:
        """Routines of cuSOLVER by which the plain algorithm is tried; None on the CPU."""
        return DRIVERS if self.on_gpu else (None,)

    def wait(self) -> None:
        """Wait until the device has done everything."""
        import torch

        if self.on_gpu:
            torch.cuda.synchronize()

    def timed(self, call: Callable[[], object]) -> float:
        """Seconds of one call, until the device has done it."""
        self.wait()
        started = time.perf_counter()
        call()
        self.wait()
        return time.perf_counter() - started

    def forget_peak(self) -> None:
        """Begin to measure the peak of the device's memory."""
        import torch

        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Peak of the device's memory since then, in bytes; 0 on the CPU."""
        import torch

        return torch.cuda.max_memory_allocated() if self.on_gpu else 0


# Steps


def environment(session: Session) -> None:
    """What there is, and in one line what is missing."""
    found: dict[str, Any] = {"python": sys.version.split()[0], "missing": []}
    missing: list[str] = found["missing"]
    try:
        asked = [
            "--query-gpu=name,driver_version,memory.total,memory.free",
            "--format=csv,noheader",
        ]
        done = subprocess.run(
            ["nvidia-smi", *asked], capture_output=True, text=True, check=False, timeout=20
        )
        found["nvidia-smi"] = (done.stdout or done.stderr).strip()
    except (OSError, subprocess.TimeoutExpired):
        missing += ["nvidia-smi"] if session.on_gpu else []
    missing += _missing_packages()
    if "torch" not in missing:
        import torch

        found |= {"torch": torch.__version__, "cuda": torch.version.cuda}
        if session.on_gpu and not torch.cuda.is_available():
            missing.append("a GPU that torch can use (torch.cuda.is_available() is False)")
        elif session.on_gpu:
            free, total = torch.cuda.mem_get_info()
            found |= {
                "free_bytes": free, "total_bytes": total,
                "tf32": torch.backends.cuda.matmul.allow_tf32,
                "capability": list(torch.cuda.get_device_capability()),
            }  # fmt: skip
    found["disk_bytes"] = shutil.disk_usage(ROOT).free
    session.say("machine", found)
    if "torch" not in missing and (not session.on_gpu or "free_bytes" in found):
        from benchmarks.speed import machine

        session.say("facts", machine.facts([], session.device))
    print("Missing: " + "; ".join(missing) + "." if missing else "Nothing is missing.")
    if missing:
        sys.exit(1)


def _missing_packages() -> list[str]:
    """Names of the packages that the steps need and that are not installed."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split("[^A-Za-z0-9_.-]", entry)[0] for entry in project["dependencies"]]
    missing = []
    for name in (*names, *BESIDES):
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def tests(session: Session) -> None:
    """The tests that need a GPU."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
    ]
    process = subprocess.Popen(
        [*command, *session.scale.tests], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:  # what had been said is kept if the time is over
        lines.append(line.rstrip())
        session.say("pytest", {"rc": None, "tail": lines[-30:]})
    nothing = 5  # pytest's code where all tests are deselected
    rc = process.wait()
    session.say("pytest", {"rc": rc, "tail": lines[-30:]})
    if rc and not (rc == nothing and not session.on_gpu):
        sys.exit(f"pytest ended with {rc}")


def spectra(session: Session) -> None:
    """Errors of one weight for all spectra, against float64 on the CPU."""
    from benchmarks.speed import accuracy, synthetic

    tasks, shape = session.scale.tasks[0], session.scale.shapes[0]
    for name in synthetic.SPECTRA:
        row = accuracy.spectrum_errors(name, tasks, (max(shape), min(shape)), session.device)
        session.say(f"{name}, {tasks}", asdict(row))


def weights(session: Session) -> None:
    """Errors of every matrix of one layer, against float64 on the CPU."""
    from safetensors import safe_open

    from benchmarks.speed import accuracy, plain, synthetic

    zoo = synthetic.checkpoints(session.scale.model, session.scale.tasks[0], 1)
    with safe_open(zoo.base / plain.FILE, "pt") as file:
        names = [n for n in sorted(file.keys()) if len(file.get_slice(n).get_shape()) == 2]
    for name in names:
        plain_error, ours, exact_svds = accuracy.update_errors(zoo, name, session.device)
        session.say(name, {"plain": plain_error, "ours": ours, "exact": exact_svds})


def kernels(session: Session) -> None:
    """Seconds of one weight by shape: hf-tsv, its two halves, and the plain algorithm."""
    from functools import partial

    from benchmarks.speed import accuracy, plain, synthetic
    from benchmarks.speed.kernels import deltas_of
    from hf_tsv.linalg import polar
    from hf_tsv.linalg.svd import truncated_svds
    from hf_tsv.linalg.updates import TaskSingularVectors, concatenate

    rows = []
    for tasks in session.scale.tasks:
        for shape in session.scale.shapes:
            drawn = deltas_of(shape, tasks, synthetic.DEFAULT_SPECTRUM)
            deltas, rank = [d.to(session.device) for d in drawn], plain.rank_of(shape, tasks)
            floors = [0.0] * tasks
            found = truncated_svds(deltas, rank, floors)
            whole = concatenate([TaskSingularVectors(one.U, one.S, one.Vh) for one in found])
            calls: dict[str, Callable[[], object]] = {
                "ours": partial(accuracy.merged, deltas, rank, floors, session.device),
                "truncation": partial(truncated_svds, deltas, rank, floors),
                "polar": partial(polar.orthogonal_product, whole.U, whole.S, whole.Vh),
            }
            for call in calls.values():
                call()  # loads libraries
            row: dict[str, Any] = {"shape": shape, "tasks": tasks, "plain": {}}
            session.forget_peak()
            for name, call in calls.items():
                row[name] = [session.timed(call) for _ in range(session.scale.rounds)]
            row["exact"] = accuracy.merged(deltas, rank, floors, session.device).exact
            row["peak_bytes"] = session.peak()
            session.say(f"{shape}, {tasks}", row)
            rows.append(row)
            del deltas, found, whole, calls
    for row in rows:  # may take longer than there is time for
        shape, tasks = row["shape"], row["tasks"]
        drawn = deltas_of(shape, tasks, synthetic.DEFAULT_SPECTRUM)
        deltas, rank = [d.to(session.device) for d in drawn], plain.rank_of(shape, tasks)
        for driver in session.drivers:
            row["plain"][driver or "LAPACK"] = _plain_seconds(session, deltas, rank, driver)
            session.say(f"{shape}, {tasks}", row)


def _plain_seconds(
    session: Session, deltas: Sequence[Any], rank: int, driver: str | None
) -> float | str:
    """Seconds of the plain algorithm by one driver, or why it fails."""
    from benchmarks.speed import plain

    try:
        plain.merge([delta[:32, :32] for delta in deltas], 4, driver=driver)  # loads libraries
        return session.timed(lambda: plain.merge(deltas, rank, driver=driver))
    except RuntimeError as error:
        return str(error).splitlines()[0]


def merges(session: Session) -> None:
    """Whole merges: seconds by activity, memory, overlap; the plain algorithm on shallow towers."""
    import hf_tsv
    from benchmarks.speed import synthetic

    out, driver = synthetic.CACHE / "gpu-out", _fastest_driver(session)
    first = synthetic.checkpoints("tiny", 2, 1)  # loads libraries
    options: dict[str, Any] = {"device": session.device, "force": True, "output": out / "ours"}
    hf_tsv.merge(list(first.tasks), base_model=first.base, **options)
    for model, tasks, layers in session.scale.zoos:
        making = session.timed(lambda: synthetic.checkpoints(model, tasks, layers))  # noqa: B023
        zoo = synthetic.checkpoints(model, tasks, layers)
        row: dict[str, Any] = {
            "model": model, "tasks": tasks, "layers": layers, "bytes": zoo.bytes(),
            "making": making, "ours": [], "plain": {},
        }  # fmt: skip
        for _ in range(session.scale.rounds):
            session.forget_peak()
            started = time.perf_counter()
            report = hf_tsv.merge(list(zoo.tasks), base_model=zoo.base, **options)
            wall = time.perf_counter() - started
            run = {"wall": wall, **report.timings, "peak_bytes": session.peak()}
            row["ours"].append(run)
            session.say(f"{model}, {tasks}, {layers}", row)
        if layers == PLAIN_LAYERS:
            row["plain"][driver or "LAPACK"] = _plain_merge(session, zoo, out / "plain", driver)
            session.say(f"{model}, {tasks}, {layers}", row)
        shutil.rmtree(out, ignore_errors=True)


def _fastest_driver(session: Session) -> str | None:
    """Routine of cuSOLVER that takes least for one matrix; None on the CPU."""
    from benchmarks.speed.kernels import deltas_of
    from benchmarks.speed.synthetic import DEFAULT_SPECTRUM

    shape = session.scale.shapes[0]
    deltas = [d.to(session.device) for d in deltas_of(shape, 2, DEFAULT_SPECTRUM)][:1]
    found = {d: _plain_seconds(session, deltas, min(shape), d) for d in session.drivers}
    seconds = {driver: s for driver, s in found.items() if isinstance(s, float)}
    return min(seconds, key=lambda driver: seconds[driver]) if seconds else None


def _plain_merge(
    session: Session, zoo: Any, out: Path, driver: str | None
) -> dict[str, float] | str:
    """Seconds of a merge by the plain algorithm, or why it fails."""
    from benchmarks.speed import plain

    started = time.perf_counter()
    try:
        seconds = plain.merge_checkpoints(zoo.base, zoo.tasks, out, session.device, False, driver)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return {"wall": time.perf_counter() - started, "computing": seconds.computing}


def profile(session: Session) -> None:
    """Operators that take most of one weight."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    from benchmarks.speed import accuracy, plain, synthetic
    from benchmarks.speed.kernels import deltas_of

    shape, tasks = session.scale.shapes[0], session.scale.tasks[0]
    drawn = deltas_of(shape, tasks, synthetic.DEFAULT_SPECTRUM)
    deltas, rank = [d.to(session.device) for d in drawn], plain.rank_of(shape, tasks)

    def call() -> None:
        accuracy.merged(deltas, rank, [0.0] * tasks, session.device)

    call()
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if session.on_gpu else [])
    with profiled(activities=kinds) as found:
        seconds = session.timed(call)
    side = "device" if session.on_gpu else "cpu"

    def own(event: Any) -> float:
        return float(getattr(event, f"self_{side}_time_total"))

    events = sorted(found.key_averages(), key=own, reverse=True)[:15]
    top = [[event.key, event.count, own(event) / 1e6] for event in events]
    session.say(f"{shape}, {tasks}", {"seconds": seconds, "side": side, "top": top})


STEPS: Mapping[str, tuple[Callable[[Session], None], int]] = {
    "environment": (environment, 40),
    "tests": (tests, 90),
    "kernels": (kernels, 90),
    "profile": (profile, 30),
    "spectra": (spectra, 60),
    "weights": (weights, 50),
    "merges": (merges, 300),
}
"""Steps by name, in order, with the seconds that each may take of those that are left."""


# Running them


def run_all(chosen: argparse.Namespace) -> dict[str, Any]:
    """Run every step in a process of its own, and write everything after each."""
    out: Path = chosen.out
    found: dict[str, Any] = {"steps": {}, "sections": {}}
    began = time.monotonic()
    for name, (_, limit) in STEPS.items():
        if name not in (chosen.step or STEPS):
            continue
        left = chosen.seconds - (time.monotonic() - began)
        left = left if chosen.small else min(limit, left)  # a rehearsal may be slow
        rows = out.with_suffix(f".{name}.jsonl")
        rows.unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.speed.gpu", "--only", name, "--out", str(rows)]
        command += ["--device", chosen.device, *(["--small"] if chosen.small else [])]
        print(f"{name}, {left:.0f} s at most", flush=True)
        started = time.monotonic()
        status = _outcome(command, left) if left > 1 else "no time was left"
        found["steps"][name] = {"status": status, "seconds": time.monotonic() - started}
        found["sections"][name] = dict(_rows(rows))
        rows.unlink(missing_ok=True)
        print(f"  {status}", flush=True)
        draft = out.with_suffix(".part")
        draft.write_text(json.dumps(found, indent=1) + "\n")
        draft.replace(out)
        if name == "environment" and not found["sections"][name].get("facts"):
            break  # without torch, or without the device, nothing else works
    return found


def _outcome(command: Sequence[str], limit: float) -> str:
    """Run a step; say that it is done, or how it ended."""
    step = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = step.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):  # with those that it started
            os.killpg(step.pid, signal.SIGKILL)
        step.communicate()
        return f"stopped after {limit:.0f} s"
    if not step.returncode:
        return "done"
    return f"failed: {said.strip().splitlines()[-1] if said.strip() else step.returncode}"


def _rows(file: Path) -> Iterator[tuple[str, Row]]:
    """Rows that a step wrote, the last one of each key; a half line is left out."""
    if not file.exists():
        return
    for line in file.read_text().splitlines():
        try:
            key, row = json.loads(line)
        except ValueError:
            continue
        yield key, row


def run_one(chosen: argparse.Namespace) -> None:
    """Run one step in this process."""
    with chosen.out.open("a") as file:

        def say(key: str, row: Row) -> None:
            file.write(json.dumps([key, row]) + "\n")
            file.flush()

        scale = SMALL if chosen.small else FULL
        STEPS[chosen.only][0](Session(chosen.device, scale, say))


# Tables


def markdown(found: Row) -> str:
    """All that was measured, as tables."""
    from benchmarks.speed import results

    sections, lines = found["sections"], ["# On a GPU", ""]
    if facts := sections.get("environment", {}).get("facts"):
        lines += [
            f"{facts['date']}, {facts['device']}, {facts['cpus']} cores,"
            f" {facts['memory_bytes'] / 2**30:.0f} GiB, torch {facts['versions']['torch']}.",
            "",
        ]
    ended = [
        [name, row["status"], f"{row['seconds']:.0f} s"] for name, row in found["steps"].items()
    ]
    lines += [*results.table(["step", "", "time"], ended), ""]
    writers = {
        "merges": _merges, "kernels": _kernels, "spectra": _errors, "weights": _errors,
        "profile": _profile,
    }  # fmt: skip
    for name, write in writers.items():
        if rows := sections.get(name):
            head, cells = write(rows)
            lines += [f"## {name.capitalize()}", "", *results.table(head, cells), ""]
    for row in sections.get("tests", {}).values():
        lines += ["## Tests", "", "```", *row["tail"][-8:], "```", ""]
    return "\n".join(lines)


def _merges(rows: Mapping[str, Row]) -> Table:
    head = [
        "model", "tasks", "layers", "files", "hf-tsv", "reading", "waiting", "computing", "writing",
        "reading hidden", "peak on the device", "plain, best driver", "wall ratio", "compute ratio",
    ]  # fmt: skip
    return head, [_merge(row) for row in rows.values()]


def _merge(row: Row) -> list[str]:
    middle = {key: median(run[key] for run in row["ours"]) for key in row["ours"][0]}
    cells = [row["model"], str(row["tasks"]), str(row["layers"]), f"{row['bytes'] / 1e9:.2f} GB"]
    cells += [f"{middle[k]:.2f} s" for k in ("wall", "reading", "waiting", "computing", "writing")]
    hidden = max(0.0, 1 - middle["waiting"] / middle["reading"]) if middle["reading"] else 0.0
    cells += [f"{hidden:.0%}", f"{max(run['peak_bytes'] for run in row['ours']) / 1e6:,.0f} MB"]
    worked = {name: run for name, run in row["plain"].items() if not isinstance(run, str)}
    if not worked:
        return [*cells, "–", "–", "–"]
    best = min(worked, key=lambda name: worked[name]["wall"])
    ratios = (worked[best][k] / middle[k] if middle[k] else 0.0 for k in ("wall", "computing"))
    return [*cells, f"{worked[best]['wall']:.2f} s ({best})", *(f"{r:.1f} ×" for r in ratios)]


def _kernels(rows: Mapping[str, Row]) -> Table:
    drivers = sorted({driver for row in rows.values() for driver in row["plain"]})
    head = ["shape", "tasks", "hf-tsv", "truncation", "polar", "full SVDs", "peak"]
    head += [f"plain, {driver}" for driver in drivers]
    lines = []
    for row in rows.values():
        own = [f"{1e3 * median(row[key]):.1f} ms" for key in ("ours", "truncation", "polar")]
        cells = [" × ".join(map(str, row["shape"])), row["tasks"], *own, row["exact"]]
        cells.append(f"{row['peak_bytes'] / 1e6:,.0f} MB")
        plain = (row["plain"].get(driver) for driver in drivers)
        cells += [f"{1e3 * s:.1f} ms" if isinstance(s, float) else "–" for s in plain]
        lines.append(cells)
    return head, lines


def _errors(rows: Mapping[str, Row]) -> Table:
    lines = [[name, f"{row['plain']:.0e}", f"{row['ours']:.0e}"] for name, row in rows.items()]
    return ["", "error, plain", "error, hf-tsv"], lines


def _profile(rows: Mapping[str, Row]) -> Table:
    lines = []
    for key, row in rows.items():
        lines.append(
            [f"**{key}: all, on the {row['side']}**", "", f"{1e3 * row['seconds']:.1f} ms"]
        )
        lines += [[name, count, f"{1e3 * own:.2f} ms"] for name, count, own in row["top"]]
    return ["operator", "calls", "time"], lines


def main() -> None:
    """Run the steps, one of them, or make the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny sizes, to rehearse")
    parser.add_argument("--seconds", type=float, default=525, help="for all steps [default: 525]")
    parser.add_argument("--out", type=Path, default=Path("gpu.json"), help="[default: gpu.json]")
    parser.add_argument("--step", action="append", choices=STEPS, help="[default: all]")
    parser.add_argument("--only", choices=STEPS, help="one step, in this process")
    parser.add_argument("--from", dest="source", type=Path, help="JSON to make the tables of")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the tables")
    chosen = parser.parse_args()
    chosen.out = chosen.out.absolute()
    if chosen.only:
        run_one(chosen)
        return
    found = json.loads(chosen.source.read_text()) if chosen.source else run_all(chosen)
    if chosen.source:
        chosen.folder.mkdir(parents=True, exist_ok=True)
        (chosen.folder / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
        (chosen.folder / "gpu.md").write_text(markdown(found))
    print(markdown(found))
    sys.exit(any(step["status"] != "done" for step in found["steps"].values()))


if __name__ == "__main__":
    main()
