"""Writing of a checkpoint in shards, whose space is reserved first and filled in any order."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import split_state_dict_into_shards_factory

from hf_tsv.checkpoints.names import SINGLE_FILE
from hf_tsv.checkpoints.storage.headers import index_of
from hf_tsv.checkpoints.storage.tensors import Part, TensorSpec, byte_view
from hf_tsv.system.checks import size_in_bytes

if TYPE_CHECKING:
    from torch import Tensor

# The library sorts by dtype, in this order, and then by name.
DTYPE_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")


@dataclass(frozen=True)
class ShardPlan:
    """Layout of all output files, known to the byte before any tensor is computed."""

    headers: Mapping[str, bytes]  # of each file, its length prefix included
    places: Mapping[str, tuple[str, int]]  # file and offset of each tensor
    sizes: Mapping[str, int]  # of each file, in bytes
    index: str | None  # content of the index, if there are several shards
    index_file: str
    transposed: frozenset[str] = frozenset()  # tensors that are stored transposed

    @property
    def total_bytes(self) -> int:
        """Size of all weight files together, in bytes, headers included, index excluded."""
        return sum(self.sizes.values())


def plan_shards(
    specs: Mapping[str, TensorSpec],
    max_shard_size: int | str = "5GB",
    single: str = SINGLE_FILE,
    placed: Mapping[str, Part] | None = None,
) -> ShardPlan:
    """Lay out tensors in files, as `save_pretrained` would and byte for byte as `save_file`.

    Args:
        specs (`Mapping[str, TensorSpec]`): tensors by name.
        max_shard_size (`int` or `str`): largest size of a file in bytes, or a text like `"5GB"`.
        single (`str`): file name; shards get a number before the suffix.
        placed (`Mapping[str, Part]`, *optional*): the stored tensor that each is a part of;
            default: each is stored under its own name.
    """
    if placed is not None:
        return _plan_parts(specs, max_shard_size, single, placed)
    # The library's own function for torch would load more of torch, which takes a second.
    split = split_state_dict_into_shards_factory(
        {name: specs[name] for name in sorted(specs)},
        get_storage_size=lambda spec: spec.nbytes,
        filename_pattern=single.replace(".safetensors", "{suffix}.safetensors"),
        max_shard_size=size_in_bytes(max_shard_size, name="max_shard_size"),
    )
    headers: dict[str, bytes] = {}
    places: dict[str, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    for file, names in split.filename_to_tensors.items():
        headers[file], offsets, sizes[file] = _header({name: specs[name] for name in names})
        places.update({name: (file, offset) for name, offset in offsets.items()})
    index = None
    if split.is_sharded:
        content = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        index = json.dumps(content, indent=2, sort_keys=True) + "\n"
    return ShardPlan(headers, places, sizes, index, index_of(single))


def _plan_parts(
    specs: Mapping[str, TensorSpec], size: int | str, single: str, placed: Mapping[str, Part]
) -> ShardPlan:
    """Lay out the stored tensors, and locate each part in them."""
    stored: dict[str, TensorSpec] = {}
    for name, part in placed.items():
        shape = specs[name].shape[::-1] if part.transposed else specs[name].shape
        whole = (part.of * shape[0], *shape[1:]) if part.of > 1 else shape
        stored[part.stored] = TensorSpec(specs[name].dtype, whole)
    plan = plan_shards(stored, size, single)
    places = {}
    for name, part in placed.items():
        file, offset = plan.places[part.stored]
        places[name] = (file, offset + part.index * specs[name].nbytes)
    transposed = frozenset(name for name, part in placed.items() if part.transposed)
    return replace(plan, places=places, transposed=transposed)


def _header(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, offset of each tensor and size of one file, in the library's own order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    relative: dict[str, int] = {}
    for name in sorted(specs, key=lambda n: (DTYPE_ORDER.index(specs[n].dtype.name), n)):
        spec = specs[name]
        entries[name] = {
            "dtype": spec.dtype.name,
            "shape": list(spec.shape),
            "data_offsets": [position, position + spec.nbytes],
        }
        relative[name] = position
        position += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    start = len(header)
    return header, {name: start + offset for name, offset in relative.items()}, start + position


class ShardWriter:
    """Writer of the files of a [`ShardPlan`], filled tensor by tensor in any order.

    Failures of the disk are raised as `OSError`. Unless it is to `create` the files and their
    index, another writer has done so.
    """

    def __init__(self, folder: Path, plan: ShardPlan, *, create: bool = True) -> None:
        self._plan = plan
        self._descriptors: dict[str, int] = {}
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        try:
            for file, header in plan.headers.items():
                self._descriptors[file] = descriptor = os.open(folder / file, flags, 0o666)
                if create:
                    _reserve(descriptor, plan.sizes[file])
                    _write_all(descriptor, memoryview(header), 0)
            if create:
                write_index(folder, plan)
        except BaseException:
            self.abandon()
            raise

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the planned dtype and shape and on any device, in its place."""
        file, offset = self._plan.places[name]
        stored = tensor.detach().cpu()
        if name in self._plan.transposed:
            stored = stored.mT
        _write_all(self._descriptors[file], byte_view(stored.contiguous()), offset)

    def read_back(self, name: str, spec: TensorSpec) -> Tensor:
        """Read one tensor from its place."""
        file, offset = self._plan.places[name]
        import torch

        from hf_tsv.system.memory import empty

        raw = empty(spec.nbytes, dtype=torch.uint8)
        view = byte_view(raw)
        while view and (got := os.preadv(self._descriptors[file], [view], offset)):
            view, offset = view[got:], offset + got
        if name in self._plan.transposed:
            return raw.view(spec.dtype.torch).reshape(spec.shape[::-1]).mT.contiguous()
        return raw.view(spec.dtype.torch).reshape(spec.shape)

    def close(self) -> None:
        """Flush to disk and close."""
        for descriptor in self._descriptors.values():
            os.fsync(descriptor)
        self.abandon()

    def abandon(self) -> None:
        """Close without flushing."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()


def write_index(folder: Path, plan: ShardPlan) -> None:
    """Write the index of the shards, if there are several."""
    if plan.index is not None:
        (folder / plan.index_file).write_text(plan.index)


def _reserve(descriptor: int, size: int) -> None:
    """Reserve the space now, so that a full disk is noticed before the first decomposition."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(descriptor, size)  # for file systems that cannot reserve


def _write_all(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        done = os.pwrite(descriptor, data, offset)
        data, offset = data[done:], offset + done
