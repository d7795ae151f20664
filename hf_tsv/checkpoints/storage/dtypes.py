"""Data types of stored tensors, as data: what a header says is known without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """Data type of a stored tensor; as text, it is what torch calls it.

    Args:
        name (`str`): its name in safetensors.
        in_torch (`str`): its name in torch.
        itemsize (`int`): bytes of one value.
        is_floating_point (`bool`): whether its values are.
    """

    name: str
    in_torch: str
    itemsize: int
    is_floating_point: bool = False

    def __str__(self) -> str:
        return f"torch.{self.in_torch}"

    @property
    def torch(self) -> torch.dtype:
        """The type itself, for which torch is imported."""
        import torch

        dtype: torch.dtype = getattr(torch, self.in_torch)
        return dtype


DTYPES = {
    dtype.name: dtype
    for dtype in (
        DType("F64", "float64", 8, True),
        DType("F32", "float32", 4, True),
        DType("F16", "float16", 2, True),
        DType("BF16", "bfloat16", 2, True),
        DType("I64", "int64", 8),
        DType("I32", "int32", 4),
        DType("I16", "int16", 2),
        DType("I8", "int8", 1),
        DType("U8", "uint8", 1),
        DType("BOOL", "bool", 1),
    )
}
"""Every type that is read, by its name in safetensors."""

DTYPES_OF_TORCH = {dtype.in_torch: dtype for dtype in DTYPES.values()}
"""The same by name in torch."""


def dtype_of(tensor: torch.Tensor) -> DType:
    """Type of a tensor."""
    return DTYPES_OF_TORCH[str(tensor.dtype).removeprefix("torch.")]
