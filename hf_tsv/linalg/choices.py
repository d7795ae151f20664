"""Names of solvers, precisions and types; imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Union

if TYPE_CHECKING:
    import torch

Precision = Literal["fast", "exact"]
Orthogonalizer = Literal["procrustes", "whitening"]
WudiFilter = Literal["swudi-a", "swudi", "tact"]
LayerScale = Literal["none", "lines", "larv"]
Dtype = Literal["float32", "float16", "bfloat16"]
AnyDtype = Union[Dtype, Literal["auto", "half", "fp16", "bf16", "fp32"], "torch.dtype"]
AnyDevice = Union[str, int, "torch.device"]
"""A device as torch names it, `auto`, the number of an accelerator, or -1 for the CPU."""
