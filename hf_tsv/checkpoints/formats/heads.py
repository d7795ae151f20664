"""Task heads kept beside a merged encoder: one file per task, with its labels."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.storage.headers import read_header, read_metadata
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.untrusted import parse_json

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "heads"
SUFFIX = ".safetensors"
CONFIG_KEY = "config"
LONGEST_NAME = 100

T = TypeVar("T", bound=Task)


def file_names(tasks: Sequence[str]) -> list[str]:
    """Path of the head file of each task."""
    return [f"{FOLDER}/{stem}{SUFFIX}" for stem in file_stems(tasks)]


def file_stems(tasks: Sequence[str]) -> list[str]:
    """Distinct name for each task, valid as a file name on any system.

    Example:
        >>> file_stems(["clip-a", "org/b", "org/b"])
        ['clip-a', 'org-b', 'org-b-2']
    """
    stems: list[str] = []
    for task in tasks:
        stem = re.sub(r"[^\w.-]+", "-", task).strip(".-") or "task"
        stem = stem.encode()[:LONGEST_NAME].decode(errors="ignore")
        while stem.lower() in [other.lower() for other in stems]:
            stem = f"{stem}-{len(stems) + 1}"
        stems.append(stem)
    return stems


def write(
    folder: Path, file: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write one head, with the keys that it needs in config.json, into the folder of a merge."""
    from safetensors.torch import save_file

    (folder / FOLDER).mkdir(exist_ok=True)
    # A single entry: the library writes several in any order, and the bytes would differ.
    save_file(dict(tensors), folder / file, metadata={CONFIG_KEY: json.dumps(dict(config))})


def tasks_of(item: Task) -> list[str]:
    """Names of the tasks whose heads are beside a merge."""
    names = item.pinned.files.within(FOLDER).names()
    mine = (name for name in names if name.endswith(SUFFIX) and name.isprintable())
    return [name.removesuffix(SUFFIX) for name in mine]


def with_head(item: T, task: str) -> T:
    """Make the same merge, or task of one, with the head of one of [`tasks_of`]."""
    known = tasks_of(item)
    if task not in known:
        there = f"It has those of {', '.join(known)}." if known else "Merge with `keep_heads=True`."
        raise CheckpointError(f"{item} has no head of the task {task!r}.", there)
    file = f"{FOLDER}/{task}{SUFFIX}"
    infos = read_header(item.pinned.files, file, str(item))
    try:
        config = parse_json(read_metadata(item.pinned.files, file, str(item))[CONFIG_KEY].encode())
    except (KeyError, ValueError, OverflowError):
        config = None
    if not isinstance(config, dict):
        raise CheckpointError(f"{item}: {file} does not say what its labels are.", "Merge again.")
    labels = ("id2label", "label2id", "num_labels", "problem_type")
    own = {key: value for key, value in config.items() if key in labels}
    kept = {key: value for key, value in item.model_config.items() if key not in labels}
    files = (*item.weight_files, file)
    return replace(item, head=infos, model_config={**kept, **own}, weight_files=files)
