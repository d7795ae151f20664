"""The speed benchmark measures what it says: its checkpoints, its references, its processes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import reference
import torch
from reference import one_thread
from rules import decompose
from safetensors.torch import load_file

from benchmarks.speed import exact, plain, processes, results, synthetic
from benchmarks.speed.accuracy import SpectrumErrors, spectrum_errors
from hf_tsv.checkpoints.formats.whole import open_checkpoint
from hf_tsv.checkpoints.reference import parse, pin

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SHAPE = (96, 64)
POWER_LAWS = [name for name in synthetic.SPECTRA if name.startswith("power")]


def drawn(name: str, tasks: int = 4) -> list[torch.Tensor]:
    """Updates of one weight."""
    generator = torch.Generator().manual_seed(1)
    return synthetic.updates(SHAPE, tasks, synthetic.SPECTRA[name], generator)


def cosines(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of the principal angles between the spans of orthonormal columns."""
    return torch.linalg.svdvals(first.mT @ second)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Zoo:
    """Four tiny fine-tunes and their base."""
    return synthetic.checkpoints("tiny", 4, 2, folder=tmp_path_factory.mktemp("bench"))


# Updates


@pytest.mark.parametrize("exponent", [1, 0.75, 0.5, 0.25])
def test_singular_values_follow_the_power_law(exponent: float) -> None:
    for delta in drawn(f"power-{exponent:g}"):
        found = torch.linalg.svdvals(delta.double())
        expected = torch.arange(1, 65, dtype=torch.float64) ** -exponent
        torch.testing.assert_close(found / found[0], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "lora-float32", *POWER_LAWS])
def test_updates_have_the_size_of_fine_tuning(name: str) -> None:
    for delta in drawn(name):
        rms = float(delta.double().norm()) / math.sqrt(delta.numel())
        assert rms == pytest.approx(synthetic.UPDATE_RMS, rel=0.02)


def test_leading_directions_of_tasks_are_partly_the_same() -> None:
    tasks, shared = 4, 16
    leading = [exact.triplets(delta, shared)[0] for delta in drawn("power-0.5", tasks)]
    related = cosines(leading[0], leading[1])
    strangers = cosines(leading[0], reference.orthonormal(96, shared, reference.generator(5)))
    assert related[0] > 0.95 and related[0] < 1 - 1e-9
    assert related.sum() > 1.2 * strangers.sum()


def test_a_lora_is_of_its_rank() -> None:
    found = torch.linalg.svdvals(drawn("lora-float32")[0].double())
    assert int((found > 1e-5 * found[0]).sum()) == synthetic.LORA_RANK


def test_special_tasks_are_zero_or_equal() -> None:
    assert not drawn("zero")[0].any() and drawn("zero")[1].any()
    first, *_, last = drawn("duplicate")
    assert torch.equal(first, last)


def test_scrambling_keeps_spectrum_and_angles() -> None:
    first, second, *_ = drawn("power-1")
    move = synthetic.scramble("a.weight", SHAPE)
    assert not torch.equal(move(first), first)
    torch.testing.assert_close(torch.linalg.svdvals(move(first)), torch.linalg.svdvals(first))
    torch.testing.assert_close(move(first).mT @ move(second), _columns(move, first.mT @ second))


def _columns(move: synthetic.Scramble, gram: torch.Tensor) -> torch.Tensor:
    picked = gram[move.columns][:, move.columns]
    return picked * move.column_signs[:, None] * move.column_signs


# Checkpoints


def test_checkpoints_open_and_have_the_shapes_of_transformers(zoo: synthetic.Zoo) -> None:
    expected = synthetic.shapes("tiny", 2)
    for folder in (zoo.base, *zoo.tasks):
        found = open_checkpoint(pin(parse(str(folder))))
        assert {name: info.shape for name, info in found.tensors.items()} == expected
        assert all(name.startswith("vision_model.") for name in expected)


def test_every_weight_has_the_same_spectrum(zoo: synthetic.Zoo) -> None:
    base, task = (load_file(folder / plain.FILE) for folder in (zoo.base, zoo.tasks[1]))
    weights = [n for n in base if "layers" in n and n.endswith("weight") and base[n].ndim == 2]
    assert len(weights) == 12
    for name in weights:
        found = torch.linalg.svdvals((task[name] - base[name]).double())
        assert float(found[1] / found[0]) == pytest.approx(2**-0.5, rel=1e-3)
    one, other = (f"vision_model.encoder.layers.{i}.mlp.fc1.weight" for i in (0, 1))
    assert not torch.equal(task[one] - base[one], task[other] - base[other])


def test_checkpoints_are_made_once(zoo: synthetic.Zoo) -> None:
    before = [file.stat().st_mtime_ns for file in zoo.files()]
    again = synthetic.checkpoints("tiny", 4, 2, folder=zoo.base.parents[1])
    assert again == zoo
    assert [file.stat().st_mtime_ns for file in again.files()] == before


# References


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("name", ["power-0.5", "gaussian"])
def test_plain_algorithm_is_the_method_but_for_float32(name: str, transpose: bool) -> None:
    deltas = drawn(name)
    for chosen in (deltas, [delta.mT for delta in deltas]):
        expected = reference.tsv(chosen, [16] * 4)
        assert exact.relative_error(exact.merge(chosen, 16, [0.0] * 4), expected) < 1e-10
        assert exact.relative_error(plain.merge(chosen, 16, transpose), expected) < 1e-3


@pytest.mark.parametrize("name", synthetic.SPECTRA)
def test_hf_tsv_is_near_float64_whatever_the_spectrum(name: str) -> None:
    errors = spectrum_errors(name, 4, SHAPE)
    assert errors.ours < 1e-5
    if name.startswith("lora"):  # shape (96, 64), four tasks: r = 16
        assert errors.ranks == (16, 16)


def test_plain_process_merges_whole_checkpoints(zoo: synthetic.Zoo, tmp_path: Path) -> None:
    plain.merge_checkpoints(zoo.base, zoo.tasks, tmp_path, "cpu", transpose=False)
    merged, base = load_file(tmp_path / plain.FILE), load_file(zoo.base / plain.FILE)
    tasks = [load_file(folder / plain.FILE) for folder in zoo.tasks]
    name = "vision_model.encoder.layers.1.mlp.fc1"
    deltas = [task[f"{name}.weight"] - base[f"{name}.weight"] for task in tasks]
    expected = base[f"{name}.weight"] + exact.merge(deltas, 16, [0.0] * 4)
    assert exact.relative_error(merged[f"{name}.weight"], expected) < 1e-5
    mean = torch.stack([task[f"{name}.bias"] for task in tasks]).mean(0)
    torch.testing.assert_close(merged[f"{name}.bias"], mean)


def test_plain_compression_keeps_the_leading_triplets(zoo: synthetic.Zoo, tmp_path: Path) -> None:
    plain.compress_checkpoint(zoo.base, zoo.tasks[0], tmp_path, "cpu", False, 0.25)
    kept, base = load_file(tmp_path / plain.FILE), load_file(zoo.base / plain.FILE)
    name = "vision_model.encoder.layers.0.mlp.fc2.weight"
    delta = load_file(zoo.tasks[0] / plain.FILE)[name] - base[name]
    found = kept[f"{name}.U"] * kept[f"{name}.S"] @ kept[f"{name}.Vh"]
    expected = decompose(delta, 16).matrix()
    assert exact.relative_error(found, expected) < 1e-4


# Processes and results


def test_a_process_is_measured_from_outside(tmp_path: Path) -> None:
    done = processes.run(["json.tool", _json(tmp_path, {"reading": 1.5, "peak_memory_bytes": 7})])
    assert done.wall > 0 and done.cpu > 0 and 2**20 < done.peak_bytes < 2**27
    assert done.seconds == {"reading": 1.5} and done.estimate_bytes == 7


def test_seconds_of_hf_tsv_are_found_in_its_timings(tmp_path: Path) -> None:
    report = {"seconds": 9.0, "timings": {"reading": 1.0, "computing": 2.0, "x": {}}}
    done = processes.run(["json.tool", _json(tmp_path, report)])
    assert done.seconds == {"reading": 1.0, "computing": 2.0, "whole": 9.0}


def test_a_failed_process_says_why() -> None:
    with pytest.raises(processes.FailedError, match="no_such_file"):
        processes.run(["json.tool", "no_such_file"])


def test_results_replace_rows_of_the_same_key(tmp_path: Path) -> None:
    facts = {
        "date": "2026-01-01", "command": "x", "cpu": "y", "cpus": 2, "device": "cpu",
        "memory_bytes": 2**30, "platform": "z", "versions": {"torch": "2"},
    }  # fmt: skip
    for error in (1e-5, 3e-5):
        row = SpectrumErrors(error, 1e-9, "power-1", 8, (96, 96))
        results.opened("some", tmp_path).add("spectra", ["power-1", 8], row, facts)
    content = json.loads((tmp_path / "some.json").read_text())
    assert [row["plain"] for row in content["sections"]["spectra"].values()] == [3e-5]
    assert "| power-1 | 8 | 96 | 3e-05 | 1e-09 |" in (tmp_path / "some.md").read_text()


def _json(folder: Path, value: object) -> Path:
    file = folder / "report.json"
    file.write_text(json.dumps(value))
    return file
