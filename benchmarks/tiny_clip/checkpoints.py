"""Trained tiny CLIPs as ordinary transformers checkpoints, cached between runs."""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr
from dataclasses import asdict
from io import StringIO
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor

from .sampling import Task
from .training import Recipe, Tick, finetune, pretrain

Pretraining = Callable[[Recipe, Tick], tuple[CLIPModel, CLIPProcessor]]

SOURCES = (
    "drawings.py",
    "first_tasks.py",
    "further_tasks.py",
    "models.py",
    "rendering.py",
    "sampling.py",
    "tasks.py",
    "training.py",
)


def cache_key(recipe: Recipe, further: Sequence[str] = ()) -> str:
    """Key that changes with every setting and every line of code that affects the training.

    Args:
        recipe: recipe of the training.
        further: files of this folder that affect it, beside those that affect every training.
    """
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for name in (*SOURCES, *further):
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:12]


def trained_base(
    recipe: Recipe, folder: Path, tick: Tick, training: Pretraining = pretrain
) -> Path:
    """Folder of the pretrained CLIPModel with tokenizer and processor; trained if absent.

    `tick` is called after every step of the training.
    """
    target = folder / "base"
    if not target.exists():
        torch.set_num_threads(1)  # the training runs two threads itself, which is faster
        model, processor = training(recipe, tick)
        save(target, model, processor)
    return target


def trained_tasks(
    recipe: Recipe, folder: Path, tasks: Sequence[Task], done: Callable[[], None]
) -> list[Path]:
    """Fine-tune a CLIPVisionModel on every task, two at a time; call `done` after each."""
    missing = [task for task in tasks if not (folder / task.name).exists()]
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        jobs = [pool.submit(_train_task, recipe, folder, task) for task in missing]
        for job in as_completed(jobs):
            job.result()
            done()
    return [folder / task.name for task in tasks]


def _train_task(recipe: Recipe, folder: Path, task: Task) -> None:
    torch.set_num_threads(1)
    base = quietly(CLIPModel.from_pretrained, folder / "base")
    tokenizer = CLIPProcessor.from_pretrained(folder / "base").tokenizer
    save(folder / task.name, finetune(base, tokenizer, task, recipe, lambda: None))


def quietly(call: Callable[..., object], *args: object, **kwargs: object) -> object:
    """Call without the library's loading bars."""
    with redirect_stderr(StringIO()):
        return call(*args, **kwargs)


def save(target: Path, *parts: object) -> None:
    """Call `save_pretrained` into a folder that appears only when complete."""
    staging = target.with_name(f".{target.name}-{secrets.token_hex(4)}")
    staging.mkdir(parents=True)
    try:
        for part in parts:
            quietly(part.save_pretrained, staging)  # type: ignore[attr-defined]
        staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
