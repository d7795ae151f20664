"""The benchmark beside fusion_bench: its errors, its memory limit, its table, what is published."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import hf_tsv
from benchmarks.speed import merges, peers, plain, synthetic
from hf_tsv.runs.journal import work_of

ROOT = Path(__file__).parents[2]
LAYERS, TASKS = 2, 3


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Zoo:
    return synthetic.checkpoints("tiny", TASKS, LAYERS, folder=tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def merged(zoo: synthetic.Zoo, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged") / "out"
    hf_tsv.merge([str(task) for task in zoo.tasks], base_model=str(zoo.base), output=folder)
    return folder / plain.FILE


def test_errors_are_those_of_every_weight(zoo: synthetic.Zoo, merged: Path, tmp_path: Path) -> None:
    tensors = load_file(merged)
    wrong = {**tensors, "vision_model.encoder.layers.1.mlp.fc2.weight": tensors[
        "vision_model.encoder.layers.1.mlp.fc2.weight"] * 1.01}  # fmt: skip
    save_file({k.removeprefix(synthetic.PREFIX): v for k, v in wrong.items()}, tmp_path / "wrong")
    found = peers.errors(zoo, {"ours": merged, "wrong": tmp_path / "wrong"})
    assert found["ours"]["weights"] == 6 * LAYERS
    assert found["ours"]["largest"] < 1e-7
    assert found["wrong"]["largest"] == pytest.approx(0.01, rel=0.01)
    assert found["wrong"]["median"] < 1e-7


def test_a_peer_that_needs_more_memory_does_not_run(
    zoo: synthetic.Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert peers.fits(zoo)
    monkeypatch.setattr(peers, "COPIES", 1e9)
    assert not peers.fits(zoo)
    row = peers.measured(zoo, 1, check=True)
    assert list(row["runs"]) == list(row["errors"]) == ["hf-tsv"]
    assert "| tiny | 2 | 3 | does not fit into memory |" in peers.markdown([row])


def test_an_unfinished_run_is_not_resumed(tmp_path: Path) -> None:
    out, work = tmp_path / "out", work_of(tmp_path / "out")
    for folder in (out, work, tmp_path / "other"):
        folder.mkdir()
        (folder / "file").touch()
    merges.clear(out)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_the_table_is_that_of_the_results() -> None:
    rows = json.loads(peers.RESULTS.read_text("utf-8"))
    assert peers.RESULTS.with_suffix(".md").read_text("utf-8") == peers.markdown(rows)


def test_the_published_ratios_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "benchmarks.md").read_text("utf-8")
    readme = (ROOT / "README.md").read_text("utf-8")
    for row in json.loads(peers.RESULTS.read_text("utf-8")):
        if peers.PEER not in row["runs"]:
            continue
        name = f"{row['model']}, {row['layers']} layers"
        cells = [name, str(row["tasks"])]
        cells += [peers.ratio(row, what) for what in ("wall", "computing", "cpu", "peak")]
        for program in (peers.PEER, "hf-tsv"):
            found = row["errors"]
            cells.append(f"{found[program]['largest']:.0e}" if found else "–")
        assert f"| {' | '.join(cells)} |" in page
        if (row["model"], row["tasks"], row["layers"]) == ("ViT-B/32", 8, 12):
            median = peers.ratio(row, "wall").partition(" ")[0]
            assert f" {median} times as fast as fusion_bench" in readme
            assert float(peers.ratio(row, "peak").split()[0]) > 10
