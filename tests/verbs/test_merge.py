"""Merging end to end: real checkpoints in, a loadable checkpoint out, checked against float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from cli import ended
from deep import deep_checkpoints, relative_error, state
from forks import fork
from hub import Hub
from safetensors.torch import save_file
from torch import Tensor

import hf_tsv
from hf_tsv import CheckpointError, MergeReport, OutputError, RecipeError
from hf_tsv.merging import work


def tsv_update(deltas: list[Tensor], rank: int) -> Tensor:
    """TSV-M of one weight in float64, from the equations."""
    factors = [torch.linalg.svd(delta.double(), full_matrices=False) for delta in deltas]
    U = torch.cat([u[:, :rank] for u, _, _ in factors], dim=1)
    S = torch.cat([s[:rank] for _, s, _ in factors])
    V = torch.cat([vh[:rank] for _, _, vh in factors])
    P, _, Qh = torch.linalg.svd(U, full_matrices=False)
    R, _, Wh = torch.linalg.svd(V, full_matrices=False)
    return (P @ Qh * S) @ (R @ Wh)


def names(zoo: Path, *kinds: str) -> list[str]:
    return [str(zoo / kind) for kind in kinds]


def merge_zoo(zoo: Path, output: Path, *kinds: str, **options: object) -> MergeReport:
    return hf_tsv.merge(names(zoo, *kinds), base_model=str(zoo / "base"), output=output, **options)  # type: ignore[arg-type]


def test_every_matrix_of_the_result_is_the_float64_tsv_merge(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "vision", "flat", "projection")
    base, merged = state(zoo / "base"), state(tmp_path / "out")
    tasks = [state(zoo / "vision"), state(zoo / "flat", "vision_model."), state(zoo / "projection")]
    checked = 0
    for name, w0 in base.items():
        if not name.startswith("vision_model."):
            assert torch.equal(merged[name], w0), name
            continue
        deltas = [task[name].double() - w0.double() for task in tasks]
        if w0.ndim == 2:
            expected = tsv_update(deltas, min(w0.shape) // 3)
        else:
            expected = torch.stack(deltas).mean(0)
        # The update is read back from float32 weights about 100 times its size.
        assert relative_error(merged[name].double() - w0.double(), expected) < 1e-4, name
        checked += 1
    assert checked == 39


@pytest.mark.parametrize("method", ["low-rank", "orthogonal", "task-arithmetic", "average"])
def test_ablations_and_baselines_follow_their_definition(
    zoo: Path, tmp_path: Path, method: str
) -> None:
    merge_zoo(zoo, tmp_path / "out", "full", "text", method=method, alpha=0.5)
    base, merged = state(zoo / "base"), state(tmp_path / "out")
    tasks = [state(zoo / "full"), base | state(zoo / "text")]
    for name in (n for n in base if n.startswith("text_")):
        w0 = base[name].double()
        deltas = [task[name].double() - w0 for task in tasks]
        mean, total = sum(deltas) / 2, sum(deltas)
        expected = {"task-arithmetic": total, "average": mean}.get(method, mean)
        if name == "text_projection.weight":
            pass  # averaged by the default exclusion; a sum decomposes nothing anyway
        elif w0.ndim == 2 and method == "orthogonal":
            expected = tsv_update(deltas, min(w0.shape))
        elif w0.ndim == 2 and method == "low-rank":
            rank = min(w0.shape) // 2
            parts = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
            expected = sum((u[:, :rank] * s[:rank]) @ vh[:rank] for u, s, vh in parts)
        assert isinstance(expected, Tensor)
        assert relative_error(merged[name].double() - w0, 0.5 * expected) < 1e-4, name


def test_one_checkpoint_comes_back_as_it_was(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "full", exclude=[])
    merged = state(tmp_path / "out")
    for name, tensor in state(zoo / "full").items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=1e-9)


def test_whitening_and_procrustes_give_the_same_weights(zoo: Path, tmp_path: Path) -> None:
    for solver in ("procrustes", "whitening"):
        merge_zoo(zoo, tmp_path / solver, "vision", "flat", orthogonalizer=solver)
    other = state(tmp_path / "whitening")
    for name, tensor in state(tmp_path / "procrustes").items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-7)


def test_the_order_of_checkpoints_does_not_matter(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "ab", "vision", "flat", "full")
    merge_zoo(zoo, tmp_path / "ba", "full", "vision", "flat")
    other = state(tmp_path / "ba")
    for name, tensor in state(tmp_path / "ab").items():
        torch.testing.assert_close(other[name], tensor, rtol=0, atol=1e-7)


def test_weights_scale_the_update_of_their_task(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "vision", "flat", weights=[0.5, 0], method="task-arithmetic",
              alpha=1)  # fmt: skip
    base, task, merged = state(zoo / "base"), state(zoo / "vision"), state(tmp_path / "out")
    for name, tensor in task.items():
        expected = base[name] + 0.5 * (tensor - base[name])
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-7)


def test_fused_attention_decomposes_the_stack(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "vision", "projection", qkv="fused")
    base, merged = state(zoo / "base"), state(tmp_path / "out")
    tasks = [state(zoo / "vision"), state(zoo / "projection")]
    stack = [f"vision_model.encoder.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]

    def stacked(tensors: dict[str, Tensor]) -> Tensor:
        return torch.cat([tensors[name] for name in stack]).double()

    expected = tsv_update([stacked(t) - stacked(base) for t in tasks], 16)
    assert relative_error(stacked(merged) - stacked(base), expected) < 1e-4


def test_excluded_weights_are_averaged(zoo: Path, tmp_path: Path) -> None:
    report = merge_zoo(zoo, tmp_path / "out", "full", "vision", exclude=["*.mlp.*", "text_pro*"])
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    base, merged = state(zoo / "base"), state(tmp_path / "out")
    tasks = [state(zoo / "full"), state(zoo / "vision")]
    expected = sum(t[name].double() for t in tasks) / 2 - base[name].double()
    assert relative_error(merged[name].double() - base[name].double(), expected) < 1e-4
    assert without_seconds(report.treatments[name]) == {
        "treatment": "averaged", "reason": "excluded"
    }  # fmt: skip


def test_the_text_projection_is_averaged_unless_told_otherwise(zoo: Path, tmp_path: Path) -> None:
    report = merge_zoo(zoo, tmp_path / "a", "full", "text")
    assert report.treatments["text_projection.weight"]["treatment"] == "averaged"
    report = merge_zoo(zoo, tmp_path / "b", "full", "text", exclude=[])
    assert report.treatments["text_projection.weight"]["treatment"] == "decomposed"


def test_more_tasks_than_directions_are_averaged_and_reported(zoo: Path, tmp_path: Path) -> None:
    tasks = [clips.make_fine_tune(zoo / "base", tmp_path / f"t{i}", 50 + i) for i in range(18)]
    report = hf_tsv.merge(
        [str(t) for t in tasks], base_model=str(zoo / "base"), output=tmp_path / "out"
    )
    name = "vision_model.embeddings.position_embedding.weight"  # 17 x 32
    assert without_seconds(report.treatments[name]) == {
        "treatment": "averaged",
        "reason": "18 tasks do not fit into 17 directions",
    }
    base, merged = state(zoo / "base"), state(tmp_path / "out")
    expected = sum(state(t)[name].double() for t in tasks) / 18 - base[name].double()
    assert relative_error(merged[name].double() - base[name].double(), expected) < 1e-4


def test_frozen_weights_are_copied_bit_for_bit(zoo: Path, tmp_path: Path) -> None:
    """A CLIPModel whose text tower was not trained: nothing of it is decomposed."""
    for i in (1, 2):
        folder = tmp_path / f"t{i}"
        tuned = clips.fine_tuned_state(zoo / "base", i)
        folder.mkdir()
        (folder / "config.json").write_bytes((zoo / "base" / "config.json").read_bytes())
        save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
    report = hf_tsv.merge(
        [str(tmp_path / "t1"), str(tmp_path / "t2")],
        base_model=str(zoo / "base"),
        output=tmp_path / "out",
    )
    assert report.weights == {"decomposed": 13, "averaged": 26, "copied": 39}
    merged = state(tmp_path / "out")
    for name, tensor in state(zoo / "base").items():
        assert name.startswith("vision_model.") or torch.equal(merged[name], tensor)


def test_lora_updates_keep_their_own_rank(zoo: Path, tmp_path: Path) -> None:
    """Rank-2 updates saved in bfloat16: the rounding noise of the files is not merged."""
    base = clips.make_base(tmp_path / "base", dtype=torch.bfloat16)
    for i in (1, 2):
        generator = torch.Generator().manual_seed(i)
        tuned = state(base)
        for name, w in tuned.items():
            if name.startswith("vision_model.") and name.endswith("q_proj.weight"):
                lora = clips.update(w.shape, generator, rank=2) * 20
                tuned[name] = (w.float() + lora).to(w.dtype)
        folder = tmp_path / f"t{i}"
        folder.mkdir()
        (folder / "config.json").write_bytes((base / "config.json").read_bytes())
        save_file(tuned, folder / "model.safetensors", metadata={"format": "pt"})
    report = hf_tsv.merge(
        [str(tmp_path / "t1"), str(tmp_path / "t2")], base_model=str(base), output=tmp_path / "out"
    )
    ranks = [e["ranks"] for e in report.treatments.values() if e["treatment"] == "decomposed"]
    assert ranks == [[2, 2], [2, 2]]


@pytest.mark.parametrize("sign", [1, -1])
def test_equal_and_opposite_updates_stay_finite_and_are_named(
    zoo: Path, tmp_path: Path, sign: int
) -> None:
    base, tuned = state(zoo / "base"), state(zoo / "vision")
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_bytes((zoo / "vision" / "config.json").read_bytes())
    mirrored = {
        n: (base[n].double() + sign * (t.double() - base[n].double())).float()
        for n, t in tuned.items()
    }
    save_file(mirrored, other / "model.safetensors", metadata={"format": "pt"})
    report = hf_tsv.merge(
        [str(zoo / "vision"), str(other)], base_model=str(zoo / "base"), output=tmp_path / "out"
    )
    word = "the same update, which is merged once" if sign == 1 else "opposite updates and cancel"
    assert any(word in w and "other" in w and "vision" in w for w in report.warnings)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    update = state(tmp_path / "out")[name].double() - base[name].double()
    delta = tuned[name].double() - base[name].double()
    expected = tsv_update([delta], 16) if sign == 1 else torch.zeros_like(delta)
    assert float((update - expected).norm() / delta.norm()) < 1e-3


def test_half_precision_checkpoints_are_merged_in_float32_and_written_as_the_base(
    zoo: Path, tmp_path: Path
) -> None:
    base = clips.make_base(tmp_path / "base", dtype=torch.float16)
    tasks = [clips.make_fine_tune(base, tmp_path / f"t{i}", i) for i in (1, 2)]
    refs = [str(t) for t in tasks]
    hf_tsv.merge(refs, base_model=str(base), output=tmp_path / "out")
    hf_tsv.merge(refs, base_model=str(base), output=tmp_path / "single", dtype="float32")
    half, single = state(tmp_path / "out"), state(tmp_path / "single")
    assert {t.dtype for t in half.values()} == {torch.float16}
    assert {t.dtype for t in single.values()} == {torch.float32}
    assert all(torch.equal(half[n], single[n].half()) for n in half)
    for folder, dtype in ((tmp_path / "out", "float16"), (tmp_path / "single", "float32")):
        assert json.loads((folder / "config.json").read_text())["dtype"] == dtype


def test_integer_buffers_of_old_checkpoints_are_copied(zoo: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for file in (zoo / "base").iterdir():
        (base / file.name).write_bytes(file.read_bytes())
    tensors = state(zoo / "base")
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    hf_tsv.merge([str(zoo / "vision")], base_model=str(base), output=tmp_path / "out")
    merged = state(tmp_path / "out")
    assert torch.equal(merged["vision_model.embeddings.position_ids"], torch.arange(17)[None])


def test_the_result_loads_in_transformers_and_classifies(zoo: Path, tmp_path: Path) -> None:
    """In a process that cannot import hf-tsv."""
    merge_zoo(zoo, tmp_path / "out", "vision", "flat", "classifier", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    code = f"""
import sys
sys.modules["hf_tsv"] = None
import numpy
from PIL import Image
from transformers import CLIPModel, pipeline
model, info = CLIPModel.from_pretrained({str(tmp_path / "out")!r}, output_loading_info=True)
assert not any(info.values()), info
pipe = pipeline("zero-shot-image-classification", model={str(tmp_path / "out")!r})
image = Image.fromarray(numpy.zeros((40, 50, 3), dtype="uint8"))
answer = pipe(image, candidate_labels=["a cat", "a dog"])
assert {{a["label"] for a in answer}} == {{"a cat", "a dog"}}, answer
"""
    done = ended(fork("-c", code, freezing=True))
    assert done.code == 0, done.err


def test_a_vision_only_base_gives_a_vision_model(zoo: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    hf_tsv.merge([str(zoo / "flat")], base_model=str(zoo / "vision"), output=tmp_path / "out")
    model, info = clips.load(CLIPVisionModel, tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    expected = clips.load(CLIPVisionModel, zoo / "flat").state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-7)


def test_task_heads_are_left_out_and_reported(zoo: Path, tmp_path: Path) -> None:
    report = merge_zoo(zoo, tmp_path / "out", "vision", "classifier")
    assert report.left_out == {str(zoo / "classifier"): ["classifier.bias", "classifier.weight"]}
    assert "classifier.weight" not in state(tmp_path / "out")
    assert "`classifier.weight`" in (tmp_path / "out" / "README.md").read_text()


def test_the_recipe_makes_the_same_bytes_again(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "vision", "flat", alpha=0.7, weights=[1, 0.5], rank=3,
              qkv="fused", max_shard_size="60KB")  # fmt: skip
    hf_tsv.merge(recipe=tmp_path / "out" / "hf_tsv_recipe.yaml", output=tmp_path / "again")
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "again").iterdir())
    for name in files:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_recipe_notices_a_folder_that_changed(zoo: Path, tmp_path: Path) -> None:
    task = clips.make_fine_tune(zoo / "base", tmp_path / "task", 77)
    hf_tsv.merge(
        [str(task), str(zoo / "flat")], base_model=str(zoo / "base"), output=tmp_path / "o"
    )
    tensors = state(task)
    tensors["vision_model.post_layernorm.bias"][3] += 1e-3
    save_file(tensors, task / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="task has changed since the recipe was written"):
        hf_tsv.merge(recipe=tmp_path / "o", output=tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_choice_beside_a_recipe_replaces_its_own(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "vision")
    hf_tsv.merge(recipe=tmp_path / "out", alpha=2.0, output=tmp_path / "again")
    assert hf_tsv.Recipe.load(tmp_path / "again").settings.alpha == 2.0


def test_output_files_have_ordinary_permissions_and_metadata(zoo: Path, tmp_path: Path) -> None:
    from safetensors import safe_open

    previous = os.umask(0o027)
    try:
        merge_zoo(zoo, tmp_path / "out", "vision")
    finally:
        os.umask(previous)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o640}
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_force_does_not_replace_an_input(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "vision")
    inside = tmp_path / "out" / "task"
    (zoo / "flat").rename(inside)
    try:
        for task in (tmp_path / "out", inside):
            with pytest.raises(OutputError, match="would replace the input"):
                hf_tsv.merge(task, base_model=zoo / "base", output=tmp_path / "out", force=True)
    finally:
        inside.rename(zoo / "flat")


def test_a_recipe_does_not_take_a_repository_for_a_folder(
    hub: Hub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    task = clips.make_fine_tune(zoo / "base", tmp_path / "mine" / "clip", 5)
    hf_tsv.merge("mine/clip", base_model=zoo / "base", output="out")
    task.rename(tmp_path / "moved")
    hub.add_repo("mine/clip", zoo / "vision")
    with pytest.raises(RecipeError, match="local folder clip, which is not here"):
        hf_tsv.merge(recipe="out", output="again")


def test_a_recipe_of_another_device_warns(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "vision")
    recipe = tmp_path / "out" / "hf_tsv_recipe.yaml"
    recipe.write_text(recipe.read_text().replace("device: cpu", "device: cuda"))
    report = hf_tsv.merge(recipe=recipe, output=tmp_path / "again")
    assert any("made on cuda and this is cpu" in warning for warning in report.warnings)


def test_numpy_numbers_paths_and_single_names_are_taken(zoo: Path, tmp_path: Path) -> None:
    import numpy

    report = hf_tsv.merge(
        zoo / "vision", base_model=zoo / "base", output=tmp_path / "out",
        alpha=numpy.float64(0.5), weights=[numpy.float32(1)], exclude="*.mlp.*",
    )  # fmt: skip
    assert report.treatments["vision_model.encoder.layers.0.mlp.fc1.weight"]["reason"] == "excluded"
    assert report.weights["decomposed"] > 0
    assert "alpha: 0.5\n" in (tmp_path / "out" / "hf_tsv_recipe.yaml").read_text()


@pytest.mark.parametrize("weights", [[0, 0], [float("nan"), 1], ["a", 1]])
def test_weights_that_mean_nothing_are_refused(
    zoo: Path, tmp_path: Path, weights: list[float]
) -> None:
    with pytest.raises(RecipeError, match="weight"):
        merge_zoo(zoo, tmp_path / "out", "vision", "flat", weights=weights)


def without_seconds(entry: dict[str, Any]) -> dict[str, Any]:
    """What a report says of a weight, without the times."""
    return {key: value for key, value in entry.items() if key != "seconds"}


def test_a_failed_run_leaves_no_parent_folders(zoo: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    tensors = state(zoo / "vision")
    tensors["vision_model.post_layernorm.bias"][0] = torch.nan
    bad.mkdir()
    (bad / "config.json").write_bytes((zoo / "vision" / "config.json").read_bytes())
    save_file(tensors, bad / "model.safetensors")
    with pytest.raises(CheckpointError, match="NaN or Inf"):
        hf_tsv.merge([bad, zoo / "flat"], base_model=zoo / "base", output=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_force_replaces_an_earlier_output_and_nothing_else(zoo: Path, tmp_path: Path) -> None:
    merge_zoo(zoo, tmp_path / "out", "vision")
    (tmp_path / "out" / "stale").touch()
    with pytest.raises(OutputError, match="exists"):
        merge_zoo(zoo, tmp_path / "out", "flat")
    merge_zoo(zoo, tmp_path / "out", "flat", force=True)
    assert not (tmp_path / "out" / "stale").exists()
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "chapter1.tex").touch()
    with pytest.raises(OutputError, match="was not written by hf-tsv"):
        merge_zoo(zoo, foreign, "flat", force=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "thesis"]


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Peak resident memory by the kernel's own count, of 2 and of 24 layers."""
    peaks: dict[int, int] = {}
    for layers in (2, 24):
        folder = tmp_path / str(layers)
        deep_checkpoints(folder, layers)
        code = f"""
import hf_tsv
hf_tsv.merge([{str(folder / "t1")!r}, {str(folder / "t2")!r}], base_model={str(folder / "base")!r},
             output={str(folder / "out")!r}, exclude=["*.mlp.*", "*.[qkv]_proj.*"])
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
        done = ended(fork("-c", code))
        peaks[layers] = int(done.out) * 1024
    grown_files = (folder / "base" / "model.safetensors").stat().st_size * 11 / 12 * 4
    assert grown_files > 250e6
    assert peaks[24] - peaks[2] < 60e6, peaks


def test_peak_memory_is_bounded_by_the_largest_weight(tmp_path: Path) -> None:
    """Interpreter, libraries, and four times the largest weight of base and tasks; as foretold."""
    tasks = 16
    deep_checkpoints(tmp_path / "tiny", 1, 16)
    deep_checkpoints(tmp_path / "wide", 1, 512, tasks)
    peaks = {}
    for name, found in (("tiny", 2), ("wide", tasks)):
        inputs = [str(tmp_path / name / f"t{i + 1}") for i in range(found)]
        code = f"""
import hf_tsv, json, torch
torch.set_num_threads(2)
options = dict(base_model={str(tmp_path / name / "base")!r})
planned = hf_tsv.merge({inputs}, **options, dry_run=True).peak_memory_bytes
hf_tsv.merge({inputs}, **options, output={str(tmp_path / name / "out")!r})
peak = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0]
print(json.dumps([planned, int(peak) * 1024]))
"""
        peaks[name] = ended(fork("-c", code)).json
    largest = 4 * 512 * 2048
    (_, interpreter), (planned, peak) = peaks["tiny"], peaks["wide"]
    assert peak <= interpreter + 4 * (tasks + 1) * largest, peaks
    assert peak <= interpreter + planned + work.LIBRARIES, peaks


def test_dry_run_predicts_the_real_size_and_touches_nothing(
    hub: Hub, zoo: Path, tmp_path: Path
) -> None:
    hub.add_repo("org/base", zoo / "base")
    hub.add_repo("org/vision", zoo / "vision")
    cache = tmp_path / "cache"
    options = {"base_model": "org/base", "cache_dir": cache, "max_shard_size": "50KB"}
    os.chdir(tmp_path)
    plan = hf_tsv.merge(["org/vision"], dry_run=True, output="out", push_to="abc", **options)
    assert list(tmp_path.iterdir()) == []
    assert not any(r.method in ("POST", "PUT", "DELETE") for r in hub.requests)
    real = hf_tsv.merge(["org/vision"], output="out", **options)
    written = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert plan.output_bytes == real.output_bytes == written
    assert plan.download_bytes == real.download_bytes > 0
    assert plan.dry_run and plan.base_model["revision"] == real.base_model["revision"]
    assert hf_tsv.merge(["org/vision"], dry_run=True, **options).download_bytes == 0


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import hf_tsv, sys; assert 'torch' not in sys.modules; dir(hf_tsv); hf_tsv.__version__"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_exported_names() -> None:
    assert dir(hf_tsv) == [
        "Adaptation", "CheckpointError", "CompressReport", "DataError",
        "EvaluateReport", "EvaluationTask", "FindReport", "HfTsvError", "InspectReport",
        "InterferenceReport", "LostProcessError", "MergeReport", "OutputError", "PushReport",
        "Recipe", "RecipeError", "ReconstructReport", "RepoError", "RouteReport", "Search",
        "SweepReport", "TaskFactors", "TaskSwitcher", "__version__", "compress", "evaluate",
        "export_peft", "find", "inspect", "interference", "load_model", "merge", "pipeline", "push",
        "reconstruct", "route", "sweep", "tune",
    ]  # fmt: skip
    assert set(dir(hf_tsv)) - set(hf_tsv.__all__) == {"inspect", "pipeline"}  # names of others
    for name in dir(hf_tsv):
        assert getattr(hf_tsv, name) is not None
