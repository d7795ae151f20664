"""One grammar of sizes, whatever option they are given to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from cli import hf_tsv as run
from hypothesis import example, given
from hypothesis import strategies as st

from hf_tsv.checkpoints.sources import Access
from hf_tsv.checkpoints.storage.dtypes import DTYPES
from hf_tsv.checkpoints.storage.tensors import TensorSpec
from hf_tsv.checkpoints.storage.writer import plan_shards
from hf_tsv.merging.work import prepare
from hf_tsv.recipes.compressing import RankRule
from hf_tsv.recipes.settings import Settings
from hf_tsv.system import memory
from hf_tsv.system.checks import size_in_bytes
from hf_tsv.system.errors import RecipeError

SIZES: dict[str | int, int] = {
    "1.5GB": 1_500_000_000,
    "2500 MB": 2_500_000_000,
    "2gib": 2 * 1024**3,
    "1.5 GiB": 1_610_612_736,
    "2 G": 2_000_000_000,
    "3000000k": 3_000_000_000,
    "3000000KB": 3_000_000_000,
    "4000mi": 4000 * 1024**2,
    "0.25tb": 250_000_000_000,
    " 2GB\n": 2_000_000_000,
    "7000000000B": 7_000_000_000,
    "12345678901": 12_345_678_901,
    "2000000000.9": 2_000_000_000,
    9_876_543_210: 9_876_543_210,
}

REFUSED: list[Any] = [
    *("", " ", "ten", "%", "MB", "-5MB", "+5MB", "5KiBs", "5ib", "5 MB/s", "1e6", "1,5MB", "1.MB"),
    *(".5GB", "5\N{KELVIN SIGN}", "\N{ARABIC-INDIC DIGIT FIVE}MB", "0", "0.0MB", "0.5", "0.0001k"),
    *("nan", "inf", "5%%", "0x10", "9" * 400, "9" * 400 + "MB", "9" * 20 + "TB"),
    *(0, -1, 1.5, 0.5, True, float("nan"), ["1GB"], b"1GB", 2**63, 10**5000),
]


def test_a_budget_in_every_spelling() -> None:
    for size, expected in SIZES.items():
        assert RankRule(budget=size).budget_bytes(10) == expected, size


def test_a_limit_of_memory_in_every_spelling(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident", lambda: 10**8)  # whatever other tests have left
    tasks = [str(zoo / "vision")]
    merge, sources = prepare(tasks, str(zoo / "base"), None, Settings(), Access())
    for size, expected in SIZES.items():
        assert merge.within(size, sources).max_memory == expected, size


def test_a_largest_file_in_every_spelling() -> None:
    """Two tensors that just fit stay together, and with a byte more they do not."""
    for size, expected in SIZES.items():
        half = TensorSpec(DTYPES["I8"], (expected // 2,))
        for more, files in ((0, 1), (1, 2)):
            rest = TensorSpec(DTYPES["I8"], (expected - expected // 2 + more,))
            assert len(plan_shards({"a": half, "b": rest}, size).sizes) == files, size
        assert Settings(max_shard_size=size).max_shard_size == size  # as recipes have it


@pytest.mark.parametrize(
    "size", REFUSED, ids=lambda size: repr(size)[:20] if size != 10**5000 else ""
)
def test_what_is_no_size_is_refused_with_an_example(size: Any) -> None:
    with pytest.raises(RecipeError, match=r"^`limit=`: invalid size .*\. Examples: 2GB, 800MB\.$"):
        size_in_bytes(size, name="limit")
    with pytest.raises(RecipeError, match=r"^`budget=`: invalid size .*10%.*35MB"):
        RankRule(budget=size)
    with pytest.raises(RecipeError, match=r"^`max_shard_size=`: invalid size .*2GB"):
        Settings(max_shard_size=size)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["merge", "--max-memory", "2 XB"], "--max-memory: invalid size '2 XB'."),
        (["merge", "--max-memory", "10%"], "--max-memory: invalid size '10%'."),
        (["merge", "--max-shard-size", "10%"], "--max-shard-size: invalid size '10%'."),
        (["compress", "--budget", "101%"], "--budget: invalid size '101%'."),
    ],
)
def test_the_commands_refuse_a_size_in_one_line(
    zoo: Path, tmp_path: Path, option: list[str], said: str
) -> None:
    command, *words = option
    done = run(command, zoo / "vision", "--base-model", zoo / "base", "-o", tmp_path / "m", *words)
    assert done.code == 2 and f"Error: {said}\nHint: Examples: " in done.err, done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("share", "expected"), [("10%", 350), ("12.5 %", 437), (" 100%", 3500), ("0.01%", 0)]
)
def test_a_percentage_is_of_the_checkpoint(share: str, expected: int) -> None:
    assert RankRule(budget=share).budget_bytes(3500) == expected


@given(tenths=st.integers(1, 1000), size=st.integers(0, 10**9))
@example(tenths=646, size=500)  # 500 · 64.6 / 100 = 322.99999999999994
def test_a_percentage_is_rounded_down_to_whole_bytes(tenths: int, size: int) -> None:
    assert size_in_bytes(f"{tenths / 10}%", size) == tenths * size // 1000


@pytest.mark.parametrize("share", ["0%", "0.0%", "100.1%", "5%%"])
def test_what_is_no_percentage_is_refused(share: str) -> None:
    with pytest.raises(RecipeError, match=r"^`budget=`: invalid size .*10%.*35MB"):
        RankRule(budget=share)


@pytest.mark.parametrize(("share", "percent"), [("0.1", "10"), (0.1, "10"), ("0.025", "2.5")])
def test_a_budget_below_a_byte_may_have_been_meant_as_a_share(share: Any, percent: str) -> None:
    with pytest.raises(RecipeError, match=rf"^`budget=`: invalid size .*Did you mean {percent}%\?"):
        RankRule(budget=share)
