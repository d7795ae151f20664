"""Several processes that share one run: started by torchrun or accelerate, on one machine or more.

The first one leads: it resolves, decides, describes and uploads. All of them compute and write
their own weights, into the same files. They exchange a few messages over gloo, also on GPUs.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from hf_tsv.errors import HfTsvError, LostProcessError, RecipeError

PATIENCE = timedelta(days=1)
"""How long processes wait for one another, as for the first one's downloads; a dead one shows at
once."""

LOST = "A process of this run is gone."
AGAIN = "Run the same command again; it goes on with what is finished."


def launched() -> int:
    """Number of processes that a launcher started; 1 without one."""
    text = os.environ.get("WORLD_SIZE", "")
    return int(text) if text.isdecimal() else 1


def is_leader() -> bool:
    """Whether this process is the one that speaks."""
    return launched() < 2 or os.environ.get("RANK", "0") == "0"


@dataclass
class Processes:
    """The processes of this run.

    Args:
        rank (`int`): of this one.
        count (`int`): of all.
        connection (`Any`): what messages go over.
        listening (`bool`): whether the others wait for a message of the first one.
    """

    rank: int = 0
    count: int = 1
    connection: Any = None
    listening: bool = True

    def send(self, message: Any) -> None:
        """Give all others a message; only the first process does."""
        if self.count > 1:
            import torch.distributed as dist

            self.listening = False
            with _noticing():
                dist.broadcast_object_list([message], group=self.connection)

    def receive(self) -> Any:
        """The next message of the first process.

        Raises:
            [`LostProcessError`]: it failed; it has said why.
        """
        import torch.distributed as dist

        box: list[Any] = [None]
        with _noticing():
            dist.broadcast_object_list(box, group=self.connection)
        if isinstance(box[0], _Failure):
            raise LostProcessError("The first process failed.", "See its message.")
        return box[0]

    def shared(self, value: Any) -> Any:
        """What the first process has, in all of them.

        Args:
            value: counts in the first process only.
        """
        if self.rank:
            return self.receive()
        self.send(value)
        return value

    def gathered(self, value: Any) -> list[Any]:
        """What all processes have, by rank; they wait for one another.

        Args:
            value: of this one.
        """
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        with _noticing():
            dist.all_gather_object(values, value, group=self.connection)
        return values

    def agree(self, error: HfTsvError | None = None) -> None:
        """Wait until all are here; raise everywhere what one of them has met.

        Args:
            error ([`HfTsvError`], *optional*): what this one has met.
        """
        met = self.gathered(error and (type(error), error.message, error.hint))
        # what made one stop comes before that others stopped with it
        failures = sorted(filter(None, met), key=lambda failure: failure[0] is LostProcessError)
        for kind, message, hint in failures:
            raise kind(message, hint)
        self.listening = True

    def dismiss(self, message: Any) -> None:
        """The last message; the work is done, so nobody has to be there any more."""
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
    """Sent in the place of a message."""


@contextmanager
def joined() -> Iterator[Processes]:
    """Meet the processes that a launcher started; alone without one.

    All of them have to call what calls this.

    Raises:
        [`RecipeError`]: they do not meet.
    """
    if launched() < 2:
        yield Processes()
        return
    import torch.distributed as dist

    own = not dist.is_initialized()
    connection = None
    try:
        if own:
            dist.init_process_group("gloo", timeout=PATIENCE)
        else:  # of the caller, perhaps over NCCL, which waits ten minutes
            connection = dist.new_group(backend="gloo", timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise RecipeError(
            f"The {launched()} processes of WORLD_SIZE do not meet: {str(error).splitlines()[0]}",
            "Start them with torchrun or accelerate launch, or unset WORLD_SIZE.",
        ) from None
    try:
        yield Processes(dist.get_rank(), dist.get_world_size(), connection)
    finally:
        if own:
            dist.destroy_process_group()


def alone(command: str) -> None:
    """Refuse several processes where one does all.

    Raises:
        [`RecipeError`]: a launcher started more.
    """
    if launched() > 1:
        raise RecipeError(
            f"`hf-tsv {command}` runs in one process.", "Run it without torchrun or accelerate."
        )


def shares(costs: Sequence[float], count: int) -> list[list[int]]:
    """Split work so that the largest share is about as small as it can be.

    The costliest piece goes to whoever has least so far (Graham, 1969); each share keeps the order
    of the pieces.

    Args:
        costs (`Sequence[float]`): of each piece.
        count (`int`): of shares.

    Returns:
        `list[list[int]]`: indices of the pieces of each share.

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
def _noticing() -> Iterator[None]:
    """A connection that broke means that a process is gone."""
    try:
        yield
    except RuntimeError:
        raise LostProcessError(LOST, AGAIN) from None
