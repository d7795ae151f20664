"""Several processes that share one merge, really launched: torchrun with gloo, on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from cli import hf_tsv
from hypothesis import given
from hypothesis import strategies as st
from test_merge import deep_checkpoints

from hf_tsv.system import processes

LIMIT = 120


def launch(*arguments: str | Path, launcher: Sequence[str], cwd: Path) -> subprocess.Popen[str]:
    """Start `python -m hf_tsv` by torchrun."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *launcher, "-m", "hf_tsv",
         *map(str, arguments)],
        cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def one_machine(count: int) -> list[str]:
    return ["--standalone", f"--nproc-per-node={count}"]


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
    deep_checkpoints(folder, 8)
    done = hf_tsv(*command(folder, "one"), cwd=folder)
    assert done.code == 0, done.err
    return folder


def command(deep: Path, output: str, *more: str) -> list[str]:
    tasks = [str(deep / "t1"), str(deep / "t2"), "--base-model", str(deep / "base")]
    return ["merge", *tasks, "-o", output, "--max-shard-size", "5MB", *more]


def test_several_processes_write_the_same_bytes_as_one(deep: Path) -> None:
    process = launch(*command(deep, "by4"), launcher=one_machine(4), cwd=deep)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert out == f"{deep / 'by4'}\n"  # one of them speaks
    assert "cpu, 4 processes" in err
    assert_same(deep / "by4", deep / "one")
    assert not list(deep.glob(".by*"))


def test_all_processes_measure_who_disturbs_whom(deep: Path) -> None:
    done = hf_tsv(*command(deep, "told", "--report"), cwd=deep)
    assert done.code == 0, done.err
    process = launch(*command(deep, "told2", "--report"), launcher=one_machine(2), cwd=deep)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, err
    assert "cpu, 2 processes" in err
    files = [file.name for file in (deep / "one").glob("*.safetensors*")]
    assert len(files) > 2
    for name in files:
        assert (deep / "told2" / name).read_bytes() == (deep / "one" / name).read_bytes()
    one, two = (
        json.loads((deep / name / "interference.json").read_text()) for name in ("told", "told2")
    )
    assert two["weights"] == one["weights"] and len(one["weights"]) > 8
    assert two["total"] == one["total"]


def test_two_machines_share_a_merge(deep: Path) -> None:
    """Two launchers that meet at one address, as on two nodes with a common file system."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = [
        launch(
            *command(deep, "nodes"),
            launcher=["--nnodes=2", f"--node-rank={rank}", "--nproc-per-node=1",
                      "--master-addr=127.0.0.1", f"--master-port={port}"],
            cwd=deep,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    ends = [node.communicate(timeout=LIMIT) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ends
    assert [out for out, _ in ends] == [f"{deep / 'nodes'}\n", ""]
    assert_same(deep / "nodes", deep / "one")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_that_dies_ends_the_run_which_goes_on_later(deep: Path, victim: int) -> None:
    output = f"dying{victim}"
    process = launch(*command(deep, output), launcher=one_machine(2), cwd=deep)
    work = deep / f".{output}.hf-tsv"
    journal = work / f"done.{victim}.jsonl"
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.005)
    os.kill(rank_of(process.pid, victim), signal.SIGKILL)
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert "Terminated." in err or "A process of this run is gone." in err or victim == 0, err
    assert not (deep / output).exists() and (work / "job.json").exists()
    again = hf_tsv(*command(deep, output), cwd=deep)
    assert again.code == 0 and "are there already" in again.err, again.err
    assert_same(deep / output, deep / "one")
    assert not work.exists()


def rank_of(launcher: int, rank: int) -> int:
    """Process id of one rank."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return int(child)
    raise AssertionError(f"no rank {rank} among {children}")


def test_bad_input_is_said_once(deep: Path) -> None:
    process = launch(*command(deep, "bad", "--rank", "0"), launcher=one_machine(2), cwd=deep)
    out, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert out == "" and err.count("Error: rank is 0") == 1, err
    assert not list(deep.glob("*bad*"))


def test_compressing_is_for_one_process(deep: Path) -> None:
    process = launch(
        "compress", deep / "t1", "--base-model", deep / "base", "-o", "small",
        launcher=one_machine(2), cwd=deep,
    )  # fmt: skip
    _, err = process.communicate(timeout=LIMIT)
    assert process.returncode == 1
    assert err.count("Error: `hf-tsv compress` runs in one process.") == 1, err


@given(st.lists(st.floats(0, 1e12), max_size=60), st.integers(1, 7))
def test_shares_cover_the_work_once_and_evenly(costs: list[float], count: int) -> None:
    found = processes.shares(costs, count)
    assert len(found) == count
    assert sorted(i for share in found for i in share) == list(range(len(costs)))
    assert all(share == sorted(share) for share in found)
    loads = [sum(costs[i] for i in share) for share in found]
    even = sum(costs) / count
    assert max(loads) <= even + max(costs, default=0) + 1e-3
