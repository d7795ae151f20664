"""The benchmark for a GPU, rehearsed on the CPU: what a short loan of one would bring back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.speed import gpu

ROOT = Path(__file__).parents[2]
REHEARSED = ("environment", "kernels", "weights", "merges")


def ran(command: list[Any], **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHON": sys.executable, **environment},
    )  # fmt: skip


def test_a_rehearsal_measures_and_its_file_becomes_the_tables(tmp_path: Path) -> None:
    steps = [word for name in REHEARSED for word in ("--step", name)]
    done = ran(["benchmarks/gpu.sh", tmp_path, "--device", "cpu", "--small", *steps])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert [(name, step["status"]) for name, step in found["steps"].items()] == [
        (name, "done") for name in REHEARSED
    ]
    sections = found["sections"]
    assert sections["environment"]["machine"]["missing"] == []
    (kernel,) = sections["kernels"].values()
    assert len(kernel["ours"]) == 1 and set(kernel["plain"]) == {"LAPACK"}
    assert all(row["ours"] < 1e-6 and row["exact"] == 0 for row in sections["weights"].values())
    (shallow, deep) = sections["merges"].values()
    assert shallow["plain"]["LAPACK"]["wall"] > 0 and not deep["plain"]
    assert {"wall", "reading", "waiting", "computing", "writing"} < shallow["ours"][0].keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "gpu.log"]

    tables = tmp_path / "tables"
    command = [sys.executable, "-m", "benchmarks.speed.gpu", "--from", tmp_path / "gpu.json"]
    done = ran([*command, "--folder", tables])
    assert done.returncode == 0, done.stderr
    assert json.loads((tables / "gpu.json").read_text()) == found
    lines = (tables / "gpu.md").read_text().splitlines()
    assert {f"## {name}" for name in ("Merges", "Kernels", "Weights")} < set(lines)
    assert any(line.startswith("| tiny | 2 | 1 |") and "(LAPACK)" in line for line in lines)


def test_a_missing_gpu_is_said_in_one_line(tmp_path: Path) -> None:
    done = ran(["benchmarks/gpu.sh", tmp_path, "--step", "environment", "--step", "merges"],
               CUDA_VISIBLE_DEVICES="")  # fmt: skip
    assert done.returncode == 1
    (step,) = json.loads((tmp_path / "gpu.json").read_text())["steps"].values()
    assert step["status"].startswith("failed: Missing: ")
    assert "torch.cuda.is_available() is False" in step["status"]


def test_what_a_step_had_measured_is_kept_when_it_is_stopped(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    write = f'open({str(file)!r}, \'w\').write(\'["a", 1]\\n["a", 2]\\n["b", \')'
    code = f"import time; {write}; time.sleep(600)"
    assert gpu._outcome([sys.executable, "-c", code], 5) == "stopped after 5 s"
    assert list(gpu._rows(file)) == [("a", 1), ("a", 2)]
    assert gpu._outcome([sys.executable, "-c", "raise ValueError('odd')"], 20) == (
        "failed: ValueError: odd"
    )
