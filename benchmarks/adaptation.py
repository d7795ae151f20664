"""What coefficients learned on unlabelled images are worth, on the tiny CLIPs of the demo.

`python -m benchmarks.adaptation` trains them if they are not there yet (`.demo/`), merges all
eight by TSV-Merge and by `--method ada`, which sees validation images without labels, and prints
accuracies on test images, measured by `hf_tsv.evaluate`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from benchmarks.demo import normalised
from benchmarks.prepared import bars, quiet_libraries, trained

VALIDATION_IMAGES, TEST_IMAGES = 500, 1_000
WHOLE_PROMPT = ("{}",)


def write_images(file: Path, task: Any, split: Literal["validation", "test"], seed: int) -> None:
    """A parquet file of one task, whose class names are its whole prompts."""
    import datasets
    from PIL import Image

    count = TEST_IMAGES if split == "test" else VALIDATION_IMAGES
    samples = task.samples(split, count, seed)
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.prompts))}
    rows = {"image": [*map(Image.fromarray, samples.images)], "label": samples.labels.tolist()}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)


def measure(folder: Path, seed: int, choices: dict[str, Any]) -> dict[str, list[float]]:
    """Accuracy in per cent on test images, by task, of every model."""
    import datasets

    import hf_tsv
    from benchmarks.tiny_clip.tasks import TASKS

    datasets.disable_progress_bars()
    images = folder / "images"
    images.mkdir(exist_ok=True)
    tasks = {}
    for split in ("validation", "test"):
        tasks[split] = []
        for task in TASKS:
            file = images / f"{task.name}-{split}.parquet"
            write_images(file, task, split, seed)
            tasks[split].append(hf_tsv.EvaluationTask(task.name, str(file), templates=WHOLE_PROMPT))
    found = {}
    for method in ("tsv", "ada"):
        learned = hf_tsv.Adaptation(tuple(tasks["validation"]), **choices)
        report = hf_tsv.merge(
            [folder / task.name for task in TASKS],
            base_model=folder / "base",
            output=folder / f"merged-{method}",
            method=method,
            adaptation=learned if method == "ada" else None,
            force=True,
        )
        if report.adaptation:
            print("Entropy before and after:", *report.adaptation["entropy"])
            print(f"Seconds: {report.seconds:.0f}")
        found[method] = accuracies(folder / f"merged-{method}", tasks["test"], folder)
    own = [accuracies(folder / task.name, [task], folder)[0] for task in tasks["test"]]
    return {**found, "fine-tuned, one model a task": own}


def accuracies(model: Path, tasks: Sequence[Any], folder: Path) -> list[float]:
    """Of one model, in per cent."""
    import hf_tsv

    report = hf_tsv.evaluate(model, tasks, base_model=folder / "base", batch_size=250)
    return [100 * float(entry["accuracy"]) for entry in report.tasks.values()]


def table(rows: dict[str, list[float]], names: Sequence[str]) -> Table:
    """The accuracies as people read them, a task a row."""
    *_, fine_tuned = rows.values()
    result = Table("task", *rows, title="Accuracy on test images (%)")
    for i, name in enumerate(names):
        result.add_row(name, *(f"{row[i]:.1f}" for row in rows.values()))
    result.add_section()
    result.add_row("mean", *(f"{sum(row) / len(row):.2f}" for row in rows.values()))
    result.add_row("normalised", *(f"{normalised(row, fine_tuned):.2f}" for row in rows.values()))
    return result


def main() -> None:
    """Train, merge, adapt, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="of all data and training")
    parser.add_argument("--steps", type=int, help="of adaptation")
    parser.add_argument("--learning-rate", type=float, help="of adaptation")
    arguments = parser.parse_args()
    quiet_libraries()

    from benchmarks.tiny_clip.tasks import TASKS

    choices = {"steps": arguments.steps, "learning_rate": arguments.learning_rate}
    choices = {name: value for name, value in choices.items() if value is not None}
    with bars() as progress:
        folder = trained(arguments.seed, progress)
    rows = measure(folder, arguments.seed, choices)
    Console().print(table(rows, [task.name for task in TASKS]))


if __name__ == "__main__":
    main()
