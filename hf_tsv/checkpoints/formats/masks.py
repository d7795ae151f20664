"""TALL-masks: tasks of one bit per weight, beside a merge that holds the sum of all updates."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar

from hf_tsv.checkpoints import places
from hf_tsv.checkpoints.base_model import SaidBase
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import open_checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.checkpoints.storage.dtypes import DTYPES
from hf_tsv.checkpoints.storage.files import Files, HubFiles, LocalFiles, read_json
from hf_tsv.checkpoints.storage.headers import read_header
from hf_tsv.checkpoints.storage.tensors import TensorInfo, fingerprint, read_tensor
from hf_tsv.system.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from hf_tsv.checkpoints.formats.change import Original

FOLDER = "masks"  # beside the weights of a merge, with a folder for each task
MASK_FILE = "mask.safetensors"
CONFIG_FILE = "hf_tsv_mask.json"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Masked(Task):
    """Task of a merge: the merged value where its bit is set, the base model's elsewhere.

    All but the following is that of the merge; the files of the mask are among the weight files.

    Args:
        masks (`Mapping[str, TensorInfo]`): packed bits by canonical name; a weight without a mask
            has no bit set.
        base_revision (`str`, *optional*): commit of the base it was made with; None for a folder.
        digests (`Mapping[str, str]`): digests of that model's tensors.
    """

    kind: ClassVar[str] = "mask"
    says: ClassVar[str] = "is a mask"
    for_factors: ClassVar[str] = "`hf-tsv merge {} -o DIR` makes a whole checkpoint of it."

    tensors: Mapping[str, TensorInfo]
    masks: Mapping[str, TensorInfo] = field(kw_only=True)
    base_ref: str = field(kw_only=True)
    base_revision: str | None = field(kw_only=True)
    digests: Mapping[str, str] = field(kw_only=True)

    def says_base(self) -> SaidBase:
        """Base model that it was made with."""
        content = fingerprint(self.digests)
        return SaidBase((self.base_ref,), True, self.base_revision, content)

    def parts(self, name: str) -> list[TensorInfo]:
        """Tensors of the files that reading one weight needs, besides the base model's."""
        return [self.tensors[name], self.masks[name]] if name in self.masks else []

    def weight(self, w0: Original) -> Tensor:
        """Compute one weight of the task."""
        import torch

        name, files = w0.name, self.pinned.files
        if self.digests.get(name) != w0.digest():
            made_with = at_revision(self.base_ref, self.base_revision)
            raise CheckpointError(
                f"{self}: {name} of the base model {w0.base} is not what the mask was made with.",
                f"It was made with {made_with}; name it with `base_model=REF`.",
            )
        base, info = w0.tensor.cpu(), self.tensors[name]
        if name not in self.masks:
            return base.to(info.dtype.torch, copy=True)
        merged = read_tensor(files, info, name, str(self), pinned=w0.device.type == "cuda")
        packed = read_tensor(files, self.masks[name], name, str(self))
        return torch.where(unpacked(packed, base.shape), merged, base.to(merged.dtype))


def packed_shape(shape: tuple[int, ...]) -> tuple[int]:
    """Shape of the packed bits of a weight, eight to a byte: (2,) for (3, 3)."""
    return (-(-prod(shape) // 8),)


def packed(mask: Tensor) -> Tensor:
    """Pack a mask into bits, eight to a byte, the first one highest.

    Example:
        >>> packed(torch.tensor([[True, False], [True, True]])).tolist()
        [176]
    """
    import numpy as np
    import torch

    return torch.from_numpy(np.packbits(mask.reshape(-1).numpy()))


def unpacked(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack a mask into the shape of its weight."""
    import numpy as np
    import torch

    flat = np.unpackbits(bits.numpy(), count=prod(shape))
    return torch.from_numpy(flat).bool().reshape(shape)


def write_config(
    folder: Path, task: str, base: PinnedCheckpoint, digests: Mapping[str, str], scale: float
) -> None:
    """Write into the folder of a task the fine-tune, the base, its digests, and the scale λ."""
    content = {
        "hf_tsv_mask": FORMAT_VERSION,
        "task": task,
        "base_model": {"ref": base.name, "revision": base.revision},
        "mask_scale": scale,
        "base_digests": dict(digests),
    }
    places.note(fingerprint(digests), base)
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def open_masked(pinned: PinnedCheckpoint) -> Masked:
    """Read the headers of a merge and of one of its masks, whose folder is pinned."""
    owner = str(pinned)
    config = read_json(pinned.files, CONFIG_FILE, owner)
    base, digests = config.get("base_model"), config.get("base_digests")
    if config.get("hf_tsv_mask") != FORMAT_VERSION:
        problem = f"{owner}: {CONFIG_FILE} was written by another version of hf-tsv."
        raise CheckpointError(problem, "Use that version.")
    if not (isinstance(digests, dict) and isinstance(base, dict) and _is_origin(base)):
        problem = f"{owner}: {CONFIG_FILE} does not say what the mask belongs to."
        raise CheckpointError(problem, "Merge again.")
    there, within = _beside(pinned.files, owner)
    merged = open_checkpoint(replace(pinned, files=there))
    file = f"{within}/{MASK_FILE}"
    masks = read_header(there, file, owner)
    for name, info in masks.items():
        weight = merged.tensors.get(name)
        if weight is None or (info.dtype, info.shape) != (DTYPES["U8"], packed_shape(weight.shape)):
            problem = f"{owner}: the mask of {name} does not fit the merge beside it."
            raise CheckpointError(problem, "Download both again, or merge again.")
    files = (*merged.weight_files, file, f"{within}/{CONFIG_FILE}")
    return Masked(
        merged.pinned, merged.model_config, merged.tensors, files, format=merged.format,
        masks=masks, base_ref=base["ref"], base_revision=base.get("revision"), digests=digests,
    )  # fmt: skip


def _is_origin(value: dict[str, Any]) -> bool:
    ref, revision = value.get("ref"), value.get("revision")
    return isinstance(ref, str) and (revision is None or isinstance(revision, str))


def _beside(files: Files, owner: str) -> tuple[Files, str]:
    """Files of the merge, and the path of the task's folder in them."""
    place = PurePosixPath(files.root.absolute()) if isinstance(files, LocalFiles) else None
    if isinstance(files, HubFiles):
        place = PurePosixPath(files.subfolder)
    if place is None or place.parent.name != FOLDER:
        hint = f"Name it there: MERGE/{FOLDER}/{owner.rpartition('/')[2]}."
        raise CheckpointError(f"{owner} is not beside the merge it belongs to.", hint)
    within = f"{FOLDER}/{place.name}"
    if isinstance(files, HubFiles):
        above = str(place.parent.parent)
        return HubFiles(files.repo, "" if above == "." else above), within
    return LocalFiles(Path(place.parent.parent)), within
