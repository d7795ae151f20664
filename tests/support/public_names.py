"""Tiny models and datasets under the public names that README and docs use."""

from __future__ import annotations

from pathlib import Path

import clips
from hub import Hub
from labelled import CLASSES, add_dataset, picture

BASE = "openai/clip-vit-base-patch32"
TASKS = ("sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd")


def fine_tune(task: str) -> str:
    return f"tanganke/clip-vit-base-patch32_{task}"


def make(folder: Path) -> Path:
    """A tiny base model and a fine-tune of it for each task, in folders of their own."""
    clips.make_base(folder / "base", positions=77)  # letters are tokens here
    for seed, task in enumerate(TASKS, start=1):
        clips.make_fine_tune(folder / "base", folder / task, seed)
    return folder


def serve(hub: Hub, folder: Path, scratch: Path) -> None:
    """Put these models, and a dataset for two tasks, on the loopback Hub."""
    hub.add_repo(BASE, folder / "base")
    card = f"---\nbase_model: {BASE}\nlicense: mit\n---\n# A fine-tune\n"
    for task in TASKS:
        files = {file.name: file for file in (folder / task).iterdir()}
        hub.add_repo(fine_tune(task), {**files, "README.md": card})
    for task in ("dtd", "eurosat"):
        for split in ("train", "test"):
            add_dataset(hub, f"tanganke/{task}", scratch, split)


def photo(folder: Path) -> None:
    """The picture that snippets classify."""
    picture(CLASSES[0], 0).save(folder / "photo.jpg")
