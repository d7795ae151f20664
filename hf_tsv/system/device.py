"""The device a run computes on."""

from __future__ import annotations

import torch

from hf_tsv.system import processes
from hf_tsv.system.errors import RecipeError
from hf_tsv.system.text import one_of

AnyDevice = str | int | torch.device
"""A device as torch names it, `auto`, the number of an accelerator, or -1 for the CPU."""


def pick_device(name: AnyDevice | None = None) -> torch.device:
    """The device asked for; by default the one accelerate chooses: cuda, xpu, mps, else cpu."""
    text = "auto" if name is None else str(name).strip().lower()
    here = torch.accelerator.is_available()
    if text == "auto" and not here:
        return torch.device("cpu")  # a second before accelerate is loaded
    if text == "auto" or (text == "cuda" and processes.launched() > 1):
        from accelerate import PartialState

        return torch.device(PartialState().device)
    kind = torch.accelerator.current_accelerator() if here else None
    if text.isdecimal():
        text = f"{kind.type if kind else 'cuda'}:{text}"
    try:
        device = torch.device("cpu" if text == "-1" else text)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        count = torch.accelerator.device_count() if kind else 0
        there = ["auto", "cpu", *(f"{kind.type}:{i}" for i in range(count) if kind)]
        hint = f"Choose {one_of(there)}."
        raise RecipeError(f"There is no device {name!r} here.", hint) from None
    return device
