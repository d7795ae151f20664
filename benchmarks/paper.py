"""Merge of a paper's suite from the Hub, evaluated and printed beside the published rows.

`python -m benchmarks.paper vit-b-32-8` downloads eight fine-tunes, the base model and the whole
datasets; `--limit 500` classifies only 500 images of each task. Ours stands below the rows that
were published for the same fine-tunes; those of the paper, for its own fine-tunes, follow.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import hf_tsv
from hf_tsv.cli.evaluate import text_of
from hf_tsv.cli.output import guarded
from hf_tsv.evaluation import suites
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.verbs.evaluate import EvaluateReport


def run(name: str, method: str, limit: int | None, folder: Path) -> EvaluateReport:
    """Merge the fine-tunes of a suite into a folder, unless that is done, and evaluate the merge.

    Args:
        name: name of the suite.
        method: method of the merge.
        limit: number of images per task, if not all.
        folder: folder for the merged model and the results.
    """
    suite = suites.named(name)
    merged = folder / f"{name}-{method}"
    if not merged.exists():
        hf_tsv.merge(
            list(suite.references.values()),
            base_model=suite.base_model,
            method=method,
            output=merged,
        )
    results = folder / f"{name}-{method}-results"
    return hf_tsv.evaluate(merged, suite=name, limit=limit, output=results, force=True)


@guarded("evaluate")
def main(words: Sequence[str] | None = None) -> None:
    """Merge, evaluate, print; exit 1 if a task could not be evaluated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("suite", help="such as vit-b-32-8")
    methods = [name for name, row in METHODS.items() if not (row.learns or row.beside)]
    parser.add_argument("--method", choices=methods, default="tsv")
    parser.add_argument("--limit", type=int, help="so many images of each task")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="for what it makes")
    chosen = parser.parse_args(words)
    report = run(chosen.suite, chosen.method, chosen.limit, chosen.folder)
    print(text_of(report))
    if report.errors:
        sys.exit(1)


if __name__ == "__main__":
    main()
