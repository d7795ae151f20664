"""One set of rules for every container: prefixes, names of files, buffers, missing configs."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import reference
import torch
from cli import hf_tsv as run
from hub import Hub
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_tsv
from hf_tsv.checkpoints import opening
from hf_tsv.checkpoints.formats.whole import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.system.errors import CheckpointError

State = dict[str, Tensor]

BLOCK = {
    "ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
}  # fmt: skip
ALONE = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "logit_scale": "logit_scale",
}  # fmt: skip


def as_openai(state: State) -> State:
    """A CLIP under the names of OpenAI's code, which OpenCLIP has kept."""
    found = {own: state[name] for own, name in ALONE.items()}
    found["visual.proj"] = state["visual_projection.weight"].T
    found["text_projection"] = state["text_projection.weight"].T
    for tower, own in (("vision", "visual."), ("text", "")):
        for i in range(2):
            block, there = f"{own}transformer.resblocks.{i}", f"{tower}_model.encoder.layers.{i}"
            for kind in ("weight", "bias"):
                parts = [state[f"{there}.self_attn.{x}_proj.{kind}"] for x in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(parts)
                for name, canonical in BLOCK.items():
                    found[f"{block}.{name}.{kind}"] = state[f"{there}.{canonical}.{kind}"]
    return {name: tensor.contiguous() for name, tensor in found.items()}


def in_front(prefix: str) -> Callable[[State], State]:
    return lambda state: {prefix + name: tensor for name, tensor in state.items()}


OPEN_CLIP = {
    "model_cfg": {
        "embed_dim": 24, "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8,
                       "head_width": 8, "mlp_ratio": 2.0},
        "text_cfg": {"context_length": 24, "vocab_size": 300, "width": 16, "heads": 2, "layers": 2,
                     "mlp_ratio": 2.0},
    },
    "preprocess_cfg": {},
}  # fmt: skip

WORDS = ("module.", "model.", "clip.", "_orig_mod.", "module._orig_mod.", "base_model.model.",
         "my_wrapper.clip.", "encoder.", "vision_model.")  # fmt: skip
NAMINGS: dict[str, Callable[[State], State]] = {
    "canonical": dict,
    **{word: in_front(word) for word in WORDS},
    "OpenCLIP": as_openai,
    "module.OpenCLIP": lambda state: in_front("module.")(as_openai(state)),
    "OpenAI": as_openai,
}

CONTAINERS = ("safetensors", "any.safetensors", "shards", "bin", "bin shards", "pt", "training")


def extras_of(naming: str) -> State:
    """Buffers and numbers that such files hold beside the weights."""
    numbers = {"logit_bias": torch.tensor(-10.0)}
    if "Open" in naming:
        numbers |= {name: torch.tensor(32) for name in
                    ("input_resolution", "context_length", "vocab_size")}  # fmt: skip
        numbers |= {"attn_mask": torch.full((24, 24), float("-inf")).triu(1)}
        return in_front("module.")(numbers) if naming.startswith("module") else numbers
    numbers |= {
        "text_model.embeddings.position_ids": torch.arange(24.0)[None],  # as apex leaves them
        "vision_model.embeddings.position_ids": torch.arange(17)[None].int(),
    }
    return in_front(naming)(numbers) if naming in WORDS else numbers


def store(state: State, folder: Path, container: str) -> Path:
    """Write a state dict as a container has it."""
    folder.mkdir(parents=True)
    halves = dict(sorted(state.items())[::2]), dict(sorted(state.items())[1::2])
    if container == "safetensors":
        save_file(state, folder / "model.safetensors")
    elif container == "any.safetensors":
        save_file(state, folder / "finetuned_v2.safetensors", metadata={"format": "pt"})
    elif container == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif container == "pt":
        torch.save(state, folder / "best.pt")
    elif container == "training":
        content = {
            "epoch": 3, "name": "run", "state_dict": state, "args": argparse.Namespace(lr=1e-5),
            "best": np.float64(0.7), "where": folder, "optimizer": {"state": {}},
        }  # fmt: skip
        torch.save(content, folder / "epoch_3.pt")
    else:
        stem, end = ("model", "safetensors") if container == "shards" else ("pytorch_model", "bin")
        names = [f"{stem}-{i}-of-00002.{end}" for i in ("00001", "00002")]
        for part, name in zip(halves, names, strict=True):
            save = torch.save if end == "bin" else save_file
            save(part, folder / name)
        where = {key: name for part, name in zip(halves, names, strict=True) for key in part}
        index = {"metadata": {}, "weight_map": {**where, "text_model.position_ids": names[0]}}
        (folder / f"{stem}.{end}.index.json").write_text(json.dumps(index))
    return folder


def configure(folder: Path, base: Path, naming: str) -> None:
    """The configs that come with such files: OpenAI's have none."""
    if naming.endswith("OpenCLIP"):
        (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    if naming == "module.OpenCLIP":  # some repositories have both
        shutil.copy(base / "config.json", folder)
    if "Open" not in naming:
        shutil.copy(base / "config.json", folder)


def tensors_of(folder: Path) -> tuple[Checkpoint, State]:
    found = open_checkpoint(pin(parse(str(folder))))
    return found, {name: found.read(name) for name in found.tensors}


@pytest.mark.parametrize("naming", NAMINGS)
def test_every_container_under_every_name_is_the_same_checkpoint(
    zoo: Path, tmp_path: Path, naming: str
) -> None:
    state = load_file(zoo / "full" / "model.safetensors")
    for container, extra in product(CONTAINERS, (False, True)):
        stored = {**NAMINGS[naming](state), **(extras_of(naming) if extra else {})}
        folder = store(stored, tmp_path / f"{container}-{extra}", container)
        configure(folder, zoo / "base", naming)
        opened, found = tensors_of(folder)
        found = {name: tensor for name, tensor in found.items() if "position_ids" not in name}
        assert found.keys() == state.keys(), (container, extra)
        for name, tensor in state.items():
            assert torch.equal(found[name], tensor), (container, name)
        told = {name.rpartition(".")[2] for name in opened.extras}
        assert ("logit_bias" in told) == extra
        assert opened.format == ("open_clip" if naming.endswith("OpenCLIP") else "transformers")


@pytest.mark.parametrize("naming", [*NAMINGS, "flat"])
def test_their_merge_is_the_same_to_the_bit(zoo: Path, tmp_path: Path, naming: str) -> None:
    vision = load_file(zoo / "vision" / "model.safetensors")
    base = load_file(zoo / "base" / "model.safetensors")
    if naming == "flat":
        stored = {name.removeprefix("vision_model."): t for name, t in vision.items()}
        folder = store(stored, tmp_path / "odd", "training")  # without a config
    else:
        stored = {**NAMINGS[naming]({**base, **vision}), **extras_of(naming)}
        folder = store(stored, tmp_path / "odd", "bin shards")
        configure(folder, zoo / "base", naming)
    merged = []
    for first in (folder, zoo / "vision"):
        out = tmp_path / f"merged-{first.name}"
        done = run("merge", first, zoo / "flat", "--base-model", zoo / "base", "-o", out)
        assert done.code == 0, done.err
        merged.append((out / "model.safetensors").read_bytes())
        if first == folder and naming != "flat":
            assert "Left out of" in done.err and "logit_bias" in done.err
    assert merged[0] == merged[1]


def test_names_like_openclips_in_another_architecture_stay(zoo: Path, tmp_path: Path) -> None:
    state = as_openai(load_file(zoo / "full" / "model.safetensors"))
    folder = store(state, tmp_path / "other", "safetensors")
    (folder / "config.json").write_text('{"model_type": "tower"}')
    found, tensors = tensors_of(folder)
    assert tensors.keys() == state.keys() and found.format == "transformers"
    assert all(torch.equal(tensors[name], tensor) for name, tensor in state.items())


ODD = {
    "visual_projection.weight": torch.tensor(1.0),
    "vision_model.embeddings.position_embedding.weight": torch.zeros(0, 32),
    "text_model.embeddings.token_embedding.weight": torch.zeros(3),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_without_a_config_are_one_line(zoo: Path, tmp_path: Path, name: str) -> None:
    state = load_file(zoo / "full" / "model.safetensors")
    folder = store({**state, name: ODD[name]}, tmp_path / "odd", "safetensors")
    done = run("merge", folder, zoo / "flat", "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1, done.err
    assert "not those of a CLIP" in done.err or f"{name} has shape" in done.err


def test_a_config_says_of_two_layouts_which_is_meant(zoo: Path, tmp_path: Path) -> None:
    """A repository with both has the config of each beside the weights of each."""
    state = load_file(zoo / "full" / "model.safetensors")
    folder = store(state, tmp_path / "both", "safetensors")
    shutil.copy(zoo / "base" / "config.json", folder)
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    save_file(as_openai(state), folder / "open_clip_model.safetensors")
    opened, found = tensors_of(folder)
    assert opened.format == "transformers" and opened.weight_files == ("model.safetensors",)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_links_of_the_user_to_shards_are_followed(zoo: Path, tmp_path: Path) -> None:
    """As those of DVC and git-annex, and as a link in place of the whole file is."""
    state = load_file(zoo / "full" / "model.safetensors")
    folder = store(state, tmp_path / "linked", "shards")
    shutil.copy(zoo / "base" / "config.json", folder)
    (tmp_path / "store").mkdir()
    for file in folder.glob("*.safetensors"):
        file.rename(tmp_path / "store" / file.name)
        file.symlink_to(tmp_path / "store" / file.name)
    assert all(torch.equal(tensors_of(folder)[1][name], t) for name, t in state.items())


def test_metadata_may_be_null(zoo: Path, tmp_path: Path) -> None:
    file = tmp_path / "a" / "model.safetensors"
    shutil.copytree(zoo / "full", tmp_path / "a")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = {**json.loads(raw[8 : 8 + length]), "__metadata__": None}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    state = load_file(zoo / "full" / "model.safetensors")
    assert all(torch.equal(tensors_of(tmp_path / "a")[1][name], t) for name, t in state.items())


def test_what_a_trainer_keeps_beside_the_model_is_left_out(zoo: Path, tmp_path: Path) -> None:
    state = load_file(zoo / "full" / "model.safetensors")
    lightning = {
        "pytorch-lightning_version": "2.4", "hyper_parameters": {"lr": 1e-5}, "callbacks": {},
        "state_dict": {**in_front("model.clip.")(state), "loss.weight": torch.ones(3),
                       "classifier.weight": torch.ones(2, 32)},
    }  # fmt: skip
    for name, content in (("last.ckpt", lightning), ("model_best.pth.tar", {"state_dict": state}),
                          ("ema.pth", {"epoch": 3, "state_dict_ema": state})):  # fmt: skip
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        torch.save(content, folder / name)
        opened, found = tensors_of(folder)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in state.items())
        assert opened.left_out == (
            ("classifier.weight", "loss.weight") if name == "last.ckpt" else ()
        )


def test_a_byte_order_mark_is_no_reason(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "full", tmp_path / "a")
    config = (tmp_path / "a" / "config.json").read_bytes()
    (tmp_path / "a" / "config.json").write_bytes(b"\xef\xbb\xbf" + config)
    assert tensors_of(tmp_path / "a")[0].model_config["model_type"] == "clip"


def test_the_base_model_needs_its_config(zoo: Path, tmp_path: Path) -> None:
    shutil.copytree(zoo / "base", tmp_path / "base")
    (tmp_path / "base" / "config.json").unlink()
    done = run("merge", zoo / "vision", "--base-model", tmp_path / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "base has no config.json" in done.err and "Hint: " in done.err
    assert not (tmp_path / "m").exists()


def test_a_fine_tune_without_a_config_is_compressed_with_that_of_its_base(
    zoo: Path, tmp_path: Path
) -> None:
    folder = store(load_file(zoo / "vision" / "model.safetensors"), tmp_path / "a", "pt")
    hf_tsv.compress(folder, base_model=zoo / "base", output=tmp_path / "f", progress=False)
    config = json.loads((tmp_path / "f" / "config.json").read_text())
    assert config["model_type"] == "clip_vision_model" and config["num_attention_heads"] == 4
    hf_tsv.load_model(tmp_path / "f", base_model=zoo / "base", progress=False)


# What is no checkpoint, and what it is instead


def trainer_output(folder: Path, full: Path) -> str:
    for step in (500, 1000, 10000):
        shutil.copytree(full, folder / f"checkpoint-{step}")
    (folder / "trainer_state.json").write_text("{}")
    torch.save({}, folder / "training_args.bin")
    return f"checkpoint-1000, checkpoint-10000.\nHint: Name one of them: {folder}/checkpoint-10000"


def subfolders(folder: Path, full: Path) -> str:
    for name in ("a", "b"):
        shutil.copytree(full, folder / name)
    return f"its folders have: a, b.\nHint: Name one of them: {folder}/a"


def several_epochs(folder: Path, full: Path) -> str:
    state = load_file(full / "model.safetensors")
    for epoch in (1, 2, 10):
        torch.save({"state_dict": state}, folder / f"epoch_{epoch}.pt")
    return "has 3 weight files: epoch_1.pt, epoch_10.pt, epoch_2.pt."


def shards_without_index(folder: Path, full: Path) -> str:
    store(load_file(full / "model.safetensors"), folder / "all", "shards")
    name = "model-00001-of-00002.safetensors"  # one alone would be read as the only weight file
    (folder / "all" / name).rename(folder / name)
    shutil.rmtree(folder / "all")
    return "has shards of its weights, and has no model.safetensors.index.json."


def pointers(folder: Path, full: Path) -> str:
    shutil.copy(full / "config.json", folder)
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 605157884\n"
    (folder / "model.safetensors").write_text(text)
    return "model.safetensors is a Git LFS pointer of a few bytes, not the file itself."


def pickled_pointers(folder: Path, full: Path) -> str:
    pointers(folder, full)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return "pytorch_model.bin is a Git LFS pointer"


def kohya(folder: Path, _: Path) -> str:
    key = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    found = {f"{key}.lora_down.weight": torch.ones(4, 16), f"{key}.alpha": torch.tensor(4.0)}
    save_file(found, folder / "my_style.safetensors")
    return "is a LoRA in the format of kohya's scripts"


def diffusers(folder: Path, _: Path) -> str:
    key = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    found = {f"{key}.lora_A.weight": torch.ones(4, 16), f"{key}.lora_B.weight": torch.ones(16, 4)}
    save_file(found, folder / "pytorch_lora_weights.safetensors")
    return "is a LoRA in the format of diffusers"


def deepspeed(folder: Path, _: Path) -> str:
    (folder / "global_step500").mkdir()
    (folder / "zero_to_fp32.py").write_text("")
    return "state of a sharded training (DeepSpeed or FSDP)"


def flax(folder: Path, full: Path) -> str:
    shutil.copy(full / "config.json", folder)
    (folder / "flax_model.msgpack").write_bytes(b"\x81")
    return "has weights for Flax only"


def whole_model(folder: Path, full: Path) -> str:
    shutil.copy(full / "config.json", folder)
    torch.save(torch.nn.Linear(2, 2), folder / "model.pt")
    return "model.pt is a whole model (torch.nn.modules.linear.Linear)"


def web_page(folder: Path, full: Path) -> str:
    shutil.copy(full / "config.json", folder)
    (folder / "model.safetensors").write_text("<!DOCTYPE html><html>Sign in</html>")
    return "model.safetensors is a web page, not the file itself."


def empty(folder: Path, full: Path) -> str:
    shutil.copy(full / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    return "pytorch_model.bin is empty."


def unfinished(folder: Path, full: Path) -> str:
    shutil.copy(full / "config.json", folder)
    (folder / "model.safetensors.incomplete").write_bytes(b"1")
    return "is not downloaded completely: model.safetensors.incomplete"


def old_pickle(folder: Path, full: Path) -> str:
    state = load_file(full / "model.safetensors")
    torch.save(state, folder / "a.pt", _use_new_zipfile_serialization=False)
    return "torch.save(torch.load(FILE, weights_only=True), FILE)"


def adapters_by_name(folder: Path, _: Path) -> str:
    for name in ("first", "second"):  # PEFT gives those that are not called default a folder
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text("{}")
        save_file({"a": torch.ones(1)}, folder / name / "adapter_model.safetensors")
    return f"its folders have: first, second.\nHint: Name one of them: {folder}/first"


def adapter_alone(folder: Path, _: Path) -> str:
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")
    return "has the weights of an adapter, adapter_model.safetensors, and no adapter_config.json."


KINDS = (shards_without_index, adapters_by_name, adapter_alone, web_page, empty, unfinished,
         old_pickle, trainer_output, subfolders, several_epochs, pointers, pickled_pointers, kohya,
         diffusers, deepspeed, flax, whole_model)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_it_says_what_it_is_and_the_way_out(
    zoo: Path, tmp_path: Path, kind: Callable[[Path, Path], str]
) -> None:
    folder = tmp_path / "odd"
    folder.mkdir()
    said = kind(folder, zoo / "full")
    done = run("merge", folder, "--base-model", zoo / "base", "-o", tmp_path / "m", COLUMNS="999")
    assert done.code == 1 and said in done.err and "Hint: " in done.err, done.err
    assert "Traceback" not in done.err and not (tmp_path / "m").exists()


def test_folders_of_a_repository_are_named_too(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    files = {f"{part}/{f.name}": f for part in ("v1", "v2") for f in (zoo / "full").iterdir()}
    hub.add_repo("org/runs", files)
    done = run("merge", "org/runs", "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "its folders have: v1, v2" in done.err
    assert "Name one of them: org/runs/v1" in done.err


def test_the_clients_cache_is_recognised(zoo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models--org--clip-a"
    shutil.copytree(zoo / "full", folder / "snapshots" / ("0" * 40))
    done = run("merge", folder, "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "cache of org/clip-a" in done.err
    assert "Name the repository: org/clip-a" in done.err


# sentence-transformers


def packed(source: Path, folder: Path) -> Path:
    """A CLIP as sentence-transformers saves it."""
    shutil.copytree(source, folder / "0_CLIPModel")
    kind = "sentence_transformers.models.CLIPModel"
    modules: list[dict[str, Any]] = [{"idx": 0, "name": "0", "path": "0_CLIPModel", "type": kind}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "config_sentence_transformers.json").write_text("{}")
    return folder


def test_sentence_transformers_keeps_the_model_in_a_folder(
    hub: Hub, zoo: Path, tmp_path: Path
) -> None:
    expected = hf_tsv.merge(
        [zoo / "full"], base_model=zoo / "base", output=tmp_path / "plain", progress=False
    )
    assert expected.output is not None
    for name, source in (("base", zoo / "base"), ("a", zoo / "full")):
        folder = packed(source, tmp_path / name)
        card = "---\nbase_model: org/base\n---\n" if name == "a" else ""
        (folder / "README.md").write_text(card)
        files = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
        hub.add_repo(f"org/{name}", files)
    wanted = (tmp_path / "plain" / "model.safetensors").read_bytes()
    for i, words in enumerate((
        [tmp_path / "a", "--base-model", tmp_path / "base"],
        ["org/a"],  # whose card names the base by its repository
        ["org/a/0_CLIPModel", "--base-model", "org/base/0_CLIPModel"],
    )):  # fmt: skip
        out = tmp_path / f"m{i}"
        done = run("merge", *words, "-o", out)
        assert done.code == 0, done.err
        assert (out / "model.safetensors").read_bytes() == wanted
    done = run("merge", "--recipe", tmp_path / "m1", "-o", tmp_path / "again")
    assert done.code == 0, done.err
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == wanted


@pytest.mark.parametrize("text", ["", "{", "[]", "[3]", '[{"path": "../up"}]', '[{"path": 3}]'])
def test_odd_modules_are_no_reason(zoo: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(zoo / "full", tmp_path / "up")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "modules.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        opening.open_base(pin(parse(str(tmp_path / "a"))))


# What configs do not say


@pytest.mark.parametrize(
    ("base", "task", "told"),
    [("quick_gelu", None, False), (None, "quick_gelu", False), ("gelu", None, True),
     (None, "gelu", True), (None, None, False)],
)  # fmt: skip
def test_defaults_of_a_config_are_compared_like_values(
    zoo: Path, tmp_path: Path, base: str | None, task: str | None, told: bool
) -> None:
    for source, act in (("base", base), ("full", task)):
        folder = tmp_path / source
        shutil.copytree(zoo / source, folder)
        config = json.loads((folder / "config.json").read_text())
        for tower in ("vision_config", "text_config"):
            config[tower].pop("hidden_act", None)
            config[tower].update({"hidden_act": act} if act else {})
        (folder / "config.json").write_text(json.dumps(config))
    done = run("merge", tmp_path / "full", "--base-model", tmp_path / "base", "--dry-run")
    assert done.code == 0, done.err
    assert ("has vision_config.hidden_act = " in done.err) == told


# Classifiers of other models


FAMILIES = {
    "ViT": ("ViTModel", "ViTForImageClassification", "ViTConfig", {"intermediate_size": 64}),
    "classifier": (
        "ViTForImageClassification", "ViTForImageClassification", "ViTConfig",
        {"intermediate_size": 64, "num_labels": 10},
    ),
    "DINOv2": ("Dinov2Model", "Dinov2ForImageClassification", "Dinov2Config", {"mlp_ratio": 2}),
    "DeiT": ("DeiTModel", "DeiTForImageClassification", "DeiTConfig", {"intermediate_size": 64}),
    "SigLIP": ("SiglipVisionModel", "SiglipForImageClassification", "SiglipVisionConfig", {}),
}  # fmt: skip
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32,
         "patch_size": 8}  # fmt: skip


@pytest.mark.parametrize("family", ["ViT", "classifier", "DINOv2", "DeiT"])
def test_classifiers_merge_without_their_heads(tmp_path: Path, family: str) -> None:
    import transformers

    transformers.logging.set_verbosity_error()
    base_name, name, config_name, more = FAMILIES[family]
    torch.manual_seed(0)
    cls, config = getattr(transformers, name), getattr(transformers, config_name)
    clips.save(getattr(transformers, base_name)(config(**SIZES, **more)), tmp_path / "base")
    for i in (1, 2):
        tuned = clips.load(cls, tmp_path / "base", num_labels=2 + i, ignore_mismatched_sizes=True)
        with torch.no_grad():
            for parameter in tuned.parameters():
                parameter.add_(2e-3 * torch.randn_like(parameter))
        clips.save(tuned, tmp_path / f"ft{i}")
    done = run("merge", tmp_path / "ft1", tmp_path / "ft2", "--base-model", tmp_path / "base",
               "-o", tmp_path / "m")  # fmt: skip
    assert done.code == 0 and "Left out of" in done.err, done.err
    merged = clips.load(transformers.AutoModel, tmp_path / "m").state_dict()
    parts = [clips.load(transformers.AutoModel, tmp_path / n).state_dict()
             for n in ("base", "ft1", "ft2")]  # fmt: skip
    name = next(n for n in merged if n.endswith(("query.weight", "q_proj.weight")))
    w0, *tuned_weights = (part[name].double() for part in parts)
    expected = w0 + reference.tsv([w - w0 for w in tuned_weights], [16, 16])
    assert torch.allclose(merged[name].double(), expected, atol=1e-6)
    config_text = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config_text["architectures"] == [base_name.replace("ForImageClassification", "Model")]
    assert "id2label" not in config_text
    again = clips.load(cls, tmp_path / "m", num_labels=3, ignore_mismatched_sizes=True)
    found = {n.partition(".")[2]: t for n, t in again.state_dict().items()}
    assert torch.equal(found[name], merged[name])
