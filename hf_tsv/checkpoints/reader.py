"""Lazy reading of checkpoints: headers first, one tensor at a time after."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hf_tsv.checkpoints import layout, open_clip
from hf_tsv.checkpoints.files import Files, inside_folder, read_json
from hf_tsv.checkpoints.pickles import SUFFIXES, read_pickle
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.tensors import DTYPE_NAMES, DTYPES, TensorInfo
from hf_tsv.errors import CheckpointError
from hf_tsv.linalg import largest_entry
from hf_tsv.memory import empty
from hf_tsv.parallel import in_parallel

SINGLE_FILE = "model.safetensors"
PICKLED_FILE = "pytorch_model.bin"
CONFIG_FILE = "config.json"
VARIANT = re.compile(r"model\.([A-Za-z0-9_]+)\.safetensors")
VARIANT_INDEX = re.compile(r"model\.safetensors\.index\.([A-Za-z0-9_]+)\.json")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MAX_DIMENSIONS = 64  # the limit of torch
FIRST_READ_BYTES = 100_000  # holds the whole header of most checkpoints: one request instead of two

Format = Literal["transformers", "open_clip"]
"""Whose names, shapes and config the files of a checkpoint have."""

WEIGHTS: tuple[tuple[str, Format], ...] = (
    (SINGLE_FILE, "transformers"),
    (open_clip.SINGLE_FILE, "open_clip"),
    (PICKLED_FILE, "transformers"),
    (open_clip.PICKLED_FILE, "open_clip"),
)
"""Weight files, the ones to be preferred first."""


@dataclass(frozen=True)
class Checkpoint:
    """The headers of a pinned checkpoint.

    Args:
        pinned ([`PinnedCheckpoint`]): which commit or folder.
        config (`dict[str, Any]`): its config.json; of OpenCLIP, what that would be.
        tensors (`Mapping[str, TensorInfo]`): by canonical name.
        weight_files (`tuple[str, ...]`): the files these lie in, index included.
        head (`Mapping[str, TensorInfo]`): its task head, by stored name; no base has one.
        format (`str`): whose files they are.
    """

    pinned: PinnedCheckpoint
    config: dict[str, Any]
    tensors: Mapping[str, TensorInfo]
    weight_files: tuple[str, ...]
    head: Mapping[str, TensorInfo] = field(default_factory=dict)
    format: Format = "transformers"

    def __str__(self) -> str:
        return str(self.pinned)

    @property
    def needed_files(self) -> tuple[str, ...]:
        """What a run reads of it."""
        config = open_clip.CONFIG_FILE if self.format == "open_clip" else CONFIG_FILE
        return (config, *self.weight_files)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Stored names that a merge leaves out."""
        return tuple(self.head)

    def parts(self, name: str) -> list[TensorInfo]:
        """What reading one weight reads of its files."""
        return [self.tensors[name]]

    def reading_from(self, files: Files) -> Checkpoint:
        """The same checkpoint, read from a copy of its files."""
        return replace(self, pinned=replace(self.pinned, files=files))

    def read(self, name: str, *, pinned: bool = False) -> Tensor:
        """Read one tensor as stored.

        Args:
            name (`str`): canonical name.
            pinned (`bool`): into memory from where a GPU copies at full speed.

        Raises:
            [`CheckpointError`]: the file is truncated, or a value is NaN or Inf.
        """
        info = self.tensors[name] if name in self.tensors else self.head[name]
        return read_tensor(self.pinned.files, info, name, str(self), pinned=pinned)


def read_tensor(
    files: Files, info: TensorInfo, name: str, owner: str, *, pinned: bool = False
) -> Tensor:
    """Read one tensor as stored.

    Args:
        files (`Files`): where to read.
        info ([`TensorInfo`]): where it lies.
        name (`str`): its name, for the error.
        owner (`str`): the checkpoint, for the error.
        pinned (`bool`): into memory from where a GPU copies at full speed.

    Raises:
        [`CheckpointError`]: the file is truncated, or a value is NaN or Inf.
    """
    raw = empty(info.nbytes, dtype=torch.uint8, pinned=pinned)
    if info.nbytes:
        files.read_into(info.file, info.start, byte_view(raw))
    tensor = raw.view(info.dtype).reshape(info.shape[::-1] if info.transposed else info.shape)
    if info.transposed:
        tensor = tensor.mT.contiguous()
    if tensor.is_floating_point() and tensor.numel() and not math.isfinite(largest_entry(tensor)):
        count = int(tensor.numel() - tensor.isfinite().sum())
        raise CheckpointError(
            f"{owner}: {count} of {tensor.numel()} values of {name} are NaN or Inf.",
            "The checkpoint is damaged; leave it out or save it again.",
        )
    return tensor


def digest(tensor: Tensor) -> str:
    """sha256 of one tensor: its type and shape as text, then its bytes.

    Example:
        >>> digest(torch.zeros(2))[:12]
        '46b46b5d4b1b'
    """
    result = hashlib.sha256(f"{DTYPE_NAMES[tensor.dtype]} {list(tensor.shape)} ".encode())
    result.update(byte_view(tensor))
    return result.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """sha256 over names and digests of tensors, in the order of the names."""
    lines = (f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, without a copy."""
    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def open_checkpoint(pinned: PinnedCheckpoint) -> Checkpoint:
    """Read the config and all headers of a checkpoint, and nothing else.

    Raises:
        [`CheckpointError`]: no model, no weights, or a damaged file or index.
    """
    owner, there = str(pinned), pinned.files
    named = _weights_in(there, [file for file, _ in WEIGHTS])
    single = named or _only_variant(there, owner) or _only_pickle(there) or SINGLE_FILE
    kind_of = dict(WEIGHTS).get(single)
    if kind_of is None and there.size(CONFIG_FILE) is None:
        kind_of = "open_clip"
    if kind_of == "open_clip" and there.size(open_clip.CONFIG_FILE) is not None:
        return _open_open_clip(pinned, single, owner)
    config = read_json(there, CONFIG_FILE, owner)
    kind = layout.layout_of(config, owner)
    stored, files = read_headers(there, single, owner)
    tensors: dict[str, TensorInfo] = {}
    head: dict[str, TensorInfo] = {}
    for name, info in sorted(stored.items()):
        canonical = layout.canonical_name(name, kind)
        if canonical is None:
            head[name] = info
        elif canonical in tensors:
            raise CheckpointError(f"{owner}: {canonical} is stored twice, once without its prefix.")
        else:
            tensors[canonical] = info
    return Checkpoint(pinned, config, tensors, files, head)


def _weights_in(files: Files, singles: Sequence[str]) -> str | None:
    """The first of these files that is there, whole or as shards."""
    return next(
        (s for s in singles if any(files.size(name) is not None for name in (s, index_of(s)))), None
    )


def _only_variant(files: Files, owner: str) -> str | None:
    """Weights in another precision, as `save_pretrained(variant=…)` names them, if there are any.

    Raises:
        [`CheckpointError`]: there are several.
    """
    found = {
        match[1]
        for name in files.names()
        for match in (VARIANT.fullmatch(name), VARIANT_INDEX.fullmatch(name))
        if match
    }
    if len(found) > 1:
        raise CheckpointError(
            f"{owner} has only variants of its weights, and several: {', '.join(sorted(found))}.",
            "Load the one you mean with transformers (variant=…) and save it.",
        )
    return f"model.{found.pop()}.safetensors" if found else None


def _only_pickle(files: Files) -> str | None:
    """A state dict of any name, if it is the only one."""
    found = [name for name in files.names() if name.endswith(SUFFIXES)]
    return found[0] if len(found) == 1 else None


def _open_open_clip(pinned: PinnedCheckpoint, single: str, owner: str) -> Checkpoint:
    config = open_clip.transformers_config(
        read_json(pinned.files, open_clip.CONFIG_FILE, owner), owner
    )
    stored, files = read_headers(pinned.files, single, owner)
    tensors: dict[str, TensorInfo] = {}
    for name, info in sorted(stored.items()):
        for part in open_clip.parts_of(name, info.shape, owner):
            shape = info.shape[::-1] if part.transposed else info.shape
            if part.of > 1:
                shape = (shape[0] // part.of, *shape[1:])
            size = info.nbytes // part.of
            start = info.start + part.index * size
            turned = part.transposed != info.transposed
            if info.transposed and part.of > 1:
                raise CheckpointError(
                    f"{owner}: the rows of {name} do not lie together.", "Save it as safetensors."
                )
            if part.name == "logit_scale" and info.nbytes == info.dtype.itemsize:
                shape = ()  # some keep it as a list of one
            if part.name in tensors:
                raise CheckpointError(f"{owner}: {part.name} is stored twice, once as {name}.")
            tensors[part.name] = TensorInfo(info.file, info.dtype, shape, start, size, turned)
    _check_sizes(config, tensors, owner)
    return Checkpoint(pinned, config, tensors, files, format="open_clip")


def _check_sizes(config: dict[str, Any], tensors: Mapping[str, TensorInfo], owner: str) -> None:
    """Refuse a config that does not describe the weights: nobody could load the output."""
    for tower, embedding in (("vision", "class_embedding"), ("text", "token_embedding.weight")):
        said = config[f"{tower}_config"]
        blocks = {
            n.split(".")[3] for n in tensors if n.startswith(f"{tower}_model.encoder.layers.")
        }
        there = tensors.get(f"{tower}_model.embeddings.{embedding}")
        width = there.shape[-1] if there is not None and there.shape else 0
        if (len(blocks), width) != (said["num_hidden_layers"], said["hidden_size"]):
            raise CheckpointError(
                f"{owner}: its config says {said['num_hidden_layers']} layers of width"
                f" {said['hidden_size']} in the {tower} tower, its weights {len(blocks)} of"
                f" {width}.",
                f"Correct its {open_clip.CONFIG_FILE}.",
            )


def index_of(single: str) -> str:
    """Name of the index that stands for `single` where it is split into shards.

    Example:
        >>> index_of("model.safetensors"), index_of("model.fp16.safetensors")
        ('model.safetensors.index.json', 'model.safetensors.index.fp16.json')
    """
    variant = VARIANT.fullmatch(single)
    return f"model.safetensors.index.{variant[1]}.json" if variant else f"{single}.index.json"


def read_headers(
    files: Files, single: str, owner: str
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Parse and check all headers of a single file, or of the shards that its index names.

    Args:
        files (`Files`): where to read.
        single (`str`): file name, if it is one file.
        owner (`str`): the checkpoint, for errors.

    Returns:
        `tuple[dict[str, TensorInfo], tuple[str, ...]]`: tensors by stored name, and the files
        they lie in, index included.

    Raises:
        [`CheckpointError`]: a file is missing, damaged, or disagrees with the index.
    """
    shards, weight_map = _weight_files(files, single, owner)
    headers = in_parallel(lambda name: read_file(files, name, owner), shards)
    stored: dict[str, TensorInfo] = {}
    for header in headers:
        if twice := sorted(stored.keys() & header.keys()):
            raise CheckpointError(f"{owner}: {twice[0]} is stored in two files.")
        stored.update(header)
    index = index_of(single)
    _check_index(shards, weight_map, stored, index, owner)
    return stored, (*shards, *([index] if weight_map else []))


def read_file(files: Files, name: str, owner: str) -> dict[str, TensorInfo]:
    """What one weight file holds, by stored name: [`read_header`], or [`read_pickle`]."""
    reader = read_pickle if name.endswith(SUFFIXES) else read_header
    return reader(files, name, owner)


def read_header(files: Files, name: str, owner: str) -> dict[str, TensorInfo]:
    """Parse and check the header of one safetensors file.

    Every tensor must have a known dtype, as many bytes as its shape says, and together they must
    fill the file without gap or overlap, as the format demands.

    Args:
        files (`Files`): where to read.
        name (`str`): file name.
        owner (`str`): the checkpoint, for errors.

    Returns:
        `dict[str, TensorInfo]`: by stored name.

    Raises:
        [`CheckpointError`]: the file is missing, truncated or not safetensors.
    """
    entries, start, size = _entries(files, name, owner)
    entries.pop("__metadata__", None)
    if strange := [key for key in entries if not key.isprintable()]:
        raise _damaged(owner, name, f"{strange[0]!r} is no name of a tensor")
    infos = {key: _tensor_info(key, entry, name, start, owner) for key, entry in entries.items()}
    position = start
    for key, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != position:
            raise _damaged(owner, name, f"{key} does not start where the tensor before it ends")
        position += info.nbytes
    if position > size:
        raise CheckpointError(
            f"{owner}: {name} is truncated: {position} bytes expected, {size} found.",
            "Download or save it again.",
        )
    if position < size:
        raise _damaged(owner, name, f"{size - position} bytes follow its last tensor")
    return infos


def read_metadata(files: Files, name: str, owner: str) -> dict[str, str]:
    """What a safetensors file says of itself.

    Args:
        files (`Files`): where to read.
        name (`str`): file name.
        owner (`str`): the checkpoint, for errors.
    """
    found: dict[str, str] = _entries(files, name, owner)[0].get("__metadata__", {})
    return found


def _entries(files: Files, name: str, owner: str) -> tuple[dict[str, Any], int, int]:
    """The header of a safetensors file, where its data starts, and its size."""
    size = files.size(name)
    if size is None:
        raise CheckpointError(
            f"{owner} has no {name}, which its index names.", "Download or save it again."
        )
    first = files.read(name, 0, min(size, FIRST_READ_BYTES))
    length = int.from_bytes(first[:8], "little")
    if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
        raise _damaged(owner, name, "its header is longer than the file")
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += files.read(name, 8 + len(raw), 8 + length)
    try:
        entries = json.loads(raw.decode(), object_pairs_hook=_without_duplicates)
        json.dumps(entries, ensure_ascii=False).encode()  # a lone surrogate is no text
    except (ValueError, RecursionError):
        raise _damaged(owner, name, "its header is not valid JSON") from None
    if not isinstance(entries, dict):
        raise _damaged(owner, name, "its header is not a JSON object")
    metadata = entries.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(owner, name, "its __metadata__ is malformed")
    return entries, 8 + length, size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate key")
    return result


def _tensor_info(key: str, entry: Any, file: str, data_start: int, owner: str) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        well_typed = isinstance(dtype, str) and isinstance(shape, list)
        if not well_typed or len(shape) > MAX_DIMENSIONS:
            raise ValueError
        if not all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop)):
            raise ValueError
        if math.prod(n for n in shape if n) >= 2**63:  # even with a zero among them
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _damaged(owner, file, f"the entry of {key} is malformed") from None
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{owner}: {key} has dtype {dtype}, which cannot be merged.",
            "Dequantise the checkpoint first (float32, float16 or bfloat16).",
        )
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != stop - start:
        raise _damaged(
            owner, file, f"{key} has {stop - start} bytes where its shape needs {nbytes}"
        )
    return TensorInfo(file, DTYPES[dtype], tuple(shape), data_start + start, nbytes)


def _damaged(owner: str, name: str, why: str) -> CheckpointError:
    return CheckpointError(
        f"{owner}: {name} is not a valid safetensors file: {why}.", "Download or save it again."
    )


def _weight_files(files: Files, single: str, owner: str) -> tuple[list[str], dict[str, str]]:
    """Shards of a checkpoint, and the file of each tensor if an index says it."""
    if files.size(single) is not None:
        return [single], {}
    index = index_of(single)
    if files.size(index) is None:
        raise CheckpointError(
            f"{owner} has no {single} and no {index}.",
            "Name a repository or folder with the weights of a model.",
        )
    weight_map = read_json(files, index, owner).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{owner}: {index} has no weight_map.")
    outside = [name for name in weight_map.values() if not inside_folder(name)]
    if outside:
        raise CheckpointError(
            f"{owner}: {index} points outside its folder: {outside[0]!r}.",
            "Do not use this checkpoint; its index is not one that transformers writes.",
        )
    return sorted(set(weight_map.values())), weight_map


def _check_index(
    shards: list[str],
    weight_map: dict[str, str],
    stored: dict[str, TensorInfo],
    index: str,
    owner: str,
) -> None:
    empty = set(shards) - {info.file for info in stored.values()}
    if empty or not stored:
        raise CheckpointError(f"{owner}: {min(empty, default=shards[0])} holds no tensors.")
    said = set(weight_map.items())
    held = {(key, info.file) for key, info in stored.items()}
    if weight_map and said != held:
        raise CheckpointError(
            f"{owner}: {index} and the shards disagree about {min(said ^ held)[0]}.",
            "Download or save it again.",
        )
