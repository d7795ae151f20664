"""Accuracy of several sets of weights in one model, on the same images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hf_tsv.evaluation import zero_shot
from hf_tsv.evaluation.data import EvaluationTask, LabelledImages
from hf_tsv.progress import bar

IMAGES_AT_ONCE = 512
"""Images kept in memory while all variants classify them: 0.3 GB of 224 × 224 pixels."""


def accuracies(
    pipe: Any,
    variants: Sequence[Callable[[], None]],
    task: EvaluationTask,
    images: LabelledImages,
    *,
    batch_size: int,
    show: bool,
) -> list[float]:
    """Top-1 accuracy of every variant on one task; each image is read once.

    Args:
        pipe: a zero-shot pipeline of a `CLIPModel`.
        variants (`Sequence[Callable[[], None]]`): functions that each load weights into the model.
        task ([`EvaluationTask`]): task of the images.
        images ([`LabelledImages`]): images of the task.
        batch_size (`int`): images at a time.
        show (`bool`): show a bar.

    Returns:
        `list[float]`: accuracy of each variant, 0 to 1.

    Raises:
        [`DataError`]: an image cannot be read, or a label is no class.
    """
    heads = []
    for put in variants:
        put()
        heads.append(zero_shot.head(pipe.model, pipe.tokenizer, images.classes, task.templates))
    right, count = [0] * len(variants), len(images.rows)
    with bar(f"Classifying {task.name}", count, visible=show) as advance:
        for start in range(0, count, IMAGES_AT_ONCE):
            stop = min(start + IMAGES_AT_ONCE, count)
            batches = (
                images.batch(first, min(first + batch_size, stop), task.name)
                for first in range(start, stop, batch_size)
            )
            seen = [
                (pipe.image_processor(pictures, return_tensors="pt")["pixel_values"], labels)
                for pictures, labels in batches
            ]
            for i, put in enumerate(variants):
                put()
                for pixels, labels in seen:
                    found = zero_shot.classify(pipe.model, heads[i], pixels).tolist()
                    right[i] += sum(a == b for a, b in zip(found, labels, strict=True))
            advance(stop - start)
    return [found / count for found in right]
