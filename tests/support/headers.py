"""Safetensors files made by hand, and how they are opened and refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from hf_tsv.checkpoints.formats.whole import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.names import SINGLE_FILE
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.checkpoints.storage.headers import index_of
from hf_tsv.system.errors import CheckpointError

INDEX_FILE = index_of(SINGLE_FILE)

FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}

CONFIG = {"model_type": "clip"}


def safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with this header, which is JSON unless given as bytes, true or lying about itself."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def folder_of(folder: Path, files: Mapping[str, Any]) -> Path:
    """A checkpoint made of these files; what is not bytes is written as JSON."""
    folder.mkdir(exist_ok=True)
    for name, content in {"config.json": CONFIG, **files}.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(raw)
    return folder


def opened(ref: str | Path) -> Checkpoint:
    return open_checkpoint(pin(parse(str(ref))))


def refused(folder: Path) -> str:
    """The one line with which a checkpoint is refused; it must name the checkpoint."""
    with pytest.raises(CheckpointError) as error:
        opened(folder)
    assert str(folder) in error.value.message
    return error.value.message
