"""First merge in a minute: the trained tiny CLIPs of `examples/tiny/`, merged and measured.

`python -m benchmarks.demo` merges eight fine-tunes with `hf-tsv merge`, once with task singular
vectors and once by simple averaging, and prints accuracies on test images beside those of the base
model and of each fine-tune. Nothing is trained: that is `python -m benchmarks.demo_train`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.prepared import CACHE, bars, quiet_libraries
from benchmarks.tiny_clip import BASE, NAMES, TINY

HF_TSV = Path(sys.executable).with_name("hf-tsv")
TSV, AVERAGE = "TSV-Merge", "average"
UNTRAINED, FINE_TUNED = "base, zero-shot", "fine-tuned, one model a task"


def normalised(row: Sequence[float], fine_tuned: Sequence[float]) -> float:
    """Mean share of each fine-tune's own accuracy that a model keeps (eq. 9), in per cent."""
    return 100 * sum(a / b for a, b in zip(row, fine_tuned, strict=True)) / len(row)


def table(rows: dict[str, list[float]], names: Sequence[str]) -> Table:
    """Table of the accuracies, one row per task; the best single model is bold."""
    means = {name: sum(row) / len(row) for name, row in rows.items() if name != FINE_TUNED}
    best = max(means, key=lambda name: means[name])
    result = Table(title="Accuracy on test images (%)")
    result.add_column("task")
    for name in rows:
        result.add_column(name, justify="right", style="bold" if name == best else None)
    for i, task in enumerate(names):
        result.add_row(task, *(f"{row[i]:.1f}" for row in rows.values()))
    result.add_section()
    result.add_row("mean", *(f"{sum(row) / len(row):.1f}" for row in rows.values()))
    shares = (normalised(row, rows[FINE_TUNED]) for row in rows.values())
    result.add_row("normalised", *(f"{share:.1f}" for share in shares))
    return result


def shown(path: Path) -> str:
    """Path as a person would type it here."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def merging(method: str, output: Path) -> list[str]:
    """Command that merges the eight fine-tunes."""
    tasks = [shown(TINY / name) for name in NAMES]
    options = ["--base-model", shown(BASE), "--method", method, "-o", shown(output), "--force"]
    return ["hf-tsv", "merge", *tasks, *options]


def begun(command: Sequence[str]) -> subprocess.Popen[str]:
    """Process of a command of hf-tsv that says nothing but its errors."""
    words, pipe = [str(HF_TSV), *command[1:], "--quiet"], subprocess.PIPE
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=pipe, text=True)


def finished(process: subprocess.Popen[str]) -> None:
    """Wait for a command; its own error ends the demo."""
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(said)


def measured(output: Path, command: Sequence[str]) -> dict[str, list[float]]:
    """Merge, and measure the test accuracy in per cent of every model on every task.

    Args:
        output: folder for the merge by task singular vectors; the average gets one beside it.
        command: command that writes it.

    Returns:
        Accuracies by model, in the order of the tasks.
    """
    plain = output.with_name(f"{output.name}-average")
    with bars() as progress:
        merges = progress.add_task("Merging with hf-tsv", total=2)
        bar = progress.add_task("Measuring on test images", total=4 * len(NAMES))
        jobs = {TSV: begun(command), AVERAGE: begun(merging("average", plain))}

        import hf_tsv
        from benchmarks.tiny_clip.checkpoints import quietly
        from benchmarks.tiny_clip.evaluation import accuracy, load_model
        from benchmarks.tiny_clip.first_tasks import FIRST_TASKS

        base, processor = load_model(BASE)
        rows: dict[str, list[float]] = {}

        def add(name: str, towers: Sequence[object]) -> None:
            rows[name] = []
            for task, tower in zip(FIRST_TASKS, towers, strict=True):
                found = accuracy(base, tower, processor, task, "test", 0)  # type: ignore[arg-type]
                rows[name].append(found)
                progress.advance(bar)

        add(UNTRAINED, [base.vision_model] * len(NAMES))
        folders = {AVERAGE: plain, TSV: output}
        for name, folder in folders.items():
            finished(jobs[name])
            progress.advance(merges)
            add(name, [load_model(folder)[0].vision_model] * len(NAMES))
        kind = "image-feature-extraction"
        add(
            FINE_TUNED,
            [
                quietly(lambda n=name: hf_tsv.load_model(TINY / n, kind=kind, base_model=BASE))
                for name in NAMES
            ],
        )
    return rows


def main() -> None:
    """Merge, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("-o", "--output", type=Path, default=CACHE / "merged", help="merged model")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    arguments = parser.parse_args()
    started = time.monotonic()
    quiet_libraries()
    output = arguments.output.absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    command = merging("tsv", output)
    print("Eight fine-tunes of one tiny CLIP, each on a task of its own, become one model:\n")
    lines = textwrap.wrap(" ".join(command), 90, break_long_words=False, break_on_hyphens=False)
    print("  " + " \\\n    ".join(lines) + "\n", flush=True)
    rows = measured(output, command)
    Console().print(table(rows, NAMES))
    print("normalised: mean share of each fine-tune's own accuracy that the model keeps")
    seconds = time.monotonic() - started
    if arguments.json:
        content = {"tasks": NAMES, "accuracy": rows, "seconds": round(seconds, 1)}
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"\nDone in {seconds:.0f} s. The merged model is in {shown(output)}. Load it with\n")
    print("  from transformers import CLIPModel, CLIPProcessor")
    print(f"  model = CLIPModel.from_pretrained({shown(output)!r})")
    print(f"  processor = CLIPProcessor.from_pretrained({shown(output)!r})")


if __name__ == "__main__":
    main()
