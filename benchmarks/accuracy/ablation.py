"""What a choice of tasks depends on: layers, tokens and numbers, on validation images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy.routed import TEMPLATES, Images, images_of, made, opened
from benchmarks.accuracy.runs import VALIDATION_IMAGES, Seed, command
from hf_tsv.routing import scores
from hf_tsv.routing.rule import KINDS, LAYER, default_layers, short

TEMPERATURES = (0.125, 0.25, 0.5)
"""Temperatures per layer."""

THRESHOLDS = (0.05, 0.15, 0.3)
MOST_TASKS = (1, 2, 3)

NOISE_IMAGES = 500

ByLayer = dict[str, Tensor]
"""Tokens of all images by layer, shape (images, d_in); or directions, shape (tasks, r, d_in)."""

# Tokens


@torch.inference_mode()
def tokens(
    tower: Any, layers: Sequence[str], batches: Iterable[Tensor], *, mean: bool = False
) -> ByLayer:
    """Class tokens at the inputs of layers, or means over all tokens of an image.

    Args:
        tower: model with a `vision_model`.
        layers: names of linear layers.
        batches: pixels of images.
        mean: whether means are wanted.
    """
    found = defaultdict[str, list[Tensor]](list)

    def noting(layer: str) -> Callable[..., None]:
        def note(module: object, inputs: tuple[Tensor, ...]) -> None:
            found[layer].append(inputs[0].mean(dim=1) if mean else inputs[0][:, 0].clone())

        return note

    hooks = [tower.get_submodule(n).register_forward_pre_hook(noting(n)) for n in layers]
    for pixels in batches:
        tower.vision_model(pixel_values=pixels)
    for hook in hooks:
        hook.remove()
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def weighted(folder: Path, tasks: Sequence[str], directions: ByLayer) -> ByLayer:
    """Directions times √(σ / σ₁), so that a residual leaves out each by its share of the largest.

    Args:
        folder: folder of the model that routes.
        tasks: names of the tasks.
        directions: right singular vectors of the tasks, by layer.
    """
    from safetensors import safe_open

    found: ByLayer = {}
    for layer, vectors in directions.items():
        values = []
        for task in tasks:
            with safe_open(folder / "tasks" / task / "task_factors.safetensors", "pt") as factors:
                values.append(factors.get_tensor(f"{layer}.weight.S")[: vectors.shape[1]].float())
        sigma = torch.stack(values)
        found[layer] = (sigma / sigma[:, :1]).sqrt()[..., None] * vectors.float()
    return found


# Which task is the nearest


def groups(layers: Sequence[str]) -> dict[str, Sequence[str]]:
    """Groups of layers that are compared, by their titles."""
    block = {name: int(match[1]) for name in layers if (match := LAYER.fullmatch(name))}
    count = 1 + max(block.values())
    default = default_layers(layers)
    kinds = [name for name in layers if name.endswith(KINDS)]
    return {
        "default": default,
        **{short(name): [name] for name in default},
        "only fc1": [name for name in default if name.endswith("mlp.fc1")],
        "only queries": [name for name in default if name.endswith("q_proj")],
        "all six kinds of layers": [name for name in layers if block[name] >= count // 3],
        "all blocks": kinds,
        "last third of the blocks": [n for n in kinds if block[n] >= 2 * count // 3],
    }


def compare_layers(seed: Seed, count: int) -> dict[str, dict[str, float]]:
    """Share of the validation images whose own task is the nearest one, or among three.

    Returns:
        `nearest` and `three`, 0 to 1, by what was done.
    """
    tasks = seed.tasks[:count]
    folder, _ = made(seed, tasks, "--layer", "*")
    pipe = opened(seed, folder, tasks)
    router, every = pipe.model.router, pipe.model.router.rule.layers
    V = {layer: router.get_buffer(f"directions_{i}") for i, layer in enumerate(every)}
    images = [images_of(seed, t, "validation", pipe.image_processor).pixels for t in tasks]
    own = torch.repeat_interleave(torch.tensor([len(some) for some in images]))
    compared = groups(every)
    default = compared["default"]
    noise = torch.randn(NOISE_IMAGES, *images[0].shape[1:], generator=torch.manual_seed(0))
    x, mean_of_noise = tokens(router.first, every, images), tokens(router.first, default, [noise])
    found = {title: residuals(x, V, some) for title, some in compared.items()}
    found |= {
        "mean over tokens": residuals(tokens(router.first, default, images, mean=True), V, default),
        "less the mean token of noise": residuals(less(x, mean_of_noise, default), V, default),
        "less the mean token of all images": residuals(less(x, x, default), V, default),
        "directions weighted by σ": residuals(x, weighted(folder, tasks, V), default),
        "tower of the merge": residuals(tokens(pipe.model, default, images), V, default),
    }
    return {title: rights(some, own) for title, some in found.items()}


def residuals(x: ByLayer, directions: ByLayer, layers: Sequence[str]) -> list[Tensor]:
    """Residuals of some layers, each of shape (images, tasks)."""
    return [scores.residuals(x[layer], directions[layer]) for layer in layers]


def less(x: ByLayer, others: ByLayer, layers: Sequence[str]) -> ByLayer:
    """Tokens of some layers minus the mean of others."""
    return {layer: x[layer] - others[layer].mean(dim=0) for layer in layers}


def rights(found: Sequence[Tensor], own: Tensor) -> dict[str, float]:
    """Share of images whose own task is the nearest one, and among the nearest three.

    Args:
        found: residuals, each of shape (images, tasks).
        own: place of the task of each image.
    """
    shares = scores.scores(found, float(len(found)))
    best = shares.topk(min(3, shares.shape[1]), dim=1).indices == own[:, None]
    return {
        "nearest": best[:, 0].float().mean().item(),
        "three": best.any(dim=1).float().mean().item(),
    }


# Sets of tasks


def compare_sets(seed: Seed, count: int) -> list[dict[str, float]]:
    """Normalised accuracy on validation images by temperature, threshold and most tasks.

    Returns:
        Settings, each with `normalised`, 0 to 1, and `chosen`, the mean number of tasks of an
        image. The temperature is that per layer.
    """
    tasks = seed.tasks[:count]
    folder, _ = made(seed, tasks)
    pipe = opened(seed, folder, tasks)
    router = pipe.model.router
    images = [
        images_of(seed, task, "validation", pipe.image_processor, VALIDATION_IMAGES)
        for task in tasks
    ]
    V = {layer: router.get_buffer(f"directions_{i}") for i, layer in enumerate(router.rule.layers)}
    found = residuals(tokens(router.first, list(V), [some.pixels for some in images]), V, list(V))
    shares = {t: scores.scores(found, t * len(V)) for t in TEMPERATURES}
    settings = {
        (temperature, threshold, most): scores.choose(shares[temperature], threshold, most)
        for temperature, threshold, most in product(TEMPERATURES, THRESHOLDS, MOST_TASKS)
    }
    right = classified(pipe, images, settings.values())
    own = fine_tuned(seed, tasks)
    return [
        {
            "temperature": temperature,
            "threshold": threshold,
            "max_tasks": most,
            "normalised": normalised(chosen, right, images, own),
            "chosen": sum(map(len, chosen)) / len(chosen),
        }
        for (temperature, threshold, most), chosen in settings.items()
    ]


Chosen = Sequence[tuple[int, ...]]
"""Places of the tasks that each image is sent to."""


@torch.inference_mode()
def classified(
    pipe: Any, images: Sequence[Images], settings: Iterable[Chosen]
) -> dict[tuple[tuple[int, ...], int], bool]:
    """Whether an image is classified rightly by the tower of some tasks, for all that are chosen.

    The keys are places of tasks, and the place of the image.
    """
    from hf_tsv.evaluation import zero_shot

    wanted = defaultdict[tuple[int, ...], set[int]](set)
    for chosen in settings:
        for row, own in enumerate(chosen):
            wanted[own].add(row)
    pixels = torch.cat([some.pixels for some in images])
    heads = [zero_shot.head(pipe.model, pipe.tokenizer, i.classes, TEMPLATES) for i in images]
    known = [(heads[i], label) for i, some in enumerate(images) for label in some.labels]
    right = {}
    for own, rows in sorted(wanted.items()):
        places = sorted(rows)
        seen = pipe.model.router.tower(own)(pixel_values=pixels[places]).pooler_output
        for row, features in zip(places, seen, strict=True):
            head, label = known[row]
            right[own, row] = int((head @ features).argmax()) == label
    return right


def fine_tuned(seed: Seed, tasks: Sequence[str]) -> list[float]:
    """Accuracies of the fine-tunes on the validation images of their tasks."""
    words = ("--base-model", seed.models / "base", "--limit", VALIDATION_IMAGES)
    reports = (
        command("evaluate", seed.models / task, *words, *seed.options([task], "validation"))
        for task in tasks
    )
    return [report["tasks"][task]["accuracy"] for report, task in zip(reports, tasks, strict=True)]


def normalised(
    chosen: Chosen,
    right: Mapping[tuple[tuple[int, ...], int], bool],
    images: Sequence[Images],
    own: Sequence[float],
) -> float:
    """Mean over the tasks of the share of the fine-tune's accuracy."""
    total, row = 0.0, 0
    for some, reference in zip(images, own, strict=True):
        rows = range(row, row + len(some.labels))
        total += sum(right[chosen[i], i] for i in rows) / len(rows) / reference
        row += len(rows)
    return total / len(images)
