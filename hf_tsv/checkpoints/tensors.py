"""Description of a stored tensor, known before the tensor is read."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_DIMENSIONS = 64  # torch's own limit
LONGEST_NAME = 1000  # many times the longest in any model


@dataclass(frozen=True)
class TensorInfo:
    """Location, dtype and shape of one tensor.

    Args:
        file (`str`): file in the checkpoint's folder.
        dtype (`torch.dtype`): type in the file.
        shape (`tuple[int, ...]`): sizes of its dimensions.
        start (`int`): first byte in the file.
        nbytes (`int`): length in bytes.
        transposed (`bool`): whether the file holds its transpose.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int
    transposed: bool = False


def is_tensor_name(key: object) -> bool:
    """Tell whether a key of a file can name a tensor: short text without control characters."""
    return isinstance(key, str) and len(key) <= LONGEST_NAME and key.isprintable()
