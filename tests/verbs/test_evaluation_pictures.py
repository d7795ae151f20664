"""Pictures of evaluations: what they show is what was measured, for any names and sizes."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from names import HOSTILE
from PIL import Image
from sklearn.metrics import confusion_matrix

from hf_tsv.reports import drawing
from hf_tsv.verbs import pictures


def result(count: int, *, seed: int = 0, own: float | None = None, **more: Any) -> dict[str, Any]:
    """Of a task, with random predictions."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, count, 5 * count)
    found = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, count, truth.shape))
    accuracy = float((truth == found).mean())
    entry = {
        "classes": [f"class {i}" for i in range(count)],
        "confusion": confusion_matrix(truth, found, labels=range(count)).tolist(),
        "accuracy": accuracy,
        **more,
    }
    if own is not None:
        entry |= {"reference": {"accuracy": own}, "normalised": accuracy / own}
    return entry


def of_names(names: list[str], classes: int = 4, own: float | None = 0.9) -> dict[str, Any]:
    return {name: result(classes, seed=i, own=own) for i, name in enumerate(names)}


CASES = {
    "one task": of_names(["dtd"], 2),
    "twenty tasks": of_names([f"clip-vit-base-patch32_{i}" for i in range(20)], 3, None),
    "odd names": {name: result(5, own=0.7, classes=HOSTILE) for name in HOSTILE},
    "many classes": {"a": result(47), "b": result(397)},
    "a class without images": {"a": result(3, confusion=[[4, 1, 0], [0, 0, 0], [2, 0, 3]])},
}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_cut_off(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing, "DPI", 60)  # the frame below is wider so, and drawn sooner
    drawn = pictures.of_evaluation(CASES[case])
    files = [picture.file for picture in drawn]
    assert len(set(map(str.lower, files))) == len(files)
    assert ("radar.png" in files) == (len(CASES[case]) > 2)
    assert sum(file.startswith("confusion-") for file in files) == len(CASES[case])
    for picture in drawn:
        image = Image.open(io.BytesIO(picture.png))
        alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        frame = [alpha[:2], alpha[-2:], alpha[:, :2].T, alpha[:, -2:].T]
        assert not any(edge.any() for edge in frame), picture.file
        assert 0.01 < (alpha > 0).mean() < 0.95
        assert picture.alt and picture.alt.isprintable() and "/" not in picture.file


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that pictures are made of."""
    made: list[Any] = []
    monkeypatch.setattr(drawing, "to_png", lambda figure: made.append(figure) or b"")
    return made


def test_bars_are_accuracies(figures: list[Any]) -> None:
    tasks = {"a": result(3, own=0.5), "b": result(3, seed=1), "c": result(3, seed=2, own=0.25)}
    pictures.of_evaluation(tasks)
    bars = sorted(figures[0].axes[0].patches, key=lambda bar: bar.get_y())
    expected = [tasks["a"]["accuracy"], 0.5, tasks["b"]["accuracy"], tasks["c"]["accuracy"], 0.25]
    assert [bar.get_width() for bar in bars] == expected
    low, high = sorted(figures[0].axes[0].get_ylim())
    assert low < bars[0].get_y() and high > bars[-1].get_y() + bars[-1].get_height()


@pytest.mark.parametrize("own", [0.8, None])
def test_the_radar_is_normalised_where_all_fine_tunes_are_known(
    figures: list[Any], own: float | None
) -> None:
    tasks = of_names(["a", "b", "c"], own=own)
    pictures.of_evaluation(tasks)
    lines = figures[1].axes[0].lines
    values = list(lines[-1].get_ydata())
    what = "accuracy" if own is None else "normalised"
    assert values[:-1] == [found[what] for found in tasks.values()] and values[-1] == values[0]
    assert len(lines) == (1 if own is None else 2)  # the fine-tunes are a circle


def test_a_confusion_matrix_has_shares_of_each_true_class(figures: list[Any]) -> None:
    counts = [[4, 1, 0], [0, 0, 0], [2, 0, 3]]
    pictures.of_evaluation({"a": result(3, confusion=counts)})
    axes = figures[1].axes[0]
    shown = np.ma.filled(axes.images[0].get_array(), np.nan)
    assert np.allclose(shown[[0, 2]], [[0.8, 0.2, 0], [0.4, 0, 0.6]]) and np.isnan(shown[1]).all()
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[(0, 2)] == "40%" and len(texts) == 6  # column, row
    assert axes.get_ylabel() == "true class" and axes.get_xlabel() == "predicted"
