"""Images of a task as parquet files, for `hf-tsv evaluate` and Hugging Face datasets."""

from __future__ import annotations

import io
import secrets
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .sampling import SPLITS, Split, Task

MEASURED: tuple[Split, ...] = SPLITS[1:]


def write_task(task: Task, folder: Path, seed: int, images: int = 500) -> dict[Split, Path]:
    """Write the validation and the test images of a task, one file each.

    The names of the classes are whole prompts, so the template is `"{}"`:
    `hf-tsv evaluate MODEL --task letters=letters-test.parquet --template "{}"`.

    Args:
        task: task with images and prompts.
        folder: folder for `NAME-validation.parquet` and `NAME-test.parquet`.
        seed: seed of the images.
        images: number of images per split.

    Returns:
        The files, by split.
    """
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(task.prompts))}
    )
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for split in MEASURED:
        data = task.samples(split, images, seed)
        rows = datasets.Dataset.from_dict(
            {
                "image": [{"bytes": _png(i), "path": None} for i in data.images],
                "label": data.labels,
            },
            features=features,
        )
        files[split] = folder / f"{task.name}-{split}.parquet"
        staging = folder / f".{task.name}-{split}-{secrets.token_hex(4)}.parquet"
        rows.to_parquet(staging)
        staging.rename(files[split])
    return files


def _png(image: NDArray[np.uint8]) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()
