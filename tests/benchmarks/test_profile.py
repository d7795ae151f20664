"""The profile of a merge: its steps, its sum, and what is published of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.speed import profile

ROOT = Path(__file__).parents[2]


def test_the_steps_are_those_of_a_merge(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    words = ["--model", "tiny", "--tasks", "3", "--layers", "2", "--results", str(file)]
    command = [sys.executable, "-m", "benchmarks.speed.profile", *words, "--cache", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)  # clocks stay in a process
    found = json.loads(file.read_text("utf-8"))
    calls, matrices = found["calls"], 2 * 6 + 1  # with the table of positions
    assert calls["tridiagonal form of the tasks' Gram matrices"] == 3 * matrices
    assert calls["eigendecompositions for the polar factors"] == 2 * matrices
    assert calls["writing"] == calls["sum of base and update"] == calls["the rest of reading"]
    assert sum(found["steps"].values()) == pytest.approx(found["cpu"])
    assert 0 < found["reading"] < found["cpu"]
    assert file.with_suffix(".md").read_text("utf-8") == profile.markdown(found)


def test_the_table_is_that_of_the_results() -> None:
    found = json.loads(profile.RESULTS.read_text("utf-8"))
    assert profile.RESULTS.with_suffix(".md").read_text("utf-8") == profile.markdown(found)
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    reading = found["reading"] / found["bytes"] * 1e9
    assert f"Reading takes {reading:.1f} seconds of a processor per gigabyte" in page
