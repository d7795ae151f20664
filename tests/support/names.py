"""Names that somebody chose to harm, and models that have them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from hf_tsv.checkpoints.names import SINGLE_FILE

# Names: tensors, tasks and labels that are markup, templates or codes of terminals


NAMES = [
    "{{ 7*7 }}{% raw %}", "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "---",
    "![x](javascript:alert(1))", "[x](javascript:alert(1))", "| a | b |", "`x` ``y``",
    'say "x" \\', "a: [b, {c: d}] # e", "$\\frac{x}{$", "[red]x[/red]", "%s %d {0}", "&lt;b&gt;",
    "- item", "*b* _i_", "```", "!!python/object:os.system", "$(touch x)", "é 層", "~", "null",
]  # fmt: skip


def model_of_names(folder: Path) -> Path:
    """A base and two fine-tunes of a model whose tensors have such names."""
    config = {"model_type": "<b>{{ 7*7 }}", "id2label": {"0": "\x1b[31m<script>"}}
    for seed, task in enumerate(("base", "<b>one", "| {{ 7*7 }} `two`")):
        generator = torch.Generator().manual_seed(seed)
        state = {
            f"layers.{i}.{name}": torch.randn(8, 6, generator=torch.Generator().manual_seed(i))
            + (seed > 0) * 0.1 * torch.randn(8, 6, generator=generator)
            for i, name in enumerate(NAMES)
        }
        (folder / task).mkdir()
        save_file(state, folder / task / SINGLE_FILE)
        (folder / task / "config.json").write_text(json.dumps(config))
        front = yaml.safe_dump({"license": "mit\nlicense: apache-2.0\n---\n<script>"})
        (folder / task / "README.md").write_text(f"---\n{front}---\n")
    return folder


HOSTILE = [
    "$\\frac{x}{$",
    "数字 <script>alert(1)</script>",
    "a\nb\x1b[31mred\u202e",
    "x" * 300,
    "_^$",
]


def prose(body: str) -> str:
    """Markdown without its code, where nothing is a link."""
    fenced = re.sub(r"^(`{3,})\w*\n.*?^\1$", "", body, flags=re.DOTALL | re.MULTILINE)
    without_code = re.sub(r"(?<!`)(`+)(?!`).*?(?<!`)\1(?!`)", "", fenced)
    return re.sub(r"\\.", "", without_code)
