"""The benchmark of evaluation: both loops on tiny models, its tables, what is published."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.speed import synthetic, throughput

ROOT = Path(__file__).parents[2]
IMAGES, SIZE, LAYERS = 20, 8, 2

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Zoo:
    folder = tmp_path_factory.mktemp("bench")
    return synthetic.checkpoints("tiny", throughput.TASKS, LAYERS, folder=folder)


@pytest.fixture(scope="module")
def loops(zoo: synthetic.Zoo, tmp_path_factory: pytest.TempPathFactory) -> throughput.Loops:
    place = tmp_path_factory.mktemp("loops")
    throughput.write_images(place / "images", IMAGES)
    throughput.write_model(zoo, place / "base")
    return throughput.opened(place / "base", place / "images", SIZE)


def test_it_runs_and_writes_both_models(
    zoo: synthetic.Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / "throughput.json"
    options: dict[str, Any] = {
        "--model": "tiny", "--layers": LAYERS, "--images": IMAGES, "--batch-size": SIZE,
        "--rounds": 2, "--cache": zoo.base.parents[1], "--results": results,
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    monkeypatch.setattr(sys, "argv", ["throughput", *words])
    throughput.main()
    found = json.loads(results.read_text("utf-8"))
    plain, routed = found["rows"]
    assert set(plain["times"]) == {*throughput.PARTS, throughput.PREPARING, throughput.WHOLE}
    assert set(routed["times"]) == {throughput.WHOLE}
    for row in found["rows"]:
        for both in row["times"].values():
            assert all(len(spent) == 2 and min(spent) > 0 for spent in both.values())
    assert results.with_suffix(".md").read_text("utf-8") == throughput.markdown(found)


def test_loops_predict_several_classes_and_the_same(loops: throughput.Loops) -> None:
    predicted = loops.ours()
    assert len(predicted) == IMAGES and len(set(predicted)) > 5
    assert predicted == loops.plain()


def test_other_predictions_are_refused(loops: throughput.Loops) -> None:
    files = [*loops.files[1:], loops.files[0]]
    with pytest.raises(RuntimeError, match="predict different classes"):
        throughput.measured(replace(loops, files=files), 1, parts=False)
    one = replace(loops, directions=torch.zeros_like(loops.directions))
    with pytest.raises(RuntimeError, match="of one class"):
        throughput.measured(one, 1, parts=False)


def test_a_ratio_is_that_of_the_same_round() -> None:
    times = {"whole": {throughput.OURS: [1.0, 2.0, 4.0], throughput.PLAIN: [2.0, 2.0, 6.0]}}
    row = {"model": "m", "times": times}
    assert throughput.ratio(row, "whole") == "1.50 (1.00 … 2.00) ×"
    assert throughput.cells(row) == ["m", "500.0", "500.0", "1.50 (1.00 … 2.00) ×", ""]


def test_the_table_is_that_of_the_results() -> None:
    found = json.loads(throughput.RESULTS.read_text("utf-8"))
    text = throughput.RESULTS.with_suffix(".md").read_text("utf-8")
    assert text == throughput.markdown(found)


def test_the_published_rates_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    found = json.loads(throughput.RESULTS.read_text("utf-8"))
    for row in found["rows"]:
        assert f"| {' | '.join(throughput.cells(row))} |" in page
    facts = found["facts"]
    assert f"{facts['images']} JPEG images of 320 to 640 pixels" in page
    assert f"batches of {facts['batch_size']}, {facts['rounds']} rounds on two cores" in page
    faster = throughput.ratio(found["rows"][0], throughput.WHOLE).split()[0]
    reading = float(throughput.ratio(found["rows"][0], throughput.PREPARING).split()[0])
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"{faster} times the images a second" in changes
    assert f"{reading:.1f} times for decoding and preprocessing alone" in changes
