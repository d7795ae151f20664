"""LoRA fine-tunes of a tiny CLIP's vision tower, saved as PEFT saves them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import CLIPModel, CLIPProcessor, CLIPVisionModel

from .checkpoints import quietly, save
from .sampling import Task
from .training import (
    HEAD_SCALE,
    Recipe,
    Tick,
    _optimise,
    image_embeddings,
    pixels,
    text_embeddings,
    tokenize,
)


@dataclass(frozen=True)
class AdapterRecipe:
    """Settings of the adapters and their training; seed, images and batch are the fine-tunes'.

    Rate and steps are such that adapters reach about the full fine-tunes' accuracy on validation
    images: on letters, digits and counting of seed 0, 200 steps at 1e-3 stay 6 points below it, and
    at 3e-3 end 2 points above, with updates of up to 0.3 of the base model's norm.
    """

    rank: int = 8
    alpha: int = 16
    modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
    steps: int = 200
    rate: float = 2e-3


def adapters_key(recipe: AdapterRecipe) -> str:
    """Key that changes with every setting of the adapters and every line of this file."""
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    digest.update(Path(__file__).read_bytes())
    return digest.hexdigest()[:12]


def finetune_adapter(
    base: Path, task: Task, recipe: Recipe, adapter: AdapterRecipe, tick: Tick
) -> PeftModel:
    """Train a LoRA adapter of the vision tower, on the images of the task's full fine-tune.

    Args:
        base: folder of the base model, which the adapter will name.
        task: task with images and prompts.
        recipe: recipe of the base model and its fine-tunes.
        adapter: recipe of the adapter.
        tick: called after every step.
    """
    torch.manual_seed(recipe.seed)
    model = quietly(CLIPModel.from_pretrained, base)
    assert isinstance(model, CLIPModel)
    model.requires_grad_(False)
    tokenizer = CLIPProcessor.from_pretrained(base).tokenizer
    head = HEAD_SCALE * text_embeddings(model, tokenize(tokenizer, task.prompts))
    config = LoraConfig(
        r=adapter.rank, lora_alpha=adapter.alpha, target_modules=list(adapter.modules)
    )
    vision = get_peft_model(quietly(CLIPVisionModel.from_pretrained, base), config)
    data = task.samples("train", recipe.finetuning_images, recipe.seed)
    labels = torch.from_numpy(data.labels)

    def loss(rows: NDArray[np.int64]) -> torch.Tensor:
        seen = image_embeddings(model, vision, pixels(data.images[rows]))
        return cross_entropy(seen @ head.T, labels[rows])

    _optimise(
        [part for part in vision.parameters() if part.requires_grad], loss, recipe, len(labels),
        adapter.steps, adapter.rate, tick,
    )  # fmt: skip
    return vision.eval()


def trained_adapters(
    recipe: Recipe,
    adapter: AdapterRecipe,
    models: Path,
    tasks: Sequence[Task],
    done: Callable[[], None],
) -> Path:
    """Train an adapter of every task, two at a time, unless it exists.

    Args:
        recipe: recipe of the base model and its fine-tunes.
        adapter: recipe of the adapters.
        models: folder with the base model, in `base`.
        tasks: tasks to train on.
        done: called after each adapter that was trained.

    Returns:
        Folder beside the base model with an adapter of every task; with `base`, a link to the base
        model; and with `whole`, a folder of the vision towers that PEFT merges the adapters into,
        since `hf-tsv evaluate` takes whole models.
    """
    folder = models / f"lora-{adapters_key(adapter)}"
    folder.mkdir(exist_ok=True)
    if not (folder / "base").is_symlink():
        (folder / "base").symlink_to(Path("..", "base"))
    missing = [task for task in tasks if not (folder / "whole" / task.name).exists()]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_train, recipe, adapter, folder, task) for task in missing]
        for job in as_completed(jobs):
            job.result()
            done()
    return folder


def _train(recipe: Recipe, adapter: AdapterRecipe, folder: Path, task: Task) -> None:
    torch.set_num_threads(1)
    base = (folder / "base").resolve()
    vision = finetune_adapter(base, task, recipe, adapter, lambda: None)
    save(folder / task.name, vision)
    save(folder / "whole" / task.name, vision.merge_and_unload())
