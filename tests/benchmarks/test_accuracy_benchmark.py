"""Tables of the accuracy benchmark, from runs whose numbers are known."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy import results
from benchmarks.accuracy.runs import METHODS, Runs, Seed, detail_runs, method_runs, stepped
from benchmarks.accuracy.suites import SUITES

COUNTS = (2, 4)
TASKS = ("a", "b", "c", "d")
SUITE = replace(SUITES["tiny"], counts=COUNTS)


def every_run(seed: Seed) -> Runs:
    return {**method_runs(seed, COUNTS), **detail_runs(seed, COUNTS)}


def kept(rng: np.random.Generator, name: str) -> Any:
    """What a run of this name would have kept."""

    def accuracies() -> dict[str, float]:
        return {task: float(rng.uniform(0.2, 0.9)) for task in TASKS}

    if name == "references":
        return {"base": accuracies(), "fine-tuned": accuracies()}
    if name == "sweep":
        return {"fractions": [0.1, 1.0], "mean": [0.5, 0.75], "full": 0.75, "stored": [0.3, 1.0]}
    found: dict[str, Any] = {"accuracies": accuracies()}
    if name.rpartition("-")[0] in (*METHODS, *stepped()):
        found |= {"alpha": 0.5, "alphas": [0.5, 1.0], "validation": [0.6, 0.4]}
    if name.startswith(("factors", "tall-mask")):
        found |= {"bytes": 300, "checkpoint_bytes": 1000}
    return found


@pytest.fixture
def seeds(tmp_path: Path) -> list[Seed]:
    """Two seeds of which everything has been run."""
    found = []
    for number in (0, 1):
        rng = np.random.default_rng(number)
        seed = Seed(number, tmp_path, tmp_path, tmp_path / str(number), TASKS)
        for name in every_run(seed):
            seed.kept(name, lambda name=name, rng=rng: kept(rng, name))
        found.append(seed)
    return found


def test_scores_are_means_over_tasks_and_spread_over_seeds(seeds: list[Seed]) -> None:
    found = results.summary(SUITE, seeds)
    for count in COUNTS:
        tasks = TASKS[:count]
        expected = []
        for seed in seeds:
            own = json.loads((seed.results / "references.json").read_text())["fine-tuned"]
            run = json.loads((seed.results / f"consensus-{count}.json").read_text())["accuracies"]
            expected.append(100 * np.mean([run[task] / own[task] for task in tasks]))
        row = found["methods"][str(count)]["consensus"]
        assert row["normalised"] == pytest.approx(expected)
        cell = f"{np.mean(expected):.1f} ± {np.std(expected, ddof=1):.1f}"
        line = next(x for x in results.main_table(found).splitlines() if "consensus" in x)
        assert cell in line
    own = found["methods"]["4"]["fine-tuned"]
    assert own["normalised"] == pytest.approx([100, 100])


def test_the_order_is_told_as_it_was_found(seeds: list[Seed]) -> None:
    found = results.summary(SUITE, seeds)
    text = results.markdown(found)
    for count in COUNTS:
        rows = found["methods"][str(count)]
        low, high = (np.array(rows[name]["normalised"]) for name in ("average", "task-arithmetic"))
        apart = high - low
        cell = f"{apart.mean():.1f} ± {apart.std(ddof=1):.1f} ({(apart >= 0).sum()} of 2)"
        assert cell in text


def test_what_was_run_is_not_run_again_and_nothing_is_made_up(seeds: list[Seed]) -> None:
    def never() -> Any:
        raise AssertionError

    for name in every_run(seeds[0]):
        seeds[0].kept(name, never)
    (seeds[0].results / "tsv-2.json").unlink()
    with pytest.raises(SystemExit, match="Not everything has been run"):
        results.summary(SUITE, seeds)


def test_json_markdown_and_picture_are_written(seeds: list[Seed], tmp_path: Path) -> None:
    found = results.summary(SUITE, seeds)
    results.write(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "accuracy.json").read_text()) == found
    details = results.summary(replace(SUITES["details"], counts=COUNTS), seeds)
    results.write(details, tmp_path / "out")
    text = (tmp_path / "out" / "accuracy-details.md").read_text()
    assert "30.0 ± 0.0" in text and "## Methods" not in text  # bytes of masks
    assert (tmp_path / "out" / "alphas.svg").read_text().count("<path") > 20


def test_other_suites_have_reports_of_their_own(seeds: list[Seed], tmp_path: Path) -> None:
    suite = replace(SUITES["lora"], counts=COUNTS)
    found = results.summary(suite, seeds)
    results.write(found, tmp_path / "out")
    text = (tmp_path / "out" / "accuracy-lora.md").read_text()
    assert "--suite lora" in text and "## Compression" not in text
    rows = found["comparisons"]["4"]["alone"]
    own, other = (np.array(rows[n]["normalised"]) for n in ("tsv-default", "wudi-tact-1"))
    apart = other - own
    cell = f"{apart.mean():+.1f} ± {apart.std(ddof=1):.1f} ({(apart > 0).sum()} of 2)"
    line = next(x for x in text.splitlines() if x.startswith("| WUDI, filter TACT "))
    assert cell in line
