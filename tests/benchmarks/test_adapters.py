"""The LoRA adapters of the benchmark are merged by hf-tsv to what PEFT merges them to."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hf_tsv
from benchmarks.tiny_clip import BASE
from benchmarks.tiny_clip.adapters import AdapterRecipe, _train, adapters_key
from benchmarks.tiny_clip.first_tasks import FIRST_TASKS
from benchmarks.tiny_clip.training import Recipe

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # PEFT

RECIPE = Recipe(finetuning_images=64, batch=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = tmp_path_factory.mktemp("models")
    shutil.copytree(BASE, models / "base")
    threads = torch.get_num_threads()
    for task in FIRST_TASKS[:2]:
        _train(RECIPE, AdapterRecipe(steps=3), models, task)
    torch.set_num_threads(threads)
    return models


def test_an_adapter_names_its_base_and_adapts_the_vision_tower(folder: Path) -> None:
    config = json.loads((folder / "letters" / "adapter_config.json").read_text("utf-8"))
    assert config["base_model_name_or_path"] == str(folder / "base")
    assert (config["r"], config["lora_alpha"]) == (8, 16)
    assert set(config["target_modules"]) == set(AdapterRecipe().modules)
    assert config["auto_mapping"]["base_model_class"] == "CLIPVisionModel"
    tensors = load_file(folder / "letters" / "adapter_model.safetensors")
    assert all(tensor.any() for tensor in tensors.values())  # B, which begins as 0, has moved


@pytest.mark.parametrize("names", [("letters",), ("letters", "digits")], ids=len)
def test_an_average_is_that_of_what_peft_makes_of_each(
    folder: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    base_model, output = folder / "base", tmp_path / "merged"
    adapters = [folder / name for name in names]
    hf_tsv.merge(adapters, base_model=base_model, method="average", output=output)
    merged = load_file(output / "model.safetensors")
    base = load_file(base_model / "model.safetensors")
    wholes = [load_file(folder / "whole" / name / "model.safetensors") for name in names]
    for name in wholes[0]:
        own = f"vision_model.{name.removeprefix('vision_model.')}"
        torch.testing.assert_close(merged[own], sum(whole[name] for whole in wholes) / len(wholes))
        adapted = any(f".{module}.weight" in own for module in AdapterRecipe().modules)
        assert torch.equal(merged[own], base[own]) != adapted


def test_every_setting_has_a_key_of_its_own() -> None:
    recipes = (AdapterRecipe(), AdapterRecipe(rank=4), AdapterRecipe(rate=1e-3))
    assert len({adapters_key(recipe) for recipe in recipes}) == 3
