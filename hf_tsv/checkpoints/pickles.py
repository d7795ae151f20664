"""Where the tensors of a PyTorch file lie: read from its index, without loading any of them.

A file of `torch.save` is an uncompressed archive: one pickle that says what there is, and one entry
a tensor. The pickle is never given to an unpickler: its instructions are followed as far as they
build tensors and containers, and nothing it names is imported or called. The tensors stay where
they are and are read like those of any other file.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_tsv.checkpoints.files import Files
from hf_tsv.checkpoints.tensors import (
    DTYPE_NAMES,
    MAX_DIMENSIONS,
    TensorInfo,
    is_tensor_name,
)
from hf_tsv.errors import CheckpointError
from hf_tsv.hub import WEIGHT_SUFFIXES
from hf_tsv.parallel import in_parallel

SUFFIXES = tuple(suffix for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors")
MAX_PICKLE_BYTES = 32_000_000
MAX_STEPS = 2_500_000
"""Instructions of a pickle; 50,000 tensors take 1.6 million."""

MOST_ARGUMENTS = 20
"""Of what a pickle would call: long ones, used over and over, would take for ever."""

MAX_DIRECTORY_BYTES = 10_000_000
"""Of an archive; 50,000 tensors take 3.2 million."""

WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the state beside their own."""

PREFIXES = ("module.", "model.")
"""Of wrappers around the model, on every name."""

STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "UntypedStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
BLOCK_BYTES = 2**16
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""Of an entry: signature, and the lengths of what follows before its data."""


def read_pickle(files: Files, name: str, owner: str) -> dict[str, TensorInfo]:
    """Find the tensors of a PyTorch file.

    Args:
        files (`Files`): where to read.
        name (`str`): file name.
        owner (`str`): the checkpoint, for errors.

    Returns:
        `dict[str, TensorInfo]`: by stored name.

    Raises:
        [`CheckpointError`]: missing, damaged, of an old kind, or holding more than tensors.
    """
    size = files.size(name)
    if size is None:
        raise CheckpointError(f"{owner} has no {name}.", "Download or save it again.")
    convert = "Save it as safetensors: model.save_pretrained(…) in transformers does."
    try:
        raw, entries = _archive(files, name, size)
    except (zipfile.BadZipFile, struct.error, ArithmeticError, EOFError, LookupError, OSError,
            RuntimeError, ValueError):  # fmt: skip
        raise CheckpointError(
            f"{owner}: {name} is no archive that torch.save writes since version 1.6.", convert
        ) from None
    if raw is None:
        raise CheckpointError(f"{owner}: {name} is not as torch.save writes it.", convert)
    try:
        state = _state(_Steps(raw).content())
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{owner}: {name} is a pickle of more than tensors, and is not loaded: it could run"
            " code.",
            "Load it where you trust it and save model.state_dict(), as safetensors if possible.",
        ) from None
    except OverflowError:
        raise CheckpointError(
            f"{owner}: {name} describes more than any model has.", "Do not use this checkpoint."
        ) from None
    except (LookupError, RecursionError, TypeError, ValueError):
        raise CheckpointError(f"{owner}: {name} cannot be read: it is damaged.", convert) from None
    tensors = {key: value for key, value in state.items() if isinstance(value, _Saved)}
    if not tensors:
        raise CheckpointError(f"{owner}: {name} holds no state dict.", convert)
    if strange := [key for key in tensors if not is_tensor_name(key)]:
        raise CheckpointError(f"{owner}: {name}: {str(strange[0])[:100]!r} is no name of a tensor.")
    used = {tensor.key for tensor in tensors.values()}
    starts = _starts(files, name, size, {key: entries[key] for key in used if key in entries})
    result = {}
    for key, tensor in tensors.items():
        entry, start = entries.get(tensor.key), starts.get(tensor.key)
        if entry is None or start is None or start + entry.file_size > size:
            raise CheckpointError(
                f"{owner}: {name} is damaged: the values of {key} are not in it.",
                "Download or save it again.",
            )
        result[key] = _info(key, tensor, name, start, entry.file_size, owner)
    return result


def _archive(files: Files, name: str, size: int) -> tuple[bytes | None, dict[str, zipfile.ZipInfo]]:
    """The pickle of an archive, if torch.save wrote it, and its entries with values, by key."""
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
    """Where the values of entries begin: after headers whose length the archive does not list."""
    groups: list[list[tuple[int, str]]] = []
    places = sorted((info.header_offset, key) for key, info in entries.items())
    for place in places:
        if not 0 <= place[0] <= size - LOCAL_HEADER.size:
            continue
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
    """The state dict in what was saved, with the names that the model has for itself."""
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    state: dict[Any, Any] = dict(content) if isinstance(content, Mapping) else {}
    for prefix in PREFIXES:
        if all(isinstance(key, str) and key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _info(key: str, tensor: _Saved, file: str, start: int, size: int, owner: str) -> TensorInfo:
    """Where a tensor lies in an entry of `size` bytes from `start` on."""
    dtype = tensor.dtype
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{owner}: {key} has dtype {str(dtype).removeprefix('torch.')}, which cannot be"
            " merged.",
            "Dequantise the checkpoint first (float32, float16 or bfloat16).",
        )
    shape, stride = tensor.shape, tensor.stride
    if not _is_size(shape) or not _is_size(stride) or len(shape) != len(stride):
        raise CheckpointError(
            f"{owner}: {file} is damaged: {key} has no shape.", "Download or save it again."
        )
    contiguous = _is_contiguous(shape, stride)
    turned = len(shape) == 2 and _is_contiguous(shape[::-1], stride[::-1])
    if not (tensor.as_stored and (contiguous or turned)):
        raise CheckpointError(
            f"{owner}: the values of {key} do not lie together in {file}.",
            "Save it as safetensors.",
        )
    nbytes = math.prod(shape) * dtype.itemsize
    skipped = tensor.offset * dtype.itemsize if type(tensor.offset) is int else -1
    if not 0 <= skipped <= skipped + nbytes <= size:
        raise CheckpointError(
            f"{owner}: {file} is truncated: {key} ends after it.", "Download or save it again."
        )
    return TensorInfo(file, dtype, shape, start + skipped, nbytes, turned and not contiguous)


def _is_size(value: object) -> bool:
    """Whether these can be the sizes or strides of a tensor."""
    return (
        isinstance(value, tuple)
        and len(value) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 2**63 for n in value)
        and math.prod(n for n in value if n) < 2**127
    )


def _is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the values lie in the order of their places, as torch asks it."""
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return 0 in shape
        expected *= length
    return True


@dataclass(frozen=True, slots=True)
class _Named:
    """What a pickle would import: only its name."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """An entry of the archive: its key, and the type of its values."""

    key: str
    dtype: object


@dataclass(frozen=True, slots=True)
class _Saved:
    """A tensor as the pickle describes it; nothing of it has been checked."""

    key: str
    dtype: object
    offset: Any
    shape: Any
    stride: Any
    as_stored: bool


def _is_known(module: str, name: str) -> bool:
    """Whether files of tensors have this name in them; even so nothing is imported or called."""
    if module == "torch":
        is_dtype = isinstance(getattr(torch, name, None), torch.dtype)
        return is_dtype or name.endswith("Storage") or name in ("Size", "Tensor", "device")
    if module == "torch._utils":
        return name.startswith("_rebuild_")
    return (module, name) in {
        ("collections", "OrderedDict"), ("collections", "Counter"), ("_codecs", "encode"),
        ("builtins", "set"), ("builtins", "complex"), ("builtins", "bytearray"),
        ("__builtin__", "set"), ("__builtin__", "complex"), ("__builtin__", "bytearray"),
        ("torch.storage", "UntypedStorage"), ("torch.storage", "TypedStorage"),
        ("torch._tensor", "_rebuild_from_type_v2"), ("torch.nn.parameter", "Parameter"),
        ("torch.serialization", "_get_layout"),
    }  # fmt: skip


def _dtype_of(value: object) -> object:
    """Of a storage or a type: torch's, or for an error the name of another."""
    if not isinstance(value, _Named):
        return None
    own = getattr(torch, value.name, None) if value.module == "torch" else None
    return own if isinstance(own, torch.dtype) else STORAGES.get(value.name, value.name)


def _called(function: object, arguments: object) -> Any:
    """What a pickle's call would give, as far as it matters: tensors and mappings."""
    few = isinstance(arguments, tuple) and len(arguments) <= MOST_ARGUMENTS
    if not isinstance(function, _Named) or not isinstance(arguments, tuple) or not few:
        raise ValueError("a call of something else")
    kind = function.name.removeprefix("_rebuild_")
    if function.module == "collections":
        return {}
    if kind in ("parameter", "parameter_with_state", "Parameter"):
        return arguments[0] if arguments else None
    if kind == "from_type_v2":
        return _called(arguments[0], arguments[2])
    if not function.name.startswith("_rebuild_"):
        return None
    if kind not in ("tensor", "tensor_v2", "tensor_v3"):
        return _Saved("", kind, 0, (), (), as_stored=False)
    storage, offset, shape, stride, *more = arguments
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor of something else")
    typed = kind == "tensor_v3"  # it says its type itself
    dtype = _dtype_of(more[2]) if typed else storage.dtype
    bits = more[3:] if typed else more[2:]  # of values that are stored negated or conjugated
    return _Saved(storage.key, dtype, offset, shape, stride, as_stored=not any(bits))


class _Steps:
    """The instructions of a pickle, followed without doing what they ask for.

    Args:
        raw (`bytes`): the pickle.
    """

    def __init__(self, raw: bytes) -> None:
        self._raw = raw
        self._stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def content(self) -> Any:
        """What it describes.

        Raises:
            `UnpicklingError`: it describes more than tensors.
            `OverflowError`: it describes more than any model has.
        """
        simple: dict[str, Callable[[Any], None]] = {
            **dict.fromkeys(VALUES, self._stack.append),
            **{name: partial(self._constant, value) for name, value in CONSTANTS.items()},
            **{name: partial(self._new, kind) for name, kind in NEW.items()},
            **{name: partial(self._tuple, length) for name, length in TUPLES.items()},
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), self._get),
            "PROTO": lambda _: None,
            "STOP": lambda _: None,
            "MARK": lambda _: self._marks.append(len(self._stack)),
            "TUPLE": lambda _: self._stack.append(tuple(self._since_mark())),
            "APPEND": lambda _: self._append([self._stack.pop()]),
            "APPENDS": lambda _: self._append(self._since_mark()),
            "SETITEM": lambda _: self._set([self._stack.pop(-2), self._stack.pop()]),
            "SETITEMS": lambda _: self._set(self._since_mark()),
            "GLOBAL": self._named,
            "BINPERSID": self._storage,
            "REDUCE": self._call,
            "NEWOBJ": self._call,
            "BUILD": lambda _: self._stack.pop(),
        }
        for step, (instruction, argument, _) in enumerate(pickletools.genops(self._raw)):
            do = simple.get(instruction.name)
            if step == MAX_STEPS:
                raise OverflowError
            if do is None:
                raise pickle.UnpicklingError(instruction.name)
            do(argument)
        return self._stack.pop()

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self._stack[start:]
        del self._stack[start:]
        return items

    def _constant(self, value: object, _: None) -> None:
        self._stack.append(value)

    def _new(self, kind: Callable[[], Any], _: None) -> None:
        self._stack.append(kind())

    def _tuple(self, length: int, _: None) -> None:
        items = tuple(self._stack[-length:])
        del self._stack[-length:]
        self._stack.append(items)

    def _put(self, place: int) -> None:
        self._memo[place] = self._stack[-1]

    def _get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def _append(self, items: list[Any]) -> None:
        if isinstance(self._stack[-1], list):
            self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        """Items with simple keys: the hash of a tuple in tuples in tuples overflows C's stack."""
        target = self._stack[-1]
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((k, v) for k, v in pairs if isinstance(k, str | int))

    def _named(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        if not _is_known(module, name):
            raise pickle.UnpicklingError(argument)
        self._stack.append(_Named(module, name))

    def _storage(self, _: None) -> None:
        found = self._stack.pop()
        if not isinstance(found, tuple) or len(found) > MOST_ARGUMENTS or found[0] != "storage":
            raise ValueError("no storage")
        self._stack.append(_Storage(str(found[2]), _dtype_of(found[1])))

    def _call(self, _: None) -> None:
        arguments = self._stack.pop()
        self._stack[-1] = _called(self._stack[-1], arguments)


VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
NEW: dict[str, Callable[[], Any]] = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
"""Instructions by name; those that are nowhere are not of torch.save."""


class _RangeFile(io.RawIOBase):
    """A file of a checkpoint for readers that seek.

    Args:
        files (`Files`): where to read.
        name (`str`): file name.
        size (`int`): its bytes.
    """

    def __init__(self, files: Files, name: str, size: int) -> None:
        self._files, self._name, self._size = files, name, size
        self._position = 0
        self._blocks: dict[int, bytes] = {}
        self.most = MAX_DIRECTORY_BYTES  # the first large part that is read

    def readable(self) -> bool:
        return True

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
        """A few kilobytes at once, and once: of the Hub every read is a request."""
        if index not in self._blocks:
            start = index * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, self._size)
            self._blocks[index] = self._files.read(self._name, start, stop)
        return self._blocks[index]
