"""Common start of all runs on the tiny CLIPs: a quiet console, and the models, trained once."""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

if TYPE_CHECKING:
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
    from benchmarks.tiny_clip.checkpoints import cache_key, trained_base, trained_tasks
    from benchmarks.tiny_clip.tasks import TASKS
    from benchmarks.tiny_clip.training import Recipe

    recipe = recipe or Recipe(seed=seed)
    tasks = TASKS[: recipe.tasks]
    folder = cache / cache_key(recipe)
    steps = progress.add_task("Training the base model", total=recipe.pretraining_steps)
    trained_base(recipe, folder, lambda: progress.advance(steps))
    progress.update(steps, completed=recipe.pretraining_steps)
    missing = [task for task in tasks if not (folder / task.name).exists()]
    bar = progress.add_task("Fine-tuning on each task", total=len(tasks))
    progress.advance(bar, len(tasks) - len(missing))
    trained_tasks(recipe, folder, tasks, lambda: progress.advance(bar))
    return folder
