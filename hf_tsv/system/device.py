"""The device a run computes on."""

from __future__ import annotations

import re

import torch

from hf_tsv.system import processes
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import one_of


def available() -> list[str]:
    """Names of the devices of this machine."""
    kind = torch.accelerator.current_accelerator()
    count = torch.accelerator.device_count() if kind is not None else 0
    return ["cpu", *(f"{kind}:{number}" for number in range(count))]


def pick_device(name: str | int | torch.device | None = None) -> torch.device:
    """The device asked for, or the one accelerate chooses: cuda, xpu, mps, else cpu.

    A number is that of an accelerator, −1 is the cpu, and None and `auto` leave the choice.
    """
    text = None if name in (None, "auto") else str(name)
    if text is None and not torch.accelerator.is_available():
        return torch.device("cpu")  # a second before accelerate is loaded
    if text is None or (text == "cuda" and processes.launched() > 1):
        from accelerate import PartialState

        return torch.device(PartialState().device)
    if re.fullmatch("-?[0-9]{1,4}", text):
        text = "cpu" if text == "-1" else f"{torch.accelerator.current_accelerator()}:{text}"
    try:
        device = torch.device(text)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        problem = f"There is no device {name!r} here."
        raise UsageError(problem, f"Choose {one_of(['auto', *available()])}.") from None
    return device
