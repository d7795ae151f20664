"""Fine-tunes with fewer and fewer of their singular vectors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import copied
from cli import hf_tsv as run
from labelled import make_folder, with_an_odd_word
from PIL import Image
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.system.errors import DataError, RecipeError

FRACTIONS = (0.05, 0.5, 1.0)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random images, on which random models differ."""
    folder = tmp_path_factory.mktemp("sweep") / "blocks"
    rng = np.random.default_rng(1)
    for name in "abcdefghijklmnopqrstuvwx":
        (folder / "test" / name).mkdir(parents=True)
        for i in range(4):
            blocks = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
            image = Image.fromarray(blocks).resize((32, 32), Image.Resampling.NEAREST)
            image.save(folder / "test" / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def far(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune far from its base, so that what is cut off is seen."""
    folder = copied(zoo / "vision", tmp_path_factory.mktemp("far") / "vision")
    base = load_file(zoo / "base" / "model.safetensors")
    state = load_file(folder / "model.safetensors")
    moved = {
        name: base[name] + 40 * (tensor - base[name]) if name in base else tensor
        for name, tensor in state.items()
    }
    save_file(moved, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def truncated(zoo: Path, far: Path, folder: Path, fraction: float) -> Path:
    """W0 + the leading triplets of Δ, by NumPy in float64, as a checkpoint of its own."""
    copied(far, folder)
    base = load_file(zoo / "base" / "model.safetensors")
    state = load_file(far / "model.safetensors")
    for name, tensor in state.items():
        if tensor.dim() == 2:
            delta = tensor.double().numpy() - base[name].double().numpy()
            U, S, Vh = np.linalg.svd(delta, full_matrices=False)
            r = max(1, int(fraction * len(S) + 1e-9))
            state[name] = base[name] + torch.from_numpy(U[:, :r] * S[:r] @ Vh[:r]).float()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_every_share_scores_as_its_own_checkpoint_does(
    zoo: Path, far: Path, images: Path, tmp_path: Path
) -> None:
    task = hf_tsv.EvaluationTask("blocks", str(images), templates=("{}",))
    report = hf_tsv.sweep([task], {"blocks": far}, rank_fraction=FRACTIONS,
                          base_model=zoo / "base", progress=False)  # fmt: skip
    expected = []
    for i, fraction in enumerate(FRACTIONS):
        folder = truncated(zoo, far, tmp_path / str(i), fraction)
        found = hf_tsv.evaluate(folder, [task], base_model=zoo / "base")
        expected.append(found.accuracy)
    whole = hf_tsv.evaluate(far, [task], base_model=zoo / "base").accuracy
    assert report.tasks["blocks"]["accuracies"] == pytest.approx(expected, abs=1e-12)
    assert report.mean == report.tasks["blocks"]["accuracies"]
    assert report.full == report.tasks["blocks"]["full"] == pytest.approx(whole, abs=1e-12)
    assert len({*expected, whole}) > 1  # else nothing was compared
    assert expected[-1] == pytest.approx(whole, abs=0.03)  # rounding may turn over an image


def test_what_is_stored_is_counted_as_the_paper_does(zoo: Path, far: Path, images: Path) -> None:
    report = hf_tsv.sweep({"blocks": str(images)}, {"blocks": far}, rank_fraction=[0.1, 1],
                          base_model=zoo / "base", limit=3, progress=False)  # fmt: skip
    base = load_file(zoo / "base" / "model.safetensors")
    state = load_file(far / "model.safetensors")
    changed = {n: t for n, t in state.items() if not torch.equal(t, base[n])}
    total = sum(t.numel() for t in changed.values())
    kept = 0
    for tensor in changed.values():
        numbers = tensor.numel()
        if tensor.dim() == 2:
            r = max(1, int(0.1 * min(tensor.shape) + 1e-9))
            numbers = min(numbers, r * (sum(tensor.shape) + 1))
        kept += numbers
    assert report.stored == pytest.approx([kept / total, 1.0])
    assert report.limit == 3 and report.tasks["blocks"]["images"] == 3


def test_the_command_writes_results_and_a_picture(zoo: Path, images: Path, tmp_path: Path) -> None:
    pairs = ["--task", f"a={images}", "--task", f"b={images}", "--reference", f"a={zoo / 'vision'}",
             "--reference", f"b={zoo / 'full'}"]  # fmt: skip
    done = run("sweep", *pairs, "--base-model", zoo / "base", "--rank-fraction", "0.5,0.1",
               "--limit", "6", "-o", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    assert "stored" in done.out and "at most 6 images per task" in done.out
    found = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert found["fractions"] == [0.1, 0.5] and list(found["tasks"]) == ["a", "b"]
    means = [
        sum(c) / 2 for c in zip(*(t["accuracies"] for t in found["tasks"].values()), strict=True)
    ]
    assert found["mean"] == pytest.approx(means)
    with Image.open(tmp_path / "out" / "sweep.png") as picture:
        assert picture.width > 300


def test_one_task_that_fails_does_not_cost_the_others(zoo: Path, images: Path) -> None:
    done = run("sweep", "--task", f"a={images}", "--task", "b=/no/where", "--reference",
               f"a={zoo / 'vision'}", "--reference", f"b={zoo / 'full'}", "--base-model",
               zoo / "base", "--limit", "3", "--json")  # fmt: skip
    assert done.code == 1 and "b: " in done.err
    assert list(done.json["tasks"]) == ["a"] and list(done.json["errors"]) == ["b"]


def test_a_fine_tune_that_is_its_base_does_not_cost_the_others(
    zoo: Path, images: Path, tmp_path: Path
) -> None:
    same = copied(zoo / "base", tmp_path / "same")
    report = hf_tsv.sweep({"a": str(images), "b": str(images)},
                          {"a": same, "b": zoo / "vision"}, base_model=zoo / "base", limit=3,
                          progress=False)  # fmt: skip
    assert list(report.tasks) == ["b"] and "equals the base model" in report.errors["a"]


@pytest.mark.parametrize("text", ["0", "1.5", "a", "", "-0.1", "nan"])
def test_a_share_that_is_none_is_refused(zoo: Path, images: Path, text: str) -> None:
    done = run("sweep", "--task", f"a={images}", "--reference", f"a={zoo / 'vision'}",
               "--rank-fraction", text)  # fmt: skip
    assert done.code == 2 and ("rank" in done.err), done.err


def test_a_task_needs_its_fine_tune(zoo: Path, images: Path) -> None:
    with pytest.raises(RecipeError, match="The task a has no fine-tune"):
        hf_tsv.sweep({"a": str(images)})
    with pytest.raises(RecipeError, match="which is no task"):
        hf_tsv.sweep({"a": str(images)}, {"b": zoo / "vision"})
    with pytest.raises(DataError, match="No task could be measured"):
        hf_tsv.sweep({"a": str(images)}, {"a": zoo / "nothing"}, base_model=zoo / "base")


def test_what_nobody_expects_of_one_task_does_not_cost_the_others(
    zoo: Path, images: Path, tmp_path: Path
) -> None:
    base, odd = with_an_odd_word(zoo, make_folder(tmp_path / "pets"), tmp_path / "odd")
    tasks = {"odd": str(odd), "blocks": str(images)}
    report = hf_tsv.sweep(tasks, dict.fromkeys(tasks, zoo / "vision"), rank_fraction=0.5,
                          base_model=base, progress=False)  # fmt: skip
    assert list(report.tasks) == ["blocks"]
    assert report.errors["odd"].startswith("odd failed with IndexError: ")
