"""Where the processor time of a merge goes, step by step, and what reading costs per gigabyte.

`python -m benchmarks.speed.profile` merges synthetic fine-tunes in this process with a clock around
each step of the work, whose time is that of its thread without the steps within it. It writes
`benchmarks/speed/results/profile.json` and `profile.md`.
"""

from __future__ import annotations

import argparse
import functools
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.speed import machine, merges, synthetic
from benchmarks.speed.synthetic import MODELS, Zoo

RESULTS = Path(__file__).parent / "results" / "profile.json"
ROUTINES = {
    "dsyrk": "Gram matrices",
    "dsytrd": "tridiagonal form of the tasks' Gram matrices",
    "dlarre": "their eigenvalues",
    "dlarrv": "their leading eigenvectors",
    "dstemr": "their leading eigenvectors",
    "dormtr": "their leading eigenvectors",
}
STEPS = {
    "linalg.eigen._full_eigh": "eigendecompositions for the polar factors",
    "linalg.lanczos.leading_eigh": "Lanczos' method",
    "linalg.products.product": "products",
    "linalg.products.largest_entry": "largest entries",
    "linalg.products.norms": "norms and storage noise",
    "linalg.products.frobenius_norm": "norms and storage noise",
    "linalg.updates.storage_noise": "norms and storage noise",
    "linalg.updates.difference": "subtraction of the base",
    "linalg.svd._scaled": "conversion to float64",
    "checkpoints.storage.tensors.digest": "SHA-256",
    "checkpoints.storage.tensors.read_tensor": "reading of bytes",
    "merging.pipeline.merge_one": "sum of base and update",
    "merging.pipeline._write": "writing",
}
READING = "merging.loading.Reader.load"
REST = "imports, the interpreter and the rest"


class Clocks:
    """Processor seconds and calls of each step, in all threads."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.whole: Counter[str] = Counter()  # with the steps within them
        self._lock = threading.Lock()
        self._here = threading.local()

    def around(self, call: Callable[..., Any], name: Callable[..., str | None]) -> Any:
        """The same function with a clock; a name of None is part of what calls it."""

        @functools.wraps(call)
        def clocked(*arguments: Any, **options: Any) -> Any:
            step = name(*arguments)
            if step is None:
                return call(*arguments, **options)
            inner: list[float] = self._here.__dict__.setdefault("inner", [])
            inner.append(0.0)
            began = time.thread_time()
            try:
                return call(*arguments, **options)
            finally:
                spent, within = time.thread_time() - began, inner.pop()
                if inner:
                    inner[-1] += spent
                with self._lock:
                    self.seconds[step] += spent - within
                    self.whole[step] += spent
                    self.calls[step] += 1

        return clocked


def clocked() -> Clocks:
    """Put a clock around every step, wherever its function is known."""
    clocks = Clocks()
    for path, step in {**STEPS, READING: "the rest of reading"}.items():
        owner, name = _owner(path)
        known = getattr(owner, name)
        timed = clocks.around(known, lambda *_, step=step: step)
        setattr(owner, name, timed)
        for module in list(sys.modules.values()):
            if module.__name__.startswith("hf_tsv") and getattr(module, name, None) is known:
                setattr(module, name, timed)
    lapack = import_module("hf_tsv.linalg.lapack")
    call = lapack._call
    lapack._call = clocks.around(call, lambda routine, *_: ROUTINES.get(routine))  # type: ignore[attr-defined]
    return clocks


def _owner(path: str) -> tuple[Any, str]:
    """Module or class of a function, and its name there."""
    owner, _, name = f"hf_tsv.{path}".rpartition(".")
    module, _, kind = owner.rpartition(".")
    if kind[0].isupper():
        return getattr(import_module(module), kind), name
    return import_module(owner), name


def measured(zoo: Zoo, out: Path) -> dict[str, Any]:
    """Merge a zoo with clocks."""
    began, started = time.process_time(), time.perf_counter()
    import hf_tsv
    from hf_tsv.merging import pipeline  # noqa: F401  (with all that it uses)

    clocks = clocked()
    merges.clear(out)
    names = [str(task) for task in zoo.tasks]
    hf_tsv.merge(names, base_model=str(zoo.base), output=out, device="cpu", progress=False)
    wall, spent = time.perf_counter() - started, time.process_time() - began
    merges.clear(out)
    nbytes = sum(file.stat().st_size for file in zoo.files())
    steps = dict(clocks.seconds.most_common()) | {REST: spent - sum(clocks.seconds.values())}
    return {
        "model": zoo.model,
        "tasks": len(zoo.tasks),
        "layers": zoo.layers,
        "bytes": nbytes,
        "facts": machine.facts([], "cpu") | {"command": "python -m benchmarks.speed.profile"},
        "wall": wall,
        "cpu": spent,
        "reading": clocks.whole["the rest of reading"],
        "steps": steps,
        "calls": dict(clocks.calls),
    }


def markdown(found: Mapping[str, Any]) -> str:
    """Results as a table."""
    gigabytes = found["bytes"] / 1e9
    lines = [
        "# Where the processor time goes",
        "",
        f"`{found['facts']['command']}`: TSV-Merge of {found['tasks']} {found['model']} towers,"
        f" {found['layers']} layers, {gigabytes:.2f} GB of files, on {found['facts']['cpus']}"
        f" cores: {found['wall']:.1f} s, of which the processors worked {found['cpu']:.1f} s.",
        "",
        "| step | processor time | share | calls |",
        "|---|---:|---:|---:|",
    ]
    for step, seconds in found["steps"].items():
        calls = found["calls"].get(step)
        cells = (step, f"{seconds:.2f} s", f"{seconds / found['cpu']:.0%}", f"{calls or ''}")
        lines.append(f"| {' | '.join(cells)} |")
    reading = found["reading"]
    lines += [
        "",
        f"All that the reading thread does takes {reading:.2f} s,"
        f" {reading / gigabytes:.2f} s per gigabyte.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Merge, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--layers", type=int, help="[default: all]")
    parser.add_argument("--cache", type=Path, default=synthetic.CACHE, help="for checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS, help="file of the results")
    chosen = parser.parse_args()
    layers = chosen.layers or MODELS[chosen.model].layers
    zoo = synthetic.checkpoints(chosen.model, chosen.tasks, layers, folder=chosen.cache)
    found = measured(zoo, chosen.cache / "out" / "profile")
    machine.publish(chosen.results, found, markdown(found))


if __name__ == "__main__":
    main()
