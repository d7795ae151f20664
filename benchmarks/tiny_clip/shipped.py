"""Training of the models that lie in `examples/tiny/`.

`python -m benchmarks.tiny_clip.shipped` trains the base model and the eight fine-tunes of the demo,
seed 0, compresses each fine-tune to task factors, and replaces the folders of `examples/tiny/`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.prepared import bars, quiet_libraries, trained
from benchmarks.tiny_clip import BASE, NAMES, TINY
from benchmarks.tiny_clip.evaluation import TEST_IMAGES
from benchmarks.tiny_clip.first_tasks import FIRST_TASKS
from benchmarks.tiny_clip.sampling import Task

SEED = 0
RANK_FRACTION = 1 / len(NAMES)
"""Rank share that a merge of all eight keeps of each, so that the factors lose nothing to it."""


EXAMPLES = {
    "letters": 9,
    "digits": 0,
    "shapes": 4,
    "colours": 3,
    "orientation": 3,
    "textures": 7,
    "counting": 2,
    "position": 2,
}
"""Place, among the test images of each task, of one that the base model names wrong and the merge
of all eight right: the first there is."""


def write_labels(folder: Path) -> None:
    """Write the class prompts of every task, and one test image of each task."""
    labels = {task.name: list(task.prompts) for task in FIRST_TASKS}
    text = json.dumps(labels, indent=2) + "\n"
    (folder / "labels.json").write_text(text, encoding="utf-8")
    images = folder / "images"
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir()
    for task in FIRST_TASKS:
        image, label = example(task)
        Image.fromarray(image).save(images / f"{label}.png")


def example(task: Task) -> tuple[np.ndarray, str]:
    """Test image of a task, uint8 (32, 32, 3), and its class prompt."""
    data, place = task.samples("test", TEST_IMAGES, SEED), EXAMPLES[task.name]
    return data.images[place], task.prompts[int(data.labels[place])]


def main() -> None:
    """Train, compress, replace."""
    quiet_libraries()
    import hf_tsv

    with bars() as progress:
        folder = trained(SEED, progress)
        bar = progress.add_task("Compressing", total=len(NAMES))
        TINY.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(BASE, ignore_errors=True)
        shutil.copytree(folder / "base", BASE)
        os.chdir(folder)  # a reference is written as it is given: no path of this machine
        for name in NAMES:
            hf_tsv.compress(
                name,
                base_model="base",
                output=TINY / name,
                rank_fraction=RANK_FRACTION,
                dtype="bfloat16",
                compress_conv=True,
                force=True,
                progress=False,
            )
            progress.advance(bar)
    write_labels(TINY)
    print(f"The models are in {TINY}")


if __name__ == "__main__":
    main()
