"""The device a run computes on."""

from __future__ import annotations

import torch

from hf_tsv.system import processes
from hf_tsv.system.errors import UsageError


def pick_device(name: str | None = None) -> torch.device:
    """The device asked for, or the one accelerate chooses: cuda, xpu, mps, else cpu."""
    if name is None and not torch.accelerator.is_available():
        return torch.device("cpu")  # a second before accelerate is loaded
    if name is None or (name == "cuda" and processes.launched() > 1):
        from accelerate import PartialState

        return torch.device(PartialState().device)
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UsageError(f"There is no device {name!r} here.", "Omit `device=`.") from None
    return device
