"""Pretraining the tiny CLIP on captioned images, and fine-tuning its vision tower on one task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionModel

from .models import build_model, build_processor
from .sampling import Task
from .tasks import TASKS

Tick = Callable[[], None]
Loss = Callable[[NDArray[np.int64]], Tensor]

HEAD_SCALE = 20.0
"""Logit scale of fine-tuning: the base's own is learnt from captions that are often wrong."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained, apart from the code."""

    seed: int = 0
    tasks: int = 8
    width: int = 96
    layers: int = 3
    mlp_ratio: int = 2
    images_a_task: int = 1_500
    wrong_captions: float = 0.45
    pretraining_steps: int = 1_000
    pretraining_rate: float = 2e-3
    finetuning_images: int = 4_800
    finetuning_steps: int = 150
    finetuning_rate: float = 3e-4
    batch: int = 64
    warmup: float = 0.1
    weight_decay: float = 0.05


def twenty_tasks(seed: int) -> Recipe:
    """The recipe of the accuracy benchmark: one base of all 20 tasks, a fine-tune of each.

    The MLPs are four times as wide as the tower, as in CLIP: how many of the singular vectors of
    all tasks fit beside each other depends on it.
    """
    return Recipe(
        seed=seed,
        tasks=20,
        width=128,
        layers=3,
        mlp_ratio=4,
        images_a_task=2_000,
        pretraining_steps=2_500,
        pretraining_rate=1.5e-3,
        finetuning_images=6_400,
        finetuning_steps=200,
    )


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """What the image processor makes of 32 x 32 images: (n, 32, 32, 3) uint8 to (n, 3, 32, 32)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Token ids (n, length); the text tower is causal, so padding behind the end needs no mask."""
    ids: Tensor = tokenizer(list(texts), padding=True, return_tensors="pt")["input_ids"]
    return ids


def text_embeddings(model: CLIPModel, tokens: Tensor) -> Tensor:
    """Unit-norm projections of n texts, given as (n, length) token ids: (n, projection)."""
    return normalize(model.text_projection(model.text_model(tokens).pooler_output), dim=-1)


def image_embeddings(model: CLIPModel, vision: torch.nn.Module, values: Tensor) -> Tensor:
    """Unit-norm projections of (n, 3, 32, 32) by a vision tower and the model's projection."""
    return normalize(model.visual_projection(vision(pixel_values=values).pooler_output), dim=-1)


def captioned_images(recipe: Recipe) -> tuple[NDArray[np.uint8], list[str]]:
    """Images of all tasks with captions, many of which name the next class instead.

    Such a base sees well and names badly, like a CLIP on images unlike those of the web: what a
    fine-tune then has to learn is small, as it is for the large models.
    """
    rng = np.random.default_rng(recipe.seed)
    images: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    for task in TASKS[: recipe.tasks]:
        data = task.samples("train", recipe.images_a_task, recipe.seed + 1_000)
        wrong = rng.random(len(data.labels)) < recipe.wrong_captions
        images.append(data.images)
        captions += [task.prompts[i] for i in (data.labels + wrong) % len(task.prompts)]
    return np.concatenate(images), captions


def pretrain(recipe: Recipe, tick: Tick) -> tuple[CLIPModel, CLIPProcessor]:
    """Train a tiny CLIP from scratch: every image against all captions there are."""
    torch.manual_seed(recipe.seed)
    images, captions = captioned_images(recipe)
    processor = build_processor(captions)
    model = build_model(processor.tokenizer, recipe.width, recipe.layers, recipe.mlp_ratio)
    texts, target = np.unique(captions, return_inverse=True)
    tokens, labels = tokenize(processor.tokenizer, list(texts)), torch.from_numpy(target)

    def loss(rows: NDArray[np.int64]) -> Tensor:
        seen = image_embeddings(model, model.vision_model, pixels(images[rows]))
        scale = model.logit_scale.exp().clamp(max=100)
        return cross_entropy(scale * seen @ text_embeddings(model, tokens).T, labels[rows])

    _optimise(
        list(model.parameters()), loss, recipe, len(images), recipe.pretraining_steps,
        recipe.pretraining_rate, tick, threads=2,
    )  # fmt: skip
    return model.eval(), processor


def finetune(
    base: CLIPModel, tokenizer: CLIPTokenizer, task: Task, recipe: Recipe, tick: Tick
) -> CLIPVisionModel:
    """Train the vision tower alone against the frozen text embeddings of the task's prompts."""
    torch.manual_seed(recipe.seed)
    vision = CLIPVisionModel(base.config.vision_config)
    vision.load_state_dict(base.vision_model.state_dict())
    base.requires_grad_(False)
    head = HEAD_SCALE * text_embeddings(base, tokenize(tokenizer, task.prompts))
    data = task.samples("train", recipe.finetuning_images, recipe.seed)
    labels = torch.from_numpy(data.labels)

    def loss(rows: NDArray[np.int64]) -> Tensor:
        seen = image_embeddings(base, vision, pixels(data.images[rows]))
        return cross_entropy(seen @ head.T, labels[rows])

    _optimise(
        list(vision.parameters()), loss, recipe, len(labels), recipe.finetuning_steps,
        recipe.finetuning_rate, tick,
    )  # fmt: skip
    return vision.eval()


def _optimise(
    parameters: list[Tensor],
    loss: Loss,
    recipe: Recipe,
    images: int,
    steps: int,
    rate: float,
    tick: Tick,
    *,
    threads: int = 1,
) -> None:
    """AdamW with warm-up and cosine decay; `loss` takes the indices of one batch of the images.

    A batch is cut into one part a thread and the gradients are averaged: on models this small that
    is faster than threads inside each operation.
    """
    rng = np.random.default_rng(recipe.seed)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    epochs = -(-steps * recipe.batch // images)
    order = np.concatenate([rng.permutation(images) for _ in range(epochs)])

    def gradients(rows: NDArray[np.int64]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(rows), parameters)

    with ThreadPoolExecutor(threads) as pool:
        for step in range(steps):
            rows = np.array_split(order[step * recipe.batch : (step + 1) * recipe.batch], threads)
            parts = zip(*pool.map(gradients, rows), strict=True)
            for parameter, shares in zip(parameters, parts, strict=True):
                parameter.grad = torch.stack(shares).mean(0)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            schedule.step()
            tick()
