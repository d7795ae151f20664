"""Coefficients of the tasks in each weight, learned on images without labels (method `ada`).

W = W0 + α Σᵢ cᵢ Mᵢ, where Mᵢ = U⊥ᵢ diag(σᵢ) V⊥hᵢ is the share of task i in a TSV-Merge, or Δᵢ / T
where updates are averaged. The shares do not depend on c, and ∂L/∂cᵢ = α ⟨∂L/∂W, Mᵢ⟩, so an
ordinary backward pass suffices. L is the entropy of zero-shot predictions. Source: section D.2.7;
Yang et al., "AdaMerging: Adaptive Model Merging for Multi-Task Learning", ICLR 2024 (arXiv
2310.02575).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from hf_tsv import linalg, stream, tsv
from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.reference import at_revision
from hf_tsv.costs import Parallelism
from hf_tsv.errors import CheckpointError, DataError, RecipeError
from hf_tsv.evaluation import zero_shot
from hf_tsv.evaluation.data import (
    EvaluationTask,
    LabelledImages,
    listed,
    load,
    refuse_not_installed,
)
from hf_tsv.models import ZERO_SHOT, check_whole_clip, pipeline
from hf_tsv.plan import MergePlan, Weight
from hf_tsv.progress import bar, logger
from hf_tsv.recipe import Settings, check_number
from hf_tsv.sources import Sources
from hf_tsv.tsv import TaskSingularVectors

WHOLE = "CLIPModel"
LEARNED = ("vision_model.", "visual_projection.")
"""Prefixes of the weights that images pass through; all other coefficients are 1."""

WATCHED = 64
"""Most images of each task on which the entropy before and after is measured."""

DIGITS = 6
"""Decimals of coefficients and entropies."""


@dataclass(frozen=True)
class Adaptation:
    """Settings for learning coefficients, and the result.

    Args:
        tasks (`Mapping[str, str]` or `Sequence`): datasets by the name of the task, or
            `NAME=DATASET` texts, or [`EvaluationTask`]s. Their labels are not used.
        steps (`int`): number of Adam steps.
        learning_rate (`float`): Adam learning rate.
        batch_size (`int`): images of each task in a step.
        seed (`int`): seed of the order of the images.
        images (`tuple[int, ...]`): number of images of each task; a result of learning.
        entropy (`tuple[float, ...]`): mean entropy of predictions before and after, in nats; a
            result of learning.

    Example:
        >>> Adaptation({"dtd": "tanganke/dtd"}).tasks[0].dataset
        'tanganke/dtd'
    """

    tasks: tuple[EvaluationTask, ...]
    steps: int = 300
    learning_rate: float = 2e-3
    batch_size: int = 16
    seed: int = 0
    images: tuple[int, ...] = ()
    entropy: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        tasks = listed(self.tasks, "There are no images to learn from.")
        object.__setattr__(self, "tasks", tuple(tasks))
        for name, least in (("steps", 1), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or not least <= value < 2**63:
                raise RecipeError(f"{name} is {value!r}.", f"Give a whole number from {least} on.")
        check_number("learning_rate", self.learning_rate)
        object.__setattr__(self, "learning_rate", float(self.learning_rate))
        if not self.learning_rate > 0:
            raise RecipeError(
                f"learning_rate is {self.learning_rate}.", "Give a number greater than 0."
            )

    def to_dict(self) -> dict[str, Any]:
        """Settings and result for a recipe."""
        tasks = [
            {
                f.name: list(value) if isinstance(value, tuple) else value
                for f in fields(EvaluationTask)
                if (value := getattr(task, f.name)) != f.default
            }
            for task in self.tasks
        ]
        found = {"images": list(self.images), "entropy": list(self.entropy)}
        return {**asdict(self), "tasks": tasks, **found}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Adaptation:
        """Adaptation with its result, from the form of [`to_dict`].

        Raises:
            [`RecipeError`]: the content does not have that form.
        """
        tasks = []
        for item in content["tasks"]:
            task: dict[str, Any]
            task = {n: tuple(v) if isinstance(v, list) else v for n, v in item.items()}
            tasks.append(EvaluationTask(**task))
        found = Adaptation(**{**content, "tasks": tuple(tasks)})
        found = replace(found, images=tuple(found.images), entropy=tuple(found.entropy))
        for number in (*found.images, *found.entropy):
            check_number("A number of the adaptation", number)
        if len(found.images) != len(tasks) or len(found.entropy) != 2:
            raise RecipeError(
                "The adaptation does not say what was found for each task.",
                "Use the recipe as it was written.",
            )
        return found


@dataclass(frozen=True)
class Layer:
    """Weight of a model as a function of the coefficients.

    Args:
        label (`str`): label in the plan.
        parameters (`tuple[Tensor, ...]`): the model's own, stacked along dimension 0 if several.
        base (`Tensor`): W0, stacked.
        tasks (`tuple[int, ...]`): the T' tasks that change it.
        shares (`TaskSingularVectors` or `Tensor`): α Mᵢ of each of them: concatenated singular
            vectors, or matrices, shape (T', …).
        ranks (`tuple[int, ...]`): number of singular vectors of each of them.
    """

    label: str
    parameters: tuple[Tensor, ...]
    base: Tensor
    tasks: tuple[int, ...]
    shares: TaskSingularVectors | Tensor
    ranks: tuple[int, ...] = ()

    @torch.no_grad()
    def place(self, coefficients: Tensor) -> None:
        """Set the parameters to W0 + α Σᵢ cᵢ Mᵢ.

        Args:
            coefficients (`Tensor`): coefficients of all tasks, shape (T,).
        """
        own = coefficients[list(self.tasks)].to(self.base)
        if isinstance(self.shares, TaskSingularVectors):
            ranks = torch.tensor(self.ranks, device=own.device)
            scaled = self.shares.S * own.repeat_interleave(ranks)
            weight = torch.addmm(self.base, self.shares.U * scaled, self.shares.Vh)
        else:
            weight = self.base + torch.tensordot(own, self.shares, dims=1)
        stacked = len(self.parameters) > 1
        parts = torch.split(weight, [p.shape[0] for p in self.parameters]) if stacked else [weight]
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.copy_(part)

    @torch.no_grad()
    def gradient(self, tasks: int) -> Tensor:
        """Compute ∂L/∂cᵢ = α ⟨∂L/∂W, Mᵢ⟩ from the gradients of the parameters.

        Args:
            tasks (`int`): T.

        Returns:
            `Tensor`: shape (T,), on the CPU; 0 for tasks that do not change the weight.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        found = self.base.new_zeros(tasks)
        if len(gradients) < len(self.parameters):  # the loss does not depend on them
            return found.cpu()
        G = torch.cat(gradients) if len(gradients) > 1 else gradients[0]
        if isinstance(self.shares, TaskSingularVectors):
            slopes = (self.shares.U * (G @ self.shares.Vh.mT)).sum(dim=0) * self.shares.S
            own = torch.stack([part.sum() for part in torch.split(slopes, list(self.ranks))])
        else:
            own = self.shares.flatten(1) @ G.flatten()
        found[list(self.tasks)] = own
        return found.cpu()


def refuse_nothing_learned(sources: Sources, plan: MergePlan) -> None:
    """Refuse, before the work, a merge in which nothing can be learned.

    Args:
        sources ([`Sources`]): base model and tasks.
        plan ([`MergePlan`]): plan of the merge.

    Raises:
        [`HfTsvError`]: the base is no whole CLIP, no merged weight is one that images pass
            through, or a package for reading images is missing.
    """
    refuse_not_installed("The method ada")
    check_whole_clip(sources.base, "The method ada")
    if not any(map(_changes, plan.weights)):
        raise CheckpointError(
            "The method ada learns from images, and no checkpoint has a vision tower.",
            "Use --method tsv.",
        )


def _changes(weight: Weight) -> bool:
    return weight.treatment != "copied" and weight.label.startswith(LEARNED)


def learn(
    sources: Sources,
    plan: MergePlan,
    scales: Sequence[float],
    settings: Settings,
    adaptation: Adaptation,
    device: torch.device,
    parallelism: Parallelism,
    *,
    show: bool,
) -> tuple[dict[str, tuple[float, ...]], Adaptation]:
    """Learn the coefficients with which predictions on images are most certain.

    Args:
        sources ([`Sources`]): base model and tasks.
        plan ([`MergePlan`]): plan of the merge.
        scales (`Sequence[float]`): factor of each task's update.
        settings ([`Settings`]): settings of the merge.
        adaptation ([`Adaptation`]): settings for learning.
        device (`torch.device`): device that computes.
        parallelism ([`Parallelism`]): parallelism of the decompositions.
        show (`bool`): show bars.

    Returns:
        `tuple[dict[str, tuple[float, ...]], Adaptation]`: coefficients of each task by weight, and
        the adaptation with its result.

    Raises:
        [`HfTsvError`]: a dataset cannot be read, the base model has no processor, or the entropy
            is not finite.
    """
    from transformers.utils import logging

    token = sources.access.token
    data = [_without_labels(load(task, token=token)) for task in adaptation.tasks]
    pinned = sources.base.pinned
    if not show:
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    pipe: Any = pipeline(
        ZERO_SHOT,
        at_revision(pinned.ref, pinned.revision),
        dtype=torch.float32,
        device=str(device),
        token=token,
        cache_dir=sources.access.cache_dir,
        progress=show,
    )
    pipe.model.requires_grad_(False)
    layers = layers_of(pipe.model, sources, plan, scales, settings, device, parallelism, show=show)
    if not layers:
        raise CheckpointError(
            "No checkpoint changes the vision tower: there is nothing to learn from images.",
            "Use --method tsv.",
        )
    classes = [
        zero_shot.head(pipe.model, pipe.tokenizer, images.classes, task.templates).clone()
        for task, images in zip(adaptation.tasks, data, strict=True)
    ]
    batches = _Batches(pipe.image_processor, adaptation, data)
    found, told = descend(
        pipe.model, layers, classes, batches, len(sources.inputs), adaptation, show=show
    )
    logger.info("Mean entropy of predictions: %.3f before, %.3f after.", *told)
    tasks = tuple(
        replace(task, split=images.split)
        for task, images in zip(adaptation.tasks, data, strict=True)
    )
    counts = tuple(len(images.rows) for images in data)
    learned = {
        layer.label: tuple(round(c, DIGITS) for c in row)
        for layer, row in zip(layers, found.tolist(), strict=True)
    }
    return learned, replace(adaptation, tasks=tasks, images=counts, entropy=told)


def _without_labels(images: LabelledImages) -> LabelledImages:
    """Replace the labels of images by the first class."""
    rows = images.rows.remove_columns(images.label)
    return replace(images, rows=rows.add_column(images.label, [0] * len(rows)))


def descend(
    model: Any,
    layers: Sequence[Layer],
    classes: Sequence[Tensor],
    batches: _Batches,
    tasks: int,
    adaptation: Adaptation,
    *,
    show: bool,
) -> tuple[Tensor, tuple[float, float]]:
    """Minimise the entropy of predictions by Adam, from coefficients of 1.

    Args:
        model: a `CLIPModel` whose weights are those of coefficients 1.
        layers (`Sequence[Layer]`): weights of the model to learn for.
        classes (`Sequence[Tensor]`): directions (classes, projection) of each task with images.
        batches (`_Batches`): images of these tasks.
        tasks (`int`): T, number of checkpoints.
        adaptation ([`Adaptation`]): settings for learning.
        show (`bool`): show a bar.

    Returns:
        `tuple[Tensor, tuple[float, float]]`: coefficients, shape (layers, T), and the entropy
        before and after, in nats.
    """
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
    """Compute the entropy of the zero-shot prediction on each image, in nats.

    Args:
        model: a `CLIPModel`.
        classes (`Tensor`): a direction of length 1 for each class, shape (classes, projection).
        pixels (`Tensor`): shape (images, 3, height, width).

    Returns:
        `Tensor`: shape (images,).
    """
    pixels = pixels.to(model.device, model.dtype)
    seen = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    logits = model.logit_scale.exp() * normalize(seen, dim=-1) @ classes.to(seen.dtype).mT
    scores = log_softmax(logits, dim=-1)
    return -(scores.exp() * scores).sum(dim=-1)


def _refuse_no_number(value: float, steps: int) -> None:
    if not math.isfinite(value):
        raise DataError(
            f"The entropy of predictions is {value} after step {steps}.",
            "Use a smaller --learning-rate.",
        )


@torch.no_grad()
def _watched(model: Any, classes: Sequence[Tensor], batches: _Batches) -> float:
    """Mean entropy over up to `WATCHED` images per task, in nats, with equal weight per task."""
    means = []
    for number, directions in enumerate(classes):
        found = [entropy(model, directions, pixels) for pixels in batches.first(number)]
        means.append(float(torch.cat(found).mean()))
    return round(sum(means) / len(means), DIGITS)


@dataclass(frozen=True)
class _Batches:
    """Pixels of images in a random order.

    Args:
        image_processor: image processor of the base model.
        adaptation ([`Adaptation`]): names, seed, sizes.
        data (`Sequence[LabelledImages]`): images of each task.
    """

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
            yield from stream.read_ahead(pool, read, range(steps), [1] * steps)

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
        images = self.data[number]
        chosen = replace(images, rows=images.rows.select(rows))
        pictures, _ = chosen.batch(0, len(rows), self.adaptation.tasks[number].name)
        pixels: Tensor = self.image_processor(pictures, return_tensors="pt")["pixel_values"]
        return pixels


def layers_of(
    model: Any,
    sources: Sources,
    plan: MergePlan,
    scales: Sequence[float],
    settings: Settings,
    device: torch.device,
    parallelism: Parallelism,
    *,
    show: bool,
) -> list[Layer]:
    """Weights that images pass through; writes all merged weights into the model.

    Args:
        model: a `CLIPModel`, the base.
        sources ([`Sources`]): base model and tasks.
        plan ([`MergePlan`]): plan of the merge.
        scales (`Sequence[float]`): factor of each task's update.
        settings ([`Settings`]): settings of the merge.
        device (`torch.device`): device of the model.
        parallelism ([`Parallelism`]): parallelism of the decompositions.
        show (`bool`): show a bar.
    """
    # An averaged weight would be read as one running mean; learning needs every task's update.
    weights = [
        replace(w, treatment="combined") if w.treatment == "averaged" else w
        for w in plan.weights
        if w.treatment != "copied"
    ]
    parameters = dict(model.named_parameters())
    ones = torch.ones(len(sources.inputs))
    found = []
    with (
        linalg.threads(parallelism.threads),
        bar("Orthogonalising", len(weights), visible=show) as advance,
    ):
        for loaded in stream.read_weights(weights, sources.base, sources.inputs, scales, device):
            if loaded.deltas and parameters.keys() >= set(_own_names(loaded.weight)):
                tasks = [sources.inputs[i] for i in loaded.floors]
                with stream.named(loaded.weight.label, tasks):
                    layer = _layer(loaded, parameters, settings, len(sources.inputs))
                layer.place(ones)
                if layer.label.startswith(LEARNED):
                    found.append(layer)
            advance(1)
    return found


def _own_names(weight: Weight) -> list[str]:
    """Names of the weight's parameters in the model; empty for one it does not have."""
    return [layout.name_in_class(name, WHOLE) or "" for name in weight.names]


def _layer(
    loaded: stream.LoadedWeight, parameters: Mapping[str, Tensor], settings: Settings, tasks: int
) -> Layer:
    weight = loaded.weight
    own = tuple(parameters[name] for name in _own_names(weight))
    dtype = own[0].dtype
    shares: TaskSingularVectors | Tensor
    ranks: tuple[int, ...] = ()
    if weight.treatment == "decomposed":
        vectors, ranks = tsv.orthonormal_vectors(
            [loaded.deltas[i] for i in loaded.floors],
            weight.rank,
            floors=list(loaded.floors.values()),
            solver=settings.orthogonalizer,
            precision=settings.precision,
        )
        shares = replace(vectors, S=vectors.S * settings.alpha).to(dtype)
    else:
        dense = [tsv.dense(delta) for delta in loaded.deltas.values()]
        shares = (torch.stack(dense) * (settings.alpha / tasks)).to(dtype)
    return Layer(weight.label, own, loaded.base.to(dtype), tuple(loaded.floors), shares, ranks)
