"""`hf-tsv env`."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from typing import Annotated

from hf_tsv.cli import options
from hf_tsv.cli.groups import Only
from hf_tsv.cli.output import Out, table

USAGE = ("[OPTIONS]",)
MISSING = ""
EXAMPLES = ("hf-tsv env",)

PACKAGES = (
    "torch", "numpy", "scipy", "safetensors", "transformers", "huggingface_hub", "peft", "datasets",
    "matplotlib",
)  # fmt: skip


def env(*, run: Annotated[options.RunOptions, Only("as_json")]) -> None:
    """Show versions, devices and settings, for a bug report."""
    import torch
    from huggingface_hub import constants, get_token

    from hf_tsv.methods.catalogue import METHODS
    from hf_tsv.system.device import available
    from hf_tsv.system.version import __version__

    found = {
        "hf-tsv": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "platform": platform.platform(),
        "processors": f"{os.cpu_count()}, torch uses {torch.get_num_threads()}",
        "devices": ", ".join(available()),
        **{name: _version(name) for name in PACKAGES},
        "methods": ", ".join(row.package or name for name, row in METHODS.items()),
        "endpoint": constants.ENDPOINT,
        "cache": constants.HF_HUB_CACHE,
        "offline": "yes" if constants.HF_HUB_OFFLINE else "no",
        "token": "yes" if get_token() else "no",
    }
    Out(as_json=run.as_json).result(table(list(found.items())), found)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
