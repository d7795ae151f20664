"""LoRA adapters of the real PEFT as fine-tunes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from adapters import KINDS, trained
from cli import hf_tsv as run
from hub import Hub
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.checkpoints.formats.adapters import open_adapter
from hf_tsv.checkpoints.formats.whole import open_checkpoint
from hf_tsv.checkpoints.opening import without_base
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.system.errors import CheckpointError


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_what_peft_makes_of_it(zoo: Path, tmp_path: Path, kind: str) -> None:
    expected = trained(zoo, tmp_path / "lora", kind)
    base = open_checkpoint(pin(parse(str(zoo / "base"))))
    found = open_adapter(pin(parse(str(tmp_path / "lora"))), lambda: base)
    before = load_file(zoo / "base" / "model.safetensors")
    changed = {n for n, w in expected.items() if n in before and not torch.equal(w, before[n])}
    assert changed and changed <= set(found.tensors)
    assert {name for name in found.tensors if found.parts(name)} >= changed
    for name in found.tensors:
        weight = found.weight(base.original([name]))
        assert torch.allclose(weight, expected[name], atol=1e-7), name


def test_adapters_and_checkpoints_merge_mixed(zoo: Path, tmp_path: Path) -> None:
    """As the merged checkpoint itself would; the rank is that of the adapter."""
    expected = trained(zoo, tmp_path / "lora", "plain")
    base = load_file(zoo / "base" / "model.safetensors")
    (tmp_path / "merged").mkdir()
    state = {name: expected.get(name, tensor).contiguous() for name, tensor in base.items()}
    save_file(state, tmp_path / "merged" / "model.safetensors", metadata={"format": "pt"})
    config = (zoo / "base" / "config.json").read_text()
    (tmp_path / "merged" / "config.json").write_text(config)
    found = {}
    for name in ("lora", "merged"):
        done = run("merge", tmp_path / name, zoo / "full", "--base-model", zoo / "base", "-o",
                   tmp_path / f"out-{name}", "--json")  # fmt: skip
        assert done.code == 0, done.err
        found[name] = load_file(tmp_path / f"out-{name}" / "model.safetensors")
        ranks = done.json["treatments"]["vision_model.encoder.layers.0.mlp.fc1.weight"]["ranks"]
        assert ranks[0] == 4
    for name, tensor in found["merged"].items():
        assert torch.allclose(found["lora"][name], tensor, atol=1e-7), name


@pytest.mark.parametrize("kind", ["plain", "rslora", "patterns"])
def test_its_own_triplets_are_used(zoo: Path, tmp_path: Path, kind: str) -> None:
    """From two small factorisations, and no more of them than it has."""
    expected = trained(zoo, tmp_path / "lora", kind)
    base = load_file(zoo / "base" / "model.safetensors")
    opened = open_checkpoint(pin(parse(str(zoo / "base"))))
    found = open_adapter(pin(parse(str(tmp_path / "lora"))), lambda: opened)
    for name, lora in found.loras.items():
        own = found.triplets(name)
        assert own is not None and own.rank == lora.A.shape[0]
        delta = (expected[name] - base[name]).double()
        assert float((own.matrix() - delta).norm() / delta.norm()) < 1e-4  # of float32 storage
        eye = torch.eye(own.rank, dtype=torch.float64)
        assert torch.allclose(own.U.T @ own.U, eye) and torch.allclose(own.Vh @ own.Vh.T, eye)
    for kind_of_none in ("dora", "convolution"):
        trained(zoo, tmp_path / kind_of_none, kind_of_none)
        other = open_adapter(pin(parse(str(tmp_path / kind_of_none))), lambda: opened)
        name = next(n for n in other.loras if "patch" in n or kind_of_none == "dora")
        assert other.triplets(name) is None


def test_an_adapter_is_compressed_and_measured(zoo: Path, tmp_path: Path) -> None:
    trained(zoo, tmp_path / "a", "vision", 1)
    trained(zoo, tmp_path / "b", "vision", 2)
    report = hf_tsv.compress(
        tmp_path / "a", base_model=zoo / "base", output=tmp_path / "f", rank=16, progress=False
    ).report
    assert report is not None and report.update_error is not None and report.update_error < 1e-4
    ranks = {w["rank"] for w in report.weights.values() if w["stored"] == "factors"}
    assert ranks == {4}
    found = hf_tsv.interference(
        [tmp_path / "a", tmp_path / "b"], base_model=zoo / "base", progress=False
    )
    assert found.total > 0 and not any("LoRA" in text for text in found.warnings)


def test_our_own_adapters_are_read_too(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.export_peft(
        zoo / "vision", base_model=zoo / "base", output=tmp_path / "lora", rank_fraction=1.0,
        progress=False,
    )  # fmt: skip
    base = open_checkpoint(pin(parse(str(zoo / "base"))))
    opened = open_adapter(pin(parse(str(tmp_path / "lora"))), lambda: base)
    tuned = load_file(zoo / "vision" / "model.safetensors")
    for name in opened.tensors:
        weight = opened.weight(base.original([name]))
        assert torch.allclose(weight, tuned[name], atol=1e-6), name


def test_from_the_hub_with_the_base_it_names(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    hub.add_repo("org/base", zoo / "base")
    for seed, name in enumerate("ab"):
        trained(zoo, tmp_path / name, "vision", seed)
        config = tmp_path / name / "adapter_config.json"
        text = config.read_text().replace(str(zoo / "base"), "org/base")
        config.write_text(text)
        (tmp_path / name / "README.md").unlink()
        hub.add_repo(f"org/lora-{name}", tmp_path / name)
    found = hf_tsv.inspect("org/lora-a", cache_dir=tmp_path / "cache")
    assert (found.kind, found.layout, found.base_model) == ("adapter", "peft", ["org/base"])
    done = run("merge", "org/lora-a", "org/lora-b", "-o", tmp_path / "m", cwd=tmp_path)
    assert done.code == 0, done.err
    again = run("merge", "--recipe", tmp_path / "m" / "hf_tsv_recipe.yaml", "-o", tmp_path / "n",
                cwd=tmp_path)  # fmt: skip
    assert again.code == 0, again.err
    first, second = (tmp_path / name / "model.safetensors" for name in "mn")
    assert first.read_bytes() == second.read_bytes()


def test_adapters_that_cannot_be_read_say_why(zoo: Path, tmp_path: Path) -> None:
    trained(zoo, tmp_path / "a", "vision")
    config = tmp_path / "a" / "adapter_config.json"
    plain = config.read_text()
    config.write_text(plain.replace('"LORA"', '"IA3"'))
    with pytest.raises(CheckpointError, match="no tensors of an adapter of type IA3"):
        open_adapter(pin(parse(str(tmp_path / "a"))), without_base)
    config.write_text(plain)
    other = clips.make_base(tmp_path / "other")
    state = load_file(other / "model.safetensors")
    save_file({n: t for n, t in state.items() if ".layers.1." not in n},
              other / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    done = run("merge", tmp_path / "a", "--base-model", other, "-o", tmp_path / "m")
    assert done.code == 1 and "is not in the base model" in done.err
    with pytest.raises(CheckpointError, match="is an adapter"):
        hf_tsv.load_model(tmp_path / "a", progress=False)
    as_base = run("merge", zoo / "vision", "--base-model", tmp_path / "a", "-o", tmp_path / "m")
    assert as_base.code == 1 and "is an adapter" in as_base.err
    weights = load_file(tmp_path / "a" / "adapter_model.safetensors")
    gone = "layers.0.self_attn.q_proj.lora_B"
    half = {name: tensor for name, tensor in weights.items() if gone not in name}
    save_file(half, tmp_path / "a" / "adapter_model.safetensors")
    done = run("merge", tmp_path / "a", "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "is missing" in done.err and not (tmp_path / "m").exists()


def test_attention_of_which_some_is_adapted_may_be_stacked(zoo: Path, tmp_path: Path) -> None:
    """q and v, as PEFT does by default, or v alone; the rest is the base's."""
    KINDS["v alone"] = ("CLIPVisionModel", {"target_modules": ["v_proj"]})
    for seed, kind in enumerate(("vision", "v alone")):
        expected = trained(zoo, tmp_path / "lora", kind, seed)
        out = tmp_path / f"out-{seed}"
        hf_tsv.merge(
            [tmp_path / "lora"], base_model=zoo / "base", output=out, qkv="fused", progress=False
        )
        found = load_file(out / "model.safetensors")
        for name, tensor in expected.items():
            if name in found:
                assert torch.allclose(found[name], tensor, atol=1e-6), (kind, name)
        for folder in (tmp_path / "lora", out):
            for file in folder.iterdir():
                file.unlink()


@pytest.mark.parametrize("kind", ["vision", "dora", "saved modules", "convolution", "plain"])
def test_factors_of_an_adapter_are_factors_like_others(
    zoo: Path, tmp_path: Path, kind: str
) -> None:
    expected = trained(zoo, tmp_path / "lora", kind)
    hf_tsv.compress(
        tmp_path / "lora", base_model=zoo / "base", output=tmp_path / "f", rank_fraction=1.0,
        compress_conv=True, progress=False,
    )  # fmt: skip
    hf_tsv.reconstruct(
        tmp_path / "f", base_model=zoo / "base", output=tmp_path / "r", progress=False
    )
    found = load_file(tmp_path / "r" / "model.safetensors")
    for name, tensor in expected.items():
        if name in found:
            assert torch.allclose(found[name], tensor, atol=1e-6), name
    hf_tsv.merge(
        [tmp_path / "f", zoo / "full"], base_model=zoo / "base", output=tmp_path / "m",
        progress=False,
    )  # fmt: skip


def test_damaged_adapters_are_refused_in_one_line(zoo: Path, tmp_path: Path) -> None:
    trained(zoo, tmp_path / "good", "dora")
    weights = load_file(tmp_path / "good" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "good" / "adapter_config.json").read_text())
    stem = "base_model.model.encoder.layers.0.self_attn.q_proj.lora_"
    A, B, magnitude = f"{stem}A.weight", f"{stem}B.weight", f"{stem}magnitude_vector"
    changes: list[tuple[dict[str, Any], dict[str, torch.Tensor]]] = [
        ({}, {B: torch.randn(32, 3)}), ({}, {B: torch.randn(32)}), ({}, {B: torch.tensor(1.0)}),
        ({}, {A: torch.randn(4, 64), B: torch.randn(16, 4)}), ({}, {magnitude: torch.ones(7)}),
        ({}, {f"{stem}B.bias": torch.ones(7)}), ({}, {A: torch.ones(4, 32, dtype=torch.int64)}),
        ({}, {"base_model.model.foo.weight": torch.ones(3)}),
        ({"alpha_pattern": {"(([a-z0-9_.]+)+)+!": 3}}, {}),
        ({"alpha_pattern": {".*.*.*.*.*.*.*.*!": 3}}, {}),
        ({"lora_alpha": 10**400}, {}), ({"lora_alpha": True}, {}), ({"lora_alpha": "x"}, {}),
        ({"lora_alpha": float("nan")}, {}), ({"fan_in_fan_out": True}, {}),
    ]  # fmt: skip
    base = open_checkpoint(pin(parse(str(zoo / "base"))))
    for i, (settings, tensors) in enumerate(changes):
        folder = tmp_path / str(i)
        folder.mkdir()
        save_file({**weights, **tensors}, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
        with pytest.raises(CheckpointError) as error:
            open_adapter(pin(parse(str(folder))), lambda: base)
        assert error.value.hint, i
        if "base_model.model.foo.weight" in tensors:
            assert "foo.weight is not in the base model" in str(error.value)


@pytest.mark.parametrize("pattern", ["a(", "a{4294967295}", "(?P<a", "\\8"])
def test_a_pattern_that_is_none_matches_nothing(zoo: Path, tmp_path: Path, pattern: str) -> None:
    trained(zoo, tmp_path / "a", "plain")
    file = tmp_path / "a" / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "alpha_pattern": {pattern: 3}}))
    base = open_checkpoint(pin(parse(str(zoo / "base"))))
    found = open_adapter(pin(parse(str(tmp_path / "a"))), lambda: base)
    assert {pair.scale for pair in found.loras.values()} == {content["lora_alpha"] / 4}


def test_a_base_of_another_machine_is_not_guessed(zoo: Path, tmp_path: Path) -> None:
    trained(zoo, tmp_path / "lora", "vision")
    done = run("merge", tmp_path / "lora", "-o", tmp_path / "m")
    assert done.code == 1 and "--base-model" in done.err and "hf://" not in done.err
