"""Processes that share one run: started by torchrun or accelerate, on one or more machines.

The first process leads: it resolves inputs, makes decisions, writes descriptions and uploads. All
processes compute weights and write them into the same files. They exchange a few messages over
gloo, also on GPUs.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from threading import Thread
from typing import Any

from hf_tsv.system.errors import HfTsvError, LostProcessError, RecipeError
from hf_tsv.system.text import first_line

# Longest time processes wait for one another, such as for downloads of the first one; a dead
# process is noticed at once.
PATIENCE = timedelta(days=1)

LOST = "A process of this run is gone."
AGAIN = "Run the same command again to resume."


def launched() -> int:
    """Number of processes that a launcher started, or 1 without a launcher."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def is_leader() -> bool:
    """Tell whether this process is the first one, which alone prints."""
    return launched() < 2 or os.environ.get("RANK", "0") == "0"


@dataclass
class Processes:
    """The processes of this run; `listening`: the others wait for a message of the first one."""

    rank: int = 0
    count: int = 1
    connection: Any = None
    listening: bool = True

    def send(self, message: Any) -> None:
        """Send a message to all others; only the first process calls this."""
        if self.count > 1:
            with _noticing() as dist:
                dist.broadcast_object_list([message], group=self.connection)
            self.listening = False  # not before: what cannot be pickled has reached nobody

    def receive(self) -> Any:
        """Receive the first process's next message; its failure is a [`LostProcessError`]."""
        box: list[Any] = [None]
        with _noticing() as dist:
            dist.broadcast_object_list(box, group=self.connection)
        if isinstance(box[0], _Failure):
            raise LostProcessError("The first process failed.", "See its message.")
        return box[0]

    def shared(self, value: Any) -> Any:
        """Return the first process's value in all processes; those of the others are ignored."""
        if self.rank:
            return self.receive()
        self.send(value)
        return value

    def gathered(self, value: Any) -> list[Any]:
        """Values of all processes, by rank; every process waits for all others."""
        values: list[Any] = [value] * self.count
        if self.count > 1:
            with _noticing() as dist:
                dist.all_gather_object(values, value, group=self.connection)
        return values

    def agree(self, error: HfTsvError | None = None) -> None:
        """Wait for all processes, and raise in each of them the error that one has met."""
        met = self.gathered(error and (type(error), error.message, error.hint))
        # a cause comes before the LostProcessErrors that follow from it
        failures = sorted(filter(None, met), key=lambda failure: failure[0] is LostProcessError)
        for kind, message, hint in failures:
            raise kind(message, hint)
        self.listening = True

    def dismiss(self, message: Any) -> None:
        """Send the last message; a process that has already left is no error, the work is done."""
        with suppress(LostProcessError):
            self.send(message)

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Tell the others when the first process fails while they wait for it."""
        try:
            yield
        except BaseException:
            if self.listening:
                with suppress(LostProcessError):
                    self.send(_Failure())
            raise


@dataclass(frozen=True)
class _Failure:
    """Message that stands for a failure of the first process."""


@contextmanager
def joined() -> Iterator[Processes]:
    """Connect the processes of a launcher, each of which calls this; without one it is alone."""
    if launched() < 2:
        yield Processes()
        return
    import torch.distributed as dist

    own = not dist.is_initialized()
    connection = None
    try:
        if own:
            dist.init_process_group("gloo", timeout=PATIENCE)
        else:  # the caller's group may be NCCL, which gives up after ten minutes
            connection = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RecipeError(
            f"The {launched()} processes of WORLD_SIZE do not meet: {first_line(error)}.",
            "Start them with torchrun or accelerate launch, or unset WORLD_SIZE.",
        ) from None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), connection)
    finally:
        if own:
            dist.destroy_process_group()


def alone(work: str, then: str = "") -> None:
    """Refuse a launcher for work that one process does alone; `then` ends the hint."""
    if launched() > 1:
        hint = f"Run it without torchrun or accelerate{then}."
        raise RecipeError(f"{work} runs in one process.", hint)


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Split work into shares, given as indices, whose largest is nearly as small as possible.

    The costliest piece goes to the share with the least so far (Graham, 1969); each share keeps the
    order of its pieces.

    Example:
        >>> shares([3.0, 1.0, 2.0, 2.0], 2)
        [[0, 1], [2, 3]]
    """
    found: list[list[int]] = [[] for _ in range(count)]
    loads = [0.0] * count
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        least = loads.index(min(loads))
        found[least].append(index)
        loads[least] += costs[index]
    return [sorted(share) for share in found]


@contextmanager
def _noticing() -> Iterator[Any]:
    """Give torch.distributed, and turn a broken connection into a [`LostProcessError`]."""
    import torch.distributed as dist

    try:
        yield dist
    except RuntimeError:
        raise LostProcessError(LOST, AGAIN) from None


def end_with_input() -> None:
    """End this process, as SIGTERM does, when its standard input ends.

    A program that holds the other side of it need not live to say so.
    """

    def wait() -> None:
        while os.read(0, 1):  # not by sys.stdin, whose lock a thread must not hold at the end
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=wait, name="hf-tsv-input", daemon=True).start()
