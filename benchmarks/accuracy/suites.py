"""Models that the accuracy benchmark merges: how each suite of them is made, and what is run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy.routing import routing_runs
from benchmarks.accuracy.runs import MORE_ALPHAS, Runs, Seed, core_runs, detail_runs, method_runs
from benchmarks.prepared import bars, prepared_adapters, prepared_larger, trained

TEST_IMAGES = 500
LORA_TASKS = 8
LORA_ALPHAS = {**MORE_ALPHAS, "iso-c": "2.5:5.5:0.5", "iso-cts": "2.5:5.5:0.5"}
"""Further α of adapters: where few directions change, all of them made equal are small."""


@dataclass(frozen=True)
class Suite:
    """One kind of fine-tunes.

    Args:
        name: name of the suite, and of its results.
        about: sentence on what the models are.
        counts: numbers of tasks merged.
        seeds: seeds that are run by default.
        prepared: makes the models and images of a seed, unless they exist.
        recipe: settings of the training, without its seed.
        runs: runs of a seed.
    """

    name: str
    about: str
    counts: tuple[int, ...]
    seeds: tuple[int, ...]
    prepared: Callable[[int, Path], Seed]
    recipe: Callable[[], dict[str, Any]]
    runs: Callable[[Seed, Sequence[int]], Runs] = method_runs


def tiny(number: int, cache: Path) -> Seed:
    """Twenty whole fine-tunes of a tiny CLIP."""
    import datasets

    from benchmarks.tiny_clip.datasets import write_task
    from benchmarks.tiny_clip.tasks import TASKS
    from benchmarks.tiny_clip.training import twenty_tasks

    datasets.disable_progress_bars()
    with bars() as progress:
        models = trained(number, progress, twenty_tasks(number), cache)
    images, found = models / "images", models / "results"
    for task in TASKS:
        if not (images / f"{task.name}-test.parquet").exists():
            write_task(task, images, number, TEST_IMAGES)
    return Seed(number, models, images, found, tuple(task.name for task in TASKS))


def tiny_recipe() -> dict[str, Any]:
    """Settings of the tiny CLIPs."""
    from benchmarks.tiny_clip.training import twenty_tasks

    return {name: value for name, value in asdict(twenty_tasks(0)).items() if name != "seed"}


def lora(number: int, cache: Path) -> Seed:
    """Eight LoRA fine-tunes of a tiny CLIP."""
    from benchmarks.tiny_clip.tasks import TASKS

    models = prepared_adapters(number, cache, LORA_TASKS)
    names = tuple(task.name for task in TASKS[:LORA_TASKS])
    return Seed(number, models, models / "images", models / "results", names, LORA_ALPHAS)


def lora_recipe() -> dict[str, Any]:
    """Settings of the adapters."""
    from benchmarks.tiny_clip.adapters import AdapterRecipe

    recipe = AdapterRecipe()
    return {**asdict(recipe), "modules": " ".join(recipe.modules)}


def larger(number: int, cache: Path) -> Seed:
    """Eight whole fine-tunes of a CLIP of 12 layers."""
    from benchmarks.tiny_clip.larger import LARGER_TASKS

    models = prepared_larger(number, cache)
    names = tuple(task.name for task in LARGER_TASKS)
    return Seed(number, models, models / "images", models / "results", names)


def larger_recipe() -> dict[str, Any]:
    """Settings of the larger CLIP."""
    from benchmarks.tiny_clip.larger import LargerRecipe

    return {name: value for name, value in asdict(LargerRecipe()).items() if name != "seed"}


SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "tiny", "Tiny CLIPs, trained from scratch on rendered images and on scikit-learn's.",
            (8, 14, 20), (0, 1, 2), tiny, tiny_recipe,
        ),
        Suite(
            "details", "Tiny CLIPs, trained from scratch on rendered images and on scikit-learn's.",
            (8, 14, 20), (0, 1), tiny, tiny_recipe, detail_runs,
        ),
        Suite(
            "routing", "Tiny CLIPs, trained from scratch on rendered images and on scikit-learn's.",
            (8, 14, 20), (0, 1, 2), tiny, tiny_recipe, routing_runs,
        ),
        Suite(
            "lora", "LoRA fine-tunes of the tiny CLIPs, on the images of the whole fine-tunes.",
            (8,), (0, 1, 2), lora, lora_recipe,
        ),
        Suite(
            "larger",
            "A CLIP with a vision tower of 12 layers, 192 wide, at 64 x 64 pixels, trained from"
            " scratch on rendered images, scikit-learn's and MNIST.",
            (8,), (0,), larger, larger_recipe, core_runs,
        ),
    )
}  # fmt: skip
"""Suites by name."""
