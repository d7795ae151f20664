"""Opening a task: the first format whose marker is there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from hf_tsv import hub
from hf_tsv.checkpoints.base_model import SaidBase, said_by
from hf_tsv.checkpoints.formats.adapter_names import CONFIG_FILE as ADAPTER_CONFIG
from hf_tsv.checkpoints.formats.adapters import Adapter, open_adapter
from hf_tsv.checkpoints.formats.factors import Factors, open_factors
from hf_tsv.checkpoints.formats.masks import CONFIG_FILE as MASK_CONFIG
from hf_tsv.checkpoints.formats.masks import Masked, open_masked
from hf_tsv.checkpoints.formats.open_clip import CONFIG_FILE as OPEN_CLIP_CONFIG
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.names import CONFIG_FILE, FACTORS_CONFIG
from hf_tsv.checkpoints.reference import PinnedCheckpoint, Reference, pin
from hf_tsv.system.errors import CheckpointError, RepoError
from hf_tsv.system.progress import logger

T = TypeVar("T")

Opener = Callable[[], Checkpoint]  # gives the base model, where a format cannot do without


@dataclass(frozen=True)
class InputFormat:
    """A form in which fine-tunes are stored, and the class that it is opened as."""

    name: str  # in reports
    task: type[Task]
    markers: tuple[str, ...]  # files of which one tells that it is this form
    open: Callable[[PinnedCheckpoint, Opener], Task]  # reads its headers
    needs_base: bool = False  # `open` asks for the base model
    says_base: Callable[[PinnedCheckpoint], SaidBase] = said_by  # before it is opened
    layout: str | None = None  # its tensors' naming, in reports; None: the checkpoint's


FORMATS = (
    InputFormat("mask", Masked, (MASK_CONFIG,), lambda it, _: open_masked(it)),
    InputFormat(
        "adapter", Adapter, (ADAPTER_CONFIG,), open_adapter, needs_base=True, layout="peft"
    ),
    InputFormat(
        "factors", Factors, (FACTORS_CONFIG,), lambda it, _: open_factors(it), layout="task factors"
    ),
    InputFormat(
        "checkpoint", Checkpoint, (CONFIG_FILE, OPEN_CLIP_CONFIG), lambda it, _: open_checkpoint(it)
    ),
)
"""Every form that is read: the first whose marker is there; where none is, the last one."""


def format_of(pinned: PinnedCheckpoint) -> InputFormat:
    """Form in which a repository or folder holds a fine-tune, by the names of its files."""
    there = (f for f in FORMATS if any(pinned.files.size(m) is not None for m in f.markers))
    return next(there, FORMATS[-1])


def without_base() -> Checkpoint:
    """Stand in for the base model where it is not known yet: formats that need it cannot ask."""
    raise AssertionError("This form has to say that it needs the base model.")


def open_task(pinned: PinnedCheckpoint, base: Opener) -> Task:
    """Read the headers of a fine-tune, in whatever form it is stored.

    Where pickles cannot be read, the conversion to safetensors that the Hub offers as a pull
    request is. The base model is asked for if the form needs it.
    """
    asked: list[PinnedCheckpoint] = []

    def opener() -> Checkpoint:
        asked.append(pinned)  # its own headers are read
        return base()

    return _readable(
        pinned, lambda found: format_of(found).open(found, opener), lambda: bool(asked)
    )


def open_base(pinned: PinnedCheckpoint) -> Checkpoint:
    """Read the headers of a base model, which is a whole checkpoint or refused."""
    form = format_of(pinned).task
    if not form.is_whole:
        hint = "Name the model that the tasks were fine-tuned from."
        raise CheckpointError(f"The base model {pinned} {form.says}.", hint)
    found = _readable(pinned, open_checkpoint)
    if found.config_name is None:
        raise CheckpointError(
            f"The base model {pinned} has no {CONFIG_FILE}, and not all of it is in the weights.",
            "Name the published base model, or put its config.json beside the weights.",
        )
    return found


def _readable(
    pinned: PinnedCheckpoint,
    read: Callable[[PinnedCheckpoint], T],
    is_sound: Callable[[], bool] = lambda: False,
) -> T:
    """Read a commit, or the conversion of its pickles to safetensors.

    Errors after its files were found sound are not about them, and stay as they are.
    """
    try:
        return read(pinned)
    except CheckpointError as error:
        if is_sound():
            raise
        converted = _conversion(pinned)
        if converted is None:
            folder = pinned.files.folder
            if folder is not None and not pinned.is_local:
                cached = next(p for p in folder.parents if p.name == "snapshots").parent
                error.hint = f"Run once with a connection; if it stays, delete {cached} first."
            raise
        logger.warning("%s Its conversion %s is read.", error.message, converted)
        return read(converted)


def _conversion(pinned: PinnedCheckpoint) -> PinnedCheckpoint | None:
    names, repo = pinned.files.names(), pinned.files.downloads
    pickled = any(name.endswith(".bin") for name in names)
    if repo is None or not pickled or any(name.endswith(".safetensors") for name in names):
        return None
    try:
        if (revision := hub.conversion(repo)) is None:
            return None
        reference = Reference(pinned.ref, repo.repo_id, revision, pinned.files.subfolder)
        return pin(reference, token=repo.token, cache_dir=repo.cache_dir)
    except RepoError:  # what is wrong with the pickle says more
        return None
