"""The benchmark of the start: its commands run, and costs of imports are added up by package."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.speed import start, synthetic

SAID = """
import time: self [us] | cumulative | imported package
import time:       100 |        100 |   torch._C
import time:       200 |       1300 | torch
import time:      1000 |       1000 |   numpy.linalg
A line of the command.
"""


def test_costs_of_imports_are_added_up_by_package() -> None:
    assert start.imports(SAID) == {"numpy": 0.001, "torch": 0.0}
    assert start.imports(SAID.replace("200 |", "2000 |")) == {"torch": 0.002, "numpy": 0.001}


def test_the_commands_run_and_what_is_measured_is_told(tmp_path: Path) -> None:
    zoo = synthetic.checkpoints("tiny", 2, 2, folder=tmp_path)
    chosen = start.commands(zoo, tmp_path / "out")
    results = json.loads((start.RESULTS / "start.json").read_text("utf-8"))["commands"]
    assert list(results) == list(chosen)
    seconds, _ = start.run(chosen["hf-tsv inspect"], tmp_path / "compiled", codes=(0,))
    assert seconds > 0
    start.run(chosen["hf-tsv merge, without an argument"], tmp_path / "compiled", codes=(2,))
