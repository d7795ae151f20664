"""Runs that are killed, or whose disk fails: a few of what `benchmarks.kills` does hundreds of."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.kills.__main__ import main


def outcome_apart(*options: str) -> list[list[str]]:
    """Rows of the table that the benchmark prints in a process that may have disks of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", *options],
        cwd=Path(__file__).parents[2],
        env={k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return cells(done.stdout)


def cells(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[1:]]


def test_a_run_killed_anywhere_leaves_nothing_or_all_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["merge, replacing", "merge, pushed again"]
    only = [word for name in names for word in ("--only", name)]
    monkeypatch.setattr(os, "environ", dict(os.environ))  # it adds to that of its children
    monkeypatch.setattr(sys, "argv", ["kills", *only, "--every", "60", "--kills", "0"])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    assert not end.value.code, said
    rows = cells(said.out)
    assert [row[0] for row in rows] == names
    assert all(int(kills) >= 1 and int(wrong) == 0 for _, _, kills, _, wrong in rows), rows
    assert sum(int(resumed) for _, _, _, resumed, _ in rows) >= 2


def test_a_disk_that_is_full_or_read_only_is_one_error_and_costs_no_finished_weight() -> None:
    ((_, _, disks, resumed, wrong),) = outcome_apart(
        "--disks", "--only", "compress", "--every", "50"
    )
    assert int(disks) >= 4
    assert int(resumed) >= 1
    assert int(wrong) == 0
