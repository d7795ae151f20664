"""One canonical name for every layout in which transformers classes save a CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from clips import clip_config, make_base, make_fine_tune, save
from safetensors.torch import load_file

from hf_tsv.checkpoints.formats.whole import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.layout import (
    FLAT_PREFIXES,
    canonical_name,
    flat_prefix_of,
    is_full_model,
    qkv_group,
    tower_configs,
    towers,
)
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.system.errors import CheckpointError


def opened(folder: Path) -> Checkpoint:
    return open_checkpoint(pin(parse(str(folder))))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("layout") / "base")


@pytest.fixture(scope="module")
def names(base: Path) -> set[str]:
    """Names in a `CLIPModel`: the canonical ones."""
    return set(opened(base).tensors)


def in_tower(names: set[str], *parts: str) -> set[str]:
    return {name for name in names if name.split(".")[0] in parts}


def test_clip_model_has_both_towers_and_the_projections(base: Path, names: set[str]) -> None:
    assert towers(names) == {
        "vision_model",
        "text_model",
        "visual_projection",
        "text_projection",
        "logit_scale",
    }
    assert names == set(load_file(base / "model.safetensors"))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("vision", ["vision_model"]),
        ("flat", ["vision_model"]),
        ("projection", ["vision_model", "visual_projection"]),
        (
            "full",
            ["vision_model", "text_model", "visual_projection", "text_projection", "logit_scale"],
        ),
        ("text", ["text_model"]),
        ("classifier", ["vision_model"]),
    ],
)
def test_every_class_is_read_under_the_names_of_clip_model(
    base: Path, names: set[str], tmp_path: Path, kind: str, parts: list[str]
) -> None:
    checkpoint = opened(make_fine_tune(base, tmp_path / kind, seed=1, kind=kind))
    assert set(checkpoint.tensors) == in_tower(names, *parts)


def test_a_flat_and_a_prefixed_checkpoint_hold_the_same_tensors(base: Path, tmp_path: Path) -> None:
    flat = opened(make_fine_tune(base, tmp_path / "flat", seed=1, kind="flat"))
    prefixed = opened(make_fine_tune(base, tmp_path / "vision", seed=1, kind="vision"))
    assert "embeddings.class_embedding" in load_file(tmp_path / "flat" / "model.safetensors")
    assert "vision_model.embeddings.class_embedding" in load_file(
        tmp_path / "vision" / "model.safetensors"
    )
    assert all(torch.equal(flat.read(name), prefixed.read(name)) for name in prefixed.tensors)


@pytest.mark.parametrize(
    "name", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPVisionModelWithProjection"]
)
def test_a_model_built_in_memory_is_read_under_the_names_of_clip_model(
    names: set[str], tmp_path: Path, name: str
) -> None:
    import transformers

    config = clip_config()
    part = config.text_config if "Text" in name else config.vision_config
    save(getattr(transformers, name)(part), tmp_path)
    expected = ["text_model" if "Text" in name else "vision_model"]
    if "Projection" in name:
        expected.append("text_projection" if "Text" in name else "visual_projection")
    assert set(opened(tmp_path).tensors) == in_tower(names, *expected)


def test_a_task_head_is_left_out_and_reported(base: Path, tmp_path: Path) -> None:
    checkpoint = opened(make_fine_tune(base, tmp_path / "head", seed=1, kind="classifier"))
    assert checkpoint.left_out == ("classifier.bias", "classifier.weight")
    assert not any("classifier" in name for name in checkpoint.tensors)


@pytest.mark.parametrize(
    ("stored", "model_type", "canonical"),
    [
        ("encoder.layers.0.mlp.fc1.weight", "clip_vision_model", "vision_model."),
        ("pre_layrnorm.weight", "clip_vision_model", "vision_model."),
        ("post_layernorm.bias", "clip_vision_model", "vision_model."),
        ("embeddings.position_ids", "clip_vision_model", "vision_model."),
        ("final_layer_norm.weight", "clip_text_model", "text_model."),
        ("embeddings.token_embedding.weight", "clip_text_model", "text_model."),
        ("vision_model.embeddings.class_embedding", "clip_vision_model", ""),
        ("visual_projection.weight", "clip_vision_model", ""),
        ("text_projection.weight", "clip_text_model", ""),
        ("logit_scale", "clip", ""),
        ("encoder.layers.0.mlp.fc1.weight", "clip", ""),
        ("classifier_of_something.weight", "clip", ""),
        ("classifier.weight", "clip", None),
        ("classifier.weight", "clip_vision_model", None),
    ],
)
def test_names(stored: str, model_type: str, canonical: str | None) -> None:
    expected = None if canonical is None else canonical + stored
    assert canonical_name(stored, FLAT_PREFIXES[model_type]) == expected


def test_the_projections_of_one_attention_belong_together(names: set[str]) -> None:
    groups = [qkv_group(name) for name in names]
    assert sum(group is not None for group in groups) == 3 * (2 + 2)
    attention = "text_model.encoder.layers.1.self_attn"
    assert qkv_group(f"{attention}.v_proj.weight") == (attention, "v")
    assert qkv_group(f"{attention}.v_proj.bias") is None
    assert qkv_group(f"{attention}.out_proj.weight") is None


@pytest.mark.parametrize(
    ("present", "full"),
    [
        (["vision_model.a", "text_model.a"], True),
        (["vision_model.a", "visual_projection.weight"], False),
        (["text_model.a"], False),
        ([], False),
    ],
)
def test_a_full_model_has_both_towers(present: list[str], full: bool) -> None:
    assert is_full_model(present) is full


@pytest.mark.parametrize("kind", ["base", "vision", "text", "classifier"])
def test_the_settings_of_a_tower_are_found_in_every_config(
    base: Path, tmp_path: Path, kind: str
) -> None:
    folder = base if kind == "base" else make_fine_tune(base, tmp_path / kind, 1, kind)
    config = tower_configs(opened(folder).model_config)
    expected = {"vision": ["vision_config"], "text": ["text_config"]}
    assert sorted(config) == expected.get(kind, ["text_config", "vision_config"])
    assert {part.get("hidden_act") for part in config.values()} == {"quick_gelu"}


@pytest.mark.parametrize("model_type", ["", None, 1, [], {}, "a\nb"])
def test_what_is_no_model_is_refused(model_type: Any) -> None:
    with pytest.raises(CheckpointError, match="org/model is not a model of transformers"):
        flat_prefix_of({"model_type": model_type}, "org/model")


@pytest.mark.parametrize("model_type", ["siglip", "clipseg", "dinov2"])
def test_of_other_models_names_stay_as_they_are(model_type: str) -> None:
    found = flat_prefix_of({"model_type": model_type}, "org/model")
    assert canonical_name("encoder.layers.0.mlp.fc1.weight", found) == (
        "encoder.layers.0.mlp.fc1.weight"
    )


def test_a_config_without_model_type_is_refused() -> None:
    with pytest.raises(CheckpointError, match="model_type None"):
        flat_prefix_of({}, "org/model")
