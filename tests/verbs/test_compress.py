"""Compressing, reconstructing and merging from factors, end to end, as API and command line."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from cli import copied, ended, hf_tsv, hf_tsv_process, refused
from deep import deep_checkpoints, relative_error, state
from forks import fork
from hub import Hub
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_tsv as api
from hf_tsv import CheckpointError, HfTsvError, OutputError, RecipeError
from hf_tsv.compression import measuring
from hf_tsv.compression.candidates import Candidate, Measured
from hf_tsv.compression.measuring import energy_curves
from hf_tsv.linalg.svd import SVD, truncated_svd
from hf_tsv.linalg.updates import TaskSingularVectors, dense
from hf_tsv.recipes.compressing import Options, RankRule
from hf_tsv.runs.target import Target
from hf_tsv.system.text import human_bytes
from hf_tsv.verbs.compress import run

FC1 = "vision_model.encoder.layers.0.mlp.fc1.weight"


def compress(zoo: Path, kind: str, output: Path | None = None, **options: Any) -> api.TaskFactors:
    return api.compress(zoo / kind, base_model=zoo / "base", output=output, **options)


def tail(delta: Tensor, rank: int) -> float:
    """Norm of what the leading triplets leave out, in float64."""
    sigma = torch.linalg.svdvals(delta.double())
    return float(sigma[rank:].norm())


# Rank rules


@pytest.mark.parametrize(
    ("rule", "rank"),
    [({"rank_fraction": 0.2}, 6), ({"rank": 5}, 5), ({}, 3), ({"rank_fraction": 0.01}, 1)],
)
def test_share_and_number_of_triplets(zoo: Path, rule: dict[str, Any], rank: int) -> None:
    factors = compress(zoo, "vision", **rule)
    update = factors.update(FC1)
    assert isinstance(update, TaskSingularVectors)
    assert update.rank == rank == factors.report.weights[FC1]["rank"]  # type: ignore[union-attr]


def test_energy_keeps_the_smallest_rank_that_has_it(zoo: Path) -> None:
    factors = compress(zoo, "vision", energy=0.5)
    base, tuned = state(zoo / "base"), state(zoo / "vision")
    checked = 0
    for name, weight in factors.config.weights.items():
        if weight.stored != "factors":
            continue
        sigma = torch.linalg.svdvals(tuned[name].double() - base[name].double())
        shares = sigma.square().cumsum(0) / sigma.square().sum()
        assert weight.rank == int((shares < 0.5).sum()) + 1, name
        assert weight.energy == pytest.approx(float(shares[weight.rank - 1]), rel=1e-6)
        checked += 1
    assert checked == 13


def test_energy_that_no_smaller_file_has_is_stored_whole(zoo: Path) -> None:
    factors = compress(zoo, "vision", energy=0.99)
    assert {weight.stored for weight in factors.config.weights.values()} == {"dense"}
    assert factors.config.update_error == 0.0


@pytest.mark.parametrize("budget", ["45%", "70%", 60_000, "50kB"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_budget_is_kept_and_nearly_spent(zoo: Path, budget: str | int, dtype: str) -> None:
    factors = compress(zoo, "vision", budget=budget, dtype=dtype)
    report = factors.report
    assert report is not None and report.factors_bytes is not None
    allowed = {"45%": 0.45 * report.checkpoint_bytes, "70%": 0.7 * report.checkpoint_bytes}
    allowed |= {"50kB": 50_000}
    limit = allowed.get(str(budget), budget)
    whole = sum(w.bytes for w in factors.config.weights.values() if w.stored == "dense")
    smallest_step = (32 + 1 + 32) * torch.finfo(getattr(torch, dtype)).bits // 8
    assert report.factors_bytes <= limit  # type: ignore[operator]
    everything = all(w.stored == "dense" for w in factors.config.weights.values())
    assert everything or report.factors_bytes > limit - 2 * smallest_step, whole  # type: ignore[operator]


def test_a_budget_has_a_smaller_error_than_equal_shares_of_the_same_size(zoo: Path) -> None:
    equal = compress(zoo, "vision", rank=5)
    best = compress(zoo, "vision", budget=equal.config.factors_bytes)
    assert best.config.factors_bytes <= equal.config.factors_bytes
    assert best.config.update_error < equal.config.update_error


def test_a_budget_below_what_is_stored_whole_says_what_it_needs(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"budget is 1\.9 kB.*alone takes 28\.0 kB") as error:
        compress(zoo, "vision", tmp_path / "out", budget="2%")
    assert "`compress_conv=True`" in str(error.value)
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir()) == []


# What is stored


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_stored_bytes_follow_the_formula_to_the_byte(zoo: Path, tmp_path: Path, dtype: str) -> None:
    """r (d_out + 1 + d_in) per matrix and everything else whole, headers aside."""
    report = compress(zoo, "full", tmp_path / "out", rank=4, dtype=dtype).report
    assert report is not None
    size = getattr(torch, dtype).itemsize
    expected = 0
    for tensor in state(zoo / "full").values():
        whole = tensor.numel()
        if tensor.ndim == 2:
            whole = min(whole, 4 * (tensor.shape[0] + 1 + tensor.shape[1]))
        expected += whole * size
    file = tmp_path / "out" / "task_factors.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert report.factors_bytes == expected == file.stat().st_size - header
    assert report.output_bytes == file.stat().st_size
    assert report.checkpoint_bytes == 4 * sum(t.numel() for t in state(zoo / "full").values())
    assert report.ratio == report.factors_bytes / report.checkpoint_bytes
    assert report.ratio_for_tasks["8"] == (report.base_bytes + 8 * expected) / (
        8 * report.checkpoint_bytes
    )


def test_the_truncation_is_the_best_of_its_rank(zoo: Path) -> None:
    factors = compress(zoo, "vision", rank=5)
    base, tuned = state(zoo / "base"), state(zoo / "vision")
    for name, weight in factors.config.weights.items():
        delta = tuned[name].double() - base[name].double()
        update = factors.update(name)
        assert update is not None
        error = float((dense(update) - delta).norm())
        if weight.stored == "factors":
            assert error == pytest.approx(tail(delta, 5), rel=1e-5), name
        else:
            assert error < 1e-6 * float(delta.norm()), name


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_update_error_is_the_real_one(zoo: Path, dtype: str) -> None:
    factors = compress(zoo, "vision", rank_fraction=0.3, dtype=dtype)
    base, tuned = state(zoo / "base"), state(zoo / "vision")
    lost = total = 0.0
    for name in factors.config.weights:
        delta = tuned[name].double() - base[name].double()
        update = factors.update(name)
        assert update is not None
        lost += float((dense(update) - delta).square().sum())
        total += float(delta.square().sum())
    assert factors.config.update_error == pytest.approx(math.sqrt(lost / total), rel=1e-4)


def test_lora_updates_keep_their_own_rank(tmp_path: Path) -> None:
    """A rank-2 update saved in bfloat16 gets two triplets, whatever the rule would allow."""
    base = clips.make_base(tmp_path / "base", dtype=torch.bfloat16)
    tuned = state(base)
    name = "vision_model.encoder.layers.0.self_attn.q_proj.weight"
    generator = torch.Generator().manual_seed(1)
    lora = clips.update(tuned[name].shape, generator, rank=2) * 20
    tuned[name] = (tuned[name].float() + lora).to(torch.bfloat16)
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "config.json").write_bytes((base / "config.json").read_bytes())
    save_file(tuned, tmp_path / "task" / "model.safetensors", metadata={"format": "pt"})
    factors = api.compress(tmp_path / "task", base_model=base, rank=10)
    assert factors.config.weights[name].rank == factors.config.weights[name].numerical_rank == 2
    others = (weight for n, weight in factors.config.weights.items() if n != name)
    assert {weight.stored for weight in others} == {"none"}


def test_values_too_large_for_float16_are_refused(zoo: Path, tmp_path: Path) -> None:
    bad = copied(zoo / "vision", tmp_path / "bad")
    tuned = load_file(bad / "model.safetensors")
    tuned["vision_model.post_layernorm.bias"] += 1e5
    save_file(tuned, bad / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"post_layernorm\.bias does not fit into float16"):
        api.compress(
            bad, base_model=zoo / "base", dtype="float16", output=tmp_path / "out",
            allow_other_base=True,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_shards_and_a_single_file_hold_the_same(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "vision", tmp_path / "one")
    compress(zoo, "vision", tmp_path / "many", max_shard_size="10KB")
    shards = sorted((tmp_path / "many").glob("task_factors-*.safetensors"))
    assert len(shards) > 1
    held = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    single = load_file(tmp_path / "one" / "task_factors.safetensors")
    assert held.keys() == single.keys()
    assert all(torch.equal(held[name], tensor) for name, tensor in single.items())


def test_compressing_twice_gives_the_same_bytes(zoo: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        compress(zoo, "full", tmp_path / name, budget="60%")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes(), file.name


def test_factors_without_a_folder_live_as_long_as_they_are_used(zoo: Path, tmp_path: Path) -> None:
    factors = compress(zoo, "vision")
    assert factors.report is not None and factors.report.output is None
    folder = Path(factors.pinned.ref)
    factors.save_pretrained(tmp_path / "kept")
    assert folder.exists()
    del factors
    assert not folder.exists()
    assert api.TaskFactors.from_pretrained(tmp_path / "kept").update(FC1) is not None


# Reconstruction


@pytest.mark.parametrize("kind", clips.KINDS)
def test_reconstruct_gives_the_base_with_the_truncated_update(
    zoo: Path, tmp_path: Path, kind: str
) -> None:
    compress(zoo, kind, tmp_path / "factors", rank=6)
    api.reconstruct(tmp_path / "factors", output=tmp_path / "full")
    base, full = state(zoo / "base"), state(tmp_path / "full")
    prefix = "vision_model." if kind == "flat" else ""
    tuned = state(zoo / kind, prefix)
    assert full.keys() == base.keys() | tuned.keys()
    for name, tensor in full.items():
        if name not in tuned:
            assert torch.equal(tensor, base[name]), name
            continue
        if name not in base:
            assert torch.equal(tensor, tuned[name]), name
            continue
        delta = tuned[name].double() - base[name].double()
        if delta.ndim == 2 and 6 * (sum(delta.shape) + 1) < delta.numel():
            U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
            delta = (U[:, :6] * S[:6]) @ Vh[:6]
        expected = base[name].double() + delta
        torch.testing.assert_close(tensor.double(), expected, rtol=0, atol=3e-7)


@pytest.mark.parametrize(
    ("dtype", "eps"), [("float32", 2**-24), ("float16", 2**-11), ("bfloat16", 2**-8)]
)
def test_reconstruct_is_exact_to_the_rounding_of_the_factors(
    zoo: Path, tmp_path: Path, dtype: str, eps: float
) -> None:
    """Three factors of a triplet are rounded, and a fixed number of triplets is summed."""
    exact = compress(zoo, "vision", rank=6)
    compress(zoo, "vision", tmp_path / "factors", rank=6, dtype=dtype)
    api.reconstruct(tmp_path / "factors", output=tmp_path / "full")
    full, base = state(tmp_path / "full"), state(zoo / "base")
    for name in exact.config.weights:
        update = exact.update(name)
        assert update is not None
        wanted = dense(update)
        found = full[name].double() - base[name].double()
        rounding = 4 * eps * float(wanted.norm()) + 2**-24 * float(base[name].norm()) + 1e-7
        assert float((found - wanted).norm()) < rounding, name


def test_reconstruct_at_full_rank_is_the_fine_tune(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "full", tmp_path / "factors", rank_fraction=1.0)
    api.reconstruct(tmp_path / "factors", output=tmp_path / "full")
    full = state(tmp_path / "full")
    for name, tensor in state(zoo / "full").items():
        torch.testing.assert_close(full[name], tensor, rtol=2e-7, atol=1e-9)


def test_a_task_head_comes_back_with_its_class_and_labels(zoo: Path, tmp_path: Path) -> None:
    from transformers import CLIPForImageClassification

    compress(zoo, "classifier", tmp_path / "factors", rank_fraction=1.0)
    api.reconstruct(tmp_path / "factors", output=tmp_path / "full", dtype="float32")
    ours = clips.load(CLIPForImageClassification, tmp_path / "full")
    theirs = clips.load(CLIPForImageClassification, zoo / "classifier")
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, expected = ours(pixels).logits, theirs(pixels).logits
    assert ours.config.id2label == theirs.config.id2label and found.shape == (2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_reconstruct_refuses_another_base_and_writes_nothing(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "vision", tmp_path / "factors")
    other = clips.make_base(tmp_path / "other", seed=7)
    with pytest.raises(CheckpointError, match=r"belongs to the base model .*base, and .* differs"):
        api.reconstruct(tmp_path / "factors", base_model=other, output=tmp_path / "full")
    assert not (tmp_path / "full").exists()


def test_the_same_base_elsewhere_is_accepted(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "vision", tmp_path / "factors")
    moved = copied(zoo / "base", tmp_path / "moved")
    api.reconstruct(tmp_path / "factors", base_model=moved, output=tmp_path / "full")
    assert (tmp_path / "full" / "model.safetensors").is_file()


def test_a_base_folder_that_is_gone_is_named(zoo: Path, tmp_path: Path) -> None:
    base = copied(zoo / "base", tmp_path / "gone")
    api.compress(zoo / "vision", base_model=base, output=tmp_path / "factors")
    base.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"gone, which is not here.*`base_model=REF`"):
        api.reconstruct(tmp_path / "factors", output=tmp_path / "full")


def test_memory_does_not_grow_with_depth(tmp_path: Path) -> None:
    """Peak resident memory of compress and reconstruct by the kernel's count, 2 and 24 layers."""
    peaks: dict[int, int] = {}
    for layers in (2, 24):
        folder = tmp_path / str(layers)
        deep_checkpoints(folder, layers)
        code = f"""
import hf_tsv
hf_tsv.compress({str(folder / "t1")!r}, base_model={str(folder / "base")!r},
                rank_fraction=0.3, output={str(folder / "factors")!r})
hf_tsv.reconstruct({str(folder / "factors")!r}, output={str(folder / "full")!r})
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""
        peaks[layers] = int(ended(fork("-c", code)).out) * 1024
    grown_files = (tmp_path / "24" / "base" / "model.safetensors").stat().st_size * 11 / 12
    assert 3 * grown_files > 190e6
    assert peaks[24] - peaks[2] < 60e6, peaks


# Merging from factors


@pytest.mark.parametrize("method", ["tsv", "low-rank", "task-arithmetic", "average"])
def test_factors_of_enough_rank_merge_like_their_originals(
    zoo: Path, tmp_path: Path, method: str
) -> None:
    kinds = ("vision", "flat", "full", "classifier")
    options: dict[str, Any] = {"base_model": zoo / "base", "method": method}
    rank = {"rank_fraction": 0.25} if method in ("tsv", "low-rank") else {"rank_fraction": 1.0}
    for kind in kinds[:3]:
        compress(zoo, kind, tmp_path / kind, **rank)
    mixed = [*(tmp_path / kind for kind in kinds[:3]), zoo / "classifier"]
    report = api.merge(mixed, output=tmp_path / "mixed", **options)
    api.merge([zoo / kind for kind in kinds], output=tmp_path / "whole", **options)
    base = state(zoo / "base")
    found, expected = state(tmp_path / "mixed"), state(tmp_path / "whole")
    # The text projection is averaged, so its truncation shows: too little of one to warn of it.
    assert report.warnings == []
    for name, w0 in base.items():
        if name == "text_projection.weight" and method in ("tsv", "low-rank"):
            continue
        change = expected[name].double() - w0.double()
        if change.norm():
            assert relative_error(found[name].double() - w0.double(), change) < 2e-5, name
        else:
            assert torch.equal(found[name], w0), name


def test_stacked_attention_of_factors_is_that_of_their_originals(tmp_path: Path) -> None:
    """One of them left some keys as they were; both are of rank 2, so their factors are whole."""
    lora_zoo(tmp_path / "zoo")
    zoo = tmp_path / "zoo"
    tuned, base = state(zoo / "a"), state(zoo / "base")
    tuned |= {name: tensor for name, tensor in base.items() if "0.self_attn.k_proj" in name}
    save_file(tuned, zoo / "a" / "model.safetensors", metadata={"format": "pt"})
    for name in "ab":
        factors = compress(zoo, name, tmp_path / name, rank=4)
        assert {w.stored for w in factors.config.weights.values()} == {"factors", "none"}
    options: dict[str, Any] = {"base_model": zoo / "base", "qkv": "fused"}
    api.merge([tmp_path / "a", tmp_path / "b"], output=tmp_path / "x", **options)
    api.merge([zoo / "a", zoo / "b"], output=tmp_path / "y", **options)
    other = state(tmp_path / "y")
    for name, tensor in state(tmp_path / "x").items():
        torch.testing.assert_close(tensor, other[name], rtol=0, atol=2e-7)
        assert name not in base or "text" in name or tensor.shape == base[name].shape


@pytest.fixture(scope="module")
def lora_zoos(tmp_path_factory: pytest.TempPathFactory) -> dict[torch.dtype, Path]:
    """Those below, by their dtype."""
    folder = tmp_path_factory.mktemp("lora")
    return {d: lora_zoo(folder / str(d), d) for d in (torch.float32, torch.bfloat16)}


def lora_zoo(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A base and two fine-tunes of rank 2, `a` and `b`, saved in a dtype."""
    clips.make_base(folder / "base", dtype=dtype)
    base = state(folder / "base")
    for seed, name in enumerate("ab"):
        copied(folder / "base", folder / name)
        g = torch.Generator().manual_seed(seed)
        tuned = {
            n: (t.float() + clips.update(t.shape, g, rank=2)).to(dtype)
            if n.startswith("vision_model") and n.endswith("weight") and t.ndim == 2
            else t
            for n, t in base.items()
        }
        save_file(tuned, folder / name / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    "rule",
    [
        {"rank_fraction": 1.0},
        {"budget": "100%"},
        {"budget": "60%"},
        {"rank": 16},
        {"energy": 0.999},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_rank_updates_cost_and_merge_by_their_own_rank(
    lora_zoos: dict[torch.dtype, Path], tmp_path: Path, dtype: torch.dtype, rule: dict[str, Any]
) -> None:
    """Rounding of the stored checkpoints is neither kept nor, in a merge, amplified."""
    zoo = lora_zoos[dtype]
    for name in "ab":
        factors = compress(zoo, name, tmp_path / name, **rule)
        changed = [w for w in factors.config.weights.values() if w.norm]
        assert {(w.stored, w.rank) for w in changed} == {("factors", 2)}
    api.merge([tmp_path / name for name in "ab"], output=tmp_path / "x", dtype="float32")
    api.merge([zoo / name for name in "ab"], base_model=zoo / "base", output=tmp_path / "y",
              dtype="float32")  # fmt: skip
    base, found, expected = (state(f) for f in (zoo / "base", tmp_path / "x", tmp_path / "y"))
    for name, tensor in expected.items():
        change = tensor.double() - base[name].double()
        if change.norm():
            assert relative_error(found[name].double() - base[name].double(), change) < 1e-4, name


def test_the_rounding_in_updates_stored_whole_is_no_direction_of_the_task(tmp_path: Path) -> None:
    """As a writer may store them: dense, rounding and all."""
    zoo = lora_zoo(tmp_path / "zoo", torch.bfloat16)
    for name in "ab":
        compress(zoo, name, tmp_path / name, rank=2)
        folder = tmp_path / name
        config = json.loads((folder / "tsv_config.json").read_text())
        base, tuned = state(zoo / "base"), state(zoo / name)
        tensors = {}
        for weight, entry in config["weights"].items():
            if entry["stored"] == "factors":
                delta = tuned[weight].float() - base[weight].float()
                tensors[f"{weight}.delta"] = delta
                entry |= {"stored": "dense", "rank": 0, "energy": 1.0, "bytes": delta.nbytes}
        config["factors_bytes"] = sum(t.nbytes for t in tensors.values())
        (folder / "tsv_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "task_factors.safetensors")
    report = api.merge([tmp_path / name for name in "ab"], output=tmp_path / "out")
    ranks = {tuple(w["ranks"]) for w in report.treatments.values() if "ranks" in w}
    assert ranks == {(2, 2)}


def test_factors_need_no_decomposition(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_tsv.methods import tsv

    decomposed = tsv.truncated_svds
    for kind in ("vision", "flat"):
        compress(zoo, kind, tmp_path / kind, rank=5)
    seen: list[Tensor] = []

    def noting(matrices: Sequence[Tensor], *args: Any, **kwargs: Any) -> Any:
        seen.extend(matrices)
        return decomposed(matrices, *args, **kwargs)

    monkeypatch.setattr(tsv, "truncated_svds", noting)
    api.merge([tmp_path / "vision", tmp_path / "flat"], output=tmp_path / "out", rank=4)
    assert seen == []
    api.merge([zoo / "vision", tmp_path / "flat"], output=tmp_path / "mixed", rank=4)
    assert seen


def test_too_small_factors_merge_with_a_warning_that_says_what_is_missing(
    zoo: Path, tmp_path: Path
) -> None:
    factors = compress(zoo, "vision", tmp_path / "small", rank=4)
    report = api.merge([tmp_path / "small", zoo / "flat"], output=tmp_path / "out", rank=8)
    weights = factors.config.weights.values()
    lost = sum((1 - w.energy) * w.norm**2 for w in weights) / sum(w.norm**2 for w in weights)
    (warning,) = report.warnings
    assert f"{100 * lost:.2g}% of the energy of its update is missing" in warning
    assert f"than this merge uses: {tmp_path / 'small'} (" in warning


def test_too_small_factors_are_told_in_one_line(zoo: Path, tmp_path: Path) -> None:
    folders = [tmp_path / kind for kind in ("vision", "flat")]
    for folder in folders:
        compress(zoo, folder.name, folder, rank=4)
    (warning,) = api.merge(folders, output=tmp_path / "out", rank=8).warnings
    assert all(str(folder) in warning for folder in folders)
    assert re.search(r"\([\d.]+% of the energy of its update is missing\), .*flat", warning)
    assert re.search(r"flat \([\d.]+%\)\. Compress with", warning)


def test_weights_scale_factors_too(zoo: Path, tmp_path: Path) -> None:
    for kind in ("vision", "flat"):
        compress(zoo, kind, tmp_path / kind, rank=5)
    found = {}
    for source in (tmp_path, zoo):
        output = tmp_path / f"out-{source.name}"
        api.merge(
            [source / "vision", source / "flat"], base_model=zoo / "base", output=output,
            weights=[0.5, -2.0], rank=5,
        )  # fmt: skip
        found[source] = state(output)
    for name, tensor in found[zoo].items():
        torch.testing.assert_close(found[tmp_path][name], tensor, rtol=0, atol=2e-7)


def test_factors_given_twice_or_beside_their_original_are_named(tmp_path: Path) -> None:
    zoo = lora_zoo(tmp_path / "zoo")
    compress(zoo, "a", tmp_path / "factors", rank=4)
    report = api.merge([tmp_path / "factors", zoo / "a"], base_model=zoo / "base",
                       output=tmp_path / "out")  # fmt: skip
    assert "are the same update, which is merged once" in report.warnings[0]


def test_a_recipe_with_factors_repeats_to_the_byte_and_notices_a_change(
    zoo: Path, tmp_path: Path
) -> None:
    compress(zoo, "vision", tmp_path / "factors", rank=5)
    api.merge([tmp_path / "factors", zoo / "flat"], output=tmp_path / "out", rank=5)
    api.merge(recipe=tmp_path / "out", output=tmp_path / "again")
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    compress(zoo, "vision", tmp_path / "factors", rank=6, force=True)
    with pytest.raises(CheckpointError, match="factors has changed since the recipe was written"):
        api.merge(recipe=tmp_path / "out", output=tmp_path / "third")


def test_factors_are_no_base_model(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "vision", tmp_path / "factors")
    with pytest.raises(CheckpointError, match=r"base model .*factors holds task factors"):
        api.merge([zoo / "flat"], base_model=tmp_path / "factors", output=tmp_path / "out")


# A LoRA adapter for PEFT


def outputs(model: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(2, 3, 32, 32, generator=generator)
    tokens = torch.tensor([[256, 5, 7, 257], [256, 9, 2, 257]])
    with torch.no_grad():
        if type(model).__name__ == "CLIPModel" or "CLIPModel" in repr(type(model)):
            both = model(pixel_values=pixels, input_ids=tokens)
            return {"image": both.image_embeds, "text": both.text_embeds}
        return {"pooled": model(pixel_values=pixels).pooler_output}


def with_adapter(base: Path, adapter: Path, model_class: str) -> Any:
    import transformers
    from peft import PeftModel

    model = clips.load(getattr(transformers, model_class), base)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape.*lora_B.bias")
@pytest.mark.parametrize(
    ("kind", "model_class"), [("vision", "CLIPVisionModel"), ("full", "CLIPModel")]
)
def test_a_full_rank_adapter_computes_what_the_fine_tune_does(
    zoo: Path, tmp_path: Path, kind: str, model_class: str
) -> None:
    import transformers

    report = api.export_peft(
        zoo / kind, base_model=zoo / "base", output=tmp_path / "lora", rank_fraction=1.0
    )
    found = outputs(with_adapter(zoo / "base", tmp_path / "lora", model_class))
    base = outputs(clips.load(getattr(transformers, model_class), zoo / "base"))
    for name, expected in outputs(
        clips.load(getattr(transformers, model_class), zoo / kind)
    ).items():
        torch.testing.assert_close(found[name], expected, rtol=0, atol=2e-5)
        assert float((base[name] - expected).norm()) > 1e-3, name
    assert report.left_out == (["logit_scale"] if kind == "full" else [])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    assert report.factors_bytes == sum(t.nbytes for t in load_file(file).values())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape.*lora_B.bias")
@pytest.mark.parametrize(("dtype", "rank"), [("float32", 5), ("bfloat16", 5), ("bfloat16", 32)])
def test_a_truncated_adapter_holds_the_truncated_updates(
    zoo: Path, tmp_path: Path, dtype: str, rank: int
) -> None:
    report = api.export_peft(
        zoo / "vision", base_model=zoo / "base", output=tmp_path / "lora", rank=rank,
        dtype=dtype,
    )  # fmt: skip
    stored = load_file(tmp_path / "lora" / "adapter_model.safetensors").values()
    assert report.factors_bytes == sum(tensor.nbytes for tensor in stored)
    assert report.factors_bytes == sum(weight["bytes"] for weight in report.weights.values())
    merged = with_adapter(zoo / "base", tmp_path / "lora", "CLIPVisionModel").state_dict()
    base, tuned = state(zoo / "base"), state(zoo / "vision")
    lost = total = 0.0
    for name, tensor in merged.items():
        full_name = f"vision_model.{name}"
        delta = tuned[full_name].double() - base[full_name].double()
        error = float((tensor.double() - tuned[full_name].double()).norm())
        if report.weights[full_name]["stored"] == "factors" and rank == 5:
            assert error == pytest.approx(tail(delta, 5), rel=1e-3), name
        else:
            assert error < 2e-2 * float(delta.norm()), name
        lost, total = lost + error**2, total + float(delta.square().sum())
    assert report.update_error == pytest.approx(math.sqrt(lost / total), rel=1e-3)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_weights_only_adapter_reports_what_it_leaves_out(zoo: Path, tmp_path: Path) -> None:
    report = api.export_peft(
        zoo / "vision", base_model=zoo / "base", output=tmp_path / "lora", rank_fraction=1.0,
        dense=False,
    )  # fmt: skip
    keys = load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    assert len(keys) == 24 and all("lora_A" in key or "lora_B.weight" in key for key in keys)
    base, tuned = state(zoo / "base"), state(zoo / "vision")
    missing = [n for n in tuned if f"base_model.model.{n[13:-7]}.lora_A.weight" not in keys]
    assert sorted(report.left_out) == sorted(missing)
    squares = {n: float((tuned[n] - base[n]).double().square().sum()) for n in tuned}
    left = math.sqrt(sum(squares[n] for n in missing) / sum(squares.values()))
    assert report.update_error == pytest.approx(left, rel=1e-4)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape.*lora_B.bias")
def test_an_adapter_can_be_made_for_another_class(zoo: Path, tmp_path: Path) -> None:
    api.export_peft(
        zoo / "flat", base_model=zoo / "base", output=tmp_path / "lora", rank_fraction=1.0,
        model_class="CLIPModel",
    )  # fmt: skip
    found = outputs(with_adapter(zoo / "base", tmp_path / "lora", "CLIPModel"))
    expected = outputs(api.load_model(zoo / "flat", kind="zero-shot-image-classification",
                                      base_model=zoo / "base"))  # fmt: skip
    torch.testing.assert_close(found["image"], expected["image"], rtol=0, atol=2e-5)
    torch.testing.assert_close(found["text"], expected["text"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("model_class", ["CLIPModel", "CLIPTextModel"])
def test_a_budget_for_an_adapter_is_kept_and_nearly_spent(
    zoo: Path, tmp_path: Path, dense: bool, model_class: str
) -> None:
    options: dict[str, Any] = {
        "base_model": zoo / "base", "dense": dense, "model_class": model_class,
    }  # fmt: skip
    most = api.export_peft(zoo / "full", output=tmp_path / "most", rank=99, **options)
    assert most.factors_bytes is not None
    budget = int(0.8 * most.factors_bytes)
    report = api.export_peft(zoo / "full", output=tmp_path / "lora", budget=budget, **options)
    assert report.factors_bytes is not None
    largest = (64 + 32) * 4
    assert budget - 2 * largest < report.factors_bytes <= budget
    file = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    assert report.factors_bytes == sum(tensor.nbytes for tensor in file.values())


def test_a_budget_that_holds_no_more_than_what_has_no_rank(zoo: Path, tmp_path: Path) -> None:
    """Biases need a pair beside them, so one triplet of every matrix is always there."""
    options: dict[str, Any] = {"base_model": zoo / "base"}
    least = api.export_peft(zoo / "vision", output=tmp_path / "least", rank=1, **options)
    assert least.factors_bytes is not None
    report = api.export_peft(
        zoo / "vision", output=tmp_path / "lora", budget=least.factors_bytes, **options
    )
    assert report.factors_bytes == least.factors_bytes
    assert report.update_error == pytest.approx(least.update_error, rel=1e-6)
    with pytest.raises(RecipeError, match="alone takes"):
        api.export_peft(
            zoo / "vision", output=tmp_path / "x", budget=least.factors_bytes - 1, **options
        )


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape.*lora_B.bias")
@pytest.mark.parametrize("model_class", ["CLIPTextModel", "CLIPVisionModel"])
def test_an_adapter_of_one_tower_reports_the_other_as_left_out(
    zoo: Path, tmp_path: Path, model_class: str
) -> None:
    report = api.export_peft(
        zoo / "full", base_model=zoo / "base", output=tmp_path / "lora", rank=32,
        model_class=model_class,
    )  # fmt: skip
    base, tuned = state(zoo / "base"), state(zoo / "full")
    part = "text_model." if model_class == "CLIPTextModel" else "vision_model."
    squares = {n: float((tuned[n] - base[n]).double().square().sum()) for n in report.weights}
    outside = sum(square for name, square in squares.items() if not name.startswith(part))
    assert report.update_error == pytest.approx(
        math.sqrt(outside / sum(squares.values())), rel=1e-4
    )
    stored = {name for name, weight in report.weights.items() if weight["stored"] != "none"}
    assert stored == {name for name in report.weights if name.startswith(part)}
    assert set(report.left_out) == report.weights.keys() - stored


# The command line and the Hub


def test_compress_push_reconstruct_and_merge_through_the_hub(world: Path, hub: Hub) -> None:
    for kind in ("vision", "flat"):
        done = hf_tsv(
            "compress", f"org/{kind}", "--rank-fraction", "0.35", "--push-to", f"me/{kind}-tsv",
            "--json", cwd=world,
        )  # fmt: skip
        assert done.code == 0, done.err
        files = hub.files(f"me/{kind}-tsv")
        assert {name for name in files if not name.startswith(".")} == {
            "README.md", "config.json", "task_factors.safetensors", "tsv_config.json"
        }  # fmt: skip
        report = done.json
        keys = {"factors_bytes", "checkpoint_bytes", "ratio", "update_error", "weights"}
        assert keys <= report.keys()
        assert report["output_bytes"] == len(files["task_factors.safetensors"])
        assert report["url"].startswith(f"{hub.endpoint}/me/{kind}-tsv/commit/")
    sha = hub.repos["org/base"].branches["main"]
    config = json.loads(hub.files("me/flat-tsv")["tsv_config.json"])
    assert config["base_model"]["ref"] == "org/base" and config["base_model"]["revision"] == sha
    assert config["source"]["license"] == "mit"
    hub.commit("org/base", {"notes.txt": b"main has moved on"})

    done = hf_tsv_process("reconstruct", "me/vision-tsv", "-o", "full", "--json", cwd=world)
    assert done.code == 0, done.err
    assert done.json["base_model"] == {"ref": "org/base", "revision": sha}
    assert (world / "full" / "model.safetensors").is_file()

    mixed = ["me/vision-tsv", "me/flat-tsv", "org/full"]
    done = hf_tsv("merge", *mixed, "--push-to", "me/merged", "--json", cwd=world)
    assert done.code == 0, done.err
    assert done.json["inputs"][0]["ref"] == "me/vision-tsv"
    assert "model.safetensors" in hub.files("me/merged")
    again = hf_tsv_process("merge", *mixed, "-o", "off", cwd=world, HF_HUB_OFFLINE="1")
    assert again.code == 0, again.err


def test_merging_factors_does_not_download_their_checkpoints(world: Path, hub: Hub) -> None:
    for kind in ("vision", "flat"):
        api.compress(f"org/{kind}", rank=4).push_to_hub(f"me/{kind}-tsv")
    hub.requests.clear()
    api.merge(["me/vision-tsv", "me/flat-tsv"], output=world / "out", rank=4)
    assert not [r for r in hub.requests if "org/vision" in r.path or "org/flat" in r.path]


def snippet_of(card: str, language: str = "python") -> str:
    return card.split(f"```{language}\n")[1].split("```", maxsplit=1)[0]


def names_after(code: str) -> dict[str, Any]:
    """What a script has at its end; the photo it may read is in the folder it runs in."""
    Image.new("RGB", (50, 40)).save("photo.jpg")
    names: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        exec(code, names)
    return names


def test_the_snippets_of_the_card_of_factors_run(
    world: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = hf_tsv_process("compress", "org/vision", "--push-to", "me/vision-tsv", cwd=world)
    assert done.code == 0, done.err
    card = hub.files("me/vision-tsv")["README.md"].decode()
    blocks = [block.split("```")[0] for block in card.split("```python\n")[1:]]
    assert len(blocks) == 2
    monkeypatch.chdir(world)
    assert type(names_after("\n".join(blocks))["model"]).__name__ == "CLIPModel"
    made_with = snippet_of(card.split("## Made with")[1], "bash").replace("\\\n", " ").split()
    again = hf_tsv(*made_with[1:], cwd=world)
    assert again.code == 0, again.err
    stored = (world / "compressed" / "task_factors.safetensors").read_bytes()
    assert stored == hub.files("me/vision-tsv")["task_factors.safetensors"]


def test_the_snippet_of_the_card_of_an_adapter_runs_without_hf_tsv(world: Path, hub: Hub) -> None:
    done = hf_tsv("compress", "org/full", "--out-format", "peft", "--push-to", "me/lora", cwd=world)
    assert done.code == 0, done.err
    assert "Changed, but not in the adapter: logit_scale" in done.err
    files = hub.files("me/lora")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    code = "import sys; sys.modules['hf_tsv'] = None\n" + snippet_of(files["README.md"].decode())
    code += "\nassert type(merged).__name__ == 'CLIPModel'"
    Image.new("RGB", (50, 40)).save(world / "photo.jpg")
    ran = ended(fork("-c", code, cwd=world, freezing=True))
    assert ran.code == 0, ran.err
    assert "a photo of a dog" in ran.out


def test_an_adapter_of_one_tower_is_applied_as_its_card_says_and_not_by_auto_model(
    world: Path, hub: Hub
) -> None:
    api.export_peft("org/flat", push_to="me/lora")
    card = hub.files("me/lora")["README.md"].decode()
    assert "On `CLIPModel` or `AutoModel` the adapter has\n**no effect**" in card
    code = f"""
{snippet_of(card)}
import torch
from transformers import AutoModel, CLIPVisionModel

pixels = inputs["pixel_values"]
base = CLIPVisionModel.from_pretrained("org/base")(pixels).pooler_output
ignored = AutoModel.from_pretrained("me/lora").vision_model(pixels).pooler_output
assert torch.equal(ignored, base)
assert not torch.allclose(merged(pixels).pooler_output, base, atol=1e-3)
"""
    Image.new("RGB", (50, 40)).save(world / "photo.jpg")
    ran = ended(fork("-c", code, cwd=world, freezing=True))
    assert ran.code == 0, ran.err


def test_the_snippet_of_the_card_of_a_reconstruction_runs(
    world: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.compress("org/vision", push_to="me/vision-tsv")
    done = hf_tsv("reconstruct", "me/vision-tsv", "--push-to", "me/again", cwd=world)
    assert done.code == 0, done.err
    monkeypatch.chdir(world)
    assert "model" in names_after(snippet_of(hub.files("me/again")["README.md"].decode()))


def test_dry_runs_write_nothing_and_bound_the_size(world: Path, hub: Hub) -> None:
    done = hf_tsv("compress", "org/vision", "--rank", "4", "--dry-run", "--json", cwd=world)
    assert done.code == 0, done.err
    assert list(world.iterdir()) == [] and not (Path(os.environ["HF_HOME"]) / "hub").exists()
    real = api.compress("org/vision", rank=4)
    assert done.json["factors_bytes"] == real.config.factors_bytes
    assert done.json["dry_run"] and done.json["update_error"] is None
    text = hf_tsv("compress", "org/vision", "--energy", "0.9", "--dry-run", cwd=world)
    assert "depends on the weights" in text.out, text.err
    api.compress("org/vision", push_to="me/vision-tsv")
    done = hf_tsv("reconstruct", "me/vision-tsv", "--dry-run", cwd=world)
    assert "factors" in done.out and done.code == 0 and list(world.iterdir()) == []


def test_quiet_prints_the_result_only(world: Path) -> None:
    done = hf_tsv("compress", "org/vision", "-o", "factors", "--quiet", cwd=world)
    assert (done.code, done.out, done.err) == (0, f"{world / 'factors'}\n", "")
    done = hf_tsv("reconstruct", "factors", "-o", "full", "--quiet", cwd=world)
    assert (done.code, done.out, done.err) == (0, f"{world / 'full'}\n", "")


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["org/nope"], ["org/nope does not exist"]),
        (["org/vision", "--budget", "1kB"], ["The budget is 1.0 kB", "28.0 kB"]),
    ],
    ids=lambda value: "-".join(value)[:50] if isinstance(value, list) else str(value),
)
def test_bad_arguments_of_compress(
    world: Path, hub: Hub, args: list[str], parts: list[str]
) -> None:
    refused(hf_tsv("compress", *args, "-o", "out", cwd=world), world, hub, *parts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank_fraction": 1.5}, r"`rank_fraction=` must be above 0 and at most 1 \(got 1\.5\)"),
        ({"energy": 0.0}, "`energy=` must be above 0"),
        ({"rank": 0}, "`rank=` must be at least 1"),
        ({"budget": "lots"}, "`budget=`: invalid size 'lots'.*10%.*35MB"),
        ({"dtype": "int8"}, "dtype=` cannot be 'int8'"),
        ({"max_shard_size": "big"}, "`max_shard_size=`: invalid size 'big'"),
        ({"base_model": "vision"}, "vision equals the base model"),
        ({"out_format": "peft", "model_class": "Bert"}, "no CLIP class 'Bert'"),
        ({"out_format": "peft", "model_class": "CLIPTextModel"}, "LoRA adapter"),
    ],
    ids=str,
)
def test_bad_choices_are_refused_and_write_nothing(
    zoo: Path, tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    compress_or_export: Any = api.compress
    if options.get("out_format") == "peft":
        compress_or_export = api.export_peft
    options = {name: value for name, value in options.items() if name != "out_format"}
    base = zoo / options.pop("base_model", "base")
    with pytest.raises(HfTsvError, match=said) as error:
        compress_or_export(zoo / "vision", base_model=base, output=tmp_path / "out", **options)
    assert error.value.hint or "must be" in error.value.message
    assert list(tmp_path.iterdir()) == []


def test_bad_input_of_reconstruct(world: Path, hub: Hub, zoo: Path) -> None:
    def run(*args: str | Path) -> Any:
        return hf_tsv("reconstruct", *args, "-o", "out", cwd=world)

    refused(run("org/vision"), world, hub, "org/vision is a checkpoint, not task factors")
    refused(run("org/nope"), world, hub, "org/nope does not exist")
    api.export_peft(zoo / "vision", base_model=zoo / "base", output=world / "lora")
    refused(run("lora"), world, hub, "lora is a PEFT adapter")
    api.compress(zoo / "vision", base_model=zoo / "base", output=world / "factors")
    refused(run("factors", "--base-model", "org/full"), world, hub, "factors belongs to")
    config = json.loads((world / "factors" / "tsv_config.json").read_text())
    config["format_version"] = 2
    (world / "factors" / "tsv_config.json").write_text(json.dumps(config))
    refused(run("factors"), world, hub, "format version 2", "Update hf-tsv")


def test_factors_are_not_compressed_again(world: Path, hub: Hub, zoo: Path) -> None:
    api.compress(zoo / "vision", base_model=zoo / "base", output=world / "factors")
    done = hf_tsv("compress", "factors", "-o", "out", cwd=world)
    refused(done, world, hub, "factors holds task factors already")


def test_an_upload_never_replaces_what_it_was_made_from(world: Path, hub: Hub) -> None:
    hub.add_repo("me/clip", dict(hub.files("org/vision")))
    done = hf_tsv("compress", "me/clip", "--push-to", "me/clip", cwd=world)
    refused(done, world, hub, "Pushing to me/clip would replace the input me/clip", "--revision")
    done = hf_tsv("compress", "me/clip", "--push-to", "me/clip", "--revision", "tsv", cwd=world)
    assert done.code == 0, done.err
    assert "task_factors.safetensors" in hub.files("me/clip", "tsv")
    assert "model.safetensors" in hub.files("me/clip")


def test_an_upload_never_replaces_the_commit_it_was_made_from(world: Path, hub: Hub) -> None:
    hub.add_repo("me/clip", hub.files("org/vision"))
    sha = hub.repos["me/clip"].branches["main"]
    with pytest.raises(OutputError, match="would replace the input"):
        api.compress(f"me/clip@{sha}", push_to="me/clip")
    factors = api.compress("me/clip", rank=2)
    with pytest.raises(OutputError, match="would replace the input"):
        factors.push_to_hub("me/clip")
    assert "model.safetensors" in hub.files("me/clip")
    factors.push_to_hub("me/clip", revision="tsv")
    assert "task_factors.safetensors" in hub.files("me/clip", "tsv")


def test_an_upload_says_whose_weights_it_replaces(
    world: Path, hub: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    hub.add_repo("me/other", hub.files("org/flat"))
    api.compress("org/vision", rank=2, push_to="me/other")
    replaced = [r.getMessage() for r in caplog.records if "replaces" in r.getMessage()]
    assert replaced == [
        "The upload replaces model.safetensors of me/other; earlier commits keep them."
    ]
    api.compress("org/vision", rank=3, push_to="me/other")
    assert sum("replaces" in r.getMessage() for r in caplog.records) == 1


def test_force_replaces_whatever_hf_tsv_wrote(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "vision", tmp_path / "factors", rank=2)
    out = tmp_path / "out"
    for _ in range(2):
        api.reconstruct(tmp_path / "factors", output=out, force=True)
        api.merge([zoo / "flat"], base_model=zoo / "base", output=out, force=True)
        compress(zoo, "flat", out, rank=2, force=True)
    with pytest.raises(OutputError, match="was not written by hf-tsv"):
        compress(zoo, "vision", zoo / "flat", force=True)


def test_an_input_behind_a_link_is_not_replaced(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "vision", tmp_path / "out", rank=2)
    copied(zoo / "vision", tmp_path / "out" / "real")
    (tmp_path / "linked").mkdir()
    for file in (tmp_path / "out" / "real").iterdir():
        (tmp_path / "linked" / file.name).symlink_to(file)
    with pytest.raises(OutputError, match="would replace the input"):
        api.compress(
            tmp_path / "linked", base_model=zoo / "base", output=tmp_path / "out", force=True
        )
    assert (tmp_path / "out" / "real" / "model.safetensors").is_file()


def test_a_reconstruction_says_what_it_was_made_of(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "classifier", tmp_path / "factors", rank=2)
    api.reconstruct(tmp_path / "factors", output=tmp_path / "full")
    said = json.loads((tmp_path / "full" / "hf_tsv_reconstruction.json").read_text())
    assert (said["factors"]["ref"], said["source"]["ref"]) == ("factors", "classifier")
    assert not (tmp_path / "full" / "hf_tsv_recipe.yaml").exists()
    with pytest.raises(RecipeError, match="hf_tsv_recipe"):
        api.merge(recipe=tmp_path / "full", output=tmp_path / "again")


@pytest.mark.parametrize("verb", ["compress", "merge"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_updates_too_large_for_their_arithmetic_are_named(
    zoo: Path, tmp_path: Path, dtype: torch.dtype, verb: str
) -> None:
    copied(zoo / "vision", tmp_path / "huge")
    tensors = state(tmp_path / "huge")
    tensors[FC1] = tensors[FC1].to(dtype)
    tensors[FC1][3, 4] = 3e38 if dtype == torch.float32 else 1e200
    save_file(tensors, tmp_path / "huge" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"huge: {FC1} differs from the base model by more"):
        getattr(api, verb)(tmp_path / "huge", base_model=zoo / "base", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_result_larger_than_the_checkpoint_is_a_warning(zoo: Path, tmp_path: Path) -> None:
    clips.make_base(tmp_path / "base", dtype=torch.bfloat16)
    clips.make_fine_tune(tmp_path / "base", tmp_path / "tuned", 1, "full")
    report = api.compress(tmp_path / "tuned", base_model=tmp_path / "base", energy=1.0).report
    assert report is not None
    (warning,) = report.warnings
    assert "200% of the checkpoint's size" in warning and "bfloat16" in warning


@pytest.mark.parametrize("kind", ["vision", "classifier"])
@pytest.mark.parametrize(
    "options",
    [
        {"budget": "100%"},
        {"budget": "70%"},
        {"rank": 4},
        {"rank_fraction": 1.0, "dtype": "bfloat16"},
        {"out_format": "peft", "rank": 5},
        {"out_format": "peft", "rank": 5, "dtype": "bfloat16"},
        {"out_format": "peft", "budget": "70%"},
        {"out_format": "peft", "rank": 5, "dense": False},
    ],
    ids=str,
)
def test_a_dry_run_never_promises_less_than_is_written(
    zoo: Path, tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    rules = {"rank", "rank_fraction", "budget"} & options.keys()
    others = {name: value for name, value in options.items() if name not in rules}
    wanted = Options(RankRule(**{name: options[name] for name in rules}), **others)
    target = Target(tmp_path / "x")
    dry, real = (
        run(str(zoo / kind), str(zoo / "base"), wanted, target, dry_run=dry)
        for dry in (True, False)
    )
    assert dry.factors_bytes is not None and real.factors_bytes is not None
    assert dry.factors_bytes >= real.factors_bytes > 0
    if not options.get("dense", True):
        kinds = {n: w["stored"] for n, w in dry.weights.items()}
        assert {n for n, k in kinds.items() if k == "none"} == set(real.left_out) - {
            "classifier.weight", "classifier.bias",
        }  # fmt: skip


def test_the_output_is_never_an_input(zoo: Path, tmp_path: Path) -> None:
    compress(zoo, "vision", tmp_path / "factors")
    (tmp_path / "hf_tsv_recipe.yaml").touch()
    with pytest.raises(OutputError, match="would replace the input"):
        api.reconstruct(tmp_path / "factors", output=tmp_path, force=True)


def test_a_failed_upload_of_factors_keeps_them(world: Path, hub: Hub) -> None:
    hub.fail("/api/models/me/abc/commit/", 403, times=99)
    with pytest.raises(api.RepoError, match="The result is complete in") as error:
        api.compress("org/vision", push_to="me/abc")
    folder = Path(str(error.value).split("complete in ")[1].split(". Upload it")[0])
    assert (folder / "task_factors.safetensors").is_file()


# The report on the card


def kept_rows(card: str) -> dict[str, list[str]]:
    """Rows of the table of kinds, by kind."""
    section = card.split("## What is kept, by kind of layer")[1].split("\n## ", maxsplit=1)[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.mark.parametrize("flags", [[], ["--out-format", "peft"]], ids=["factors", "peft"])
def test_the_card_says_what_is_kept_of_which_layer(
    zoo: Path, tmp_path: Path, flags: list[str]
) -> None:
    tuned = ("--base-model", zoo / "base", "--budget", "60%")
    for name, more in (("plain", []), ("told", ["--report"])):
        done = hf_tsv("compress", zoo / "vision", *tuned, *flags, *more, "-o", tmp_path / name)
        assert done.code == 0, done.err
    (file,) = (tmp_path / "told").glob("*.safetensors")
    assert file.read_bytes() == (tmp_path / "plain" / file.name).read_bytes()
    card = (tmp_path / "told" / "README.md").read_text()
    assert "](compression.png)" in card and "\n\n\n" not in card
    assert (tmp_path / "told" / "compression.png").read_bytes().startswith(b"\x89PNG")
    assert "by kind of layer" not in (tmp_path / "plain" / "README.md").read_text()
    assert not (tmp_path / "plain" / "compression.png").exists()
    weights = json.loads((tmp_path / "told" / "tsv_config.json").read_text())["weights"]
    changed = {n: w for n, w in weights.items() if w["norm"]}
    rows = kept_rows(card)
    assert sum(int(row[0]) for row in rows.values()) == len(changed)
    attention = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")]
    assert list(rows)[:6] == [*attention, "mlp.fc1", "mlp.fc2"]
    fc1 = [w for n, w in changed.items() if n.endswith("mlp.fc1.weight")]
    count, ranks, energy, size = rows["mlp.fc1"]
    kept = [w["rank"] for w in fc1 if w["rank"]]
    said = str(kept[0]) if len(set(kept)) == 1 else f"{min(kept)} to {max(kept)}"
    assert int(count) == len(fc1) and ranks.startswith(said)
    share = sum(w["energy"] * w["norm"] ** 2 for w in fc1) / sum(w["norm"] ** 2 for w in fc1)
    assert energy == f"{100 * share:.1f}%"
    assert size == human_bytes(sum(w["bytes"] for w in fc1))


def test_what_is_not_kept_is_in_the_table(zoo: Path, tmp_path: Path) -> None:
    done = hf_tsv("compress", zoo / "full", "--base-model", zoo / "base", "--rank", "2",
                  "--out-format", "peft", "--no-dense", "--report",
                  "-o", tmp_path / "out")  # fmt: skip
    assert done.code == 0, done.err
    rows = kept_rows((tmp_path / "out" / "README.md").read_text())
    assert rows["token_embedding"][1:3] == ["1 not kept", "0.0%"]
    assert "not kept" in rows["all others"][1]


def test_a_copy_of_factors_keeps_the_picture(zoo: Path, tmp_path: Path) -> None:
    factors = compress(zoo, "vision", rank=4, report=True)
    factors.save_pretrained(tmp_path / "copy")
    assert "](compression.png)" in (tmp_path / "copy" / "README.md").read_text()
    assert (tmp_path / "copy" / "compression.png").read_bytes().startswith(b"\x89PNG")


def test_energy_curves_are_the_spectra(zoo: Path) -> None:
    """Against float64 singular values, all weights of a kind together."""
    base, tuned = state(zoo / "base"), state(zoo / "vision")
    names = [n for n in base if n.startswith("vision_model.") and n.endswith("mlp.fc1.weight")]
    sigmas = [torch.linalg.svdvals(tuned[n].double() - base[n].double()) for n in names]
    k = len(sigmas[0])
    measured = [
        Measured(Candidate(n, tuple(base[n].shape), torch.float32, 0, 0, None), "",
                 float(s.norm()), s[:known], 8)
        for n, s, known in zip(names, sigmas, (8, 11), strict=True)
    ]  # fmt: skip
    ((kind, (at, energy)),) = energy_curves(measured).items()
    assert kind == "mlp.fc1" and (at[0], at[-1]) == (0.0, 8 / k)
    total = sum(float(s.square().sum()) for s in sigmas)
    for rank in (0, 4, 8):
        expected = sum(float(s[:rank].square().sum()) for s in sigmas) / total
        assert energy[at.index(rank / k)] == pytest.approx(expected, rel=1e-9)


def test_weights_are_decomposed_side_by_side(zoo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Biases between them, which are not decomposed, keep no thread from working."""
    two, met = threading.Barrier(2, timeout=20), []

    def decompose(*arguments: Any, **options: Any) -> SVD:
        if not met:
            with contextlib.suppress(threading.BrokenBarrierError):
                two.wait()
                met.append(True)
        return truncated_svd(*arguments, **options)

    monkeypatch.setattr(measuring, "truncated_svd", decompose)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        compress(zoo, "vision")
    finally:
        torch.set_num_threads(threads)
    assert met
