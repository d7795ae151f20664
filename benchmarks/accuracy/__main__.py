"""Accuracy of every method on models trained here: tiny CLIPs, LoRA of them, a larger CLIP.

`python -m benchmarks.accuracy` merges 8, 14 and 20 tasks of three seeds of tiny CLIPs; with
`--suite lora` eight LoRA fine-tunes of the same base models, with `--suite larger` eight fine-tunes
of a CLIP of 12 layers; `--suite details` has ranks and variants of TSV-Merge, and compression;
`--suite routing` has models that route their images, beside the best merges. It trains models and
runs methods unless their results exist, and writes JSON, Markdown and pictures into
`benchmarks/accuracy/results/`. Everything is kept in `.accuracy/`, so that a stopped run resumes.
All of it takes some hours on two cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.accuracy import results
from benchmarks.accuracy.runs import clear
from benchmarks.accuracy.suites import SUITES
from benchmarks.prepared import bars, quiet_libraries

CACHE = Path(__file__).parents[2] / ".accuracy"


def main() -> None:
    """Train, run, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--suite", choices=SUITES, default="tiny")
    parser.add_argument("--seeds", help="with commas between; by default those of the suite")
    parser.add_argument("--cache", type=Path, default=CACHE, help="for models and finished runs")
    parser.add_argument("--only", default="", help="runs whose name begins so, and no tables")
    arguments = parser.parse_args()
    quiet_libraries()
    suite = SUITES[arguments.suite]
    numbers = [int(n) for n in arguments.seeds.split(",")] if arguments.seeds else suite.seeds
    seeds = [suite.prepared(number, arguments.cache) for number in numbers]
    with bars() as progress:
        for seed in seeds:
            runs = suite.runs(seed, suite.counts)
            bar = progress.add_task(f"Seed {seed.number}", total=len(runs))
            for name, measure in runs.items():
                if name.startswith(arguments.only):
                    seed.kept(name, measure)
                progress.advance(bar)
            clear(seed)
    if not arguments.only:
        results.write(results.summary(suite, seeds))


if __name__ == "__main__":
    main()
