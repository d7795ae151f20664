"""Many tensors and many tasks: time and output grow in proportion."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from reference import one_thread

import hf_tsv
from benchmarks.load import random_checkpoints
from benchmarks.speed.synthetic import Size, Zoo

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

TINY = Size(hidden=4, layers=0, heads=2, patch=112)


def merge(zoo: Zoo, out: Path) -> None:
    report = hf_tsv.merge(zoo.tasks, base_model=zoo.base, output=out, method="average")
    assert sum(report.weights.values()) > 16 * zoo.layers


def compress(zoo: Zoo, out: Path) -> None:
    hf_tsv.compress(zoo.tasks[0], base_model=zoo.base, output=out, rank=1)


def interference(zoo: Zoo, out: Path) -> None:
    hf_tsv.interference(zoo.tasks, base_model=zoo.base)


def seconds(work: Callable[[], None]) -> float:
    """Of processors: others on the machine do not count."""
    started = time.process_time()
    work()
    return time.process_time() - started


@pytest.mark.parametrize("verb", [merge, compress, interference])
def test_eight_times_the_tensors_take_about_eight_times_as_long(
    tmp_path: Path, verb: Callable[[Zoo, Path], None]
) -> None:
    few, many = (random_checkpoints(TINY, 2, layers, tmp_path) for layers in (15, 120))
    verb(few, tmp_path / "warm")
    short, long = (
        seconds(lambda zoo=zoo: verb(zoo, tmp_path / f"out-{zoo.layers}")) for zoo in (few, many)
    )
    assert long < 20 * short, (short, long)  # 64 times as long if every tensor saw all others


def test_four_times_the_tasks_take_about_four_times_as_long(tmp_path: Path) -> None:
    few, many = (random_checkpoints(TINY, tasks, 5, tmp_path) for tasks in (10, 40))
    merge(few, tmp_path / "warm")
    short, long = (
        seconds(lambda zoo=zoo: merge(zoo, tmp_path / f"out-{len(zoo.tasks)}"))
        for zoo in (few, many)
    )
    assert long < 10 * short, (short, long)


def test_card_and_recipe_of_many_tensors_stay_small(tmp_path: Path) -> None:
    zoo = random_checkpoints(TINY, 2, 120, tmp_path)
    hf_tsv.merge(zoo.tasks, base_model=zoo.base, output=tmp_path / "m")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "m").iterdir()}
    assert sizes["README.md"] + sizes["hf_tsv_recipe.yaml"] < 10_000
