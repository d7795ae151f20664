"""Where the tensors of a PyTorch file lie: read from its index, without loading any of them.

A file of `torch.save` is an uncompressed archive: one pickle that says what there is, and one entry
a tensor. The pickle is read by torch's restricted unpickler, which builds tensors and containers
and calls nothing; the tensors stay where they are and are read like those of any other file.
"""

from __future__ import annotations

import io
import pickle
import threading
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from hf_tsv.checkpoints.files import Files
from hf_tsv.checkpoints.tensors import DTYPE_NAMES, TensorInfo
from hf_tsv.errors import CheckpointError
from hf_tsv.hub import WEIGHT_SUFFIXES
from hf_tsv.progress import first_line

SUFFIXES = tuple(suffix for suffix in WEIGHT_SUFFIXES if suffix != ".safetensors")
MAX_PICKLE_BYTES = 50_000_000
WRAPPERS = ("state_dict", "model_state_dict", "model")
"""Keys under which training scripts keep the state beside their own."""

PREFIXES = ("module.", "model.")
"""Of wrappers around the model, on every name."""

BLOCK_BYTES = 2**16
_ONE_AT_A_TIME = threading.Lock()


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
    archive = _RangeFile(files, name, size)
    try:
        with zipfile.ZipFile(archive) as entries:
            infos = entries.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, EOFError):
        raise CheckpointError(
            f"{owner}: {name} is no archive that torch.save writes since version 1.6.", convert
        ) from None
    big = [e for e in infos if e.filename.endswith("data.pkl") and e.file_size > MAX_PICKLE_BYTES]
    if big or any(entry.compress_type != zipfile.ZIP_STORED for entry in infos):
        raise CheckpointError(f"{owner}: {name} is not as torch.save writes it.", convert)
    state = _state(_loaded(archive, name, owner, convert))
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise CheckpointError(f"{owner}: {name} holds no state dict.", convert)
    if strange := [key for key in tensors if not isinstance(key, str) or not key.isprintable()]:
        raise CheckpointError(f"{owner}: {name}: {strange[0]!r} is no name of a tensor.")
    return {key: _info(key, value, name, size, owner) for key, value in tensors.items()}


def _loaded(archive: io.RawIOBase, name: str, owner: str, convert: str) -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    archive.seek(0)
    try:
        with _ONE_AT_A_TIME, FakeTensorMode():  # tensors without memory, that know their offset
            return torch.load(archive, weights_only=True)  # type: ignore[arg-type]
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{owner}: {name} is a pickle of more than tensors, and is not loaded: it could run"
            " code.",
            "Load it where you trust it and save model.state_dict(), as safetensors if possible.",
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # a dozen types on damaged files
        raise CheckpointError(
            f"{owner}: {name} cannot be read: {first_line(error)}", convert
        ) from None


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


def _info(key: str, tensor: torch.Tensor, file: str, size: int, owner: str) -> TensorInfo:
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if tensor.dtype not in DTYPE_NAMES or tensor.is_quantized or tensor.layout != torch.strided:
        raise CheckpointError(
            f"{owner}: {key} has dtype {str(tensor.dtype).removeprefix('torch.')}, which cannot be"
            " merged.",
            "Dequantise the checkpoint first (float32, float16 or bfloat16).",
        )
    transposed = not tensor.is_contiguous() and tensor.dim() == 2 and tensor.mT.is_contiguous()
    as_stored = not (tensor.is_neg() or tensor.is_conj())
    if not (as_stored and (tensor.is_contiguous() or transposed) and type(offset) is int):
        raise CheckpointError(
            f"{owner}: the values of {key} do not lie together in {file}.",
            "Save it as safetensors.",
        )
    nbytes = tensor.numel() * tensor.dtype.itemsize
    start = offset + int(tensor.storage_offset()) * tensor.dtype.itemsize
    if not 0 <= start <= start + nbytes <= size:
        raise CheckpointError(
            f"{owner}: {file} is truncated: {key} ends after it.", "Download or save it again."
        )
    return TensorInfo(file, tensor.dtype, tuple(tensor.shape), start, nbytes, transposed)


class _RangeFile(io.RawIOBase):
    """A file of a checkpoint for readers that seek; keeps the blocks it has read.

    Args:
        files (`Files`): where to read.
        name (`str`): file name.
        size (`int`): its bytes.
    """

    def __init__(self, files: Files, name: str, size: int) -> None:
        self._files, self._name, self._size = files, name, size
        self._position = 0
        self._blocks: dict[int, bytes] = {}

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

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), max(0, self._size - self._position))
        done = 0
        while done < wanted:
            index, within = divmod(self._position, BLOCK_BYTES)
            part = self._block(index)[within : within + wanted - done]
            view[done : done + len(part)] = part
            done += len(part)
            self._position += len(part)
        return done

    def _block(self, index: int) -> bytes:
        if index not in self._blocks:
            start = index * BLOCK_BYTES
            stop = min(start + BLOCK_BYTES, self._size)
            self._blocks[index] = self._files.read(self._name, start, stop)
        return self._blocks[index]
