"""Reading ahead of the computation, within a limit of memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from typing import TypeVar

import torch

from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.linalg.lapack import NotConvergedError
from hf_tsv.system.errors import CheckpointError

S = TypeVar("S")
T = TypeVar("T")

LITTLE = 0.05  # memory of biases and norms, as a share of the largest weight


@dataclass(frozen=True)
class Seconds:
    """Wall time, in seconds, by activity; reading, computing and writing run in parallel.

    Reading includes subtracting; the computation stands still for a read or a write while waiting.
    """

    reading: float = 0.0
    waiting: float = 0.0
    computing: float = 0.0
    writing: float = 0.0

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def rounded(self) -> dict[str, float]:
        """Seconds by activity, rounded to the millisecond."""
        return {name: round(value, 3) for name, value in asdict(self).items()}


@contextmanager
def named(label: str, tasks: Sequence[object]) -> Iterator[None]:
    """Name the tasks, in the order of their updates, whose weight cannot be decomposed.

    Of a weight that a GPU has no memory for, the weight is named.
    """
    try:
        yield
    except NotConvergedError as error:
        whose = tasks if error.place is None else [tasks[error.place]]
        raise CheckpointError(
            f"{', '.join(map(str, whose))}: {label} cannot be decomposed: {error}.",
            "Drop the checkpoint or save it again; a merge can also average the weight with"
            f" `exclude={label.replace('{q,k,v}', '?')}`.",
        ) from None
    except torch.OutOfMemoryError:
        problem = f"The device has not enough memory for {label}."
        raise CheckpointError(problem, "Compute on the CPU with `device=cpu`.") from None


def stop_fetching(items: Iterable[Task]) -> None:
    """End every wait for the Hub: the run is over."""
    for item in items:
        item.pinned.files.stop()


def expect(item: Task, names: Iterable[str]) -> None:
    """Begin to fetch weights that are not on this machine, in the order they will be read."""
    parts = (info for name in names for info in item.parts(name))
    item.pinned.files.expect((info.file, info.start, info.nbytes) for info in parts)


def read_ahead(
    pool: ThreadPoolExecutor,
    load: Callable[[S], T],
    items: Sequence[S],
    sizes: Sequence[int],
    *,
    ahead: bool = True,
) -> Iterator[T]:
    """Load items in order; those that the caller will want next meanwhile.

    As many as the largest item takes, and a little more: between two large weights lie small ones,
    during whose computation the next large one could not be read. Sizes are the bytes that each
    item takes; without `ahead` each is loaded when it is asked for.
    """
    most = max(sizes, default=0) * (1 + LITTLE)
    pending: deque[tuple[Future[T], int]] = deque()
    todo = deque(zip(items, sizes, strict=True))
    taken = 0  # by what is pending

    def submit() -> None:
        nonlocal taken
        item, size = todo.popleft()
        pending.append((pool.submit(load, item), size))
        taken += size

    while todo or pending:
        if not pending:
            submit()
        future, size = pending.popleft()
        taken -= size
        while ahead and todo and taken + todo[0][1] <= most:
            submit()
        yield future.result()
