"""Adapters that stock PEFT loads, judged by what the network computes with them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from rules import decompose
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_tsv.checkpoints.layout import MODEL_CLASSES
from hf_tsv.compression.peft import Adapter, bias_of, is_target, lora_pair, pair_keys, plan_adapter
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.system.errors import CheckpointError, RecipeError

pytestmark = [
    # PEFT reads a property that transformers 5.23 has renamed,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # takes the bias of every adapter with `lora_bias` for a damaged matrix when it lists tensors,
    pytest.mark.filterwarnings("ignore:Adapter 'default'.* have invalid shape.*lora_B.bias"),
    # and warns of every second adapter that transformers itself loads.
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
]

State = dict[str, Tensor]

FULL = 10**6
CLASSES = list(MODEL_CLASSES)
LAYER = "vision_model.encoder.layers.0"
TOLERANCE = 2e-5


def with_peft(model: Any, adapter: Path) -> Any:
    """`PeftModel.from_pretrained`, having read every tensor of the adapter and no other."""
    from peft import PeftModel, get_peft_model_state_dict

    wrapped = PeftModel.from_pretrained(model, adapter)
    stored = load_file(adapter / "adapter_model.safetensors")
    assert set(get_peft_model_state_dict(wrapped)) == set(stored)
    return wrapped


def with_peft_merged(model: Any, adapter: Path) -> Any:
    """`merge_and_unload`: a plain transformers model again."""
    return with_peft(model, adapter).merge_and_unload()


def with_transformers(model: Any, adapter: Path) -> Any:
    """`load_adapter` of transformers, which reports what did not fit."""
    info = model.load_adapter(str(adapter))
    assert not info.missing_keys
    assert not info.unexpected_keys
    assert not info.mismatched_keys
    return model


LOADERS = (with_peft, with_peft_merged, with_transformers)


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose image tower has layers 1, 10 and 11."""
    from transformers import CLIPModel

    folder = tmp_path_factory.mktemp("deep") / "base"
    config = clips.clip_config()
    config.vision_config.num_hidden_layers = 12
    torch.manual_seed(0)
    clips.save(CLIPModel(config), folder)
    return folder


def build(model_class: str, folder: Path) -> Any:
    """The class from a folder with canonical names, as users load the base."""
    import transformers

    torch.manual_seed(0)  # the classifier that a CLIP does not come with
    return clips.load(getattr(transformers, model_class), folder).eval()


def build_state(model_class: str, base: Path, state: State, folder: Path) -> Any:
    """The class with weights of our own; what the adapter should make of the base."""
    folder.mkdir()
    shutil.copy(base / "config.json", folder)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return build(model_class, folder)


@torch.no_grad()
def outputs(model: Any) -> Tensor:
    """Everything the network computes of an image, a text, or both, but for their similarity."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(inner).__name__
    generator = torch.Generator().manual_seed(7)
    inputs: dict[str, Any] = {}
    if "Text" not in kind:
        inputs["pixel_values"] = torch.randn(3, 3, 32, 32, generator=generator)
    if "Vision" not in kind and "Image" not in kind:
        ids = torch.randint(0, 250, (3, 9), generator=generator)
        inputs["input_ids"] = torch.cat([ids, torch.full((3, 1), 257)], dim=1)
    found = model(**inputs)
    keys = ("image_embeds", "text_embeds", "last_hidden_state", "pooler_output", "logits")
    return torch.cat([found[key].flatten() for key in keys if key in found])


def fine_tune(base: Path, keep: Callable[[str], bool] = lambda _: True, seed: int = 3) -> State:
    """Weights of the base, updated where `keep` says so."""
    state, tuned = load_file(base / "model.safetensors"), clips.fine_tuned_state(base, seed, "")
    # Ten times as large, so that an update that is not applied is not taken for rounding.
    return {
        name: tensor + 10 * (tuned[name] - tensor) if keep(name) else tensor
        for name, tensor in state.items()
    }


def changes(base: State, tuned: State) -> set[str]:
    return {name for name in base if not torch.equal(base[name], tuned[name])}


def factors(base: State, tuned: State, rank: int) -> dict[str, TaskSingularVectors]:
    """Task singular vectors of the target weights, of 0 to 4 more than `rank` triplets.

    How many differs between the towers, and between layers whose numbers begin alike.
    """
    found = {}
    for name in filter(is_target, base):
        layer = int(name.split(".")[3])
        more = layer % 4 + name.startswith("text_model.")
        found[name] = decompose(tuned[name] - base[name], rank + more)
    return found


def write_adapter(
    folder: Path, base: State, tuned: State, model_class: str, rank: int = FULL, dense: bool = True
) -> Adapter:
    """Both files of an adapter, assembled as its plan says."""
    vectors = factors(base, tuned, rank)
    plan = plan_adapter(
        {name: found.rank for name, found in vectors.items()},
        changes(base, tuned),
        base,
        model_class,
        dense=dense,
        base_model="org/clip",
        revision="main",
    )
    tensors = {name: tuned[source] for source, name in plan.values.items()}
    tensors |= {name: tuned[source] - base[source] for source, name in plan.biases.items()}
    for weight, module in plan.pairs.items():
        A, B = lora_pair(vectors[weight])
        name_a, name_b = pair_keys(module)
        tensors |= {name_a: A.float().contiguous(), name_b: B.float().contiguous()}
    folder.mkdir()
    save_file(
        {name: t.clone() for name, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps(plan.config))
    return plan


def by_hand(base: State, tuned: State, rank: int = FULL, dense: bool = True) -> State:
    """W0 + U diag(S) Vh in the target weights; the other tensors of the fine-tune, or the base."""
    state = dict(tuned if dense else base)
    for name, vectors in factors(base, tuned, rank).items():
        state[name] = base[name] + vectors.matrix().float()
    return state


def assert_close(found: Tensor, expected: Tensor, than: Tensor | None = None) -> None:
    """The same to rounding, and not just what the base computes."""
    torch.testing.assert_close(found, expected, rtol=TOLERANCE, atol=TOLERANCE)
    if than is not None:
        assert (expected - than).abs().max() > 100 * TOLERANCE


def assert_loaded(model_class: str, base: Path, adapter: Path, expected: Tensor) -> None:
    """Every way to load the adapter into the base gives the model expected."""
    before = outputs(build(model_class, base))
    for loader in LOADERS:
        found = outputs(loader(build(model_class, base), adapter))
        assert_close(found, expected, before)


def is_trained(part: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(part)


@pytest.mark.parametrize("model_class", CLASSES)
def test_at_full_rank_the_adapter_is_the_fine_tune(
    zoo: Path, tmp_path: Path, model_class: str
) -> None:
    base, tuned = load_file(zoo / "base/model.safetensors"), fine_tune(zoo / "base")
    write_adapter(tmp_path / "adapter", base, tuned, model_class)
    expected = outputs(build_state(model_class, zoo / "base", tuned, tmp_path / "tuned"))
    assert_loaded(model_class, zoo / "base", tmp_path / "adapter", expected)


@pytest.mark.parametrize("kind", ["vision", "flat", "projection", "full", "text", "classifier"])
def test_published_fine_tunes_are_reproduced_whatever_class_saved_them(
    zoo: Path, tmp_path: Path, kind: str
) -> None:
    base, seed = load_file(zoo / "base/model.safetensors"), 1 + clips.KINDS.index(kind)
    prefix = {"full": "", "text": "text_model."}.get(kind, "vision_model.")
    tuned = clips.fine_tuned_state(zoo / "base", seed, prefix)
    model_class = {"text": "CLIPTextModel", "full": "CLIPModel"}.get(kind, "CLIPVisionModel")
    write_adapter(tmp_path / "adapter", base, tuned, model_class)
    found = outputs(with_peft(build(model_class, zoo / "base"), tmp_path / "adapter"))
    torch.testing.assert_close(found, outputs(build(model_class, zoo / kind)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("model_class", ["CLIPModel", "CLIPVisionModel"])
def test_truncated_the_adapter_adds_exactly_the_triplets_kept(
    zoo: Path, tmp_path: Path, model_class: str, dense: bool
) -> None:
    base, tuned = load_file(zoo / "base/model.safetensors"), fine_tune(zoo / "base")
    plan = write_adapter(tmp_path / "adapter", base, tuned, model_class, rank=3, dense=dense)
    assert plan.config["rank_pattern"]  # ranks differ from weight to weight
    expected = build_state(
        model_class, zoo / "base", by_hand(base, tuned, 3, dense), tmp_path / "tuned"
    )
    assert_loaded(model_class, zoo / "base", tmp_path / "adapter", outputs(expected))


@pytest.mark.parametrize("model_class", ["CLIPModel", "CLIPVisionModel"])
def test_layers_whose_numbers_begin_alike_keep_their_own_rank(
    deep: Path, tmp_path: Path, model_class: str
) -> None:
    base, tuned = load_file(deep / "model.safetensors"), fine_tune(deep)
    plan = write_adapter(tmp_path / "adapter", base, tuned, model_class, rank=3)
    modules = [plan.pairs[f"vision_model.encoder.layers.{i}.mlp.fc1.weight"] for i in (1, 10, 11)]
    config = plan.config
    assert [config["rank_pattern"].get(name, config["r"]) for name in modules] == [4, 5, 6]
    state = by_hand(base, tuned, 3)
    expected = outputs(build_state(model_class, deep, state, tmp_path / "tuned"))
    assert_loaded(model_class, deep, tmp_path / "adapter", expected)


def test_a_frozen_text_tower_leaves_no_text_keys(zoo: Path, tmp_path: Path) -> None:
    base = load_file(zoo / "base/model.safetensors")
    tuned = fine_tune(zoo / "base", is_trained("vis"))
    plan = write_adapter(tmp_path / "adapter", base, tuned, "CLIPModel")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert not [name for name in (*stored, json.dumps(plan.config)) if "text_" in name]
    expected = outputs(build_state("CLIPModel", zoo / "base", tuned, tmp_path / "tuned"))
    assert_loaded("CLIPModel", zoo / "base", tmp_path / "adapter", expected)


@pytest.mark.parametrize(
    "trained",
    [
        f"{LAYER}.mlp.fc1.weight",
        f"{LAYER}.mlp.fc2.bias",
        "text_model.encoder.layers.1.self_attn.out_proj",
        "vision_model.encoder.layers.1",
    ],
)
def test_only_what_changed_is_in_the_adapter(zoo: Path, tmp_path: Path, trained: str) -> None:
    base = load_file(zoo / "base/model.safetensors")
    tuned = fine_tune(zoo / "base", is_trained(trained))
    plan = write_adapter(tmp_path / "adapter", base, tuned, "CLIPModel")
    stored = load_file(tmp_path / "adapter/adapter_model.safetensors")
    module = trained.removesuffix(".weight").removesuffix(".bias")
    assert all(module in name for name in stored)
    assert plan.left_out == ()
    assert plan.config["lora_bias"] == (not trained.endswith("weight"))
    expected = outputs(build_state("CLIPModel", zoo / "base", tuned, tmp_path / "tuned"))
    assert_loaded("CLIPModel", zoo / "base", tmp_path / "adapter", expected)


@pytest.mark.parametrize(
    ("trained", "module"),
    [
        ("vision_model.embeddings.position_embedding", "vision_model.embeddings"),
        ("text_model.embeddings.token_embedding", "text_model.embeddings"),
        (
            "vision_model.encoder.layers.1.layer_norm1.bias",
            "vision_model.encoder.layers.1.layer_norm1",
        ),
        ("vision_model.pre_layrnorm", "vision_model.pre_layrnorm"),
        ("text_model.final_layer_norm", "text_model.final_layer_norm"),
        ("visual_projection", "visual_projection"),
        ("text_projection", "text_projection"),
    ],
)
def test_a_module_is_saved_whole_where_one_of_its_tensors_changed_and_only_there(
    zoo: Path, tmp_path: Path, trained: str, module: str
) -> None:
    base = load_file(zoo / "base/model.safetensors")
    target = f"{LAYER}.mlp.fc1.weight"
    tuned = fine_tune(zoo / "base", lambda name: name.startswith((trained, target)))
    plan = write_adapter(tmp_path / "adapter", base, tuned, "CLIPModel")
    assert plan.config["modules_to_save"] == [module]
    assert set(plan.values) == {name for name in base if name.startswith(module + ".")}
    expected = outputs(build_state("CLIPModel", zoo / "base", tuned, tmp_path / "tuned"))
    found = with_peft(build("CLIPModel", zoo / "base"), tmp_path / "adapter")
    assert_close(outputs(found), expected)


def two_tasks(base: Path) -> tuple[State, State]:
    """Two fine-tunes that trained different, overlapping parts of the image tower."""
    early = ("vision_model.embeddings", *(f"vision_model.encoder.layers.{i}." for i in range(8)))
    late = ("vision_model.p", *(f"vision_model.encoder.layers.{i}." for i in range(5, 12)))
    return (
        fine_tune(base, lambda name: name.startswith(early), seed=1),
        fine_tune(base, lambda name: name.startswith(late), seed=2),
    )


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize(("model_class", "order"), [("CLIPModel", "01"), ("CLIPVisionModel", "10")])
def test_peft_switches_between_two_adapters(
    deep: Path, tmp_path: Path, model_class: str, order: str, dense: bool
) -> None:
    from peft import PeftModel

    base = load_file(deep / "model.safetensors")
    expected = []
    for i, tuned in enumerate(two_tasks(deep)):
        write_adapter(tmp_path / f"task-{i}", base, tuned, model_class, rank=3, dense=dense)
        state = by_hand(base, tuned, 3, dense)
        expected.append(outputs(build_state(model_class, deep, state, tmp_path / f"tuned-{i}")))
    model = build(model_class, deep)
    before = outputs(model)
    first, second = (tmp_path / f"task-{i}" for i in order)
    wrapped = PeftModel.from_pretrained(model, first, adapter_name=first.name)
    result = wrapped.load_adapter(second, adapter_name=second.name)
    assert not result.missing_keys
    assert not result.unexpected_keys
    for i in (0, 1, 0):
        wrapped.set_adapter(f"task-{i}")
        assert_close(outputs(wrapped), expected[i], before)
    with wrapped.disable_adapter():
        assert_close(outputs(wrapped), before)


@pytest.mark.parametrize("dense", [True, False])
def test_transformers_switches_between_two_adapters(
    deep: Path, tmp_path: Path, dense: bool
) -> None:
    base = load_file(deep / "model.safetensors")
    model = build("CLIPVisionModel", deep)
    before = outputs(model)
    expected = []
    # Unlike PEFT, it refuses to switch where one of them replaces modules the other does not.
    whole = [fine_tune(deep, is_trained("vision_model."), seed) for seed in (1, 2)]
    for i, tuned in enumerate(whole if dense else two_tasks(deep)):
        write_adapter(tmp_path / f"task-{i}", base, tuned, "CLIPVisionModel", rank=3, dense=dense)
        state = by_hand(base, tuned, 3, dense)
        expected.append(outputs(build_state("CLIPVisionModel", deep, state, tmp_path / f"t-{i}")))
        info = model.load_adapter(str(tmp_path / f"task-{i}"), adapter_name=f"task-{i}")
        # It takes the keys of the adapters loaded before for missing ones.
        assert not [name for name in info.missing_keys if f"task-{i}" in name]
        assert not info.unexpected_keys
    for i in (0, 1, 0):
        model.set_adapter(f"task-{i}")
        assert_close(outputs(model), expected[i], before)


@pytest.mark.parametrize("combination", ["cat", "svd"])
@pytest.mark.parametrize("model_class", ["CLIPModel", "CLIPVisionModel"])
def test_peft_adds_adapters_of_weights(
    deep: Path, tmp_path: Path, model_class: str, combination: str
) -> None:
    from peft import PeftModel

    base = load_file(deep / "model.safetensors")
    total = dict(base)
    for i, (weight, tuned) in enumerate(zip((1.0, 0.5), two_tasks(deep), strict=True)):
        write_adapter(tmp_path / f"task-{i}", base, tuned, model_class, rank=3, dense=False)
        for name, tensor in by_hand(base, tuned, 3, dense=False).items():
            total[name] = total[name] + weight * (tensor - base[name])
    model = build(model_class, deep)
    before = outputs(model)
    wrapped = PeftModel.from_pretrained(model, tmp_path / "task-0", adapter_name="task-0")
    wrapped.load_adapter(tmp_path / "task-1", adapter_name="task-1")
    rank = {"svd_rank": 16} if combination == "svd" else {}
    wrapped.add_weighted_adapter(
        ["task-0", "task-1"], [1.0, 0.5], "sum", combination_type=combination, **rank
    )
    wrapped.set_adapter("sum")
    expected = outputs(build_state(model_class, deep, total, tmp_path / "total"))
    assert_close(outputs(wrapped), expected, before)
    assert_close(outputs(wrapped.merge_and_unload()), expected)


@pytest.mark.parametrize("model_class", CLASSES)
def test_auto_peft_model_builds_the_base_that_the_adapter_names(
    zoo: Path, tmp_path: Path, model_class: str
) -> None:
    from peft import AutoPeftModel

    base, tuned = load_file(zoo / "base/model.safetensors"), fine_tune(zoo / "base")
    plan = write_adapter(tmp_path / "adapter", base, tuned, model_class)
    assert plan.config["base_model_name_or_path"] == "org/clip"
    assert plan.config["revision"] == "main"
    plan.config["base_model_name_or_path"] = str(zoo / "base")
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(plan.config))
    torch.manual_seed(0)
    found = clips.load(AutoPeftModel, str(tmp_path / "adapter"))
    assert type(found.get_base_model()).__name__ == model_class
    expected = build_state(model_class, zoo / "base", tuned, tmp_path / "tuned")
    assert_close(outputs(found), outputs(expected))


def test_the_adapter_is_for_inference(zoo: Path, tmp_path: Path) -> None:
    base, tuned = load_file(zoo / "base/model.safetensors"), fine_tune(zoo / "base")
    plan = write_adapter(tmp_path / "adapter", base, tuned, "CLIPModel")
    assert plan.config["inference_mode"]
    model = with_peft(build("CLIPModel", zoo / "base"), tmp_path / "adapter")
    assert not [name for name, p in model.named_parameters() if p.requires_grad]


def test_peft_reads_the_config_as_it_is(zoo: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, PeftConfig

    base, tuned = load_file(zoo / "base/model.safetensors"), fine_tune(zoo / "base")
    plan = write_adapter(tmp_path / "adapter", base, tuned, "CLIPVisionModel", rank=3)
    config: Any = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert isinstance(config, LoraConfig)
    read = vars(config) | {"target_modules": sorted(config.target_modules or ())}
    assert plan.config == {name: read[name] for name in plan.config}


def names_of(zoo: Path) -> list[str]:
    return list(load_file(zoo / "base/model.safetensors"))


def plan(
    names: Iterable[str], ranks: dict[str, int], changed: Iterable[str], **kwargs: Any
) -> Adapter:
    kwargs = {"model_class": "CLIPModel", "base_model": "org/clip", "revision": None} | kwargs
    return plan_adapter(ranks, set(changed) | set(ranks), list(names), **kwargs)


def test_what_the_class_or_peft_has_no_place_for_is_left_out(zoo: Path) -> None:
    names = names_of(zoo)
    ranks = {name: 2 for name in names if is_target(name)}
    assert plan(names, ranks, names).left_out == ("logit_scale",)
    vision = plan(names, ranks, names, model_class="CLIPVisionModel")
    assert set(vision.left_out) == {n for n in names if not n.startswith("vision_model.")}
    projected = plan(names, ranks, names, model_class="CLIPVisionModelWithProjection")
    assert "visual_projection.weight" in projected.values
    assert "text_projection.weight" in projected.left_out


def test_an_adapter_of_weights_leaves_out_the_rest(zoo: Path) -> None:
    names = names_of(zoo)
    weights = {name for name in names if is_target(name)}
    found = plan(names, dict.fromkeys(weights, 2), names, dense=False)
    assert set(found.pairs) == weights
    assert set(found.left_out) == set(names) - weights
    assert (found.biases, found.values) == ({}, {})
    assert found.config["modules_to_save"] is None
    assert not found.config["lora_bias"]


def test_a_weight_of_which_no_triplet_was_kept_is_left_out(zoo: Path) -> None:
    weight, other = f"{LAYER}.mlp.fc1.weight", f"{LAYER}.mlp.fc2.weight"
    found = plan(names_of(zoo), {weight: 0, other: 2}, [weight])
    assert set(found.pairs) == {other}
    assert found.left_out == (weight,)
    biased = plan(names_of(zoo), {weight: 0, other: 2}, [weight, bias_of(weight)])
    assert set(biased.pairs) == {weight, other}
    assert biased.left_out == (weight,)
    assert biased.config["rank_pattern"] == {f"{LAYER}.mlp.fc1": 1}


def test_all_biases_are_stored_where_one_changed(zoo: Path) -> None:
    weights = [f"{LAYER}.mlp.fc1.weight", f"{LAYER}.mlp.fc2.weight"]
    found = plan(names_of(zoo), dict.fromkeys(weights, 2), [bias_of(weights[0])])
    assert set(found.biases) == {bias_of(weight) for weight in weights}


def test_buffers_of_old_checkpoints_are_not_stored(zoo: Path) -> None:
    ids = "vision_model.embeddings.position_ids"
    names = [*names_of(zoo), ids]
    found = plan(names, {f"{LAYER}.mlp.fc1.weight": 2}, ["vision_model.embeddings.class_embedding"])
    assert "vision_model.embeddings.patch_embedding.weight" in found.values
    assert ids not in found.values


@pytest.mark.parametrize("changed", ["visual_projection.weight", f"{LAYER}.layer_norm1.weight"])
def test_an_adapter_without_a_low_rank_update_is_refused(zoo: Path, changed: str) -> None:
    with pytest.raises(CheckpointError, match="keep the task as factors"):
        plan(names_of(zoo), {f"{LAYER}.mlp.fc1.weight": 0}, [changed])


def test_biases_alone_are_no_adapter_of_weights(zoo: Path) -> None:
    changed = [f"{LAYER}.mlp.fc1.bias"]
    assert plan(names_of(zoo), {}, changed).pairs
    with pytest.raises(CheckpointError, match="CLIPModel"):
        plan(names_of(zoo), {}, changed, dense=False)


def test_an_update_of_the_other_tower_is_refused(zoo: Path) -> None:
    with pytest.raises(CheckpointError, match="CLIPTextModel: no update"):
        plan(names_of(zoo), {f"{LAYER}.mlp.fc1.weight": 2}, [], model_class="CLIPTextModel")


def test_an_unknown_class_is_refused(zoo: Path) -> None:
    with pytest.raises(RecipeError, match=r"'CLIPSegModel'.*CLIPVisionModel"):
        plan(names_of(zoo), {f"{LAYER}.mlp.fc1.weight": 2}, [], model_class="CLIPSegModel")


def test_the_plan_does_not_depend_on_the_order_of_names(zoo: Path) -> None:
    names = names_of(zoo)
    ranks = {name: 1 + len(name) % 3 for name in names if is_target(name)}
    back = dict(reversed(ranks.items()))
    forwards, backwards = plan(names, ranks, names), plan(names[::-1], back, names[::-1])
    assert json.dumps(vars(forwards)) == json.dumps(vars(backwards))


def test_targets_are_the_linear_layers_with_a_bias(zoo: Path) -> None:
    model = build("CLIPModel", zoo / "base")
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module.bias is not None
    }
    assert {name for name in names_of(zoo) if is_target(name)} == linear


@pytest.mark.parametrize("model_class", CLASSES)
def test_modules_are_those_the_class_has(zoo: Path, model_class: str) -> None:
    names = names_of(zoo)
    found = plan(names, {n: 1 for n in names if is_target(n)}, names, model_class=model_class)
    own = {f"base_model.model.{name}" for name in build(model_class, zoo / "base").state_dict()}
    weights = {f"base_model.model.{module}.weight" for module in found.pairs.values()}
    biases = {key.replace(".lora_B", "") for key in found.biases.values()}
    head = {
        "base_model.model." + name
        for name in ("logit_scale", "classifier.weight", "classifier.bias")
    }
    assert weights | biases | set(found.values.values()) == own - head


def test_a_lora_pair_is_the_task_matrix_in_equal_halves() -> None:
    vectors = decompose(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), rank=4)
    A, B = lora_pair(vectors)
    assert (A.shape, B.shape) == ((4, 9), (6, 4))
    torch.testing.assert_close(B @ A, vectors.matrix())
    torch.testing.assert_close(A @ A.T, torch.diag(vectors.S))
    torch.testing.assert_close(B.T @ B, torch.diag(vectors.S))


def test_a_lora_pair_of_nothing_is_a_pair_of_zeros_of_rank_1() -> None:
    A, B = lora_pair(decompose(torch.zeros(6, 9), rank=4))
    assert (A.shape, B.shape) == ((1, 9), (6, 1))
    assert not A.any()
    assert not B.any()
