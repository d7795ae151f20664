"""Several processes that share one merge over gloo, on loopback; one test launches torchrun."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cli import hf_tsv
from deep import deep_checkpoints
from ends import LIMIT, ends, ranks
from hypothesis import given
from hypothesis import strategies as st

from hf_tsv.system import processes


def assert_same(folder: Path, expected: Path) -> None:
    """Every file but the card, which names the folder."""
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names
    for name in names:
        if name != "README.md":
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two fine-tunes and what one process makes of them."""
    folder = tmp_path_factory.mktemp("deep")
    deep_checkpoints(folder, 6)
    done = hf_tsv(*command(folder, "one"), cwd=folder)
    assert done.code == 0, done.err
    return folder


def command(deep: Path, output: str, *more: str) -> list[str]:
    tasks = [str(deep / "t1"), str(deep / "t2"), "--base-model", str(deep / "base")]
    return ["merge", *tasks, "-o", output, "--max-shard-size", "5MB", *more]


def test_several_processes_write_the_same_bytes_as_one(deep: Path) -> None:
    first, *others = ends(ranks(*command(deep, "by4"), count=4, cwd=deep))
    assert [first.code, *(other.code for other in others)] == [0] * 4, (first, others)
    assert first.out == f"{deep / 'by4'}\n" and not any(other.out for other in others)
    assert "cpu, 4 processes" in first.err
    assert_same(deep / "by4", deep / "one")
    assert not list(deep.glob(".by*"))


def test_all_processes_of_torchrun_measure_who_disturbs_whom(deep: Path) -> None:
    done = hf_tsv(*command(deep, "told", "--report"), cwd=deep)
    assert done.code == 0, done.err
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    two = subprocess.run(
        [sys.executable, *torchrun, "-m", "hf_tsv", *command(deep, "told2", "--report")],
        cwd=deep, capture_output=True, text=True, check=False, timeout=LIMIT,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr
    assert two.stdout == f"{deep / 'told2'}\n"  # one of them speaks
    assert "cpu, 2 processes" in two.stderr
    files = [file.name for file in (deep / "one").glob("*.safetensors*")]
    assert len(files) > 2
    for name in files:
        assert (deep / "told2" / name).read_bytes() == (deep / "one" / name).read_bytes()
    alone, shared = (
        json.loads((deep / name / "interference.json").read_text()) for name in ("told", "told2")
    )
    assert shared["weights"] == alone["weights"] and len(alone["weights"]) > 8
    assert shared["total"] == alone["total"]


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_which_goes_on_later(deep: Path, victim: int) -> None:
    output = f"dying{victim}"
    processes = ranks(*command(deep, output), count=2, cwd=deep)
    work = deep / f".{output}.hf-tsv"
    journal = work / f"done.{victim}.jsonl"
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.005)
    processes[victim].send_signal(signal.SIGKILL)
    dead, other = ends([processes[victim], processes[1 - victim]])
    assert (dead.code, other.code) == (-signal.SIGKILL, 1)
    assert other.err.count("Error: A process of this run is gone.") == 1, other.err
    assert not (deep / output).exists() and (work / "job.json").exists()
    again = hf_tsv(*command(deep, output), cwd=deep)
    assert again.code == 0 and "Resuming: " in again.err, again.err
    assert_same(deep / output, deep / "one")
    assert not work.exists()


def test_bad_input_is_said_once(deep: Path) -> None:
    first, second = ends(ranks(*command(deep, "bad", "--rank", "0"), count=2, cwd=deep))
    assert (first.code, second.code) == (2, 2)
    assert first.out + second.out == ""
    assert (first.err + second.err).count("Error: --rank must be at least 1") == 1, (first, second)
    assert not list(deep.glob("*bad*"))


def test_compressing_is_for_one_process(deep: Path) -> None:
    words = ["compress", deep / "t1", "--base-model", deep / "base", "-o", "small"]
    first, second = ends(ranks(*words, count=2, cwd=deep))
    assert (first.code, second.code) == (1, 1)
    said = "Error: `hf-tsv compress` runs in one process."
    assert (first.err + second.err).count(said) == 1, (first, second)


@given(st.lists(st.floats(0, 1e12), max_size=60), st.integers(1, 7))
def test_shares_cover_the_work_once_and_evenly(costs: list[float], count: int) -> None:
    found = processes.shares(costs, count)
    assert len(found) == count
    assert sorted(i for share in found for i in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in found)
    loads = [sum(costs[i] for i in share) for share in found]
    even = sum(costs) / count
    assert max(loads) <= even + max(costs, default=0) + 1e-3
