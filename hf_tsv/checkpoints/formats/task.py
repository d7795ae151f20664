"""A fine-tune in whatever form it is stored: the types, names and entries of inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_tsv.checkpoints.formats.factors import Factors
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.system.errors import CheckpointError

Task = Checkpoint | Factors
"""A fine-tune, whole or compressed."""


def config_of(item: Task) -> Mapping[str, Any]:
    """The config.json of a task."""
    return item.config.model_config if isinstance(item, Factors) else item.config


def pinned_entry(item: Task) -> dict[str, str | None]:
    """What a report says of a checkpoint."""
    return {"ref": item.pinned.ref, "revision": item.pinned.revision}


def identity_entry(item: Task) -> dict[str, Any]:
    """Which commit; or which folder, and the sizes of its files and when they were changed.

    Unlike the time of modification, that of change cannot be set: a copy that keeps the one is
    noticed by the other.
    """
    entry: dict[str, Any] = {**pinned_entry(item)}
    if isinstance(item.pinned.files, LocalFiles) and item.pinned.is_local:
        root = item.pinned.files.root
        stats = {name: (root / name).stat() for name in item.needed_files}
        entry["files"] = {
            name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()
        }
    return entry


def distinct_names(pins: Sequence[PinnedCheckpoint]) -> list[str]:
    """Short names of checkpoints: the last part of each reference, more where needed.

    Args:
        pins (`Sequence[PinnedCheckpoint]`): of the checkpoints.
    """
    names = [Path(item.ref).name or item.ref for item in pins]
    for longer in (lambda item: item.ref, str):
        pairs = zip(names, pins, strict=True)
        names = [longer(item) if names.count(name) > 1 else name for name, item in pairs]
    return [
        f"{name} ({names[: i + 1].count(name)})" if names.count(name) > 1 else name
        for i, name in enumerate(names)
    ]


def equals_base(name: str, base: str) -> CheckpointError:
    """The error for an input without an update."""
    return CheckpointError(
        f"{name} equals the base model {base}: it has no update.",
        "Leave it out, or name the right --base-model.",
    )
