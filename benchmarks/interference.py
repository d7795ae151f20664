"""Does the pair of tasks that interferes most lose most? On the trained tasks of the demo.

`python -m benchmarks.interference` measures the interference of the eight tasks, merges every two
of them with all four methods of the ablation (low-rank or not, orthogonal or not), and prints how
much of the fine-tunes' accuracy each merge keeps.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks.prepared import bars, quiet_libraries, trained

HF_TSV = Path(sys.executable).with_name("hf-tsv")
ABLATION = ("task-arithmetic", "low-rank", "orthogonal", "tsv")


@dataclass(frozen=True)
class Merged:
    """Group of tasks merged with every method.

    Args:
        tasks: names of the tasks.
        sti: singular task interference of the triplets that a merge of all tasks keeps.
        kept: mean share of each fine-tune's own accuracy, in per cent, by method.
    """

    tasks: tuple[str, ...]
    sti: float
    kept: Mapping[str, float]


def report(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Run `hf-tsv interference` on the fine-tunes in `folder`; the report stays beside them."""
    tasks = [folder / name for name in names]
    base = ("--base-model", folder / "base", "-o", folder / "interference")
    command = [HF_TSV, "interference", *tasks, *base, "--force", "--quiet", "--json"]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def extremes(pairs: Sequence[Sequence[float]]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pairs of tasks that interfere most and least."""
    ranked = sorted(combinations(range(len(pairs)), 2), key=lambda pair: pairs[pair[0]][pair[1]])
    return ranked[-1], ranked[0]


def measure(
    folder: Path,
    found: Mapping[str, Any],
    wanted: Iterable[Sequence[int]],
    fine_tuned: Sequence[float],
    seed: int,
    progress: Progress,
) -> list[Merged]:
    """Merge groups of tasks with every method, at the rank of a merge of all of them."""
    import hf_tsv
    from benchmarks.tiny_clip.evaluation import accuracy, load_model
    from benchmarks.tiny_clip.first_tasks import FIRST_TASKS

    wanted = list(wanted)
    names = [task["name"] for task in found["tasks"]]
    bar = progress.add_task("Merging pairs", total=len(wanted) * len(ABLATION))
    output = folder / "merged-pair"
    results = []
    for group in wanted:
        kept = {}
        for method in ABLATION:
            truncated = method in ("low-rank", "tsv")
            hf_tsv.merge(
                [folder / names[i] for i in group],
                base_model=folder / "base",
                output=output,
                method=method,
                rank_fraction=1 / len(names) if truncated else None,
                force=True,
                progress=False,
            )
            model, processor = load_model(output)
            kept[method] = mean(
                100 * accuracy(model, model.vision_model, processor, FIRST_TASKS[i], "test", seed)
                / fine_tuned[i]
                for i in group
            )  # fmt: skip
            progress.advance(bar)
        pair = len(group) == 2
        sti = found["pairs"][group[0]][group[1]] if pair else found["total"]
        results.append(Merged(tuple(names[i] for i in group), sti, kept))
    return results


def table(results: Sequence[Merged]) -> Table:
    """Table of the accuracy kept by every method, the group that interferes most first."""
    shown = Table(title="Accuracy kept by merges (% of the fine-tunes')")
    shown.add_column("tasks")
    for name in ("STI", *ABLATION):
        shown.add_column(name, justify="right")
    for row in sorted(results, key=lambda row: -row.sti):
        tasks = " and ".join(row.tasks) if len(row.tasks) == 2 else f"all {len(row.tasks)}"
        shown.add_row(tasks, f"{row.sti:.1f}", *(f"{row.kept[m]:.1f}" for m in ABLATION))
    return shown


def rank_correlation(results: Sequence[Merged], method: str) -> float:
    """Spearman correlation of the interference of pairs with the accuracy their merge keeps."""
    from scipy.stats import spearmanr

    pairs = [row for row in results if len(row.tasks) == 2]
    return float(spearmanr([row.sti for row in pairs], [row.kept[method] for row in pairs])[0])


def main() -> None:
    """Train what is missing, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seed", type=int, default=0, help="of all data and training")
    parser.add_argument("--picture", type=Path, help="where to copy the heat map to")
    arguments = parser.parse_args()
    quiet_libraries()

    from benchmarks.compression import accuracies
    from benchmarks.tiny_clip.evaluation import load_vision
    from benchmarks.tiny_clip.first_tasks import FIRST_TASKS

    names = [task.name for task in FIRST_TASKS]
    with bars() as progress:
        folder = trained(arguments.seed, progress)
        fine_tuned = accuracies(folder, lambda name: load_vision(folder / name), arguments.seed)
        found = report(folder, names)
        groups = [*combinations(range(len(names)), 2), range(len(names))]
        results = measure(folder, found, groups, fine_tuned, arguments.seed, progress)
    Console().print(table(results))
    for method in ABLATION:
        rho = rank_correlation(results, method)
        print(f"Rank correlation of interference and accuracy kept, {method}: {rho:.2f}")
    if arguments.picture:
        shutil.copyfile(folder / "interference" / "pairs.png", arguments.picture)
    print(f"The report is {folder / 'interference' / 'interference.html'}")


if __name__ == "__main__":
    main()
