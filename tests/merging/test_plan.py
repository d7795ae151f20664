"""Plans: which weight gets which treatment, decided from headers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from clips import clip_config

from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.dtypes import DTYPES_OF_TORCH
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.checkpoints.storage.tensors import TensorInfo
from hf_tsv.merging.costs import Parallelism, fitting, operations, peak_memory
from hf_tsv.merging.plan import MergePlan, Weight, make_plan
from hf_tsv.recipes.settings import Settings
from hf_tsv.system.errors import CheckpointError, RecipeError

LAYER = "vision_model.encoder.layers.0"
FC1 = f"{LAYER}.mlp.fc1.weight"  # 64 x 32
POSITION_IDS = "vision_model.embeddings.position_ids"


def headers(
    name: str, shapes: Mapping[str, Any], config: Mapping[str, Any] | None = None
) -> Checkpoint:
    """A checkpoint of which only the headers exist; a value is a shape, or (dtype, shape)."""
    tensors = {}
    for key, value in shapes.items():
        dtype, shape = (
            value if value and isinstance(value[0], torch.dtype) else (torch.float32, value)
        )
        kind = DTYPES_OF_TORCH[f"{dtype}".removeprefix("torch.")]
        tensors[key] = TensorInfo("f", kind, tuple(shape), 0, prod(shape) * dtype.itemsize)
    pinned = PinnedCheckpoint(name, None, LocalFiles(Path("/absent")), {})
    return Checkpoint(pinned, dict(config or {"model_type": "clip"}), tensors, ("f",))


@pytest.fixture(scope="module")
def shapes() -> dict[str, Any]:
    """Names and shapes of a tiny CLIPModel, with the position ids that old checkpoints have."""
    from transformers import CLIPModel

    with torch.device("meta"):
        state = CLIPModel(clip_config()).state_dict()
    return {
        **{name: tuple(tensor.shape) for name, tensor in state.items()},
        POSITION_IDS: (torch.int64, (1, 17)),
    }


@pytest.fixture(scope="module")
def base(shapes: dict[str, Any]) -> Checkpoint:
    return headers("base", shapes)


def vision(shapes: dict[str, Any], *more: str) -> dict[str, Any]:
    """The vision tower, as a CLIPVisionModel has it, and more names."""
    return {n: s for n, s in shapes.items() if n.startswith("vision_model.") or n in more}


def tasks(shapes: dict[str, Any], count: int = 2) -> list[Checkpoint]:
    return [headers(f"task{i}", vision(shapes)) for i in range(count)]


def by_label(plan: MergePlan) -> dict[str, Weight]:
    return {weight.label: weight for weight in plan.weights}


def treated(plan: MergePlan, treatment: str) -> set[str]:
    return {n for w in plan.weights if w.treatment == treatment for n in w.names}


# Treatments


def test_every_tensor_of_the_base_is_treated_once(base: Checkpoint, shapes: dict[str, Any]) -> None:
    for qkv in ("split", "fused"):
        plan = make_plan(base, tasks(shapes), Settings(qkv=qkv))  # type: ignore[arg-type]
        names = [name for weight in plan.weights for name in weight.names]
        assert sorted(names) == sorted(shapes)
        assert sum(plan.counts().values()) == len(shapes)


def test_matrices_are_decomposed_and_the_rest_of_the_tower_averaged(
    base: Checkpoint, shapes: dict[str, Any]
) -> None:
    plan = make_plan(base, tasks(shapes), Settings())
    matrices = {n for n, s in vision(shapes).items() if len(s) == 2 and n != POSITION_IDS}
    assert treated(plan, "decomposed") == matrices
    assert treated(plan, "averaged") == set(vision(shapes)) - matrices - {POSITION_IDS}
    assert by_label(plan)["vision_model.embeddings.patch_embedding.weight"].reason == "not a matrix"


def test_what_no_checkpoint_has_is_copied(base: Checkpoint, shapes: dict[str, Any]) -> None:
    weights = by_label(make_plan(base, tasks(shapes), Settings()))
    for name in set(shapes) - set(vision(shapes)):
        assert (weights[name].treatment, weights[name].reason) == ("copied", "no checkpoint has it")
        assert weights[name].inputs == ()


def test_integers_are_copied(base: Checkpoint, shapes: dict[str, Any]) -> None:
    for method in ("tsv", "average", "task-arithmetic"):
        plan = make_plan(base, tasks(shapes), Settings(method=method))  # type: ignore[arg-type]
        weight = by_label(plan)[POSITION_IDS]
        assert (weight.treatment, weight.reason) == ("copied", "not a floating-point tensor")
        assert plan.specs[POSITION_IDS].dtype.torch == torch.int64


@pytest.mark.parametrize("missing_in", ["base", "task"])
def test_integers_may_be_missing(shapes: dict[str, Any], missing_in: str) -> None:
    without = {name: shape for name, shape in shapes.items() if name != POSITION_IDS}
    base = headers("base", without if missing_in == "base" else shapes)
    task = headers("task", vision(without if missing_in == "task" else shapes))
    assert set(make_plan(base, [task], Settings()).specs) == set(base.tensors)


def test_empty_tensors_are_copied() -> None:
    shapes = {"vision_model.a": (0, 4), "vision_model.b": (4, 4)}
    plan = make_plan(headers("base", shapes), [headers("task", shapes)], Settings())
    assert by_label(plan)["vision_model.a"].treatment == "copied"


@pytest.mark.parametrize(
    ("method", "treatment"),
    [
        ("tsv", "decomposed"),
        ("low-rank", "decomposed"),
        ("orthogonal", "decomposed"),
        ("task-arithmetic", "summed"),
        ("average", "averaged"),
    ],
)
def test_the_method_decides_about_matrices(
    base: Checkpoint, shapes: dict[str, Any], method: Any, treatment: str
) -> None:
    plan = make_plan(base, tasks(shapes), Settings(method=method))
    assert by_label(plan)[FC1].treatment == treatment
    vector = by_label(plan)[f"{LAYER}.mlp.fc1.bias"].treatment
    assert vector == ("summed" if method == "task-arithmetic" else "averaged")


@pytest.mark.parametrize("method", ["tsv", "task-arithmetic", "ties"])
def test_matrices_but_tables_of_positions_are_calibrated(
    base: Checkpoint, shapes: dict[str, Any], method: str
) -> None:
    plan = make_plan(base, tasks(shapes), Settings(method=method, calibrate=True))
    held = [w for w in plan.weights if w.treatment != "copied"]
    matrices = {w.label for w in held if len(w.shape) == 2}
    tables = {label for label in matrices if "embedding" in label}
    assert len(tables) == 1
    assert {w.label for w in plan.weights if w.calibrated} == matrices - tables
    assert all(w.together for w in plan.weights if w.calibrated)


@pytest.mark.parametrize("method", ["tsv", "average"])
def test_larv_scales_what_the_method_merges(
    base: Checkpoint, shapes: dict[str, Any], method: str
) -> None:
    plan = make_plan(base, tasks(shapes), Settings(method=method, layer_scale="larv"))
    surveyed = {w.label for w in plan.weights if w.surveyed}
    assert FC1 in surveyed and f"{LAYER}.mlp.fc1.bias" not in surveyed
    assert "visual_projection.weight" not in surveyed  # no task has it


def test_counts_say_what_is_done_and_put_unchanged_weights_to_the_copies(
    base: Checkpoint, shapes: dict[str, Any]
) -> None:
    plan = make_plan(base, tasks(shapes), Settings(method="task-arithmetic"))
    tower = len(vision(shapes)) - 1
    rest = len(shapes) - tower
    none = {"decomposed": 0, "averaged": 0}
    assert plan.counts() == none | {"summed": tower, "copied": rest}
    frozen = plan.counts(frozenset([FC1]))
    assert frozen == none | {"summed": tower - 1, "copied": rest + 1}
    ties = make_plan(base, tasks(shapes), Settings(method="ties")).counts()
    assert "summed" not in ties and ties["combined"] + ties["averaged"] == tower


# Ranks


@pytest.mark.parametrize("count", [1, 2, 3, 32])
def test_by_default_the_tasks_share_the_rank(
    base: Checkpoint, shapes: dict[str, Any], count: int
) -> None:
    for method in ("tsv", "low-rank"):
        plan = make_plan(base, tasks(shapes, count), Settings(method=method))  # type: ignore[arg-type]
        assert by_label(plan)[FC1].rank == 32 // count


def test_orthogonal_keeps_every_direction(base: Checkpoint, shapes: dict[str, Any]) -> None:
    plan = make_plan(base, tasks(shapes, 3), Settings(method="orthogonal", rank=2))
    assert by_label(plan)[FC1].rank == 32


@pytest.mark.parametrize(
    ("method", "choice", "rank"),
    [
        ("tsv", {"rank": 4}, 4),
        ("tsv", {"rank": 99}, 16),
        ("tsv", {"rank_fraction": 0.25}, 8),
        ("tsv", {"rank_fraction": 1.0}, 16),
        ("tsv", {"rank_fraction": 0.001}, 1),
        ("low-rank", {"rank": 20}, 20),
        ("low-rank", {"rank": 99}, 32),
        ("low-rank", {"rank_fraction": 1.0}, 32),
    ],
)
def test_a_rank_is_kept_as_far_as_it_fits(
    base: Checkpoint, shapes: dict[str, Any], method: Any, choice: Any, rank: int
) -> None:
    plan = make_plan(base, tasks(shapes, 2), Settings(method=method, **choice))
    assert by_label(plan)[FC1].rank == rank
    lowered = any("lowered to ⌊k/2⌋" in warning for warning in plan.warnings)
    assert lowered is (method == "tsv" and rank == 16)


@pytest.mark.parametrize("method", ["tsv", "low-rank"])
def test_more_tasks_than_directions_are_averaged(
    base: Checkpoint, shapes: dict[str, Any], method: Any
) -> None:
    plan = make_plan(base, tasks(shapes, 33), Settings(method=method))
    assert by_label(plan)[FC1].treatment == "averaged"
    assert by_label(plan)[FC1].reason == "33 tasks do not fit into 32 directions"
    assert treated(plan, "decomposed") == set()


def test_orthogonal_takes_any_number_of_tasks(base: Checkpoint, shapes: dict[str, Any]) -> None:
    plan = make_plan(base, tasks(shapes, 33), Settings(method="orthogonal"))
    assert by_label(plan)[FC1].treatment == "decomposed"


# What is excluded


def test_excluded_weights_are_averaged(base: Checkpoint, shapes: dict[str, Any]) -> None:
    globs = ("*.fc1.weight", f"{LAYER}.self_attn.q_proj.weight")
    plan = make_plan(base, tasks(shapes), Settings(exclude=globs))
    weights = by_label(plan)
    excluded = {w.label for w in plan.weights if w.reason == "excluded"}
    assert excluded == {n for n in vision(shapes) if n.endswith("fc1.weight") or n == globs[1]}
    assert weights[FC1].treatment == "averaged"
    assert weights[f"{LAYER}.mlp.fc2.weight"].treatment == "decomposed"


def test_the_text_projection_is_averaged_as_in_the_paper_unless_told_otherwise(
    base: Checkpoint, shapes: dict[str, Any]
) -> None:
    full = [headers("task", shapes)]
    name = "text_projection.weight"
    assert by_label(make_plan(base, full, Settings()))[name].treatment == "averaged"
    assert by_label(make_plan(base, full, Settings(exclude=())))[name].treatment == "decomposed"


@pytest.mark.parametrize("method", ["task-arithmetic", "average"])
def test_excluded_weights_are_averaged_by_every_method(
    base: Checkpoint, shapes: dict[str, Any], method: Any
) -> None:
    plan = make_plan(base, tasks(shapes), Settings(method=method, exclude=(FC1,)))
    assert by_label(plan)[FC1].treatment == "averaged"


def test_a_glob_that_matches_nothing_is_pointed_out(
    base: Checkpoint, shapes: dict[str, Any]
) -> None:
    globs = ("*.fc1.weight", "*.FC1.weight", "fc1.weight")
    warnings = make_plan(base, tasks(shapes), Settings(exclude=globs)).warnings
    assert warnings == tuple(f"`exclude={glob}` matches no weight." for glob in globs[1:])
    no_text = headers("base", vision(shapes))
    assert make_plan(no_text, tasks(shapes), Settings()).warnings == ()


# Fused attention


def test_fused_projections_are_one_stack(base: Checkpoint, shapes: dict[str, Any]) -> None:
    plan = make_plan(base, tasks(shapes), Settings(qkv="fused"))
    stack = by_label(plan)[f"{LAYER}.self_attn.{{q,k,v}}_proj.weight"]
    assert stack.names == tuple(f"{LAYER}.self_attn.{letter}_proj.weight" for letter in "qkv")
    assert (stack.shape, stack.treatment, stack.rank) == ((96, 32), "decomposed", 16)
    stacks = [weight for weight in plan.weights if len(weight.names) == 3]
    assert len(stacks) == 2 + 2  # of both towers
    assert by_label(plan)[f"{LAYER}.self_attn.q_proj.bias"].treatment == "averaged"


def test_an_excluded_projection_excludes_its_stack(
    base: Checkpoint, shapes: dict[str, Any]
) -> None:
    choice = Settings(qkv="fused", exclude=(f"{LAYER}.self_attn.k_proj.weight",))
    weights = by_label(make_plan(base, tasks(shapes), choice))
    assert weights[f"{LAYER}.self_attn.{{q,k,v}}_proj.weight"].treatment == "averaged"
    other = LAYER.replace("0", "1")
    assert weights[f"{other}.self_attn.{{q,k,v}}_proj.weight"].treatment == "decomposed"


def test_an_incomplete_stack_stays_split(shapes: dict[str, Any]) -> None:
    lacking = {n: s for n, s in shapes.items() if n != f"{LAYER}.self_attn.v_proj.weight"}
    plan = make_plan(
        headers("base", lacking), [headers("task", vision(lacking))], Settings(qkv="fused")
    )
    assert f"{LAYER}.self_attn.q_proj.weight" in by_label(plan)


# Who holds what


def test_each_weight_knows_which_checkpoints_hold_it(
    base: Checkpoint, shapes: dict[str, Any]
) -> None:
    inputs = [
        headers("vision", vision(shapes)),
        headers("projection", vision(shapes, "visual_projection.weight")),
        headers("full", shapes),
    ]
    weights = by_label(make_plan(base, inputs, Settings()))
    assert weights[FC1].inputs == (0, 1, 2)
    assert weights["visual_projection.weight"].inputs == (1, 2)
    assert weights["text_projection.weight"].inputs == (2,)


# What does not fit


def misfit(base: Checkpoint, *inputs: Checkpoint) -> list[str]:
    with pytest.raises(CheckpointError) as error:
        make_plan(base, inputs, Settings())
    assert "`base_model=REF`" in (error.value.hint or "")
    first, *lines = error.value.message.split("\n  ")
    count = f"{len(lines)} weights do" if len(lines) > 1 else "1 weight does"
    assert first == f"{count} not fit the base model base:"
    return lines


def test_everything_that_does_not_fit_is_listed_at_once(
    base: Checkpoint, shapes: dict[str, Any]
) -> None:
    first, second = vision(shapes), vision(shapes)
    del first[FC1]
    first["vision_model.extra.weight"] = (3, 4)
    first[f"{LAYER}.mlp.fc2.weight"] = (64, 32)
    second["vision_model.embeddings.class_embedding"] = (torch.int64, (32,))
    assert misfit(base, headers("first", first), headers("second", second)) == [
        f"first: {FC1} is missing",
        f"first: {LAYER}.mlp.fc2.weight has shape [64, 32], the base [32, 64]",
        "first: vision_model.extra.weight is not in the base",
        "second: vision_model.embeddings.class_embedding is torch.int64, in the base torch.float32",
    ]


def test_another_architecture_is_one_sentence_and_three_tensors(
    base: Checkpoint, shapes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    larger = {
        name: tuple(2 * size for size in shape)
        for name, shape in vision(shapes).items()
        if name != POSITION_IDS
    }
    task = headers("task", larger)
    with pytest.raises(CheckpointError) as error:
        make_plan(base, [task], Settings())
    said, count, *lines = error.value.message.splitlines()
    assert said == (
        "task has a vision tower with hidden size 64, layers 2, patch size 16; base has 32, 2, 8."
    )
    total = int(count.split()[0])
    assert count == f"{total} weights do not fit the base model base:" and total > 20
    assert len(lines) == 4 and all("has shape" in line for line in lines[:3])
    assert lines[3] == f"  … and {total - 3} more (HF_DEBUG=1 lists all)"
    monkeypatch.setenv("HF_DEBUG", "1")
    with pytest.raises(CheckpointError) as error:
        make_plan(base, [task], Settings())
    assert len(error.value.message.splitlines()) == total + 2


def test_a_full_model_must_be_complete(base: Checkpoint, shapes: dict[str, Any]) -> None:
    for name in ("logit_scale", "visual_projection.weight", "text_model.final_layer_norm.bias"):
        lacking = {n: s for n, s in shapes.items() if n != name}
        assert misfit(base, headers("task", lacking)) == [f"task: {name} is missing"]


def test_a_tower_that_the_base_lacks_is_one_line(shapes: dict[str, Any]) -> None:
    base = headers("base", vision(shapes))
    lines = misfit(base, headers("task", shapes))
    text = sum(name.startswith("text_model.") for name in shapes)
    assert f"task: the base has no text_model ({text} weights)" in lines
    assert len(lines) == 4  # text_model, both projections, logit_scale


def test_a_checkpoint_with_no_encoder_in_common_is_one_line(shapes: dict[str, Any]) -> None:
    text = {name: shape for name, shape in shapes.items() if name.startswith("text_model.")}
    lines = misfit(headers("base", vision(shapes)), headers("task", text))
    assert lines == ["task: it has no encoder in common with the base"]


def test_another_patch_size_does_not_fit(base: Checkpoint, shapes: dict[str, Any]) -> None:
    other = vision(shapes)
    other["vision_model.embeddings.patch_embedding.weight"] = (32, 3, 16, 16)
    other["vision_model.embeddings.position_embedding.weight"] = (5, 32)
    with pytest.raises(CheckpointError, match=r"(?s)patch size 16; base has 32, 2, 8\.\n2 weights"):
        make_plan(base, [headers("task", other)], Settings())


def test_a_base_with_a_task_head_is_a_fine_tune(base: Checkpoint, shapes: dict[str, Any]) -> None:
    wrong = replace(base, head={"classifier.weight": base.tensors[min(base.tensors)]})
    with pytest.raises(CheckpointError, match=r"base has a task head \(classifier\.weight\)"):
        make_plan(wrong, tasks(shapes), Settings())


# What the user is warned of


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("num_attention_heads", 8),
        ("layer_norm_eps", 1e-6),
        ("patch_size", 16),
    ],
)
def test_settings_that_shapes_do_not_show_are_compared(
    shapes: dict[str, Any], key: str, value: Any
) -> None:
    config = clip_config().to_dict()
    base = headers("base", shapes, config)
    same = headers("same", vision(shapes), config["vision_config"])
    other = headers("other", vision(shapes), {**config["vision_config"], key: value})
    ours = config["vision_config"][key]
    (warning,) = make_plan(base, [same, other], Settings()).warnings
    assert warning == (
        f"other has vision_config.{key} = {value}, the base {ours}: it is probably not"
        " a fine-tune of this base."
    )


def test_a_config_that_is_silent_or_strange_gives_no_warning(shapes: dict[str, Any]) -> None:
    base = headers("base", shapes, {"model_type": "clip", "vision_config": 3, "text_config": None})
    silent = headers("task", vision(shapes), {"model_type": "clip_vision_model", "hidden_act": []})
    assert make_plan(base, [silent], Settings()).warnings == ()


# The output


@pytest.mark.parametrize("dtype", [None, "float32", "float16", "bfloat16"])
def test_the_output_has_the_base_s_dtype_unless_told_otherwise(
    shapes: dict[str, Any], dtype: Any
) -> None:
    half = {n: s if n == POSITION_IDS else (torch.float16, s) for n, s in shapes.items()}
    plan = make_plan(headers("base", half), tasks(shapes), Settings(dtype=dtype))
    wanted = torch.float16 if dtype is None else getattr(torch, dtype)
    assert {spec.dtype.torch for n, spec in plan.specs.items() if n != POSITION_IDS} == {wanted}
    assert plan.specs[POSITION_IDS].dtype.torch == torch.int64
    assert {n: s.shape for n, s in plan.specs.items()} == {
        n: info.shape for n, info in headers("base", half).tensors.items()
    }


def test_the_output_is_split_as_asked(base: Checkpoint, shapes: dict[str, Any]) -> None:
    one = make_plan(base, tasks(shapes), Settings()).shards
    many = make_plan(base, tasks(shapes), Settings(max_shard_size=40_000)).shards
    assert list(one.sizes) == ["model.safetensors"] and one.index is None
    assert len(many.sizes) == 4 and many.index is not None
    assert set(many.places) == set(one.places) == set(shapes)


def peak(base: Checkpoint, inputs: Sequence[Checkpoint], **parallelism: Any) -> int:
    """Bytes that a merge is said to need."""
    weights = make_plan(base, inputs, Settings()).weights
    return peak_memory(weights, Parallelism(**parallelism))


def test_the_memory_needed_grows_with_the_tasks_and_the_largest_weight(
    base: Checkpoint, shapes: dict[str, Any]
) -> None:
    few, many = (peak(base, tasks(shapes, n)) for n in (2, 8))
    largest = max(prod(info.shape) for info in base.tensors.values())
    assert 3 * 4 * largest < few < many < 1000 * largest


def test_memory_does_not_grow_with_the_number_of_layers() -> None:
    def model(layers: int) -> dict[str, Any]:
        return {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": (64, 32) for i in range(layers)}

    peaks = {peak(headers("base", model(n)), [headers("task", model(n))]) for n in (3, 5, 50)}
    assert len(peaks) == 1


def test_less_memory_means_less_at_a_time(base: Checkpoint, shapes: dict[str, Any]) -> None:
    weights = make_plan(base, tasks(shapes, 4), Settings()).weights
    inputs = tasks(shapes, 4)
    sizes = [
        peak(base, inputs, threads=4),
        peak(base, inputs, threads=4, ahead=False),
        peak(base, inputs, threads=1, ahead=False),
    ]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    used = 1000
    assert fitting(weights, 4, None, used) == Parallelism(4)
    assert fitting(weights, 4, used + sizes[0], used) == Parallelism(4)
    assert fitting(weights, 4, used + sizes[1], used) == Parallelism(4, ahead=False)
    assert fitting(weights, 4, used + sizes[2], used) == Parallelism(1, ahead=False)
    with pytest.raises(RecipeError, match="of memory"):
        fitting(weights, 4, used + sizes[2] - 1, used)


def test_operations_follow_the_size_and_the_number_of_tasks(base: Checkpoint) -> None:
    """What processes share is weighed by it: a wide layer counts more, a copy next to nothing."""

    def cost(shape: tuple[int, ...], count: int, **settings: Any) -> float:
        name = "vision_model.encoder.layers.0.mlp.fc1.weight"
        plan = make_plan(
            headers("base", {name: shape}), tasks({name: shape}, count), Settings(**settings)
        )
        return operations(plan.weights[0])

    assert cost((64, 32), 2) < cost((128, 32), 2) < cost((128, 64), 2) < cost((128, 64), 4)
    assert cost((64, 32), 2, method="average") < 0.5 * cost((64, 32), 2)
    assert operations(Weight(("a",), (64, 32), "copied")) < cost((64, 32), 2, method="average")


def test_what_is_read_ahead_counts_in_memory() -> None:
    shapes = {f"vision_model.encoder.layers.{i}.mlp.fc1.weight": (64, 32) for i in range(3)}
    base, inputs = headers("base", shapes), [headers(f"t{i}", shapes) for i in range(4)]
    assert peak(base, inputs) - peak(base, inputs, ahead=False) >= 4 * 64 * 32 * (4 + 1)
