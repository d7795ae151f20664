"""Real repositories on the live Hub: `pytest -m live`, for whoever has a network.

What is small also runs on the loopback Hub, with tiny repositories in place of the real ones, so
that what it calls is known to exist.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import clips
import pytest
from cli import Result, hf_tsv
from home import ENVIRONMENT
from hub import Hub
from labelled import CLASSES, add_dataset

from hf_tsv.evaluation import suites
from hf_tsv.recipes.images import EvaluationTask

ROOT = Path(__file__).parents[2]
TOWERS = ("vit-b-32-20", "vit-b-16-20", "vit-l-14-20")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")


def python(*words: str | Path, live: bool) -> Result:
    """Run Python on the loopback Hub, or as a user would: the live Hub, own cache and token."""
    own = {name: value for name, value in os.environ.items() if not live or name not in ENVIRONMENT}
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**own, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return Result(done.returncode, done.stdout, done.stderr)


live_python = partial(python, live=True)
live_hf_tsv = partial(live_python, "-m", "hf_tsv")


@dataclass(frozen=True)
class Place:
    """A Hub: how to run the command line and Python there, and repositories that it has.

    `tiny` is a whole CLIP of a few hundred kilobytes, `fine_tunes` are vision towers of `base`.
    """

    run: Callable[..., Result]
    python: Callable[..., Result]
    tiny: str
    base: str
    fine_tunes: tuple[str, str]


@pytest.fixture(params=["loopback", pytest.param("live", marks=pytest.mark.live)])
def place(request: pytest.FixtureRequest, zoo: Path, tmp_path: Path) -> Place:
    """The live Hub, or the loopback Hub with a base and two fine-tunes."""
    if request.param == "live":
        base = "openai/clip-vit-base-patch32"
        tiny = "hf-internal-testing/tiny-random-CLIPModel"
        ones = ("tanganke/clip-vit-base-patch32_dtd", "tanganke/clip-vit-base-patch32_eurosat")
        return Place(live_hf_tsv, live_python, tiny, base, ones)
    hub: Hub = request.getfixturevalue("hub")
    hub.add_repo("org/base", zoo / "base")
    for seed, name in enumerate(("one", "two")):
        folder = clips.make_fine_tune(zoo / "base", tmp_path / name, seed)
        (folder / "README.md").write_text(clips.CARD)
        hub.add_repo(f"org/{name}", folder)
    here = partial(python, live=False)
    return Place(hf_tsv, here, "org/base", "org/base", ("org/one", "org/two"))


def test_a_small_model_is_inspected_at_its_commit(place: Place) -> None:
    done = place.run("inspect", place.tiny, "--json")
    assert done.code == 0, done.err
    assert len(done.json["revision"]) == 40 and done.json["parameters"] > 10_000
    again = place.run("inspect", f"{place.tiny}@{done.json['revision']}", "--json")
    assert again.json["tensors"] == done.json["tensors"]


def test_weights_are_not_downloaded_for_their_headers(place: Place, tmp_path: Path) -> None:
    words = ("--cache-dir", tmp_path / "cache", "--json")
    for reference in place.fine_tunes:
        done = place.run("inspect", reference, *words)
        assert done.code == 0, done.err
        assert done.json["model_class"] == "CLIPVisionModel" and len(done.json["tensors"]) > 30
    large = [
        file for file in (tmp_path / "cache").rglob("*") if file.suffix in (".safetensors", ".bin")
    ]
    assert large == []


def test_fine_tunes_of_a_base_model_are_found(place: Place) -> None:
    for one in place.fine_tunes:
        author, _, name = one.partition("/")
        done = place.run("find", place.base, "--author", author, "--search", name, "--json")
        assert done.code == 0, done.err
        found = {model["ref"]: model for model in done.json["models"]}
        assert found[one]["mergeable"] and found[one]["dtypes"] == ["F32"]


def test_a_merge_is_planned_from_headers_alone(place: Place, tmp_path: Path) -> None:
    base = ("--base-model", place.base)
    done = place.run("merge", *place.fine_tunes, *base, "-o", tmp_path / "merged", "--dry-run",
                     "--stream", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert "decomposed" in done.out and not (tmp_path / "merged").exists()


def test_fine_tunes_of_a_small_model_are_merged(place: Place, tmp_path: Path) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    for seed, folder in enumerate(folders):
        made = place.python(ROOT / "tests" / "live" / "nudged.py", place.tiny, folder, seed)
        assert made.code == 0, made.err
    base = ("--base-model", place.tiny)
    done = place.run("merge", *folders, *base, "-o", tmp_path / "merged", "--json")
    assert done.code == 0, done.err
    before = place.run("inspect", place.tiny, "--json").json
    after = place.run("inspect", tmp_path / "merged", "--json").json
    assert after["parameters"] == before["parameters"]


def test_a_repository_that_is_not_there_is_named(place: Place) -> None:
    missing = f"{place.tiny}-of-nobody"
    done = place.run("inspect", missing)
    assert done.code == 1 and done.out == "", done.err
    assert missing in done.err and "Hint: " in done.err and "Traceback" not in done.err


def check_dataset(task: EvaluationTask, run: Callable[..., Result]) -> None:
    """Compare what a suite says of a dataset with the first row of its split."""
    file = ROOT / "tests" / "live" / "first_row.py"
    done = run(file, task.dataset, task.config or "", task.split or "test")
    assert done.code == 0, done.err
    found = done.json
    images = [name for name, kind in found["columns"].items() if kind == "Image"]
    labels = [name for name, kind in found["columns"].items() if kind == "ClassLabel"]
    assert task.image in images if task.image else len(images) == 1
    label = task.label or (labels or ["label"])[0]
    assert label in found["columns"] and (task.label or len(labels) < 2)
    assert found["numbers"].get(label, 0) in range(len(task.classes))
    assert len(found["classes"].get(label, task.classes)) == len(task.classes)


def test_what_a_suite_says_of_a_dataset_is_compared(hub: Hub, tmp_path: Path) -> None:
    add_dataset(hub, "org/data", tmp_path)
    task = EvaluationTask("pets", "org/data", split="test", classes=CLASSES)
    here = partial(python, live=False)
    check_dataset(task, here)
    with pytest.raises(AssertionError):
        check_dataset(EvaluationTask("pets", "org/data", classes=CLASSES, label="kind"), here)


@pytest.mark.live
@pytest.mark.parametrize("task", suites.named("vit-b-32-20").tasks, ids=lambda task: task.name)
def test_the_datasets_of_the_suites_are_as_they_say(task: EvaluationTask) -> None:
    check_dataset(task, live_python)


@pytest.mark.live
@pytest.mark.parametrize("tower", TOWERS)
def test_the_fine_tunes_of_the_suites_are_there(tower: str) -> None:
    suite = suites.named(tower)
    for reference in (suite.base_model, *suite.references.values()):
        done = live_hf_tsv("inspect", reference, "--json")
        assert done.code == 0, done.err
        assert done.json["parameters"] > 80_000_000


@pytest.mark.live
def test_a_suite_of_the_paper_is_merged_and_measured(tmp_path: Path) -> None:
    words = ("vit-b-32-8", "--limit", "50", "--folder", tmp_path)
    done = live_python("-m", "benchmarks.paper", *words)
    assert done.code == 0, done.err
    assert "Published by FusionBench" in done.out and "this model, 50 images of each" in done.out
    results = json.loads((tmp_path / "vit-b-32-8-tsv-results" / "evaluation.json").read_text())
    assert abs(results["suite"]["accuracy"] - 0.83) < 0.06  # 400 images
