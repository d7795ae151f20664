"""Pretraining the tiny CLIP on captioned scenes, and fine-tuning its vision tower on one task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transformers import CLIPModel, CLIPProcessor, CLIPTokenizer, CLIPVisionModel

from .models import build_model, build_processor
from .scenes import scenes
from .tasks import Task

import os
HEAD_SCALE = float(os.environ.get("HS", "20"))
Tick = Callable[[], None]


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what is trained, apart from the code."""

    seed: int = 0
    pretraining_pairs: int = 16_000
    pretraining_steps: int = 500
    pretraining_batch: int = 128
    pretraining_rate: float = 2e-3
    task_images: int = 6_400
    finetuning_steps: int = 300
    finetuning_batch: int = 64
    finetuning_rate: float = 5e-4
    warmup: float = 0.1
    weight_decay: float = 0.05


def pixels(images: NDArray[np.uint8]) -> Tensor:
    """What the image processor makes of 32 x 32 images: (n, 32, 32, 3) uint8 to (n, 3, 32, 32)."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def text_embeddings(model: CLIPModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Unit-norm projections of the texts: (n, projection)."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
    features = model.text_model(**inputs).pooler_output
    return normalize(model.text_projection(features), dim=-1)


def image_embeddings(model: CLIPModel, vision: torch.nn.Module, values: Tensor) -> Tensor:
    """Unit-norm projections of (n, 3, 32, 32) through a vision tower and the model's projection."""
    return normalize(model.visual_projection(vision(pixel_values=values).pooler_output), dim=-1)


def _optimise(
    parameters: Sequence[Tensor], loss: Callable[[NDArray[np.int64]], Tensor], *, n: int, steps: int,
    batch: int, rate: float, recipe: Recipe, tick: Tick,
) -> None:
    """AdamW with linear warm-up and cosine decay; `loss` takes the indices of one batch out of n."""
    rng = np.random.default_rng(recipe.seed)
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=recipe.weight_decay, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, rate, total_steps=steps, pct_start=recipe.warmup, cycle_momentum=False
    )
    order = np.concatenate([rng.permutation(n) for _ in range(-(-steps * batch // n))])
    for step in range(steps):
        optimiser.zero_grad()
        loss(order[step * batch : (step + 1) * batch]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        schedule.step()
        tick()


def pretrain(recipe: Recipe, tick: Tick) -> tuple[CLIPModel, CLIPProcessor]:
    """Train a tiny CLIP from scratch with the symmetric contrastive loss."""
    torch.manual_seed(recipe.seed)
    images, captions = scenes(recipe.pretraining_pairs, recipe.seed)
    processor = build_processor(captions)
    model = build_model(processor.tokenizer)

    def loss(rows: NDArray[np.int64]) -> Tensor:
        seen = image_embeddings(model, model.vision_model, pixels(images[rows]))
        read = text_embeddings(model, processor.tokenizer, [captions[row] for row in rows])
        logits = model.logit_scale.exp().clamp(max=100) * seen @ read.T
        target = torch.arange(len(rows))
        return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2

    _optimise(
        list(model.parameters()), loss, n=len(images), steps=recipe.pretraining_steps,
        batch=recipe.pretraining_batch, rate=recipe.pretraining_rate, recipe=recipe, tick=tick,
    )
    return model.eval(), processor


def finetune(
    base: CLIPModel, tokenizer: CLIPTokenizer, task: Task, recipe: Recipe, tick: Tick
) -> CLIPVisionModel:
    """Train the vision tower alone against the frozen text embeddings of the task's prompts."""
    torch.manual_seed(recipe.seed)
    vision = CLIPVisionModel(base.config.vision_config)
    vision.load_state_dict(base.vision_model.state_dict())
    base.requires_grad_(False)
    head = HEAD_SCALE * text_embeddings(base, tokenizer, task.prompts)
    data = task.samples("train", recipe.task_images, recipe.seed)
    labels = torch.from_numpy(data.labels)

    def loss(rows: NDArray[np.int64]) -> Tensor:
        seen = image_embeddings(base, vision, pixels(data.images[rows]))
        return cross_entropy(seen @ head.T, labels[rows])

    _optimise(
        list(vision.parameters()), loss, n=len(labels), steps=recipe.finetuning_steps,
        batch=recipe.finetuning_batch, rate=recipe.finetuning_rate, recipe=recipe, tick=tick,
    )
    return vision.eval()
