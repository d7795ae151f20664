"""Recipes taken up again: by hand, from the Hub, with folders and options; no path in public."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import labelled
import pytest
import yaml
from cli import hf_tsv
from hub import Hub

import hf_tsv as api
from hf_tsv.checkpoints.names import RECIPE_FILE
from hf_tsv.recipes.learning import Adaptation
from hf_tsv.system.errors import RecipeError

QUIET: Any = {"progress": False}
WEIGHTS = "model.safetensors"


@pytest.fixture
def local(world: Path, zoo: Path) -> Path:
    """A merge of two local folders on a local base, and these folders."""
    for name in ("base", "vision", "flat"):
        shutil.copytree(zoo / name, world / "private" / name)
    here = world / "private"
    tasks = [here / "vision", here / "flat"]
    api.merge(tasks, base_model=here / "base", output=world / "merged", weights=[1, 0.5], **QUIET)
    return here


def same(first: Path, second: Path) -> bool:
    return (first / WEIGHTS).read_bytes() == (second / WEIGHTS).read_bytes()


def test_folders_are_names_and_fingerprints(local: Path, world: Path) -> None:
    recipe = yaml.safe_load((world / "merged" / RECIPE_FILE).read_text())
    assert [item["ref"] for item in recipe["inputs"]] == ["vision", "flat"]
    assert recipe["base_model"].keys() == {"ref", "fingerprint"}
    assert None not in recipe.values()


def test_folders_beside_the_recipe_are_found(
    local: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api.merge(recipe=world / "merged", output=world / "where they were", **QUIET)
    assert same(world / "where they were", world / "merged")
    local = local.rename(world / "moved")
    (world / "merged").rename(local / "merged")
    api.merge(recipe=local / "merged", output=world / "again", **QUIET)
    assert same(world / "again", local / "merged")
    (world / "here").mkdir()
    for name in ("vision", "flat", "base"):
        (local / name).rename(world / "here" / name)
    monkeypatch.chdir(world / "here")
    shutil.copy(local / "merged" / RECIPE_FILE, world / "r.yaml")
    assert api.merge(recipe=world / "r.yaml", dry_run=True).output is None


def test_folders_are_supplied_by_name_or_by_what_they_hold(local: Path, world: Path) -> None:
    local.rename(world / "moved")
    words = ("merge", "--recipe", "merged", "--base-model", "moved/base", "-o")
    done = hf_tsv(*words, "m1", "moved/flat", "moved/vision", cwd=world)
    assert done.code == 0, done.err
    (world / "moved" / "flat").rename(world / "moved" / "x")
    (world / "moved" / "vision").rename(world / "moved" / "y")
    done = hf_tsv(*words, "m2", "moved/x", "moved/y", cwd=world)
    assert done.code == 0, done.err
    assert same(world / "m1", world / "merged") and same(world / "m2", world / "merged")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "local folder vision, which is not here"),
        (("moved/vision",), "local folder flat, which is not here"),
        (("org/vision",), "org/vision is no local folder"),
        (("moved/vision", "moved/flat", "merged"), "merged is none of the local folders"),
    ],
)
def test_what_does_not_fit_the_recipe_is_refused(
    local: Path, world: Path, given: tuple[str, ...], said: str
) -> None:
    local.rename(world / "moved")
    words = ("merge", "--recipe", "merged", "--base-model", "moved/base", "-o", "m")
    done = hf_tsv(*words, *given, cwd=world)
    assert done.code and said in done.err and "Hint: " in done.err, done.err


def test_a_folder_of_the_same_name_that_holds_something_else_is_refused(
    local: Path, world: Path, zoo: Path
) -> None:
    shutil.rmtree(local / "flat")
    shutil.copytree(zoo / "projection", local / "flat")
    with pytest.raises(api.HfTsvError, match="flat has changed since the recipe was written"):
        api.merge(
            [local / "vision", local / "flat"], base_model=local / "base",
            recipe=world / "merged", output=world / "m", **QUIET,
        )  # fmt: skip


def test_a_recipe_on_the_hub_is_run_by_its_name(world: Path, hub: Hub) -> None:
    done = api.merge(["org/vision", "org/flat"], output=world / "m", push_to="me/two", **QUIET)
    sha = done.url.rpartition("/")[2] if done.url else ""
    for name in ("me/two", f"me/two@{sha}", "hf://me/two"):
        out = world / f"m{len(name)}"
        done_again = hf_tsv("merge", "--recipe", name, "-o", out, cwd=world)
        assert done_again.code == 0, done_again.err
        assert same(out, world / "m")
    missing = hf_tsv("merge", "--recipe", "org/vision", "-o", "x", cwd=world)
    assert "org/vision has no hf_tsv_recipe.yaml" in missing.err


def test_a_short_recipe_by_hand_is_enough(world: Path, zoo: Path) -> None:
    shutil.copytree(zoo / "flat", world / "flat")
    file = world / "mine.yaml"
    file.write_text("method: ties\ninputs: [org/vision, {ref: ./flat, weight: 0.5}]\n")
    found = api.merge(recipe=file, output=world / "m", **QUIET)
    assert found.method == "ties" and found.base_model["ref"] == "org/base"
    written = yaml.safe_load((world / "m" / RECIPE_FILE).read_text())
    assert written["inputs"][1]["weight"] == 0.5
    file.write_text("base_model: null\ninputs: [org/vision, org/flat]\n")
    assert api.merge(recipe=file, dry_run=True).base_model["ref"] == "org/base"


def test_options_replace_the_settings_of_a_recipe_with_a_note(world: Path) -> None:
    file = world / "mine.yaml"
    file.write_text("method: task-arithmetic\nrank_fraction: 0.5\ninputs: [org/vision, org/flat]\n")
    words = ("merge", "--recipe", file, "-o", "m", "--method", "tsv", "--dtype", "bfloat16")
    done = hf_tsv(*words, "--rank", "3", "--weights", "1,2", cwd=world)
    assert done.code == 0, done.err
    for note in (
        "method is tsv here, and task-arithmetic in the recipe.",
        "rank is 3 here, and not set in the recipe.",
        "rank_fraction is not set here, and 0.5 in the recipe.",
        "weights is [1.0, 2.0] here, and [1.0, 1.0] in the recipe.",
    ):
        assert note in done.err
    assert "precision" not in done.err
    written = yaml.safe_load((world / "m" / RECIPE_FILE).read_text())
    wanted = {"method": "tsv", "alpha": 1.0, "dtype": "bfloat16", "rank": 3}
    assert wanted.items() <= written.items() and "rank_fraction" not in written
    assert [item["weight"] for item in written["inputs"]] == [1.0, 2.0]


def test_nothing_public_holds_a_path_of_this_machine(local: Path, world: Path, hub: Hub) -> None:
    base, tasks = local / "base", [local / "vision", local / "flat"]
    output: Any = {"base_model": base, **QUIET}
    api.merge(tasks, output=world / "r", push_to="me/r", report=True, **output)
    api.merge(tasks, output=world / "t", push_to="me/t", method="tall-mask", **output)
    api.interference(tasks, output=world / "i", **output)
    api.compress(tasks[0], output=world / "f", push_to="me/f", **output)
    api.export_peft(tasks[0], output=world / "l", push_to="me/l", **output)
    api.reconstruct(world / "f", output=world / "c", push_to="me/c", **output)
    for file in (path for name in "rtiflc" for path in (world / name).rglob("*") if path.is_file()):
        assert str(world).encode() not in file.read_bytes(), file
    for name in ("me/r", "me/t", "me/f", "me/l", "me/c"):
        for file_name, content in hub.files(name).items():
            assert str(world).encode() not in content, (name, file_name)


def test_factors_of_folders_find_their_base_beside_them(local: Path, world: Path) -> None:
    api.compress(local / "vision", base_model=local / "base", output=world / "f", **QUIET)
    assert api.load_model(world / "f").config.model_type == "clip"  # where it was
    local = local.rename(world / "moved")
    (world / "f").rename(local / "f")
    assert api.load_model(local / "f").config.model_type == "clip"
    (local / "base").rename(local / "other")
    with pytest.raises(api.HfTsvError, match="folder base, which is not here"):
        api.load_model(local / "f")


def test_images_of_a_recipe_have_no_path(tmp_path: Path) -> None:
    folder = labelled.make_folder(tmp_path / "secret")
    learned = Adaptation({"a": str(folder), "b": "org/images"}).to_dict()
    assert [task["dataset"] for task in learned["tasks"]] == ["secret", "org/images"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("inputs: org/a", "no list"),
        ("inputs: [{ref: org/a, alpha: 1}]", "of which ref is needed"),
        ("inputs: [3]", "An input of"),
        ("inputs: []", "names no inputs"),
        ("inputs: [org/a]\nbase_model: [org/b]", "base_model of"),
        ("models: [org/a]", "a short one is"),
    ],
)
def test_a_wrong_recipe_by_hand_is_told_how_to_write_it(
    tmp_path: Path, text: str, said: str
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(RecipeError) as error:
        api.merge(recipe=file, dry_run=True)
    assert said in str(error.value) and "class" not in str(error.value)
