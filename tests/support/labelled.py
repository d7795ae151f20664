"""Labelled images for tests of `evaluate`: pictures of three colours, as folders and as parquet."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from hub import Hub
from PIL import Image

CLASSES = ("cat", "dog", "emu")
TOKENS = 300  # of the tiny text towers
COLOURS = {"cat": (200, 40, 40), "dog": (40, 200, 40), "emu": (40, 40, 200)}


def picture(name: str, seed: int) -> Image.Image:
    """A noisy picture of one class."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(-40, 40, (40, 36, 3))
    return Image.fromarray(np.clip(np.array(COLOURS[name]) + noise, 0, 255).astype(np.uint8))


def make_folder(folder: Path) -> Path:
    """A folder of images, one folder a class, in two splits."""
    for split, count in (("train", 3), ("test", 8)):
        for number, name in enumerate(CLASSES):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                picture(name, 100 * number + i).save(folder / split / name / f"{i}.png")
    return folder


def parquet(
    folder: Path, count: int = 12, names: Sequence[str] = CLASSES, seed: int = 0, **columns: Any
) -> bytes:
    """A parquet file with a column of images and one of class labels.

    Args:
        folder: to write it in.
        count: of images.
        names: of the classes.
        seed: of the pictures.
        columns: other names of the two columns, `image` and `label`.
    """
    import datasets

    datasets.disable_progress_bars()
    image, label = columns.get("image", "image"), columns.get("label", "label")
    numbers = [i % len(CLASSES) for i in range(count)]
    rows = datasets.Dataset.from_dict(
        {image: [picture(CLASSES[n], seed + i) for i, n in enumerate(numbers)], label: numbers},
        features=datasets.Features(
            {image: datasets.Image(), label: datasets.ClassLabel(names=list(names))}
        ),
    )
    file = folder / "rows.parquet"
    rows.to_parquet(file)
    return file.read_bytes()


def add_dataset(hub: Hub, repo_id: str, folder: Path, split: str = "test", **options: Any) -> str:
    """A dataset of the loopback Hub, with one split; returns the sha of its commit."""
    file = f"data/{split}-00000-of-00001.parquet"
    return hub.add_repo(repo_id, {file: parquet(folder, **options)}, kind="datasets")


def with_an_odd_word(zoo: Path, pets: Path, folder: Path) -> tuple[Path, Path]:
    """A base model whose tokenizer has a word that the model has not, and images of that class."""
    from transformers import AutoTokenizer

    base, odd = (Path(shutil.copytree(p, folder / p.name)) for p in (zoo / "base", pets))
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([*(f"<{i}>" for i in range(TOKENS)), "zebra"])
    tokenizer.save_pretrained(base)
    for split in odd.iterdir():
        (split / "emu").rename(split / "zebra")
    return base, odd
