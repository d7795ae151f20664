"""The pipeline: what is read ahead, how much goes on at a time, what it takes."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import ended
from cli import hf_tsv as run
from forks import fork
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.runs.reading import LITTLE, read_ahead


class Loads:
    """Remembers which items are in memory."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.loaded, self.order = sizes, set[int](), list[int]()
        self.lock = threading.Lock()

    def load(self, item: int) -> int:
        with self.lock:
            self.loaded.add(item)
            self.order.append(item)
        return item

    def ahead(self, item: int) -> int:
        """Bytes of what is loaded after an item."""
        with self.lock:
            return sum(self.sizes[i] for i in self.loaded if i > item)


@given(st.lists(st.integers(0, 50), max_size=30), st.booleans())
def test_items_come_in_order_and_what_is_ahead_is_bounded(sizes: list[int], ahead: bool) -> None:
    loads = Loads(sizes)
    seen = []
    with ThreadPoolExecutor(1) as pool:
        for item in read_ahead(pool, loads.load, range(len(sizes)), sizes, ahead=ahead):
            most = max(sizes) * (1 + LITTLE) if ahead else 0
            assert loads.ahead(item) <= most
            seen.append(item)
    assert seen == loads.order == list(range(len(sizes)))


def test_the_next_large_item_is_read_while_the_large_one_before_it_is_used() -> None:
    """As two matrices with a bias between them."""
    sizes = [1, 100, 1, 100, 1]
    loads = Loads(sizes)
    with ThreadPoolExecutor(1) as pool:
        items = read_ahead(pool, loads.load, range(5), sizes)
        assert [next(items), next(items)] == [0, 1]
        deadline = time.monotonic() + 10
        while 3 not in loads.loaded and time.monotonic() < deadline:
            time.sleep(0.001)
        assert 3 in loads.loaded
        assert list(items) == [2, 3, 4]


def test_an_error_of_a_read_reaches_the_caller() -> None:
    def load(item: int) -> int:
        if item == 2:
            raise ValueError("unreadable")
        return item

    seen = []
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match="unreadable"):
        for item in read_ahead(pool, load, range(4), [1] * 4):
            seen.append(item)
    assert seen == [0, 1]


def merged(zoo: Path, folder: Path, *options: str, threads: int | None = None) -> Any:
    """A merge in this process, or in one of its own with so many threads."""
    command = ["merge", str(zoo / "vision"), str(zoo / "full"), "--base-model", str(zoo / "base")]
    command += ["-o", str(folder), *options]
    code = f"import torch; from hf_tsv import cli; torch.set_num_threads({threads}); cli.main()"
    done = ended(fork("-c", code, *command)) if threads else run(*command)
    assert done.code == 0, done.err
    return done


def test_threads_and_memory_change_the_time_and_no_byte(zoo: Path, tmp_path: Path) -> None:
    one = merged(zoo, tmp_path / "one")
    two = merged(zoo, tmp_path / "two", "--timings", threads=2)
    little = merged(zoo, tmp_path / "little", "--max-memory", "2GB", threads=3)
    expected = (tmp_path / "one" / "model.safetensors").read_bytes()
    for name in ("two", "little"):
        assert (tmp_path / name / "model.safetensors").read_bytes() == expected
    rows = [line.split() for line in two.err.splitlines()]
    assert {row[0] for row in rows if row} >= {"reading", "waiting", "computing", "writing"}
    assert not any("reading" in line for line in (one.err + little.err).splitlines())


def test_timings_are_in_the_report(zoo: Path, tmp_path: Path) -> None:
    plain = merged(zoo, tmp_path / "plain", "--json", "--quiet").json
    assert plain["timings"]
    assert not any("seconds" in entry for entry in plain["treatments"].values())
    report = merged(zoo, tmp_path / "out", "--json", "--quiet", "--timings").json
    phases = {"reading", "waiting", "computing", "writing"}
    assert report["timings"].keys() == phases
    of_weights = [entry["seconds"] for entry in report["treatments"].values()]
    assert all(seconds.keys() == phases for seconds in of_weights)
    for phase in phases:  # each is rounded to a millisecond
        total = sum(seconds[phase] for seconds in of_weights)
        assert report["timings"][phase] == pytest.approx(total, abs=0.001 * len(of_weights))
    assert 0 < report["timings"]["computing"] <= report["seconds"]


@pytest.mark.parametrize("size", ["1MB", "0", "-3GB", "much", "2 XB"])
def test_memory_that_cannot_be_is_refused(zoo: Path, tmp_path: Path, size: str) -> None:
    done = run(
        "merge", str(zoo / "vision"), "--base-model", str(zoo / "base"), "-o",
        str(tmp_path / "out"), f"--max-memory={size}",
    )  # fmt: skip
    assert done.code == (1 if size == "1MB" else 2)
    assert "memory" in done.err and "Hint: " in done.err
    assert list(tmp_path.iterdir()) == []


def test_less_memory_is_less_at_a_time(zoo: Path, tmp_path: Path) -> None:
    """`--dry-run` says what will be needed."""
    options: dict[str, Any] = {"base_model": zoo / "base", "dry_run": True}
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        tasks = [zoo / "vision", zoo / "full"]
        free = hf_tsv.merge(tasks, **options).peak_memory_bytes
        with pytest.raises(hf_tsv.RecipeError, match="of memory") as error:
            hf_tsv.merge(tasks, **options, max_memory=1_000_000)
        assert "Give at least" in str(error.value)
        tight = hf_tsv.merge(tasks, **options, max_memory=100_000_000_000).peak_memory_bytes
    finally:
        torch.set_num_threads(threads)
    assert free == tight > 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"method": "average"}, {"method": "low-rank", "alpha": 0.5}]
)
def test_a_merge_on_a_gpu_is_that_of_the_cpu(
    zoo: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Through pinned memory, and back into the files."""
    found = {}
    for device in ("cpu", "cuda"):
        report = hf_tsv.merge(
            [zoo / "vision", zoo / "full"], base_model=zoo / "base", output=tmp_path / device,
            device=device, **options,
        )  # fmt: skip
        assert report.device == device
        found[device] = load_file(tmp_path / device / "model.safetensors")
    base = load_file(zoo / "base" / "model.safetensors")
    for name, expected in found["cpu"].items():
        change = (expected.double() - base[name].double()).norm()
        assert (found["cuda"][name].double() - expected.double()).norm() <= 1e-4 * change, name


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("method", ["average", "task-arithmetic"])
def test_means_and_sums_hold_one_task_at_a_time(tmp_path: Path, method: str, scale: float) -> None:
    """No update stays in memory while the next one is read."""
    entries, name = 5_000_000, "vision_model.post_layernorm.bias"
    for index, folder in enumerate(("base", "a", "b", "c", "d")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.json").write_text('{"model_type": "clip_vision_model"}')
        tensor = torch.full((entries,), 1.0 + index / 8)
        save_file({name: tensor}, tmp_path / folder / "model.safetensors")
    code = f"""
import torch
from hf_tsv.merging import costs, loading, work
from hf_tsv.recipes.settings import Settings
from hf_tsv.system import memory
torch.set_num_threads(1)
memory.share_one_heap()
tasks = [{str(tmp_path)!r} + "/" + name for name in "abcd"]
settings = Settings(method={method!r})
merge, sources = work.prepare(tasks, {str(tmp_path / "base")!r}, [{scale}] * 4, settings)
(weight,) = merge.plan.weights
reader = loading.Reader(merge, sources, torch.device("cpu"))
memory.empty(1000, 1000, dtype=torch.float64).zero_()
def peak(key="VmHWM"):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(key)))
open("/proc/self/clear_refs", "w").write("5")
before = peak("VmRSS")
with memory.reused():
    reader.load(weight)
print((peak() - before) / (costs.held(weight) + costs._reading(weight)))
"""
    done = ended(fork("-c", code))
    assert 0.5 < float(done.out) < 1.15, done  # one more would be 1.25
