"""Locations of the tensors in a PyTorch file, read from its index without loading any of them.

A file of `torch.save` is an uncompressed archive of one pickle that describes the content, and one
entry per tensor. The pickle is never unpickled, but interpreted by [`instructions`]. The tensors
are then read in place like those of any other file.
"""

from __future__ import annotations

import io
import math
import pickle
import struct
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any

from hf_tsv.checkpoints.storage.dtypes import DType
from hf_tsv.checkpoints.storage.files import AGAIN, Files, refuse_stand_in
from hf_tsv.checkpoints.storage.instructions import SavedTensor, Skipped, described
from hf_tsv.checkpoints.storage.tensors import (
    MAX_DIMENSIONS,
    TensorInfo,
    is_tensor_name,
    unknown_dtype,
)
from hf_tsv.hub import WEIGHT_SUFFIXES
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import quoted
from hf_tsv.system.threads import in_parallel

SUFFIXES = tuple(suffix for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors")
MAX_PICKLE_BYTES = 32_000_000
MAX_DIRECTORY_BYTES = 10_000_000  # of an archive; 50,000 tensors need 3.2 million

CONTIGUOUS = "Save it again with {name: value.contiguous() for name, value in state_dict.items()}."

# Keys under which training scripts save the state dict among other values.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "state_dict_ema",
            "model_ema", "ema")  # fmt: skip

BLOCK_BYTES = 2**16
# Header of an entry: signature, and the lengths of name and extra field before the data.
LOCAL_HEADER = struct.Struct("<4s22xHH")


def read_pickle(files: Files, name: str, owner: str) -> dict[str, TensorInfo]:
    """Find the tensors of a PyTorch file, by stored name.

    Raises:
        [`CheckpointError`]: missing, damaged, of an old format, or holding more than tensors.
    """
    size = files.size(name)
    if size is None:
        raise CheckpointError(f"{owner} has no {name}.", AGAIN)
    convert = "Save it as safetensors: model.save_pretrained(…) in transformers does."
    try:
        raw, entries = _archive(files, name, size)
    except (zipfile.BadZipFile, struct.error, ArithmeticError, EOFError, LookupError, OSError,
            RuntimeError, ValueError):  # fmt: skip
        refuse_stand_in(files, name, owner)
        said = f"{owner}: {name} is not an archive as torch.save has written since version 1.6."
        anew = (
            "Save it anew where you trust it: torch.save(torch.load(FILE, weights_only=True), FILE)"
        )
        raise CheckpointError(said, anew) from None
    if raw is None:
        raise CheckpointError(f"{owner}: {name} is not as torch.save writes it.", convert)
    try:
        state = _state(content := described(raw))
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{owner}: {name} is a pickle that would run code ({quoted(str(error))}). Nothing of it"
            " was run.",
            "Do not load it with other tools either, unless you know where it comes from.",
        ) from None
    except OverflowError:
        said = f"{owner}: {name} describes more than any model has."
        raise CheckpointError(said, "Do not use this checkpoint.") from None
    except (LookupError, RecursionError, TypeError, ValueError):
        raise CheckpointError(f"{owner}: {name} cannot be read: it is damaged.", convert) from None
    tensors = {key: value for key, value in state.items() if isinstance(value, SavedTensor)}
    if isinstance(content, Skipped):
        raise CheckpointError(
            f"{owner}: {name} is a whole model ({quoted(content.type)}), and only running its"
            " code could load it.",
            "Load it where you trust it and save model.state_dict(), as safetensors if possible.",
        )
    if not tensors:
        raise CheckpointError(f"{owner}: {name} holds no state dict.", convert)
    if strange := [key for key in tensors if not is_tensor_name(key)]:
        raise CheckpointError(
            f"{owner}: {name}: {str(strange[0])[:100]!r} is not the name of a tensor."
        )
    used = {tensor.key for tensor in tensors.values()}
    starts = _starts(files, name, size, {key: entries[key] for key in used if key in entries})
    result = {}
    for key, tensor in tensors.items():
        entry, start = entries.get(tensor.key), starts.get(tensor.key)
        if entry is None or start is None or start + entry.file_size > size:
            said = f"{owner}: {name} is damaged: the values of {key} are not in it."
            raise CheckpointError(said, AGAIN)
        result[key] = _info(key, tensor, name, start, entry.file_size, owner)
    return result


def _archive(files: Files, name: str, size: int) -> tuple[bytes | None, dict[str, zipfile.ZipInfo]]:
    """Pickle of an archive, None unless torch.save wrote it, and its entries of values, by key."""
    file = _RangeFile(files, name, size)
    with zipfile.ZipFile(file) as archive:
        file.most = MAX_PICKLE_BYTES
        infos = {info.filename: info for info in archive.infolist()}
        root = next(iter(infos), "").partition("/")[0]
        index = infos.get(f"{root}/data.pkl")
        stored = all(info.compress_type == zipfile.ZIP_STORED for info in infos.values())
        if index is None or not stored or index.file_size > MAX_PICKLE_BYTES:
            return None, {}
        order = infos.get(f"{root}/byteorder")
        if order is not None and (order.file_size > 9 or archive.read(order) != b"little"):
            return None, {}
        values = f"{root}/data/"
        entries = {n.removeprefix(values): i for n, i in infos.items() if n.startswith(values)}
        return archive.read(index), entries


def _starts(
    files: Files, name: str, size: int, entries: Mapping[str, zipfile.ZipInfo]
) -> dict[str, int]:
    """Offsets of the entries' values, behind headers whose length the archive does not list."""
    groups: list[list[tuple[int, str]]] = []
    places = ((info.header_offset, key) for key, info in entries.items())
    for place in sorted(p for p in places if 0 <= p[0] <= size - LOCAL_HEADER.size):
        if not groups or place[0] - groups[-1][0][0] > BLOCK_BYTES:
            groups.append([])
        groups[-1].append(place)

    def starts(group: Sequence[tuple[int, str]]) -> dict[str, int]:
        first = group[0][0]
        raw = files.read(name, first, group[-1][0] + LOCAL_HEADER.size)
        found = {}
        for offset, key in group:
            signature, *lengths = LOCAL_HEADER.unpack_from(raw, offset - first)
            if signature == b"PK\3\4":
                found[key] = offset + LOCAL_HEADER.size + sum(lengths)
        return found

    return {key: start for found in in_parallel(starts, groups) for key, start in found.items()}


def _state(content: Any) -> Mapping[Any, Any]:
    """State dict in the saved object."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    return content if isinstance(content, Mapping) else {}


def _info(
    key: str, tensor: SavedTensor, file: str, start: int, size: int, owner: str
) -> TensorInfo:
    """Location of a tensor within an entry of `size` bytes that begins at `start`."""
    dtype = tensor.dtype
    if not isinstance(dtype, DType):
        raise unknown_dtype(owner, key, str(dtype).removeprefix("torch."))
    shape, stride = tensor.shape, tensor.stride
    if not _is_size(shape) or not _is_size(stride) or len(shape) != len(stride):
        raise CheckpointError(f"{owner}: {file} is damaged: {key} has no shape.", AGAIN)
    order = _order(shape, stride)
    if order is None or not tensor.as_stored:
        said = f"{owner}: the values of {key} are not contiguous in {file}."
        raise CheckpointError(said, CONTIGUOUS)
    nbytes = math.prod(shape) * dtype.itemsize
    skipped = tensor.offset * dtype.itemsize if type(tensor.offset) is int else -1
    if not 0 <= skipped <= skipped + nbytes <= size:
        raise CheckpointError(f"{owner}: {file} is truncated: {key} ends after it.", AGAIN)
    return TensorInfo(file, dtype, shape, start + skipped, nbytes, order)


def _is_size(value: object) -> bool:
    """Tell whether a value can be the sizes or strides of a tensor."""
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
        and math.prod(n for n in value if n) < 2**127
    )


def _order(shape: Sequence[int], stride: Sequence[int]) -> tuple[int, ...] | None:
    """Order of the dimensions in which values are contiguous, empty for their own; None: none."""
    if _is_contiguous(shape, stride):
        return ()
    order = tuple(sorted(range(len(shape)), key=lambda axis: -stride[axis]))
    turned = _is_contiguous([shape[axis] for axis in order], [stride[axis] for axis in order])
    return order if turned else None


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Tell whether these strides are contiguous, by torch's definition."""
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return 0 in shape
        expected *= length
    return True


class _RangeFile(io.RawIOBase):
    """Seekable view of a checkpoint's file."""

    def __init__(self, files: Files, name: str, size: int) -> None:
        self._files, self._name, self._size = files, name, size
        self._position = 0
        self._blocks: dict[int, bytes] = {}
        self.most = MAX_DIRECTORY_BYTES  # the directory is read first

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if start + offset < 0:
            raise ValueError("before the beginning")
        self._position = start + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        stop = self._size if count < 0 else min(self._position + count, self._size)
        start = min(self._position, stop)
        if stop - start > self.most:
            raise ValueError("more than an index has")
        self._position = stop
        if stop - start > BLOCK_BYTES:
            return self._files.read(self._name, start, stop)
        first = start // BLOCK_BYTES
        raw = b"".join(map(self._block, range(first, -(-stop // BLOCK_BYTES))))
        return raw[start - first * BLOCK_BYTES : stop - first * BLOCK_BYTES]

    def _block(self, index: int) -> bytes:
        """Block of a few kilobytes, read once, because every read from the Hub is a request."""
        if index not in self._blocks:
            start = index * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, self._size)
            self._blocks[index] = self._files.read(self._name, start, stop)
        return self._blocks[index]
