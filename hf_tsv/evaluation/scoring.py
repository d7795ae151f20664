"""Tasks whose images are held in memory, to score a model on them again and again.

tasks = [prepare(task, load(task, limit=500, token=None), pipe.image_processor) for task in …]
directions = heads(pipe.model, pipe.tokenizer, tasks)  # once, while the text tower stays
accuracies(pipe.model, tasks, directions)  # after every change of the vision tower
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tsv.evaluation import zero_shot
from hf_tsv.evaluation.data import EvaluationTask, LabelledImages


@dataclass(frozen=True)
class PreparedTask:
    """The images of a task as an image processor leaves them.

    Args:
        name (`str`): of the task.
        classes (`tuple[str, ...]`): names, in the order of the labels.
        templates (`tuple[str, ...]`): of prompts.
        pixels (`Tensor`): shape (images, 3, height, width), on the CPU; of 224 × 224 pixels 0.6 MB
            an image.
        labels (`Tensor`): shape (images,).
    """

    name: str
    classes: tuple[str, ...]
    templates: tuple[str, ...]
    pixels: Tensor
    labels: Tensor


def prepare(
    task: EvaluationTask, images: LabelledImages, image_processor: Any, *, batch_size: int = 64
) -> PreparedTask:
    """Read and process the images of a task once.

    Args:
        task ([`EvaluationTask`]): which.
        images ([`LabelledImages`]): of it.
        image_processor: of the model.
        batch_size (`int`): images at a time.

    Raises:
        [`DataError`]: an image cannot be read, or a label is no class.
    """
    pixels, labels = [], []
    for start in range(0, len(images.rows), batch_size):
        pictures, own = images.batch(start, min(start + batch_size, len(images.rows)), task.name)
        pixels.append(image_processor(pictures, return_tensors="pt")["pixel_values"])
        labels += own
    return PreparedTask(
        task.name, images.classes, task.templates, torch.cat(pixels), torch.tensor(labels)
    )


def heads(model: Any, tokenizer: Any, tasks: Sequence[PreparedTask]) -> dict[str, Tensor]:
    """The zero-shot head of every task, which the text tower alone decides about.

    Args:
        model: a `CLIPModel`.
        tokenizer: its own.
        tasks (`Sequence[PreparedTask]`): to classify.

    Returns:
        `dict[str, Tensor]`: by task, shape (classes, projection).
    """
    return {
        task.name: zero_shot.head(model, tokenizer, task.classes, task.templates) for task in tasks
    }


def accuracies(
    model: Any,
    tasks: Sequence[PreparedTask],
    directions: Mapping[str, Tensor],
    *,
    batch_size: int = 64,
) -> dict[str, float]:
    """Top-1 accuracy of a model, as it is now, on every task.

    Args:
        model: a `CLIPModel`.
        tasks (`Sequence[PreparedTask]`): to classify.
        directions (`Mapping[str, Tensor]`): see [`heads`].
        batch_size (`int`): images at a time.

    Returns:
        `dict[str, float]`: by task, 0 to 1.
    """
    found = {}
    for task in tasks:
        right = 0
        for start in range(0, len(task.labels), batch_size):
            batch = slice(start, start + batch_size)
            predicted = zero_shot.classify(model, directions[task.name], task.pixels[batch])
            right += int((predicted == task.labels[batch]).sum())
        found[task.name] = right / len(task.labels)
    return found
