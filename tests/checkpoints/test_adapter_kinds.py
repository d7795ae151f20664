"""Adapters of every kind that PEFT merges, against PEFT's own merge_and_unload."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

import clips
import peft
import pytest
import torch
import transformers
from adapters import OF_TEXT, OTHERS, merged, saved
from cli import hf_tsv as run
from hub import Hub
from safetensors.torch import load_file, save_file

from hf_tsv.checkpoints.formats.adapters import Adapter, open_adapter
from hf_tsv.checkpoints.formats.whole import open_checkpoint
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.system.errors import CheckpointError

TOWERS = {"CLIPVisionModel": "vision_model.", "CLIPTextModel": "text_model.", "CLIPModel": ""}
CASES = [*((kind, "CLIPModel") for kind in OTHERS), *((kind, "CLIPTextModel") for kind in OF_TEXT)]
CASES += [(kind, cls) for kind in ("pissa", "loha", "vera") for cls in list(TOWERS)[:2]]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a base model whose every parameter has moved: biases and norms begin at 0 and 1."""
    folder = tmp_path_factory.mktemp("moved")
    clips.make_base(folder / "base")
    file = folder / "base" / "model.safetensors"
    generator = torch.Generator().manual_seed(5)
    moved = {
        name: tensor + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in load_file(file).items()
    }
    save_file(moved, file, metadata={"format": "pt"})
    return folder


def made(zoo: Path, folder: Path, kind: str, cls: str) -> dict[str, torch.Tensor]:
    """Save an adapter of a kind; returns what PEFT makes of it, by canonical name."""
    model = clips.load(getattr(transformers, cls), zoo / "base")
    saved(model, *(OTHERS | OF_TEXT)[kind], folder)
    if "shrunken" in kind:
        shrink(folder)
    fresh = clips.load(getattr(transformers, cls), zoo / "base")
    return {TOWERS[cls] + name: tensor for name, tensor in merged(fresh, folder).items()}


def shrink(folder: Path) -> None:
    """Drop singular values of an AdaLoRA adapter, as training does."""
    file, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    state, content = load_file(file), json.loads(config.read_text())
    kept = [True, False, True, True, False, True]
    mask = torch.tensor(kept)
    content["rank_pattern"] = {}
    for name in [name for name in state if name.endswith("lora_E")]:
        stem = name.removesuffix("E")
        state[name], state[f"{stem}A"] = state[name][mask], state[f"{stem}A"][mask]
        state[f"{stem}B"] = state[f"{stem}B"][:, mask].contiguous()
        content["rank_pattern"][name.removeprefix("base_model.model.")] = kept
    save_file(state, file, metadata={"format": "pt"})
    config.write_text(json.dumps(content))


def opened(zoo: Path, folder: Path) -> tuple[Adapter, Any]:
    base = open_checkpoint(pin(parse(str(zoo / "base"))))
    return open_adapter(pin(parse(str(folder))), lambda: base), base


def check(zoo: Path, folder: Path, expected: dict[str, torch.Tensor]) -> set[str]:
    """Compare every weight, and the change of each; returns the names of the changed ones."""
    task, base = opened(zoo, folder)
    before = load_file(zoo / "base" / "model.safetensors")
    changed = {n for n, w in expected.items() if n in before and not torch.equal(w, before[n])}
    assert changed and changed <= {name for name in task.tensors if task.parts(name)}
    for name in task.tensors:
        weight = task.weight(base.original([name]))
        error, norm = (weight - expected[name]).double().norm(), expected[name].double().norm()
        assert float(error) <= 1e-6 * float(norm), (name, float(error / norm))
        assert task.differs(base.original([name])) == (name in changed)
    return changed


@pytest.mark.parametrize(("kind", "cls"), CASES)
def test_it_is_what_peft_makes_of_it(zoo: Path, tmp_path: Path, kind: str, cls: str) -> None:
    check(zoo, tmp_path / "a", made(zoo, tmp_path / "a", kind, cls))


PATTERN = r".*vision_model.*\.(?:self_attn|mlp)\..*(?:q_proj|fc1).*"


@pytest.mark.parametrize("kind", ["ia3", "loha", "vera"])
@pytest.mark.parametrize("also", [
    {"modules_to_save": ["visual_projection"]}, {"target_modules": PATTERN},
])  # fmt: skip
def test_beside_a_projection_and_by_a_pattern(
    zoo: Path, tmp_path: Path, kind: str, also: dict[str, Any]
) -> None:
    """A module saved whole has no dot in its name, nor have tensors that modules share."""
    config, options = OTHERS[kind]
    options = {**options, **also}
    saved(clips.load(transformers.CLIPModel, zoo / "base"), config, options, tmp_path / "a")
    model = clips.load(transformers.CLIPModel, zoo / "base")
    changed = check(zoo, tmp_path / "a", merged(model, tmp_path / "a"))
    assert ("visual_projection.weight" in changed) == ("modules_to_save" in also)


@pytest.mark.parametrize("kind", ["pissa", "adalora", "embeddings"])
def test_only_what_is_a_product_has_its_own_triplets(zoo: Path, tmp_path: Path, kind: str) -> None:
    expected = made(zoo, tmp_path / "a", kind, "CLIPVisionModel")
    task, base = opened(zoo, tmp_path / "a")
    for name in task.loras:
        own = task.triplets(name)
        assert (own is None) == (kind == "pissa")
        if own is not None:
            delta = (expected[name] - base.read(name)).double()
            assert float((own.matrix() - delta).norm() / delta.norm()) < 3e-4  # float32 storage


def edited(folder: Path, settings: dict[str, Any], tensors: Any = None) -> None:
    """Change settings of an adapter, and all its tensors if a function of their state is given."""
    config, file = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    if tensors is not None:
        save_file(tensors(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", ["pissa", "ia3", "tokens"])
def test_a_merge_of_one_is_what_peft_makes_of_it(zoo: Path, tmp_path: Path, kind: str) -> None:
    cls = "CLIPTextModel" if kind in OF_TEXT else "CLIPVisionModel"
    expected = made(zoo, tmp_path / "a", kind, cls)
    done = run("merge", tmp_path / "a", "--base-model", zoo / "base", "-o", tmp_path / "m",
               "--alpha", 1, "--method", "task-arithmetic", "--allow-other-base")  # fmt: skip
    assert done.code == 0, done.err
    found = load_file(tmp_path / "m" / "model.safetensors")
    for name, tensor in expected.items():
        if name in found:
            assert float((found[name] - tensor).norm()) <= 1e-6 * float(tensor.norm()), name


@pytest.mark.parametrize("kind", ["olora", "vera", "only tokens"])
def test_pickled_adapters_and_names_of_a_state_dict(zoo: Path, tmp_path: Path, kind: str) -> None:
    """Names with the adapter's own name in them, nested and without PEFT's prefix."""
    expected = made(zoo, tmp_path / "a", kind, "CLIPTextModel")
    file = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(file)
    file.unlink()
    for prefix in ("base_model.model.base_model.model.", ""):
        renamed = {}
        for name, tensor in state.items():
            inner = prefix + name.removeprefix("base_model.model.").removeprefix("base_model.")
            stem, dot, last = inner.rpartition(".")
            is_weight = last == "weight" and "lora_" in stem
            renamed[f"{stem}.default.weight" if is_weight else f"{stem}{dot}{last}.default"] = (
                tensor
            )
        torch.save(renamed, tmp_path / "a" / "adapter_model.bin")
        check(zoo, tmp_path / "a", expected)


@pytest.mark.parametrize(
    ("init", "said"),
    [("pissa_niter_4", "at random"), ("corda", "training data"), ("lora_ga", "gradients"),
     ("loftq", "quantisation"), ("of_next_year", "is unknown"), (3, "is unknown")],
)  # fmt: skip
def test_a_start_that_is_not_stored_is_refused(
    zoo: Path, tmp_path: Path, init: object, said: str
) -> None:
    made(zoo, tmp_path / "a", "orthogonal", "CLIPVisionModel")
    edited(tmp_path / "a", {"init_lora_weights": init})
    with pytest.raises(CheckpointError, match=said) as error:
        opened(zoo, tmp_path / "a")
    assert "path_initial_model_for_weight_conversion" in (error.value.hint or "")


def test_a_converted_adapter_is_plain(zoo: Path, tmp_path: Path) -> None:
    """As the hint of the refusal says: the change is stored, and the base model is as it was."""
    model = clips.load(transformers.CLIPVisionModel, zoo / "base")
    options = {"target_modules": ["q_proj"], "r": 4, "init_lora_weights": "pissa_niter_4"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**options))
        adapted.peft_config["default"].init_lora_weights = True
        adapted.save_pretrained(tmp_path / "first")
        adapted.peft_config["default"].init_lora_weights = "pissa_niter_4"
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.02)
        adapted.save_pretrained(
            tmp_path / "a", path_initial_model_for_weight_conversion=tmp_path / "first"
        )
    expected = adapted.merge_and_unload().state_dict()
    task, base = opened(zoo, tmp_path / "a")
    for name in task.loras:
        own = expected[name.removeprefix("vision_model.")]
        assert torch.allclose(task.weight(base.original([name])), own, atol=1e-5), name


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP whose towers have the same width; that of text has fewer layers."""
    config = clips.clip_config()
    for key in ("hidden_size", "intermediate_size", "num_attention_heads"):
        setattr(config.text_config, key, getattr(config.vision_config, key))
    config.text_config.num_hidden_layers = 1
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("twins") / "base"
    return clips.save(transformers.CLIPModel(config), folder).parent


@pytest.mark.parametrize("kind", ["mica", "loha"])
def test_the_tower_is_that_of_all_names(twins: Path, tmp_path: Path, kind: str) -> None:
    """Of text, though the names are those of the vision tower too."""
    expected = made(twins, tmp_path / "a", kind, "CLIPTextModel")
    check(twins, tmp_path / "a", expected)
    edited(tmp_path / "a", {"auto_mapping": None, "task_type": "FEATURE_EXTRACTION"})
    check(twins, tmp_path / "a", expected)  # the vision tower has layers that were not adapted
    edited(tmp_path / "a", {"target_modules": ".*(q_proj|fc1)"})
    with pytest.raises(CheckpointError, match="vision tower or of the text tower") as error:
        opened(twins, tmp_path / "a")
    found = re.findall(r'"auto_mapping": (\{[^}]*\})', error.value.hint or "")
    assert len(found) == 2 and "hf download" not in (error.value.hint or "")
    edited(tmp_path / "a", {"auto_mapping": json.loads(found[1])})
    check(twins, tmp_path / "a", expected)
    edited(tmp_path / "a", {"auto_mapping": json.loads(found[0])})
    task, _ = opened(twins, tmp_path / "a")
    assert all(name.startswith("vision_model.") for name in (*task.loras, *task.modules))


def test_the_tower_of_a_hub_adapter_is_asked_for(hub: Hub, twins: Path, tmp_path: Path) -> None:
    made(twins, tmp_path / "a", "mica", "CLIPTextModel")
    edited(tmp_path / "a", {"auto_mapping": None, "target_modules": ".*(q_proj|fc1)"})
    hub.add_repo("org/lora", tmp_path / "a")
    done = run("merge", "org/lora", "--base-model", twins / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "hf download org/lora" in done.err and "CLIPTextModel" in done.err
    assert not (tmp_path / "m").exists()


def test_shared_tensors_are_streamed(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    """With the tensors that all modules share, which are read again for each of them."""
    made(zoo, tmp_path / "a", "vera", "CLIPVisionModel")
    (tmp_path / "a" / "README.md").unlink()
    hub.add_repo("org/vera", tmp_path / "a")
    found = []
    for i, options in enumerate(([], ["--stream"])):
        reference = "org/vera" if i else tmp_path / "a"
        done = run("merge", reference, "--base-model", zoo / "base", "-o", tmp_path / f"m{i}",
                   *options)  # fmt: skip
        assert done.code == 0, done.err
        found.append((tmp_path / f"m{i}" / "model.safetensors").read_bytes())
    assert len(set(found)) == 1


def test_a_prompt_has_nothing_to_merge(zoo: Path, tmp_path: Path) -> None:
    made(zoo, tmp_path / "a", "mica", "CLIPVisionModel")
    edited(tmp_path / "a", {"peft_type": "PROMPT_TUNING"})
    with pytest.raises(CheckpointError, match="PROMPT_TUNING, which changes no weights"):
        opened(zoo, tmp_path / "a")


def test_hostile_adapters_get_one_line(zoo: Path, tmp_path: Path) -> None:
    changes: dict[str, list[tuple[dict[str, Any], Any]]] = {
        "loha": [
            ({"r": 10**9}, None), ({"r": 3}, None), ({"rank_pattern": {"fc1": 10**9}}, None),
            ({"rank_pattern": {"(([a-z0-9_.]+)+)+!": 3}}, None), ({"of_next_year": 1}, None),
            ({"alpha": float("nan")}, None), ({"r": "x"}, None), ({"alpha": 10**400}, None),
            ({}, lambda state: {n: t[:1].contiguous() for n, t in state.items()}),
            ({}, lambda state: dict(list(state.items())[1:])),
            ({}, lambda state: {**state, "encoder.layers.0.mlp.fc9.hada_w1_a": torch.ones(2)}),
            ({}, lambda state: {**state, "encoder.layers.0.mlp.fc1.hada_w9": torch.ones(2)}),
        ],
        "ia3": [({"feedforward_modules": "(([a-z0-9_.]+)+)+!"}, None)],
        "adalora": [
            ({"init_r": 0}, None), ({"init_r": "x"}, None), ({"peft_type": "LORA"}, None),
            ({}, lambda state: {n: t for n, t in state.items() if "lora_E" not in n}),
            ({}, lambda state: {n: t[:1] if "lora_E" in n else t for n, t in state.items()}),
        ],
        "tokens": [
            ({"trainable_token_indices": [3, 5000]}, None),
            ({"trainable_token_indices": [3]}, None), ({"trainable_token_indices": [3, 3]}, None),
            ({"trainable_token_indices": {"token_embedding": [3, -1]}}, None),
            ({"trainable_token_indices": None}, None),
        ],
        "mica": [
            ({"peft_type": kind}, None) for kind in ("PROMPT_TUNING", "GLORA", "NEW", None, 3)
        ] + [({key: True}, None) for key in ("use_qalora", "kasa_config", "layer_replication")],
        "embeddings": [
            ({"init_lora_weights": "pissa"}, None), ({"use_dora": True}, None),
            ({}, lambda state: {n: t for n, t in state.items() if "embedding_A" not in n}),
        ],
    }  # fmt: skip
    for kind, cases in changes.items():
        made(zoo, tmp_path / kind, kind, "CLIPTextModel")
        for i, (settings, tensors) in enumerate(cases):
            folder = shutil.copytree(tmp_path / kind, tmp_path / f"{kind} {i}")
            edited(folder, settings, tensors)
            with pytest.raises(CheckpointError) as error:
                opened(zoo, folder)
            assert error.value.hint and "\n" not in f"{error.value}{error.value.hint}", (kind, i)


def test_without_peft_the_error_says_what_to_install(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(zoo, tmp_path / "a", "loha", "CLIPVisionModel")
    monkeypatch.setitem(sys.modules, "peft", None)  # as where it is not installed
    with pytest.raises(CheckpointError, match="not installed") as error:
        opened(zoo, tmp_path / "a")
    assert error.value.hint == "Run `pip install peft`."


def test_an_update_is_not_rounded_to_the_base(tmp_path: Path) -> None:
    """Of an adapter in float32 on a base in bfloat16, however small the update is."""
    clips.make_base(tmp_path / "base", dtype=torch.bfloat16)
    model = clips.load(transformers.CLIPVisionModel, tmp_path / "base", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saved(model, *OTHERS["ia3"], tmp_path / "a")
    edited(tmp_path / "a", {}, lambda s: {n: 1 + (t - 1) * 1e-3 for n, t in s.items()})
    fresh = clips.load(transformers.CLIPVisionModel, tmp_path / "base", dtype=torch.float32)
    expected = merged(fresh, tmp_path / "a")
    task, base = opened(tmp_path, tmp_path / "a")
    assert task.rounded_to is None
    name = "encoder.layers.0.mlp.fc1.weight"
    delta, w0 = expected[name] - before[name], base.original([f"vision_model.{name}"])
    change = task.change(w0)
    assert change is not None and task.differs(w0)
    assert float((change.update - delta).norm()) <= 1e-2 * float(delta.norm())
    assert task.weight(w0).dtype == torch.bfloat16
