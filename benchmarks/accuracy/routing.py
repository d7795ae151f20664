"""Runs of models that route their images, through the command line of hf-tsv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.accuracy import ablation
from benchmarks.accuracy.routed import TEMPLATES, Images, images_of, made, opened
from benchmarks.accuracy.runs import Accuracies, Runs, Seed, adding, method_runs
from hf_tsv.evaluation import zero_shot

ROUTED: dict[str, tuple[object, ...]] = {"routed-nearest": ("--max-tasks", 1), "routed": ()}
"""Options of `hf-tsv route` by the name of their runs."""

MOST_TOWERS = 2000
"""Towers of sets of tasks that are kept, of 2.5 MB each."""


def with_classes(seed: Seed, count: int) -> dict[str, Any]:
    """Results as those of [`routed`] of a model that knows the names of the tasks' classes."""
    options: list[object] = ["--template", TEMPLATES[0]]
    for task in seed.tasks[:count]:
        options += ["--classes", f"{task}={seed.images / f'{task}-validation.parquet'}"]
    return routed(seed, count, *options)


def routed(seed: Seed, count: int, *options: object) -> dict[str, Any]:
    """Accuracies of a model that routes among the first tasks, its size, and what it chooses.

    All are of test images. Every tower is kept, which gives what `hf-tsv evaluate` gives, sooner.

    Returns:
        `accuracies`; `ratio`, the size as a share of that of as many checkpoints; `nearest`: for
        each task the share of its images whose nearest task is each; `among`: for each task the
        share of its images that have it among their tasks; `chosen`: mean number of tasks of an
        image; `sets`: number of distinct sets of tasks.
    """
    tasks = seed.tasks[:count]
    folder, report = made(seed, tasks, *options)
    pipe = opened(seed, folder, tasks)
    pipe.model.router.max_towers = MOST_TOWERS
    accuracies, nearest, among, sets = {}, [], [], list[tuple[int, ...]]()
    for place, task in enumerate(tasks):
        images = images_of(seed, task, "test", pipe.image_processor)
        labels = zero_shot.head(pipe.model, pipe.tokenizer, images.classes, TEMPLATES)
        accuracies[task] = accuracy(pipe, labels, images)
        route = pipe.model.route(images.pixels, labels)
        first = torch.bincount(route.scores.argmax(dim=1), minlength=count)
        nearest.append((first / first.sum()).tolist())
        among.append(sum(place in own for own in route.chosen) / len(route.chosen))
        sets += route.chosen
    return {
        "accuracies": accuracies,
        "ratio": report["ratio"],
        "nearest": nearest,
        "among": among,
        "chosen": sum(map(len, sets)) / len(sets),
        "sets": len(set(sets)),
    }


def accuracy(pipe: Any, labels: Tensor, images: Images) -> float:
    """Zero-shot accuracy of a pipeline's model, 0 to 1, with directions of the labels."""
    predicted, _ = zero_shot.classify(pipe.model, labels, images.pixels)
    return sum(a == b for a, b in zip(predicted.tolist(), images.labels, strict=True)) / len(
        predicted
    )


def own_factors(seed: Seed, count: int) -> dict[str, Accuracies]:
    """Accuracies of each task's own factors, from the folder of a model that routes."""
    tasks = seed.tasks[:count]
    folder, _ = made(seed, tasks)
    return {"accuracies": {t: seed.accuracies(folder / "tasks" / t, [t])[t] for t in tasks}}


def routing_runs(seed: Seed, counts: Sequence[int]) -> Runs:
    """Runs of models that route, beside those of all methods.

    Args:
        seed: models and images.
        counts: numbers of tasks.
    """
    runs = method_runs(seed, counts)
    add = adding(runs, seed)
    for count in counts:
        for name, options in ROUTED.items():
            add(name, count, routed, *options)
        add("routed-classes", count, with_classes)
        add("routed-own", count, own_factors)
    for count in {min(counts), max(counts)}:
        add("routing-layers", count, ablation.compare_layers)
    add("routing-sets", min(counts), ablation.compare_sets)
    return runs
