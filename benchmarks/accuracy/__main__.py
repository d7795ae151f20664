"""Accuracy of every method on 8, 14 and 20 tasks, three seeds of tiny CLIPs trained here.

`python -m benchmarks.accuracy` trains models and runs methods unless their results exist, and
writes JSON, Markdown and pictures into `benchmarks/accuracy/results/`. Everything is kept in
`.accuracy/`, so that a stopped run resumes. All of it takes some hours on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.accuracy import results
from benchmarks.accuracy.runs import Seed, all_runs, clear
from benchmarks.prepared import bars, quiet_libraries, trained

CACHE = Path(__file__).parents[2] / ".accuracy"
COUNTS = (8, 14, 20)
TEST_IMAGES = 500


def prepared(number: int, cache: Path) -> Seed:
    """Make the models and images of one seed, unless they exist."""
    import datasets

    from benchmarks.tiny_clip.datasets import write_task
    from benchmarks.tiny_clip.tasks import TASKS
    from benchmarks.tiny_clip.training import twenty_tasks

    datasets.disable_progress_bars()
    with bars() as progress:
        models = trained(number, progress, twenty_tasks(number), cache)
    images, found = models / "images", models / "results"
    for task in TASKS:
        if not (images / f"{task.name}-test.parquet").exists():
            write_task(task, images, number, TEST_IMAGES)
    return Seed(number, models, images, found, tuple(task.name for task in TASKS))


def main() -> None:
    """Train, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", default="0,1,2", help="with commas between")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for models and finished runs")
    parser.add_argument("--only", default="", help="runs whose name begins so, and no tables")
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [prepared(int(number), arguments.cache) for number in arguments.seeds.split(",")]
    with bars() as progress:
        for seed in seeds:
            runs = all_runs(seed, COUNTS)
            bar = progress.add_task(f"Seed {seed.number}", total=len(runs))
            for name, measure in runs.items():
                if name.startswith(arguments.only):
                    seed.kept(name, measure)
                progress.advance(bar)
            clear(seed)
    if not arguments.only:
        results.write(results.summary(seeds, COUNTS))


if __name__ == "__main__":
    main()
