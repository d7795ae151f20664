"""Zero-shot accuracy of a saved checkpoint, as a user of transformers would measure it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from .checkpoints import quietly
from .sampling import Samples, Task
from .training import image_embeddings, pixels, text_embeddings, tokenize

TEST_IMAGES = 500


@functools.lru_cache(maxsize=20)
def images(task: Task, split: Literal["validation", "test"], seed: int) -> Samples:
    """Images that every model is measured on, drawn once."""
    return task.samples(split, TEST_IMAGES, seed)


@torch.inference_mode()
def accuracy(
    model: CLIPModel,
    vision: torch.nn.Module,
    processor: CLIPProcessor,
    task: Task,
    split: Literal["validation", "test"],
    seed: int,
) -> float:
    """Share of images whose own class prompt is the nearest, in per cent.

    Args:
        model: CLIPModel with the text tower and both projections.
        vision: the vision tower to measure.
        processor: processor whose tokenizer reads the prompts.
        task: task with images and prompts.
        split: split, drawn independently of the training images.
        seed: seed of the images.
    """
    data = images(task, split, seed)
    texts = text_embeddings(model, tokenize(processor.tokenizer, task.prompts))
    seen = image_embeddings(model, vision, pixels(data.images))
    chosen: Tensor = (seen @ texts.T).argmax(dim=1)
    return 100 * float((chosen == torch.from_numpy(data.labels)).float().mean())


def load_model(folder: Path) -> tuple[CLIPModel, CLIPProcessor]:
    """Load a complete CLIPModel and its processor."""
    model = quietly(CLIPModel.from_pretrained, folder)
    processor = CLIPProcessor.from_pretrained(folder)
    assert isinstance(model, CLIPModel)
    return model.eval(), processor


def load_vision(folder: Path) -> CLIPVisionModel:
    """Load a vision tower alone."""
    model = quietly(CLIPVisionModel.from_pretrained, folder)
    assert isinstance(model, CLIPVisionModel)
    return model.eval()
