"""Finer control of a merge: weights by name, factors by glob, and weights that stay the base's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import adapters
import pytest
import reference
import torch
import yaml
from cli import hf_tsv as run
from hub import Hub
from reference import generator, one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_tsv
from hf_tsv.checkpoints.names import RECIPE_FILE
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.recipes.scaling import factors_of, place_of
from hf_tsv.system.errors import RecipeError, UsageError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

State = dict[str, Tensor]

LAYER = "vision_model.encoder.layers.1"
FC1 = f"{LAYER}.mlp.fc1.weight"
KINDS = ("vision", "full")
SHAPES = {"first.square.weight": (24, 24), "first.tall.weight": (40, 16), "first.bias": (16,),
          "last.square.weight": (24, 24), "last.bias": (16,)}  # fmt: skip


def of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def written(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def product(scale: Mapping[str, float], name: str, task: str = "") -> float:
    """Factor of a weight by entries `GLOB` or `TASK:GLOB`, from the definition."""
    found = 1.0
    for key, factor in scale.items():
        whose, _, glob = key.rpartition(":")
        if whose == task and fnmatchcase(name, glob):
            found *= factor
    return found


# The definition, on tiny CLIPs

SCALE = {
    f"{LAYER}.*": 0.5,
    "*.mlp.*": -3,
    "full:vision_model.*": 0.25,
    "full:*.self_attn.*": 4,
    "vision:*.layers.0.mlp.*": 0,
}


def merged(zoo: Path, output: Path, tasks: Sequence[object], **options: Any) -> Any:
    return hf_tsv.merge(tasks, base_model=zoo / "base", output=output, progress=False, **options)


@pytest.mark.parametrize("method", ["tsv", "task-arithmetic", "average"])
def test_a_scaled_merge_is_that_of_the_equations(zoo: Path, tmp_path: Path, method: str) -> None:
    merged(zoo, tmp_path / "out", [zoo / kind for kind in KINDS], method=method, alpha=0.7,
           weights={"vision": 0.5}, scale=SCALE)  # fmt: skip
    base, out = of(zoo / "base"), of(tmp_path / "out")
    states, factors = [of(zoo / kind) for kind in KINDS], set()
    for name, w0 in ((name, w0.double()) for name, w0 in base.items()):
        deltas = []
        for kind, weight, state in zip(KINDS, (0.5, 1), states, strict=True):
            factor = weight * product(SCALE, name, kind)
            deltas.append(factor * (state.get(name, w0).double() - w0))
            factors.add(factor)
        held = [delta for delta in deltas if delta.any()]
        if method == "task-arithmetic":
            update = reference.task_arithmetic(deltas)
        elif method == "tsv" and w0.ndim == 2 and name != "text_projection.weight" and held:
            update = reference.tsv(held, [min(w0.shape) // 2] * len(held))
        else:
            update = reference.average(deltas)
        update = 0.7 * product(SCALE, name) * update
        error = (out[name].double() - w0 - update).norm()
        assert error < 1e-6 * w0.norm() + 1e-4 * update.norm(), name
    assert factors == {0.5, 0, 1, 0.25, 4}


def test_checkpoints_adapters_and_task_factors_are_scaled_alike(zoo: Path, tmp_path: Path) -> None:
    plain = {"base_model": zoo / "base", "progress": False}
    adapter = adapters.trained(zoo, tmp_path / "adapter", "plain")
    hf_tsv.compress(zoo / "vision", output=tmp_path / "factors", rank=3, **plain)
    hf_tsv.reconstruct(tmp_path / "factors", output=tmp_path / "whole", **plain)
    tasks = [tmp_path / "adapter", tmp_path / "factors", zoo / "full"]
    scale = {"adapter:*.layers.1.*": -2, "factors:*q_proj*": 0.5, "factors:*.fc1.*": 0,
             "full:*": 0.25}  # fmt: skip
    merged(zoo, tmp_path / "out", tasks, method="task-arithmetic", alpha=1, scale=scale)
    base, out = of(zoo / "base"), of(tmp_path / "out")
    states = [adapter, of(tmp_path / "whole"), of(zoo / "full")]
    for name, w0 in ((name, w0.double()) for name, w0 in base.items()):
        update = sum(
            product(scale, name, task.name) * (state.get(name, w0).double() - w0)
            for task, state in zip(tasks, states, strict=True)
        )
        assert torch.allclose(out[name].double() - w0, update, atol=2e-6), name


def news(report: hf_tsv.MergeReport) -> list[str]:
    """Warnings, but for that of an architecture that is not known."""
    return [text for text in report.warnings if "generic layout" not in text]


# Equality to the byte, on numbers that float32 has


def save(folder: Path, tensors: State) -> Path:
    """A checkpoint of no known architecture."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "odd"}')
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def steps(seed: int, size: int) -> State:
    """Random tensors whose entries are multiples of 2⁻¹⁴, so that halves of them are exact."""
    g = generator(seed)
    return {n: torch.randint(-size, size + 1, s, generator=g) / 2**14 for n, s in SHAPES.items()}


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A base and three fine-tunes."""
    base = steps(0, 2**12)
    save(tmp_path / "base", base)
    for seed, name in enumerate("abc", start=1):
        tuned = {n: base[n] + delta for n, delta in steps(seed, 60).items()}
        save(tmp_path / name, tuned)
    return tmp_path


def merge(folder: Path, output: str, tasks: str = "abc", **options: Any) -> bytes:
    merged(folder, folder / output, [folder / name for name in tasks], **options)
    return written(folder / output)


ALL = [name for name, row in METHODS.items() if not row.learns]


@pytest.mark.parametrize(
    ("square", "tall", "bias"), [(2.0, -0.5, 0.0), (0.0, 2.0, -0.5)], ids=["first", "second"]
)
@pytest.mark.parametrize("method", ALL)
def test_a_scaled_task_is_merged_as_the_fine_tune_with_that_update(
    odd: Path, method: str, square: float, tall: float, bias: float
) -> None:
    """Also by methods that look at all weights before the first is merged."""
    base = of(odd / "base")
    factors = {"first.square.weight": square, "first.tall.weight": tall, "first.bias": bias}
    tuned = {n: base[n] + factors.get(n, 1.0) * (w - base[n]) for n, w in of(odd / "b").items()}
    save(odd / "scaled" / "b", tuned)
    scale = {f"b:{name}": factor for name, factor in factors.items()}
    assert merge(odd, "out", method=method, scale=scale) != merge(odd, "plain", method=method)
    tasks = [odd / "a", odd / "scaled" / "b", odd / "c"]
    merged(odd, odd / "expected", tasks, method=method)
    assert written(odd / "out") == written(odd / "expected")
    for mask in (odd / "expected" / "masks").glob("*/mask.safetensors"):
        assert mask.read_bytes() == (odd / "out" / mask.relative_to(odd / "expected")).read_bytes()
    assert (odd / "out" / "masks").exists() == (method == "tall-mask")


@pytest.mark.parametrize("method", [name for name in ALL if METHODS[name].alpha is not None])
def test_a_factor_without_a_task_is_one_of_alpha(odd: Path, method: str) -> None:
    def result(name: str, **options: Any) -> State:
        merge(odd, name, method=method, **options)
        return of(odd / name)

    scaled = result("scaled", alpha=0.8, scale={"first.*": 0.25, "*.bias": 2})
    expected = {0.2: result("both", alpha=0.2), 0.4: result("bias", alpha=0.4)}
    for name, tensor in scaled.items():
        alpha = 0.8 * (0.25 if name.startswith("first.") else 1) * (2 if "bias" in name else 1)
        other = expected.get(alpha) or result(f"alpha{alpha}", alpha=alpha)
        shutil.rmtree(odd / f"alpha{alpha}", ignore_errors=True)
        assert torch.equal(tensor, other[name]), name


def test_weights_by_name_are_those_in_order(odd: Path) -> None:
    expected = merge(odd, "ordered", weights=[1, 0.5, -2])
    assert merge(odd, "named", weights={"c": -2, odd / "b": 0.5}) == expected
    assert merge(odd, "plain") != expected


# Weights that stay the base's


@pytest.mark.parametrize("method", ["tsv", "ties", "average", "tall-mask"])
def test_kept_weights_are_those_of_the_base_to_the_bit(odd: Path, method: str) -> None:
    report = merged(odd, odd / "out", [odd / "a", odd / "b"], method=method,
                    keep_base=["first.*", "*.none"])  # fmt: skip
    base, out = of(odd / "base"), of(odd / "out")
    for name in SHAPES:
        assert torch.equal(out[name], base[name]) == name.startswith("first."), name
    entry = report.treatments["first.bias"]
    assert (entry["treatment"], entry["reason"]) == ("copied", "kept from the base")
    assert report.weights["copied"] == 3
    assert news(report) == ["`keep_base=*.none` matches no weight."]
    assert report.selected == ["3 weights kept from the base (first.*)"]


def test_kept_weights_are_not_averaged_and_only_rounded_to_the_type_of_the_output(
    odd: Path,
) -> None:
    merge(odd, "out", keep_base="first.*", exclude=["*"], dtype="bfloat16")
    base, out = of(odd / "base"), of(odd / "out")
    assert torch.equal(out["first.bias"], base["first.bias"].bfloat16())
    assert not torch.equal(out["last.bias"], base["last.bias"].bfloat16())


def test_a_task_that_changes_only_kept_weights_is_no_copy_of_the_base(odd: Path) -> None:
    tuned = of(odd / "base") | {"last.bias": of(odd / "c")["last.bias"]}
    save(odd / "d", tuned)
    report = merged(odd, odd / "out", [odd / "a", odd / "d"], keep_base="last.*")
    assert report.weights["copied"] == 2
    report = merged(odd, odd / "none", [odd / "a", odd / "d"], keep_base="*")
    assert differing(odd / "base", odd / "none") == []
    assert news(report) == ["No update is left to merge: the result is the base model."]


def differing(first: Path, second: Path) -> list[str]:
    """Names of the weights that are not the same to the bit."""
    base = of(first)
    return [name for name, w in of(second).items() if not torch.equal(w, base[name])]


# Fused attention


def test_stacked_weights_have_one_factor(zoo: Path, tmp_path: Path) -> None:
    tasks = [zoo / kind for kind in KINDS]
    for options in ({"scale": {"*q_proj.weight": 2}}, {"scale": {"full:*.q_proj.weight": 2}},
                    {"keep_base": ["*.layers.0.*.k_proj.weight"]}):  # fmt: skip
        (option,) = options
        with pytest.raises(UsageError, match=f"`{option}=` has different .*q_proj.*qkv=split"):
            merged(zoo, tmp_path / "out", tasks, qkv="fused", **options)
    assert list(tmp_path.iterdir()) == []
    split = merged(zoo, tmp_path / "out", tasks, scale={"*q_proj.weight": 2})
    assert split.treatments[f"{LAYER}.self_attn.q_proj.weight"]["alpha_factor"] == 2
    fused = merged(
        zoo, tmp_path / "fused", tasks, qkv="fused", keep_base="*.layers.0.self_attn.*",
        scale={"*.[qkv]_proj.weight": 2, "full:*_proj.*": 0.5},
    )  # fmt: skip
    entry = fused.treatments[f"{LAYER}.self_attn.{{q,k,v}}_proj.weight"]
    assert (entry["alpha_factor"], entry["task_factors"]) == (2, [1, 0.5])
    changed = differing(zoo / "base", tmp_path / "fused")
    assert changed and not [name for name in changed if ".0.self_attn." in name]


# Recipes


CHOICES: dict[str, Any] = {
    "scale": {"first.*": 0.5, "b:*.weight": 2, "b:last.*": 0}, "keep_base": ["last.bias"],
    "weights": {"c": 0.75},
}  # fmt: skip


def test_a_recipe_repeats_it_to_the_byte(odd: Path) -> None:
    first = merge(odd, "out", **CHOICES)
    recipe = yaml.safe_load((odd / "out" / RECIPE_FILE).read_text())
    assert recipe["scale"] == {"first.*": 0.5} and recipe["keep_base"] == ["last.bias"]
    own = {item["ref"]: (item["weight"], item.get("scale")) for item in recipe["inputs"]}
    assert own == {"a": (1, None), "b": (1, {"*.weight": 2, "last.*": 0}), "c": (0.75, None)}
    hf_tsv.merge(recipe=odd / "out", output=odd / "again", progress=False)
    assert written(odd / "again") == first
    texts = [(odd / name / RECIPE_FILE).read_text() for name in ("out", "again")]
    assert texts[0] == texts[1] and str(odd) not in texts[0]


def test_folders_of_one_name_keep_their_own_factors(odd: Path) -> None:
    for name in "ab":
        (odd / name).rename(odd / f"of-{name}")
        (odd / f"of-{name}").rename(odd / "moving")
        (odd / f"of-{name}").mkdir()
        (odd / "moving").rename(odd / f"of-{name}" / "model")
    tasks = [odd / "of-a" / "model", odd / "of-b" / "model"]
    scale = {f"{tasks[1]}:first.*": 0.5}
    with pytest.raises(UsageError, match="'model', which may be any of "):
        merged(odd, odd / "out", tasks, scale={"model:first.*": 0.5})
    report = merged(odd, odd / "out", tasks, scale=scale)
    assert report.selected == ["3 weights of of-b/model scaled by 0.5 (first.*)"]
    hf_tsv.merge(tasks, recipe=odd / "out", output=odd / "again", progress=False)
    assert written(odd / "again") == written(odd / "out")


def test_options_beside_a_recipe_replace_its_own(odd: Path) -> None:
    merge(odd, "out", **CHOICES)
    words = ["merge", "--recipe", odd / "out", "-o"]
    done = run(*words, odd / "plain", "--scale", "", "--keep-base", "", "--weights", "c=1")
    assert done.code == 0, done.err
    assert "scale is not set here, and {'first.*': 0.5, 'b:*.weight': 2.0" in done.err
    assert "keep_base is not set here, and ('last.bias',) in the recipe." in done.err
    assert "weights is [1.0, 1.0, 1.0] here, and [1.0, 1.0, 0.75] in the recipe." in done.err
    assert written(odd / "plain") == merge(odd, "expected")
    assert "scale" not in (odd / "plain" / RECIPE_FILE).read_text()
    more = ["--scale", "c:*.bias=3", "--keep-base", "first.*", "--weights", "a=2"]
    done = run(*words, odd / "other", *more)
    assert done.code == 0, done.err
    options = {"scale": {"c:*.bias": 3}, "keep_base": "first.*", "weights": [2, 1, 0.75]}
    assert written(odd / "other") == merge(odd, "given", **options)


def test_a_recipe_by_hand_may_name_tasks(odd: Path) -> None:
    first = merge(odd, "out", "ab", scale={"a:first.*": 0.5, "*.bias": 2}, keep_base="last.square*")
    content = {"base_model": str(odd / "base"), "inputs": [str(odd / "a"), str(odd / "b")],
               "scale": {"a:first.*": 0.5, "*.bias": 2}, "keep_base": ["last.square*"]}  # fmt: skip
    (odd / "by-hand.yaml").write_text(yaml.safe_dump(content))
    hf_tsv.merge(recipe=odd / "by-hand.yaml", output=odd / "again", progress=False)
    assert written(odd / "again") == first


def test_a_folder_that_changed_in_a_kept_weight_is_noticed(odd: Path) -> None:
    merge(odd, "out", keep_base="last.*")
    changed = of(odd / "a")
    changed["last.bias"] += 1
    save_file(changed, odd / "a" / "model.safetensors")
    with pytest.raises(hf_tsv.CheckpointError, match="has changed since the recipe was written"):
        hf_tsv.merge(recipe=odd / "out", output=odd / "again", progress=False)


# What is told


def test_a_dry_run_the_summary_and_the_card_tell_of_it(odd: Path) -> None:
    words = ["merge", *(odd / name for name in "abc"), "--base-model", odd / "base", "-o",
             odd / "out", "--weights", "c=0.75", "--scale", "first.*=0.5", "--scale",
             "b:*.weight=2", "--scale", "none*=3", "--keep-base", "last.bias"]  # fmt: skip
    told = ["3 weights scaled by 0.5 (first.*)", "3 weights of b scaled by 2 (*.weight)",
            "1 weight kept from the base (last.bias)"]  # fmt: skip
    planned = run(*words, "--dry-run")
    assert planned.code == 0, planned.err
    for line in told:
        assert f"weights      {line}\n" in planned.out
    assert f"task 3       {odd / 'c'}, times 0.75\n" in planned.out
    assert "Warning: --scale none* matches no merged weight.\n" in planned.err
    assert not (odd / "out").exists()
    done = run(*words, "--json")
    assert done.code == 0, done.err
    assert all(f"\n{line}.\n" in done.err for line in told)
    found = done.json
    assert found["selected"] == told and found["scales"] == [1, 1, 0.75]
    assert found["settings"]["scale"] == {"first.*": 0.5, "none*": 3}
    assert found["settings"]["keep_base"] == ["last.bias"]
    entry = found["treatments"]["first.square.weight"]
    assert (entry["alpha_factor"], entry["task_factors"]) == (0.5, [1, 2, 1])
    assert "task_factors" not in found["treatments"]["first.bias"]
    card = (odd / "out" / "README.md").read_text()
    assert "- 3 weights scaled by 0.5 \\(first.\\*\\)\n- 3 weights of b scaled by 2" in card
    assert "| task 3 | `c` (a local folder) | 0.75 |" in card


def test_warnings_are_of_the_updates_that_are_merged(odd: Path) -> None:
    base = of(odd / "base")
    loud = {n: w + 8 * (w - base[n]) for n, w in of(odd / "b").items()}
    save(odd / "loud", loud)

    def kinds(**options: Any) -> list[str]:
        shutil.rmtree(odd / "out", ignore_errors=True)
        tasks = [odd / "a", odd / "loud", odd / "c"]
        return news(merged(odd, odd / "out", tasks, allow_other_base=True, **options))

    assert any("8.9 times as large" in text for text in kinds())
    assert kinds(scale={"loud:*": 1 / 9}) == []
    assert any("as large" in text for text in kinds(scale={"loud:*": 1 / 9, "a:*": 20}))


def test_a_tower_that_a_task_must_not_change_is_no_news(zoo: Path, tmp_path: Path) -> None:
    tasks = [zoo / "full", zoo / "text"]
    for i, options in enumerate((
        {"scale": {"full:vision_model.*": 0}}, {"keep_base": ["vision_model.*"]},
        {"scale": {"full:text_model.*": 0}},
    )):  # fmt: skip
        report = merged(zoo, tmp_path / str(i), tasks, **options)
        assert report.warnings == [], options
    entry = merged(zoo, tmp_path / "m", tasks, scale={"full:vision*": 0}).treatments[FC1]
    assert entry["reason"] == "equal to the base in every checkpoint whose factor is not 0"


def test_interference_is_measured_of_the_scaled_updates(zoo: Path, tmp_path: Path) -> None:
    tasks = [zoo / kind for kind in KINDS]
    merged(zoo, tmp_path / "all", tasks, report=True, rank=16, weights={"vision": 0.5})
    merged(zoo, tmp_path / "globs", tasks, report=True, rank=16, scale={"vision:*": 0.5})
    found = [json.loads((tmp_path / n / "interference.json").read_text()) for n in ("all", "globs")]
    assert found[0]["total"] == found[1]["total"] and found[0]["spectra"] == found[1]["spectra"]
    merged(zoo, tmp_path / "plain", tasks, report=True, rank=16)
    found.append(json.loads((tmp_path / "plain" / "interference.json").read_text()))
    first, *others = ([task["energy"] for task in report["tasks"]] for report in found)
    assert others == [pytest.approx(first)] * 2  # a share, whatever the factor
    shares = [report["spectra"]["energy"] for report in found[1:]]
    assert torch.allclose(*map(torch.tensor, shares))


# Names and errors


REFERENCES = ["org/a@v1", "hf://org/b@refs/pr/1/vision", "other/a", "org/c"]


@pytest.mark.parametrize(
    ("name", "place"),
    [("org/a@v1", 0), ("org/a", 0), ("other/a", 2), ("org/c/", 3), ("c", 3), ("vision", 1),
     ("org/b/vision", 1), ("hf://org/b@refs/pr/1/vision", 1)],
)  # fmt: skip
def test_a_task_is_found_by_its_names(name: str, place: int) -> None:
    assert place_of(name, REFERENCES, "weights") == place


@pytest.mark.parametrize(
    ("name", "said"),
    [("a", "may be any of org/a@v1, other/a."), ("d", "is none of the checkpoints org/a@v1, "),
     ("", "is none of"), (3, "is none of"), ("org", "is none of")],
)  # fmt: skip
def test_a_name_of_no_task_or_of_several_lists_them(name: object, said: str) -> None:
    with pytest.raises(UsageError) as error:
        place_of(name, REFERENCES, "weights")
    assert f"`weights=` names {name!r}, which {said}" in str(error.value)


def test_a_task_that_is_named_twice_is_refused() -> None:
    with pytest.raises(UsageError, match="names org/c twice"):
        factors_of(REFERENCES, {"c": 1, "org/c": 2}, {})


@pytest.mark.parametrize(
    ("options", "said"),
    [({"weights": {"d": 1}}, "'d', which is none of"), ({"weights": {"a": "x"}}, "finite number"),
     ({"weights": {"a": 0, "b": 0}}, "all 0"), ({"scale": {"d:*": 1}}, "'d', which is none of"),
     ({"scale": {"*": float("nan")}}, "The scale of '\\*' must be a finite number"),
     ({"scale": ["*"]}, "must be factors by glob"), ({"scale": {"a:": 1}}, "without a glob"),
     ({"scale": {"*": 1}, "method": "tall-mask"}, "tall-mask has no α to scale"),
     ({"scale": {"a:*": 1e300}, "weights": {"a": 1e300}}, "is more than 1e"),
     ({"scale": {"*": 1e300}, "alpha": 1e300}, "do not fit")],
    ids=str,
)  # fmt: skip
def test_what_means_nothing_is_refused_and_nothing_written(
    odd: Path, options: dict[str, Any], said: str
) -> None:
    before = sorted(odd.rglob("*"))
    with pytest.raises((RecipeError, hf_tsv.CheckpointError), match=said):
        merge(odd, "out", "ab", **options)
    assert sorted(odd.rglob("*")) == before


# From the Hub


def test_streaming_merges_the_same(world: Path, hub: Hub) -> None:
    words = ["merge", "org/vision", "org/full", "--weights", "full=0.5", "--scale",
             f"{LAYER}.*=2", "--scale", "org/vision:*.bias=0", "--keep-base", "*.mlp.*",
             ]  # fmt: skip
    for name, more in (("whole", []), ("streamed", ["--stream"])):
        done = run(*words, *more, "-o", name, cwd=world)
        assert done.code == 0, done.err
    assert written(world / "streamed") == written(world / "whole")
    recipe = yaml.safe_load((world / "streamed" / RECIPE_FILE).read_text())
    assert recipe["inputs"][0]["scale"] == {"*.bias": 0}
    done = run("merge", "--recipe", "streamed", "-o", "again", cwd=world)
    assert done.code == 0 and written(world / "again") == written(world / "whole")
