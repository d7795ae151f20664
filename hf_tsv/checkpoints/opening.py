"""Opening a task: the first format whose marker is there."""

from __future__ import annotations

from hf_tsv import hub
from hf_tsv.checkpoints.formats.adapters import is_adapter, open_adapter
from hf_tsv.checkpoints.formats.factors import is_factors, open_factors
from hf_tsv.checkpoints.formats.masks import is_masked, open_masked
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import open_checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint, Reference, pin
from hf_tsv.checkpoints.storage.files import HubFiles, LocalFiles
from hf_tsv.system.errors import CheckpointError, RepoError
from hf_tsv.system.progress import logger


def open_task(pinned: PinnedCheckpoint) -> Task:
    """Read the headers of a checkpoint, of an adapter, or of task factors.

    Where pickles cannot be read, the conversion to safetensors that the Hub offers as a pull
    request is.
    """
    try:
        return _opened(pinned)
    except CheckpointError as error:
        converted = _conversion(pinned)
        if converted is None:
            if isinstance(pinned.files, LocalFiles) and not pinned.is_local:
                cached = next(p for p in pinned.files.root.parents if p.name == "snapshots").parent
                error.hint = f"Run once with a connection; if it stays, delete {cached} first."
            raise
        logger.warning("%s Its conversion %s is read.", error.message, converted)
        return _opened(converted)


def _conversion(pinned: PinnedCheckpoint) -> PinnedCheckpoint | None:
    names = pinned.files.names()
    pickled = any(name.endswith(".bin") for name in names)
    if not pickled or any(name.endswith(".safetensors") for name in names):
        return None
    if not isinstance(pinned.files, HubFiles):
        return None
    repo = pinned.files.repo
    try:
        revision = hub.conversion(repo)
        if revision is None:
            return None
        reference = Reference(pinned.ref, repo.repo_id, revision, pinned.files.subfolder)
        return pin(reference, token=repo.token, cache_dir=repo.cache_dir)
    except RepoError:  # what is wrong with the pickle says more
        return None


def _opened(pinned: PinnedCheckpoint) -> Task:
    if is_masked(pinned):
        return open_masked(pinned)
    if is_adapter(pinned):
        return open_adapter(pinned)
    return open_factors(pinned) if is_factors(pinned) else open_checkpoint(pinned)
