"""Names of solvers, precisions and types; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Union

if TYPE_CHECKING:
    import torch

Precision = Literal["fast", "exact"]
Orthogonalizer = Literal["procrustes", "whitening"]
Dtype = Literal["float32", "float16", "bfloat16"]
AnyDtype = Union[Dtype, Literal["auto", "half", "fp16", "bf16", "fp32"], "torch.dtype"]

DTYPES = {"half": "float16", "fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
"""Other names of types."""


def dtype_name(value: object) -> str | None:
    """Our name of a `torch.dtype` or of an alias; None for "auto" and None, others as they are.

    Example:
        >>> dtype_name("bf16"), dtype_name("float32"), dtype_name("auto")
        ('bfloat16', 'float32', None)
    """
    name = str(value).removeprefix("torch.")
    return None if name in ("auto", "None") else DTYPES.get(name, name)
