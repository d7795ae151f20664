"""Many tensors and many tasks: work and output grow in proportion."""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType

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


def calls(work: Callable[[], None]) -> int:
    """Functions that are called in all threads: unlike seconds the same on every machine."""
    counted = itertools.count()

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event in ("call", "c_call"):
            next(counted)

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return next(counted)


@pytest.mark.parametrize("verb", [merge, compress, interference])
def test_every_tensor_more_takes_as_much_work_as_the_last(
    tmp_path: Path, verb: Callable[[Zoo, Path], None]
) -> None:
    """Whatever is done once for all of them does not count."""
    zoos = [random_checkpoints(TINY, 2, layers, tmp_path) for layers in (3, 12, 21)]
    verb(zoos[0], tmp_path / "warm")
    few, some, many = (
        calls(lambda zoo=zoo: verb(zoo, tmp_path / f"out-{zoo.layers}")) for zoo in zoos
    )
    # 2.4 times as much if every tensor saw all others
    assert many - some < 1.1 * (some - few), (few, some, many)


def test_four_times_the_tasks_take_about_four_times_the_work(tmp_path: Path) -> None:
    few, many = (random_checkpoints(TINY, tasks, 3, tmp_path) for tasks in (6, 24))
    merge(few, tmp_path / "warm")
    short, long = (
        calls(lambda zoo=zoo: merge(zoo, tmp_path / f"out-{len(zoo.tasks)}")) for zoo in (few, many)
    )
    assert long < 6 * short, (short, long)


def test_card_and_recipe_of_many_tensors_stay_small(tmp_path: Path) -> None:
    zoo = random_checkpoints(TINY, 2, 24, tmp_path)
    hf_tsv.merge(zoo.tasks, base_model=zoo.base, output=tmp_path / "m")
    sizes = {p.name: p.stat().st_size for p in (tmp_path / "m").iterdir()}
    assert sizes["README.md"] + sizes["hf_tsv_recipe.yaml"] < 10_000
