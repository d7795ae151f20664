"""Gradient descent on the entropy of predictions."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from hf_tsv.evaluation.data import LabelledImages
from hf_tsv.evaluation.job import in_one_line
from hf_tsv.methods.ada import Layer
from hf_tsv.recipes.learning import Adaptation
from hf_tsv.runs import reading
from hf_tsv.system.errors import DataError
from hf_tsv.system.progress import bar

WATCHED = 64
"""Most images of each task on which the entropy before and after is measured."""

DIGITS = 6
"""Decimals of coefficients and entropies."""


def descend(
    model: Any,
    layers: Sequence[Layer],
    classes: Sequence[Tensor],
    batches: Batches,
    tasks: int,
    *,
    show: bool,
) -> tuple[Tensor, tuple[float, float]]:
    """Minimise the entropy of predictions by Adam, from coefficients of 1.

    Args:
        model: a `CLIPModel` whose weights are those of coefficients 1.
        classes (`Sequence[Tensor]`): directions (classes, projection) of each task with images.
        tasks (`int`): T, number of checkpoints.

    Returns:
        `tuple[Tensor, tuple[float, float]]`: coefficients, shape (layers, T), and the entropy
        before and after, in nats.
    """
    adaptation = batches.adaptation
    for layer in layers:
        for parameter in layer.parameters:
            parameter.requires_grad_(True)
    coefficients = torch.ones(len(layers), tasks, dtype=layers[0].base.dtype)
    optimiser = torch.optim.Adam([coefficients], lr=adaptation.learning_rate)
    before = _watched(model, classes, batches)
    with bar("Adapting", adaptation.steps, visible=show) as advance:
        for step, parts in enumerate(batches.steps()):
            total = 0.0
            for number, pixels in enumerate(parts):  # one task at a time, to save memory
                loss = entropy(model, classes[number], pixels).mean() / len(classes)
                torch.autograd.backward(loss)
                total += float(loss.detach())
            _refuse_no_number(total, step)
            coefficients.grad = torch.stack([layer.gradient(tasks) for layer in layers])
            model.zero_grad()
            optimiser.step()
            coefficients.clamp_(min=0)
            for layer, row in zip(layers, coefficients, strict=True):
                layer.place(row)
            advance(1, f"Adapting, entropy {total:.3f}")
    after = _watched(model, classes, batches)
    _refuse_no_number(after, adaptation.steps)
    return coefficients, (before, after)


def entropy(model: Any, classes: Tensor, pixels: Tensor) -> Tensor:
    """Compute the entropy of a `CLIPModel`'s zero-shot prediction on each image, in nats.

    Classes are directions of length 1, shape (classes, projection); pixels have the shape
    (images, 3, height, width), and the result (images,).
    """
    pixels = pixels.to(model.device, model.dtype)
    seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    logits = model.logit_scale.exp() * normalize(seen, dim=-1) @ classes.to(seen.dtype).mT
    scores = log_softmax(logits, dim=-1)
    return -(scores.exp() * scores).sum(dim=-1)


def _refuse_no_number(value: float, steps: int) -> None:
    if not math.isfinite(value):
        problem = f"The entropy of predictions is {value} after step {steps}."
        raise DataError(problem, "Use a smaller `learning_rate=`.")


@torch.no_grad()
def _watched(model: Any, classes: Sequence[Tensor], batches: Batches) -> float:
    """Mean entropy over up to `WATCHED` images per task, in nats, with equal weight per task."""
    means = []
    for number, directions in enumerate(classes):
        found = [entropy(model, directions, pixels) for pixels in batches.first(number)]
        means.append(float(torch.cat(found).mean()))
    return round(sum(means) / len(means), DIGITS)


@dataclass(frozen=True)
class Batches:
    """Pixels of images of each task in a random order, from the base model's image processor."""

    image_processor: Any
    adaptation: Adaptation
    data: Sequence[LabelledImages]

    def steps(self) -> Iterator[list[Tensor]]:
        """Yield one batch of every task per step, while the next is read."""
        size, steps = self.adaptation.batch_size, self.adaptation.steps
        orders = [self._order(number, size * steps) for number in range(len(self.data))]

        def read(step: int) -> list[Tensor]:
            rows = slice(step * size, (step + 1) * size)
            return [self._pixels(number, order[rows]) for number, order in enumerate(orders)]

        with ThreadPoolExecutor(1, "hf-tsv-images") as pool:
            yield from reading.read_ahead(pool, read, range(steps), [1] * steps)

    def first(self, number: int) -> Iterator[Tensor]:
        """Yield batches of the first images of a task in its random order."""
        size = self.adaptation.batch_size
        order = self._order(number, min(WATCHED, len(self.data[number].rows)))
        for start in range(0, len(order), size):
            yield self._pixels(number, order[start : start + size])

    def _order(self, number: int, count: int) -> list[int]:
        """Row numbers in random order: `count` of them, each epoch shuffled anew."""
        rows = len(self.data[number].rows)
        generator = torch.Generator().manual_seed(self.adaptation.seed)
        epochs = [torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))]
        order: list[int] = torch.cat(epochs)[:count].tolist()
        return order

    def _pixels(self, number: int, rows: Sequence[int]) -> Tensor:
        images, task = self.data[number], self.adaptation.tasks[number].name
        chosen = replace(images, rows=images.rows.select(rows))
        pictures, _ = chosen.batch(0, len(rows), task)
        with in_one_line(task):
            pixels: Tensor = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels
