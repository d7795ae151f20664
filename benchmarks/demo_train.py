"""Demo of hf-tsv from scratch: tiny CLIPs are trained, merged, compressed and measured.

`python -m benchmarks.demo_train` trains a base and one fine-tune per task (cached in `.demo/`),
runs `hf-tsv merge` with three methods, compresses every task to several sizes, measures the
interference of tasks, and prints accuracies on test images that were not trained on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from benchmarks import compression, interference
from benchmarks.demo import AVERAGE, FINE_TUNED, HF_TSV, TSV, UNTRAINED, table
from benchmarks.prepared import bars, quiet_libraries, trained

ALPHAS = (0.2, 0.3, 0.5)
ARITHMETIC = "task arithmetic"


def merge(folder: Path, names: Sequence[str], output: Path, *options: str) -> Path:
    """Run `hf-tsv merge` on the fine-tunes in `folder`."""
    command = [HF_TSV, "merge", *(folder / name for name in names), "--base-model", folder / "base"]
    options = ("-o", str(output), "--force", "--quiet", *options)
    done = subprocess.run(
        [*map(str, command), *options], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return output


def merge_all(folder: Path, names: Sequence[str], progress: Progress) -> dict[str, Path]:
    """Make every merge of the demo, two processes at a time."""
    wanted = {TSV: ["--method", "tsv", "--report"], AVERAGE: ["--method", "average"]}
    for alpha in ALPHAS:
        wanted[f"{ARITHMETIC} {alpha}"] = ["--method", "task-arithmetic", "--alpha", str(alpha)]
    bar = progress.add_task("Merging with hf-tsv", total=len(wanted))

    def run(item: tuple[str, list[str]]) -> tuple[str, Path]:
        name, options = item
        output = merge(folder, names, folder / f"merged-{name.replace(' ', '-').lower()}", *options)
        progress.advance(bar)
        return name, output

    with ThreadPoolExecutor(2) as pool:
        return dict(pool.map(run, wanted.items()))


def measure(
    folder: Path, merged: dict[str, Path], seed: int, progress: Progress
) -> dict[str, list[float]]:
    """Test accuracy, in per cent, of every row of the table, by task."""
    from benchmarks.tiny_clip.evaluation import accuracy, load_model, load_vision
    from benchmarks.tiny_clip.first_tasks import FIRST_TASKS

    bar = progress.add_task("Measuring on test images", total=len(ALPHAS) + 5)

    def of_model(path: Path, split: str) -> list[float]:
        model, processor = load_model(path)
        return [
            accuracy(model, model.vision_model, processor, task, split, seed)  # type: ignore[arg-type]
            for task in FIRST_TASKS
        ]

    rows = {UNTRAINED: of_model(folder / "base", "test")}
    progress.advance(bar)
    validation = {}
    for alpha in ALPHAS:
        validation[alpha] = sum(of_model(merged[f"{ARITHMETIC} {alpha}"], "validation"))
        progress.advance(bar)
    best = max(validation, key=lambda alpha: validation[alpha])
    rows[AVERAGE] = of_model(merged[AVERAGE], "test")
    progress.advance(bar)
    rows[f"{ARITHMETIC}, α = {best}"] = of_model(merged[f"{ARITHMETIC} {best}"], "test")
    progress.advance(bar)
    rows[TSV] = of_model(merged[TSV], "test")
    progress.advance(bar)
    model, processor = load_model(folder / "base")
    rows[FINE_TUNED] = [
        accuracy(model, load_vision(folder / task.name), processor, task, "test", seed)
        for task in FIRST_TASKS
    ]
    progress.advance(bar)
    return rows


def main() -> None:
    """Train, merge, compress, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="of all data and training")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    arguments = parser.parse_args()
    started = time.monotonic()
    quiet_libraries()

    from benchmarks.tiny_clip.first_tasks import FIRST_TASKS

    names = [task.name for task in FIRST_TASKS]
    with bars() as progress:
        folder = trained(arguments.seed, progress)
        merged = merge_all(folder, names, progress)
        rows = measure(folder, merged, arguments.seed, progress)
        points = compression.measure(folder, rows[FINE_TUNED], arguments.seed, progress)
        found = interference.report(folder, names)
        groups = [*interference.extremes(found["pairs"]), range(len(names))]
        pairs = interference.measure(
            folder, found, groups, rows[FINE_TUNED], arguments.seed, progress
        )
    Console().print(table(rows, names))
    plot = folder / "compression.svg"
    compression.plot(points, plot)
    Console().print(compression.table(points))
    print("The pair of tasks that interferes most, the pair that interferes least, and all eight:")
    Console().print(interference.table(pairs))
    seconds = time.monotonic() - started
    if arguments.json:
        compressed = [asdict(point) for point in points]
        content = {"tasks": names, "accuracy": rows, "compressed": compressed}
        content["interference"] = [asdict(row) for row in pairs]
        content["seconds"] = round(seconds, 1)
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    print(f"The plot of compression is in {plot}")
    print(f"The task interference is in {folder / 'interference' / 'interference.html'}")
    print(f"\nDone in {seconds:.0f} s. The merged model is in\n{merged[TSV]}\nLoad it with\n")
    print("  from transformers import CLIPModel, CLIPProcessor")
    print(f"  model = CLIPModel.from_pretrained({str(merged[TSV])!r})")
    print(f"  processor = CLIPProcessor.from_pretrained({str(merged[TSV])!r})")


if __name__ == "__main__":
    main()
