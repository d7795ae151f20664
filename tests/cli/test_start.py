"""What a command imports: nothing that it does not use, since imports are most of its start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_tsv.checkpoints.storage.dtypes import DTYPES, DTYPES_OF_TORCH, dtype_of
from hf_tsv.checkpoints.storage.instructions import ALIASES, DTYPE_NAME

UNUSED = {
    "PIL", "accelerate", "datasets", "gradio", "matplotlib", "pandas", "peft", "sklearn", "sympy",
    "torch._dynamo", "torch._inductor", "transformers",
}  # fmt: skip
"""Libraries that neither a merge nor a compression needs."""

COMPUTING = {"numpy", "safetensors", "scipy", "threadpoolctl", "torch"}
WRITING = {"jinja2"}

CODE = """
import json, sys
from hf_tsv.cli import app
code = None
try:
    app(sys.argv[1:])
except SystemExit as end:
    code = end.code
sys.stderr.flush()
print("\\n" + json.dumps([code, sorted(sys.modules)]))
"""

BOTH = "org/vision org/flat"
RUNS = {
    "--help": UNUSED | COMPUTING | WRITING | {"huggingface_hub", "rich"},
    "merge --help": UNUSED | COMPUTING | WRITING | {"huggingface_hub", "rich"},
    "inspect {zoo}/vision": UNUSED | COMPUTING | WRITING,
    "inspect {pickled}": UNUSED | COMPUTING | WRITING,
    "inspect org/vision": UNUSED | COMPUTING | WRITING,
    "find org/base": UNUSED | COMPUTING | WRITING,
    f"merge {BOTH} --dry-run": UNUSED | WRITING | {"scipy", "threadpoolctl"},
    f"merge {BOTH} -o merged": UNUSED,
    "compress org/vision -o factors": UNUSED,
}
"""Commands, and what they do not import."""


@pytest.fixture
def pickled(zoo: Path, tmp_path: Path) -> Path:
    """A checkpoint whose weights torch.save wrote."""
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((zoo / "vision" / "config.json").read_bytes())
    torch.save(load_file(zoo / "vision" / "model.safetensors"), folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("words", RUNS)
def test_a_command_imports_only_what_it_uses(
    world: Path, zoo: Path, pickled: Path, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, *words.format(zoo=zoo, pickled=pickled).split()],
        capture_output=True, text=True, check=True, cwd=world, env=os.environ,
    )  # fmt: skip
    code, loaded = json.loads(done.stdout.splitlines()[-1])
    assert not code, done.stderr
    assert sorted(RUNS[words].intersection(loaded)) == []


def test_types_known_without_torch_are_those_of_torch() -> None:
    for dtype in DTYPES.values():
        empty = torch.empty(0, dtype=dtype.torch)
        assert dtype.itemsize == dtype.torch.itemsize
        assert dtype.is_floating_point == dtype.torch.is_floating_point
        assert str(dtype) == str(dtype.torch) and dtype_of(empty) is dtype
    assert len(DTYPES_OF_TORCH) == len(DTYPES)


def test_names_of_types_in_pickles_are_those_that_torch_has() -> None:
    known = {name for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
    assert {n for n in vars(torch) if n in ALIASES or DTYPE_NAME.fullmatch(n)} == known
    for name, other in ALIASES.items():
        assert getattr(torch, name) is getattr(torch, other)
