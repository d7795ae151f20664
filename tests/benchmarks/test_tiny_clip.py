"""The tasks of the benchmarks: what they draw, and the files that `evaluate` reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import torch
from PIL import Image

import hf_tsv
from benchmarks.tiny_clip.checkpoints import quietly
from benchmarks.tiny_clip.datasets import write_task
from benchmarks.tiny_clip.evaluation import accuracy
from benchmarks.tiny_clip.first_tasks import FIRST_TASKS, digit_pools
from benchmarks.tiny_clip.further_tasks import photo_blocks
from benchmarks.tiny_clip.models import build_model, build_processor
from benchmarks.tiny_clip.rendering import Floats
from benchmarks.tiny_clip.sampling import SPLITS, Split, Task
from benchmarks.tiny_clip.tasks import TASKS
from benchmarks.tiny_clip.training import Recipe, captioned_images

IMAGES = 120
Pools: TypeAlias = Mapping[Split, Floats]

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")


def test_there_are_twenty_tasks_and_the_first_eight_are_those_of_the_demo() -> None:
    assert len(TASKS) == len({task.name for task in TASKS}) == 20
    assert TASKS[:8] == FIRST_TASKS
    assert [task.name for task in FIRST_TASKS] == [
        "letters", "digits", "shapes", "colours", "orientation", "textures", "counting", "position",
    ]  # fmt: skip


def test_every_class_has_its_own_prompt() -> None:
    prompts = [prompt for task in TASKS for prompt in task.prompts]
    assert len(set(prompts)) == len(prompts)
    assert all(4 <= len(task.prompts) <= 10 for task in TASKS)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_task_draws_images_of_every_class(task: Task) -> None:
    drawn = {split: task.samples(split, IMAGES, seed=0) for split in SPLITS}
    for data in drawn.values():
        assert data.images.shape == (IMAGES, 32, 32, 3) and data.images.dtype == np.uint8
        assert set(data.labels.tolist()) == set(range(len(task.prompts)))
        assert min(image.std() for image in data.images) > 2  # something is on it
    again = task.samples("test", IMAGES, seed=0)
    assert np.array_equal(again.images, drawn["test"].images)
    assert np.array_equal(again.labels, drawn["test"].labels)
    others = [*(drawn[split] for split in SPLITS[:2]), task.samples("test", IMAGES, seed=1)]
    seen = {image.tobytes() for image in drawn["test"].images}
    assert len(seen) == IMAGES
    assert all(seen.isdisjoint(image.tobytes() for image in other.images) for other in others)


@pytest.mark.parametrize(
    "splits", [lambda: {s: p[0] for s, p in digit_pools().items()}, photo_blocks]
)
def test_the_splits_of_real_data_share_nothing(splits: Callable[[], Pools]) -> None:
    parts = {split: {item.tobytes() for item in items} for split, items in splits().items()}
    assert list(parts) == list(SPLITS) and all(parts.values())
    for first, second in (SPLITS[:2], SPLITS[1:], SPLITS[::2]):
        assert parts[first].isdisjoint(parts[second])


@pytest.mark.parametrize("tasks", [8, 20])
def test_a_base_learns_from_the_tasks_of_its_recipe(tasks: int) -> None:
    images, captions = captioned_images(Recipe(tasks=tasks, images_a_task=60))
    assert len(images) == len(captions) == 60 * tasks
    assert set(captions) <= {prompt for task in TASKS[:tasks] for prompt in task.prompts}
    assert set(captions[-60:]) <= set(TASKS[tasks - 1].prompts)


@pytest.fixture(scope="module")
def task() -> Task:
    return next(task for task in TASKS if task.name == "photos")


@pytest.fixture(scope="module")
def files(task: Task, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_task(task, tmp_path_factory.mktemp("tasks"), seed=3, images=60)


def test_the_files_of_a_task_hold_its_images_and_its_prompts(
    task: Task, files: dict[str, Path]
) -> None:
    import datasets

    assert [file.name for file in files.values()] == [
        "photos-validation.parquet", "photos-test.parquet",
    ]  # fmt: skip
    for split, file in files.items():
        rows = datasets.Dataset.from_parquet(str(file))
        expected = task.samples(split, 60, seed=3)
        assert tuple(rows.features["label"].names) == task.prompts
        assert rows["label"] == expected.labels.tolist()
        assert isinstance(rows[0]["image"], Image.Image)
        assert np.array_equal(np.stack([np.asarray(i) for i in rows["image"]]), expected.images)


def test_evaluate_counts_what_the_benchmark_counts(
    task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.tiny_clip.evaluation.TEST_IMAGES", 60)
    torch.manual_seed(0)
    processor = build_processor(task.prompts)
    model = build_model(processor.tokenizer, width=32, layers=1, mlp_ratio=2).eval()
    for part in (model, processor):
        quietly(part.save_pretrained, tmp_path / "model")
    files = write_task(task, tmp_path, seed=3, images=60)
    found = {
        split: hf_tsv.evaluate(tmp_path / "model", {"photos": str(file)}, templates=["{}"])
        for split, file in files.items()
    }
    for split, report in found.items():
        expected = accuracy(model, model.vision_model, processor, task, split, seed=3)
        assert 100 * report.accuracy == pytest.approx(expected)
        assert tuple(report.tasks["photos"]["classes"]) == task.prompts
