"""TALL-masks: every task beside a merge, one bit a weight."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from cli import copied
from cli import hf_tsv as run
from hub import Hub
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.checkpoints.formats.masks import CONFIG_FILE, MASK_FILE, packed, unpacked
from hf_tsv.methods import tall_masks
from hf_tsv.methods.tall_masks import tall_mask
from hf_tsv.system.errors import CheckpointError, HfTsvError, RecipeError

TASKS = ("vision", "full", "flat")
SCALE = 0.4


@pytest.fixture(scope="module")
def merged(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("masks") / "merged"
    hf_tsv.merge([zoo / name for name in TASKS], base_model=zoo / "base", output=output,
                 method="tall-mask", progress=False)  # fmt: skip
    return output


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """By the names of `CLIPModel`."""
    state = load_file(folder / "model.safetensors")
    known = ("vision_model.", "text_model.", "visual_projection.", "text_projection.", "logit_")
    return {n if n.startswith(known) else f"vision_model.{n}": t for n, t in state.items()}


def expected(zoo: Path, task: str) -> dict[str, np.ndarray]:
    """W0 + m ⊙ ΣΔ in float64, from the equations."""
    base = {n: t.double().numpy() for n, t in weights(zoo / "base").items()}
    deltas = [
        {n: t.double().numpy() - base[n] for n, t in weights(zoo / name).items()} for name in TASKS
    ]
    own = deltas[TASKS.index(task)]
    result = {}
    for name, w0 in base.items():
        total = sum(d.get(name, np.zeros_like(w0)) for d in deltas)
        delta = own.get(name, np.zeros_like(w0))
        result[name] = w0 + (np.abs(delta) > SCALE * np.abs(total - delta)) * total
    return result


@pytest.mark.parametrize("task", TASKS)
def test_a_task_is_the_merge_where_its_mask_says_so(zoo: Path, merged: Path, task: str) -> None:
    found = hf_tsv.load_model(merged / "masks" / task, progress=False).state_dict()
    wrong = entries = 0
    for name, value in expected(zoo, task).items():
        apart = np.abs(found[name].double().numpy() - value)
        wrong += int((apart > 1e-6).sum())  # rounding may turn over a bit that is at the edge
        entries += value.size
    assert wrong <= 1e-4 * entries


def test_a_mask_keeps_more_of_its_task_than_the_merge_does(zoo: Path, merged: Path) -> None:
    task = weights(zoo / "full")
    masked = hf_tsv.load_model(merged / "masks" / "full", progress=False).state_dict()
    both = weights(merged)

    def distance(state: dict[str, torch.Tensor]) -> float:
        return sum(float((state[n] - t).square().sum()) for n, t in task.items())

    assert distance(masked) < 0.7 * distance(both)


def test_the_cost_is_a_bit_for_each_changed_weight(zoo: Path, tmp_path: Path) -> None:
    done = run("merge", zoo / "vision", zoo / "flat", "--base-model", zoo / "base", "--method",
               "tall-mask", "-o", tmp_path / "m", "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert "Masks, " in done.err and "masks/vision, masks/flat" in done.err
    files = [tmp_path / "m" / "masks" / name / MASK_FILE for name in ("vision", "flat")]
    assert done.json["mask_bytes"] == sum(file.stat().st_size for file in files)
    assert list(done.json["masks"]) == ["masks/vision", "masks/flat"]
    for file in files:
        bits = load_file(file)
        assert all(name.startswith("vision_model.") for name in bits)  # the rest is the base's
        assert sum(t.numel() for t in bits.values()) == sum(
            -(-t.numel() // 8) for n, t in weights(zoo / "vision").items() if n in bits
        )


@pytest.mark.parametrize("shape", [(1,), (8,), (3, 5), (2, 3, 4), (17,)])
def test_packing_is_undone_by_unpacking(shape: tuple[int, ...]) -> None:
    mask = torch.rand(shape) > 0.5
    assert torch.equal(unpacked(packed(mask), shape), mask)


def test_a_masked_task_is_an_input_like_any_other(zoo: Path, merged: Path, tmp_path: Path) -> None:
    """Alone it becomes a whole checkpoint; it can be evaluated, compressed and merged."""
    done = run("merge", merged / "masks" / "full", "--method", "task-arithmetic", "--alpha", "1",
               "-o", tmp_path / "whole")  # fmt: skip
    assert done.code == 0, done.err
    assert f"Base model: {zoo / 'base'}" in done.err  # which the mask names
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    masked = hf_tsv.load_model(merged / "masks" / "full", progress=False).state_dict()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, masked[name], rtol=0, atol=1e-7)
    done = run("compress", merged / "masks" / "full", "-o", tmp_path / "factors")
    assert done.code == 0, done.err
    done = run("inspect", merged / "masks" / "full", "--json")
    assert (done.json["kind"], done.json["base_model"]) == ("mask", ["base"])


def test_a_run_that_is_stopped_while_masks_are_written_goes_on(
    zoo: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge() -> None:
        hf_tsv.merge([zoo / name for name in TASKS], base_model=zoo / "base",
                     output=tmp_path / "m", method="tall-mask", progress=False)  # fmt: skip

    with monkeypatch.context() as patch:
        calls: list[object] = []

        def stopping(*arguments: object) -> torch.Tensor:
            calls.append(arguments)
            if len(calls) > 50:
                raise KeyboardInterrupt
            return tall_mask(*arguments)  # type: ignore[arg-type]

        patch.setattr(tall_masks, "tall_mask", stopping)
        with pytest.raises(KeyboardInterrupt):
            merge()
    assert not (tmp_path / "m").exists()
    merge()
    for file in merged.glob("masks/*/*"):
        if file.suffix == ".safetensors":
            assert file.read_bytes() == (tmp_path / "m" / file.relative_to(merged)).read_bytes()


def test_the_head_of_a_masked_task(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.merge([zoo / "classifier", zoo / "vision"], base_model=zoo / "base",
                 output=tmp_path / "m", method="tall-mask", keep_heads=True,
                 progress=False)  # fmt: skip
    model = hf_tsv.load_model(tmp_path / "m" / "masks" / "classifier", head="classifier",
                              kind="image-classification", progress=False)  # fmt: skip
    kept = load_file(tmp_path / "m" / "heads" / "classifier.safetensors")
    assert torch.equal(model.state_dict()["classifier.weight"], kept["classifier.weight"])


def test_the_recipe_repeats_weights_and_masks(world: Path, zoo: Path, hub: Hub) -> None:
    hf_tsv.merge(["org/vision", "org/full"], output=world / "m", method="tall-mask", progress=False)
    hf_tsv.merge(recipe=world / "m", output=world / "again", progress=False)
    first = {p.relative_to(world / "m"): p for p in (world / "m").rglob("*") if p.is_file()}
    for name, file in first.items():
        assert file.read_bytes() == (world / "again" / name).read_bytes(), name


@pytest.mark.parametrize("stream", [False, True])
def test_from_and_to_the_hub(world: Path, zoo: Path, hub: Hub, stream: bool) -> None:
    names = ["org/vision", "org/full"]
    hf_tsv.merge(names, push_to="me/both", method="tall-mask", progress=False, stream=stream)
    assert hub.files("me/both").keys() >= {
        f"masks/{name}/{file}" for name in ("vision", "full") for file in (MASK_FILE, CONFIG_FILE)
    }
    found = hf_tsv.load_model("me/both/masks/vision", progress=False).state_dict()
    done = hf_tsv.merge(["me/both/masks/vision"], output=world / "m", method="task-arithmetic",
                        alpha=1, stream=stream, progress=False)  # fmt: skip
    assert done.base_model["ref"] == "org/base"
    again = load_file(world / "m" / "model.safetensors")
    for name, tensor in again.items():
        torch.testing.assert_close(tensor, found[name], rtol=0, atol=1e-7)
    assert "me/both/masks/vision" in hub.files("me/both")["README.md"].decode()


def test_the_same_masks_from_stacked_attention(zoo: Path, merged: Path, tmp_path: Path) -> None:
    hf_tsv.merge([zoo / name for name in TASKS], base_model=zoo / "base", output=tmp_path / "m",
                 method="tall-mask", qkv="fused", progress=False)  # fmt: skip
    for name in TASKS:
        again = load_file(tmp_path / "m" / "masks" / name / MASK_FILE)
        first = load_file(merged / "masks" / name / MASK_FILE)
        assert again.keys() == first.keys()
        assert all(torch.equal(again[n], t) for n, t in first.items())


# What goes wrong


def test_another_base_model_is_refused(zoo: Path, merged: Path, tmp_path: Path) -> None:
    other = copied(zoo / "base", tmp_path / "other")
    state = load_file(other / "model.safetensors")
    state["vision_model.post_layernorm.weight"][0] += 1
    save_file(state, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is not what the mask was made with") as error:
        hf_tsv.load_model(merged / "masks" / "full", base_model=other, progress=False)
    assert "made with base;" in str(error.value.hint)


def test_a_mask_away_from_its_merge_is_refused(merged: Path, tmp_path: Path) -> None:
    alone = copied(merged / "masks" / "full", tmp_path / "full")
    with pytest.raises(CheckpointError, match="is not beside the merge"):
        hf_tsv.load_model(alone, progress=False)


@pytest.mark.parametrize("content", ["{}", "[]", '{"hf_tsv_mask": 2}', '{"hf_tsv_mask": 1}', "x"])
def test_a_damaged_description_is_refused(merged: Path, tmp_path: Path, content: str) -> None:
    both = copied(merged, tmp_path / "m")
    (both / "masks" / "full" / CONFIG_FILE).write_text(content)
    with pytest.raises(HfTsvError):
        hf_tsv.load_model(both / "masks" / "full", progress=False)


def test_a_mask_of_another_merge_is_refused(merged: Path, tmp_path: Path) -> None:
    both = copied(merged, tmp_path / "m")
    file = both / "masks" / "full" / MASK_FILE
    bits = load_file(file)
    name = next(iter(bits))
    save_file({**bits, name: bits[name].repeat(2)}, file)
    with pytest.raises(CheckpointError, match=f"the mask of {name} does not fit"):
        hf_tsv.load_model(both / "masks" / "full", progress=False)


def test_a_mask_is_no_base_model_and_no_factors(zoo: Path, merged: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a mask"):
        hf_tsv.merge([zoo / "full"], base_model=merged / "masks" / "full", output=tmp_path / "m")
    with pytest.raises(CheckpointError, match="is a mask, not task factors") as error:
        hf_tsv.reconstruct(merged / "masks" / "full", output=tmp_path / "m")
    assert "hf-tsv merge" in str(error.value.hint)
    with pytest.raises(RecipeError, match="has no α"):
        hf_tsv.merge([zoo / "full"], output=tmp_path / "m", method="tall-mask", alpha=0.5)
    with pytest.raises(RecipeError, match="has no rank"):
        hf_tsv.merge([zoo / "full"], output=tmp_path / "m", method="tall-mask", rank=2)


def test_the_description_names_base_and_task(zoo: Path, merged: Path) -> None:
    said = json.loads((merged / "masks" / "full" / CONFIG_FILE).read_text())
    assert said["base_model"] == {"ref": "base", "revision": None}
    assert said["task"] == "full" and said["mask_scale"] == SCALE
