"""Recipes: every choice there and back, and no wrong one accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_tsv.checkpoints.names import RECIPE_FILE
from hf_tsv.recipes.recipe import PinnedInput, Recipe
from hf_tsv.recipes.settings import Settings, current_versions
from hf_tsv.system.errors import RecipeError

fuzz = settings(max_examples=60, deadline=None, database=None)
SHA = "0123456789abcdef0123456789abcdef01234567"
BASE = PinnedInput("org/base", SHA)
RECIPE = Recipe(
    BASE,
    (PinnedInput("org/a", SHA, weight=0.5), PinnedInput("/data/b", fingerprint="f" * 64)),
    Settings(alpha=0.3, rank_fraction=0.25, exclude=("*.bias", "logit_scale"), dtype="bfloat16"),
    "cuda",
)
MINIMAL: dict[str, Any] = {
    "hf_tsv_recipe": 1,
    "base_model": {"ref": "org/base"},
    "inputs": [{"ref": "org/a"}],
}


def refused(content: object) -> str:
    """The error of a recipe with this content, which is YAML if it is text."""
    text = content if isinstance(content, str) else yaml.safe_dump(content)
    with pytest.raises(RecipeError) as error:
        Recipe.from_yaml(text, "my-recipe.yaml")
    return str(error.value)


# There and back


def test_a_recipe_is_the_same_after_a_round_trip() -> None:
    assert Recipe.from_yaml(RECIPE.to_yaml()) == RECIPE


numbers = st.integers(-(10**9), 10**9) | st.floats(allow_nan=False, allow_infinity=False)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
globs = texts.filter(lambda text: text.rpartition(":")[2] != "")
scales = st.dictionaries(globs, numbers, max_size=3)
pins = st.builds(PinnedInput, texts, st.none() | texts, st.none() | texts, numbers, scales)
all_settings = st.builds(
    Settings,
    method=st.sampled_from(["tsv", "low-rank", "orthogonal", "task-arithmetic", "average"]),
    orthogonalizer=st.sampled_from(["procrustes", "whitening"]),
    precision=st.sampled_from(["fast", "exact"]),
    alpha=numbers,
    rank=st.none() | st.integers(1, 10**6),
    exclude=st.lists(texts, max_size=3).map(tuple),
    scale=scales,
    keep_base=st.lists(texts, max_size=3).map(tuple),
    qkv=st.sampled_from(["split", "fused"]),
    dtype=st.sampled_from([None, "float32", "float16", "bfloat16"]),
    max_shard_size=st.sampled_from(["5GB", "300MB", "5", " 2 gib"]) | st.integers(1, 10**12),
)


@fuzz
@given(
    base=texts.map(PinnedInput),
    inputs=st.lists(pins, min_size=1, max_size=3).map(tuple),
    choice=all_settings,
    device=texts,
    versions=st.dictionaries(texts, texts, max_size=3),
)
@example(PinnedInput("\x85\u2028\ufeff"), (BASE,), Settings(), "cpu", {"\x85": "\x85"})
def test_any_recipe_is_the_same_after_a_round_trip(
    base: PinnedInput, inputs: Any, choice: Settings, device: str, versions: dict[str, str]
) -> None:
    recipe = Recipe(base, inputs, choice, device, versions)
    text = recipe.to_yaml()
    assert Recipe.from_yaml(text) == recipe
    assert Recipe.from_yaml(text).to_yaml() == text


def test_a_recipe_names_every_choice_and_the_versions() -> None:
    content = yaml.safe_load(RECIPE.to_yaml())
    assert list(content)[:2] == ["hf_tsv_recipe", "method"]
    assert content == {
        "hf_tsv_recipe": 1,
        "method": "tsv",
        "orthogonalizer": "procrustes",
        "alpha": 0.3,
        "rank_fraction": 0.25,
        "exclude": ["*.bias", "logit_scale"],
        "dtype": "bfloat16",
        "max_shard_size": "5GB",
        "precision": "fast",
        "keep_heads": False,
        "base_model": {"ref": "org/base", "revision": SHA},
        "inputs": [
            {"ref": "org/a", "revision": SHA, "weight": 0.5},
            {"ref": "/data/b", "fingerprint": "f" * 64, "weight": 1.0},
        ],
        "device": "cuda",
        "versions": current_versions(),
    }


def test_a_recipe_written_by_hand_needs_only_the_checkpoints() -> None:
    recipe = Recipe.from_yaml(yaml.safe_dump(MINIMAL))
    assert recipe.settings == Settings()
    assert recipe.base_model == PinnedInput("org/base")
    assert recipe.inputs == (PinnedInput("org/a"),)
    assert (recipe.device, recipe.versions) == ("cpu", {})


def test_a_recipe_is_loaded_from_a_file_or_the_folder_of_an_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / RECIPE_FILE).write_text(RECIPE.to_yaml(), encoding="utf-8")
    monkeypatch.setenv("HOME", str(tmp_path))
    for path in (tmp_path, str(tmp_path), tmp_path / RECIPE_FILE, "~", f"~/{RECIPE_FILE}"):
        assert Recipe.load(path) == RECIPE


# Files that cannot be read


@pytest.mark.parametrize("name", ["absent.yaml", "absent/x.yaml", "n" * 300, "file/x", "a\0b"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"The recipe .* cannot be read"):
        Recipe.load(tmp_path / name)


def test_a_folder_without_recipe_and_an_unknown_home_are_named(tmp_path: Path) -> None:
    for path in (tmp_path, "~no-such-user/recipe.yaml"):
        with pytest.raises(RecipeError, match="cannot be read"):
            Recipe.load(path)


def test_a_file_that_is_not_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"recipe\.yaml cannot be read: not UTF-8"):
        Recipe.load(tmp_path / "recipe.yaml")


def test_an_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("a: 1")
    with pytest.raises(RecipeError, match=r"mine\.yaml is not an hf-tsv recipe"):
        Recipe.load(tmp_path / "mine.yaml")


# What is refused


@pytest.mark.parametrize(
    "text", ["", "text", "3", "- a", "null", "{}", "method: tsv", "[hf_tsv_recipe]"]
)
def test_what_is_no_recipe_is_refused(text: str) -> None:
    assert "my-recipe.yaml is not an hf-tsv recipe" in refused(text)


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], True, 1.5])
def test_another_format_version_is_refused(version: Any) -> None:
    assert "Update hf-tsv" in refused({**MINIMAL, "hf_tsv_recipe": version})


@pytest.mark.parametrize("text", ["[", "a: b: c", "\0", "\t", "a: 1\n---\nb: 2", "[" * 1000])
def test_what_is_no_yaml_is_refused(text: str) -> None:
    assert refused(text) == "my-recipe.yaml is not valid YAML."


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['exit 1']",
        "!!python/object:hf_tsv.recipes.settings.Settings {}",
        "!!python/name:os.system",
        "!!bool maybe",
        "!!int ''",
        "!!int x",
        "!!float x",
        "!!timestamp x",
        "!!binary x",
        "2020-99-99",
        "1" * 5000,
        "!custom x",
    ],
)
def test_a_yaml_tag_constructs_nothing(value: str) -> None:
    refused(yaml.safe_dump(MINIMAL) + f"alpha: {value}\n")


WRONG = {
    "method": ["tsvv", "", None, 3, [], {}],
    "orthogonalizer": ["svd", None, True],
    "precision": ["float64", None, True],
    "alpha": ["1", True, [], float("nan"), float("inf"), -float("inf"), 10**400],
    "rank": [0, -1, 1.0, 1.5, "8", True, [8]],
    "rank_fraction": [0, 0.0, -0.5, 1.01, "0.5", True, float("nan"), 10**400],
    "exclude": ["*.bias", 3, None, [3], [None], [["*"]], {"*.bias": 1}],
    "scale": ["*", 3, None, ["*"], {"*": "x"}, {"*": float("nan")}, {3: 1}, {"": 1}, {"a:": 1}],
    "keep_base": ["*.bias", 3, None, [3], {"*.bias": 1}],
    "qkv": ["fuse", "", False],
    "out_format": ["openclip", "", True],
    "dtype": ["float64", "bf17", "torch.float64", 16, []],
    "max_shard_size": [0, -1, 1.5, "", "0GB", "0.5", "-5GB", "5 XB", "5%", None, True],
    "device": [3, None, ["cpu"]],
    "versions": [3, ["torch"], "2.0"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_refused_by_the_name_of_its_key(key: str, value: Any) -> None:
    assert key in refused({**MINIMAL, key: value})


@pytest.mark.parametrize("key", [k for k in WRONG if k not in ("device", "versions")])
def test_the_api_refuses_the_same_values(key: str) -> None:
    for value in WRONG[key]:
        with pytest.raises(RecipeError, match=key):
            Settings(**{key: value})


@pytest.mark.parametrize("value", [float("nan"), 10**400, "1", None, True, [1]])
def test_a_wrong_weight_is_refused_by_the_name_of_its_checkpoint(value: Any) -> None:
    assert "The weight of org/a" in refused(
        {**MINIMAL, "inputs": [{"ref": "org/a", "weight": value}]}
    )


@pytest.mark.parametrize("value", ["*", None, ["*"], {"*": "x"}, {3: 1}, {"a:": 1}])
def test_wrong_factors_are_refused_by_the_name_of_their_checkpoint(value: Any) -> None:
    inputs = ["org/b", {"ref": "org/a", "scale": value}]
    assert "he scale of" in refused({**MINIMAL, "inputs": inputs})


@pytest.mark.parametrize("value", [3, None, [], {}])
@pytest.mark.parametrize("key", ["ref", "revision", "fingerprint"])
def test_a_checkpoint_that_is_no_text_is_refused(key: str, value: Any) -> None:
    if value is None and key != "ref":
        return
    wrong = {"ref": "org/a", key: value}
    assert f"The {key} of an input" in refused({**MINIMAL, "inputs": [wrong]})
    refused({**MINIMAL, "base_model": wrong})


@pytest.mark.parametrize(
    "change",
    [
        {"base_model": ["org/base"]},
        {"base_model": 3},
        {"base_model": {}},
        {"base_model": {"ref": "org/base", "weight": 2.0}},
        {"base_model": {"ref": "org/base", "scale": {"*": 2.0}}},
        {"base_model": {"ref": "org/base", "sha": SHA}},
        {"base_model": {"ref": "org/base", 3: 4}},
        {"inputs": None},
        {"inputs": []},
        {"inputs": {}},
        {"inputs": ""},
        {"inputs": {"ref": "org/a"}},
        {"inputs": "org/a"},
        {"inputs": [["org/a"]]},
        {"allow_other_base": 1},
        {"inputs": [{"ref": "org/a", "alpha": 1}]},
        {"inputs": [{}]},
    ],
    ids=str,
)
def test_checkpoints_that_are_not_well_formed_are_refused(change: dict[str, Any]) -> None:
    refused({**MINIMAL, **change})


def test_a_recipe_without_its_checkpoints_is_refused() -> None:
    assert "inputs" in refused({k: v for k, v in MINIMAL.items() if k != "inputs"})


@pytest.mark.parametrize("key", ["alhpa", "token", "", 3, None])
def test_an_unknown_key_is_refused_so_that_no_choice_is_dropped(key: Any) -> None:
    assert f"unknown key: {key}" in refused({**MINIMAL, key: 1})


def test_rank_and_rank_fraction_exclude_each_other() -> None:
    with pytest.raises(RecipeError, match="`rank=` and `rank_fraction=` cannot be combined"):
        Settings(rank=8, rank_fraction=0.5)


def test_settings_take_a_list_of_globs_and_keep_it() -> None:
    globs, scale = ["a", "b"], {"*": 2}
    choice = Settings(exclude=globs, keep_base=globs, scale=scale)  # type: ignore[arg-type]
    globs.append("c")
    scale["c"] = 3
    assert choice.exclude == choice.keep_base == ("a", "b")
    assert choice.scale == {"*": 2.0}


def test_what_is_not_scaled_and_not_kept_is_not_written() -> None:
    assert not {"scale", "keep_base"} & yaml.safe_load(RECIPE.to_yaml()).keys()


def test_an_error_stays_short_whatever_the_value() -> None:
    """A few nested YAML aliases stand for a billion values."""
    lines = ["a0: &a0 [x, x]", *(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 16))]
    text = yaml.safe_dump(MINIMAL) + "method:\n" + "".join(f"- {{{line}}}\n" for line in lines)
    assert len(refused(text)) < 1000


# Whatever the text: a recipe, or a RecipeError


def read(text: str) -> Recipe | None:
    try:
        return Recipe.from_yaml(text)
    except RecipeError as error:
        assert error.message
        return None


@fuzz
@given(text=st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    read(text)
    read(f"hf_tsv_recipe: {text}")


scalars = st.sampled_from(
    [
        "!!bool x",
        "!!int x",
        "2020-99-99",
        "0x",
        "1e400",
        ".inf",
        "~",
        "*a",
        "&a b",
        "<<",
        "'",
        "1:99",
    ]
)


@fuzz
@given(
    key=st.sampled_from([*WRONG, "base_model", "inputs", "hf_tsv_recipe"]),
    value=scalars | st.text(max_size=12) | st.integers().map(str),
    nested=st.sampled_from(["{}", "[{}]", "{{ref: {}}}", "[{{ref: a, weight: {}}}]", "{{{}: 1}}"]),
)
def test_any_value_is_read_or_refused(key: str, value: str, nested: str) -> None:
    lines = {k: yaml.safe_dump(v, default_flow_style=True) for k, v in MINIMAL.items()}
    lines[key] = nested.replace("{{", "{").replace("}}", "}").replace("{}", value)
    read("\n".join(f"{k}: {v.removesuffix('...' + chr(10))}" for k, v in lines.items()))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=6,
)


@fuzz
@given(changes=st.dictionaries(st.sampled_from([*WRONG, "base_model", "inputs", "other"]), values))
def test_any_content_is_read_or_refused(changes: dict[str, Any]) -> None:
    recipe = read(yaml.safe_dump({**MINIMAL, **changes}))
    if recipe is not None:
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("method", "alpha"),
    [("tsv", 1), ("orthogonal", 1), ("ties", 1), ("task-arithmetic", 0.3), ("consensus", 0.3)],
)
def test_sums_of_what_agrees_are_scaled_down_unless_the_user_says_otherwise(
    method: Any, alpha: float
) -> None:
    assert Settings(method).alpha == alpha
    assert Settings(method, alpha=0.7).alpha == 0.7
