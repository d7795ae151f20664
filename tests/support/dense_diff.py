"""A form of fine-tunes that hf-tsv does not know: updates stored as they are, beside their base.

`test_formats.py` adds it by one row of the table of formats.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_tsv.checkpoints.base_model import SaidBase
from hf_tsv.checkpoints.formats.change import Original
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.opening import InputFormat
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.files import read_json
from hf_tsv.checkpoints.storage.headers import read_headers
from hf_tsv.checkpoints.storage.tensors import TensorInfo, read_tensor

MARKER, WEIGHTS = "diff_config.json", "diff.safetensors"


@dataclass(frozen=True)
class DenseDiff(Task):
    """Updates of some weights of a base model."""

    kind: ClassVar[str] = "dense update"
    says: ClassVar[str] = "is a dense update"

    deltas: Mapping[str, TensorInfo] = field(kw_only=True)

    @property
    def needed_files(self) -> tuple[str, ...]:
        return (MARKER, *self.weight_files)

    def parts(self, name: str) -> list[TensorInfo]:
        return [self.deltas[name]] if name in self.deltas else []

    def weight(self, w0: Original) -> Tensor:
        base = w0.tensor.cpu()
        if w0.name not in self.deltas:
            return base.clone()
        delta = read_tensor(self.pinned.files, self.deltas[w0.name], w0.name, str(self))
        return (base.double() + delta.double()).to(base.dtype)


def open_diff(pinned: PinnedCheckpoint, opener: Callable[[], Checkpoint]) -> DenseDiff:
    """Read the headers; weights of the same towers that are not stored are the base's."""
    deltas, files = read_headers(pinned.files, WEIGHTS, str(pinned))
    base = opener()
    towers = {name.split(".")[0] for name in deltas}
    held = {name: info for name, info in base.tensors.items() if name.split(".")[0] in towers}
    return DenseDiff(pinned, base.model_config, held, files, deltas=deltas)


def base_of_diff(pinned: PinnedCheckpoint) -> SaidBase:
    return SaidBase((read_json(pinned.files, MARKER, str(pinned))["base_model"],), made_with=True)


DIFF = InputFormat("diff", DenseDiff, (MARKER,), open_diff, needs_base=True, says_base=base_of_diff)


def save_diff(base: Path, fine_tuned: Path, folder: Path) -> Path:
    """Store what a fine-tune changed."""
    before = load_file(base / "model.safetensors")
    after = load_file(fine_tuned / "model.safetensors")
    folder.mkdir()
    changed = {name: after[name] - w0 for name, w0 in before.items() if name in after}
    changed = {name: delta for name, delta in changed.items() if delta.is_floating_point()}
    save_file(changed, folder / WEIGHTS)
    (folder / MARKER).write_text(json.dumps({"base_model": str(base)}))
    return folder
