"""Models that route their images, and the images themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.accuracy.runs import Seed, command

TEMPLATES = ("{}",)
"""Prompts: the names of the classes are whole prompts."""


@dataclass(frozen=True)
class Images:
    """Images of one task: pixels, shape (images, 3, height, width), labels and names of classes."""

    pixels: Tensor
    labels: list[int]
    classes: tuple[str, ...]


def images_of(
    seed: Seed, task: str, split: str, processor: Any, limit: int | None = None
) -> Images:
    """Read images of a task as `hf-tsv evaluate` does.

    Args:
        seed: models and images.
        task: name of the task.
        split: `test` or `validation`.
        processor: image processor of the model.
        limit: number of images, the same ones every time.
    """
    from hf_tsv.evaluation.data import load
    from hf_tsv.recipes.images import EvaluationTask

    file = seed.images / f"{task}-{split}.parquet"
    found = load(EvaluationTask(task, str(file), split="test"), limit=limit)
    pictures, labels = found.batch(0, len(found.rows), task)
    pixels = processor(pictures, return_tensors="pt")["pixel_values"]
    return Images(pixels, labels, found.classes)


def made(seed: Seed, tasks: Sequence[str], *options: object) -> tuple[Path, dict[str, Any]]:
    """Make a model that routes among some tasks; return its folder and the report."""
    folder = seed.results / "routed"
    models = [seed.models / task for task in tasks]
    base = ("--base-model", seed.models / "base")
    return folder, command("route", *models, *base, "-o", folder, "--force", *options)


def opened(seed: Seed, folder: Path, tasks: Sequence[str]) -> Any:
    """Zero-shot pipeline of a model that routes among some tasks."""
    import hf_tsv

    base = seed.models / "base"
    pipe = hf_tsv.pipeline("zero-shot-image-classification", folder, base_model=base)
    if pipe.model.router.names != tuple(tasks):
        raise SystemExit(f"{folder} routes among {', '.join(pipe.model.router.names)}.")
    return pipe
