"""Headers of weight files, fully checked before any tensor is read."""

from __future__ import annotations

import math
import re
import reprlib
from typing import Any

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.storage import tensors
from hf_tsv.checkpoints.storage.dtypes import DTYPES
from hf_tsv.checkpoints.storage.files import AGAIN, Files, inside_folder, read_json, refuse_stand_in
from hf_tsv.checkpoints.storage.pickles import SUFFIXES, read_pickle
from hf_tsv.checkpoints.storage.tensors import TensorInfo, is_tensor_name
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import quoted
from hf_tsv.system.threads import in_parallel
from hf_tsv.system.untrusted import MAX_BYTES, parse_json

VARIANT = re.compile(r"model\.([A-Za-z0-9_]+)\.safetensors")
FIRST_READ_BYTES = 100_000  # holds the whole header of most checkpoints: one request instead of two


def index_of(single: str) -> str:
    """Name of the index that replaces `single` when the weights are split into shards.

    Example:
        >>> index_of("model.safetensors"), index_of("model.fp16.safetensors")
        ('model.safetensors.index.json', 'model.safetensors.index.fp16.json')
    """
    variant = VARIANT.fullmatch(single)
    return f"model.safetensors.index.{variant[1]}.json" if variant else f"{single}.index.json"


def read_headers(
    files: Files, single: str, owner: str
) -> tuple[dict[str, TensorInfo], tuple[str, ...]]:
    """Tensors by stored name, and their files, index included, from all headers, checked.

    They are those of the file `single`, or of all shards that its index names.

    Raises:
        [`CheckpointError`]: a file is missing, damaged, or disagrees with the index.
    """
    shards, weight_map = _weight_files(files, single, owner)
    readers = {name: read_pickle if name.endswith(SUFFIXES) else read_header for name in shards}
    headers = in_parallel(lambda name: readers[name](files, name, owner), shards)
    stored: dict[str, TensorInfo] = {}
    for header in headers:
        if twice := sorted(stored.keys() & header.keys()):
            raise CheckpointError(f"{owner}: {twice[0]} is stored in two files.")
        stored.update(header)
    empty = set(shards) - {info.file for info in stored.values()}
    if empty or not stored:
        raise CheckpointError(f"{owner}: {min(empty, default=shards[0])} holds no tensors.")
    if not weight_map:
        return stored, tuple(shards)
    said, held = weight_map.items(), {(key, info.file) for key, info in stored.items()}
    if wrong := {item for item in said ^ held if not layout.is_extra(item[0])}:
        which = f"{index_of(single)} and the shards disagree about {quoted(min(wrong)[0])}"
        raise CheckpointError(f"{owner}: {which}.", AGAIN)
    return stored, (*shards, index_of(single))


def read_header(files: Files, name: str, owner: str) -> dict[str, TensorInfo]:
    """Tensors by stored name, from the header of one safetensors file, checked.

    Every tensor must have a known dtype and as many bytes as its shape needs. Together the tensors
    must fill the file without gap or overlap, as the format demands.

    Raises:
        [`CheckpointError`]: the file is missing, truncated or not safetensors.
    """
    entries, start, size = _entries(files, name, owner)
    entries.pop("__metadata__", None)
    if strange := [key for key in entries if not is_tensor_name(key)]:
        raise _damaged(owner, name, f"{strange[0][:100]!r} is no name of a tensor")
    infos = {key: _tensor_info(key, entry, name, start, owner) for key, entry in entries.items()}
    position = start
    for key, info in sorted(infos.items(), key=lambda item: (item[1].start, item[1].nbytes)):
        if info.start != position:
            raise _damaged(owner, name, f"{key} does not start where the tensor before it ends")
        position += info.nbytes
    if position > size:
        said = f"{owner}: {name} is truncated: {position} bytes expected, {size} found."
        raise CheckpointError(said, AGAIN)
    if position < size:
        raise _damaged(owner, name, f"{size - position} bytes follow its last tensor")
    return infos


def read_metadata(files: Files, name: str, owner: str) -> dict[str, str]:
    """Metadata that a safetensors file carries."""
    found: dict[str, str] | None = _entries(files, name, owner)[0].get("__metadata__")
    return found or {}


def _entries(files: Files, name: str, owner: str) -> tuple[dict[str, Any], int, int]:
    """Header of a safetensors file, offset of its data, and size of the file."""
    size = files.size(name)
    if size is None:
        raise _missing(owner, name)
    first = files.read(name, 0, min(size, FIRST_READ_BYTES))
    length = int.from_bytes(first[:8], "little")
    if size < 8 or 8 + length > size:
        refuse_stand_in(files, name, owner)
        raise _damaged(owner, name, "its header is longer than the file")
    if length > MAX_BYTES:
        raise _too_large(owner, name)
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += files.read(name, 8 + len(raw), 8 + length)
    try:
        entries = parse_json(raw, unique=True)
    except OverflowError:
        raise _too_large(owner, name) from None
    except ValueError:
        raise _damaged(owner, name, "its header is not valid JSON") from None
    if not isinstance(entries, dict):
        raise _damaged(owner, name, "its header is not a JSON object")
    metadata = entries.get("__metadata__")
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(owner, name, "its __metadata__ is malformed")
    return entries, 8 + length, size


def _tensor_info(key: str, entry: Any, file: str, data_start: int, owner: str) -> TensorInfo:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        well_typed = isinstance(dtype, str) and isinstance(shape, list)
        if not well_typed or len(shape) > tensors.MAX_DIMENSIONS:
            raise ValueError
        sound = all(type(n) is int and 0 <= n < 2**63 for n in (*shape, start, stop))
        if not sound or math.prod(n for n in shape if n) >= 2**63:  # even with a zero among them
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise _damaged(owner, file, f"the entry of {key} is malformed") from None
    if dtype not in DTYPES:
        raise tensors.unknown_dtype(owner, key, dtype)
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if nbytes != stop - start:
        why = f"{key} has {stop - start} bytes where its shape needs {nbytes}"
        raise _damaged(owner, file, why)
    return TensorInfo(file, DTYPES[dtype], tuple(shape), data_start + start, nbytes)


def _outside(owner: str, index: str, name: object) -> CheckpointError:
    return CheckpointError(
        f"{owner}: {index} points outside its folder: {reprlib.repr(name)}.",
        "Do not use this checkpoint; its index is not one that transformers writes.",
    )


def _missing(owner: str, name: str) -> CheckpointError:
    return CheckpointError(f"{owner} has no {name}, which its index names.", AGAIN)


def _too_large(owner: str, name: str) -> CheckpointError:
    problem = f"{owner}: the header of {name} describes more than any model has."
    return CheckpointError(problem, "Do not use this checkpoint; no library saves such files.")


def _damaged(owner: str, name: str, why: str) -> CheckpointError:
    return CheckpointError(f"{owner}: {name} is not a valid safetensors file: {why}.", AGAIN)


def _weight_files(files: Files, single: str, owner: str) -> tuple[list[str], dict[str, str]]:
    """Shards of a checkpoint, and the file of each tensor if there is an index."""
    if files.size(single) is not None:
        return [single], {}
    index = index_of(single)
    if files.size(index) is None:
        problem = f"{owner} has no {single} and no {index}."
        raise CheckpointError(problem, "Name a repository or folder with the weights of a model.")
    weight_map = read_json(files, index, owner).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{owner}: {index} has no weight_map.")
    if outside := [name for name in weight_map.values() if not inside_folder(name)]:
        raise _outside(owner, index, outside[0])
    shards = sorted(set(weight_map.values()))
    for name in shards:  # a separate loop before any read: there may be a million
        if files.size(name) is None:
            raise _missing(owner, name)
    return shards, weight_map
