"""Pixels of labelled images by batches, prepared in threads while a model classifies."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_tsv.evaluation.data import LabelledImages

THREADS = min(8, os.cpu_count() or 1)
"""Images prepared at a time."""

Prepared = tuple[Tensor, int]
Batch = tuple[Tensor, list[int]]
"""Pixels, shape (images, 3, height, width), and the classes of the images."""


def batches(
    images: LabelledImages, image_processor: Any, parts: Iterable[Sequence[int]], task: str
) -> Generator[Batch, None, None]:
    """Yield pixels and classes of parts of the rows, in order; `task` is for errors.

    While the caller works on one batch the next is prepared, and none after it. An image that
    cannot be read is an error when its batch is due. Closing waits for the images that threads are
    reading then; no other is begun.
    """

    def prepared(row: int) -> Prepared:
        picture, found = images.read(row, task)
        return image_processor(picture, return_tensors="pt")["pixel_values"], found

    begun = deque[list[Future[Prepared]]]()
    pool = ThreadPoolExecutor(THREADS, "hf-tsv-images")
    try:
        for rows in parts:
            begun.append([pool.submit(prepared, row) for row in rows])
            if len(begun) > 1:
                yield _joined(begun.popleft())
        while begun:
            yield _joined(begun.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _joined(jobs: Sequence[Future[Prepared]]) -> Batch:
    found = [job.result() for job in jobs]
    # Preparing alone takes 1.2 times as long with `torch.cat` in batches of 8, as long in 64.
    pixels = np.concatenate([one.numpy() for one, _ in found])
    return torch.from_numpy(pixels), [label for _, label in found]
