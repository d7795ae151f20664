"""Description of a stored tensor, known before the tensor is read."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from hf_tsv.checkpoints.storage.dtypes import DType, dtype_of
from hf_tsv.checkpoints.storage.files import Files
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import quoted

if TYPE_CHECKING:
    from torch import Tensor

MAX_DIMENSIONS = 64  # torch's own limit
LONGEST_NAME = 1000  # many times the longest in any model


class Described(Protocol):
    """A tensor of which type and shape are known."""

    @property
    def dtype(self) -> DType: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class TensorInfo:
    """Location of one tensor: `nbytes` bytes from `start` on in a file of the checkpoint's folder.

    `order` are its dimensions in the order of the file, the slowest first; empty for their own
    order. (1, 0) is a transposed matrix, (0, 2, 3, 1) a convolution in `channels_last`.
    """

    file: str
    dtype: DType
    shape: tuple[int, ...]
    start: int
    nbytes: int
    order: tuple[int, ...] = ()


def is_tensor_name(key: object) -> bool:
    """Tell whether a key of a file can name a tensor: short text without control characters."""
    return isinstance(key, str) and len(key) <= LONGEST_NAME and key.isprintable()


def unknown_dtype(owner: str, key: str, dtype: str) -> CheckpointError:
    """Error for a tensor of a data type that is not read."""
    return CheckpointError(
        f"{owner}: {key} has dtype {quoted(dtype)}, which cannot be merged.",
        "Dequantise the checkpoint first (float32, float16 or bfloat16).",
    )


@dataclass(frozen=True)
class Part:
    """Canonical tensor as part `index` of the `of` equal ones stacked along dimension 0 of another.

    `stored` names that one in the file; `transposed` tells whether the file holds its transpose.
    """

    name: str
    stored: str
    index: int = 0
    of: int = 1
    transposed: bool = False


def read_tensor(
    files: Files, info: TensorInfo, name: str, owner: str, *, pinned: bool = False
) -> Tensor:
    """Read one tensor as stored, which errors call `name` of `owner`.

    With `pinned` it is read into memory from where a GPU copies at full speed.

    Raises:
        [`CheckpointError`]: the file is truncated, or a value is NaN or Inf.
    """
    import torch

    from hf_tsv.linalg.products import largest_entry
    from hf_tsv.system.memory import empty

    raw = empty(info.nbytes, dtype=torch.uint8, pinned=pinned)
    if info.nbytes:
        files.read_into(info.file, info.start, byte_view(raw))
    order = info.order or range(len(info.shape))
    tensor = raw.view(info.dtype.torch).reshape([info.shape[axis] for axis in order])
    if info.order:
        tensor = tensor.permute([info.order.index(axis) for axis in range(len(order))]).contiguous()
    if tensor.is_floating_point() and tensor.numel() and not math.isfinite(largest_entry(tensor)):
        count = int(tensor.numel() - tensor.isfinite().sum())
        problem = f"{owner}: {count} of {tensor.numel()} values of {name} are NaN or Inf."
        raise CheckpointError(problem, "The checkpoint is damaged; drop it or save it again.")
    return tensor


def digest(tensor: Tensor) -> str:
    """Compute the sha256 of one tensor: its type and shape as text, then its bytes.

    Example:
        >>> digest(torch.zeros(2))[:12]
        '46b46b5d4b1b'
    """
    result = hashlib.sha256(f"{dtype_of(tensor).name} {list(tensor.shape)} ".encode())
    result.update(byte_view(tensor))
    return result.hexdigest()


def fingerprint(digests: Mapping[str, str]) -> str:
    """Compute the sha256 over names and digests of tensors, in the order of the names."""
    lines = (f"{name} {value}\n" for name, value in sorted(digests.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def byte_view(tensor: Tensor) -> memoryview:
    """Bytes of a contiguous CPU tensor, without a copy."""
    import torch

    flat: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


@dataclass(frozen=True)
class TensorSpec:
    """Data type and shape of one tensor to be written."""

    dtype: DType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize
