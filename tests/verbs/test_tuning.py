"""Choosing α on labelled validation images."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli import hf_tsv as run
from labelled import CLASSES, make_folder, with_an_odd_word
from PIL import Image

import hf_tsv
from hf_tsv import AlphaSearch
from hf_tsv.recipes.learning import alphas_of
from hf_tsv.system.errors import DataError, RecipeError

ALPHAS = (0.0, 4.0, 12.0, 40.0)


@pytest.fixture(scope="session")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of random images, on which random models differ; a folder a class, two splits."""
    folder = tmp_path_factory.mktemp("tuning") / "pets"
    rng = np.random.default_rng(0)
    for split, count in (("train", 2), ("validation", 12)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                blocks = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
                image = Image.fromarray(blocks).resize((32, 32), Image.Resampling.NEAREST)
                image.save(folder / split / name / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    ("kind", "options"),
    [("vision", {}), ("full", {}),
     ("full", {"scale": {"*.mlp.*": 0.5, "full:*": 0.5}, "keep_base": "*.layers.0.*"})],
)  # fmt: skip
def test_every_alpha_scores_as_its_own_merge_does(
    zoo: Path, pets: Path, tmp_path: Path, kind: str, options: Any
) -> None:
    """`full` changes the text tower, and with it the heads."""
    found = hf_tsv.tune(
        [zoo / kind, zoo / "flat"], {"pets": str(pets)}, alphas=ALPHAS, base_model=zoo / "base",
        output=tmp_path / "m", progress=False, **options,
    ).tuning  # fmt: skip
    assert found is not None
    expected = []
    for i, alpha in enumerate(ALPHAS):
        output = tmp_path / str(i)
        hf_tsv.merge([zoo / kind, zoo / "flat"], base_model=zoo / "base", output=output,
                     alpha=alpha, progress=False, **options)  # fmt: skip
        task = hf_tsv.EvaluationTask("pets", str(pets), split="validation")
        expected.append(hf_tsv.evaluate(output, [task], base_model=zoo / "base").accuracy)
    assert found["accuracies"]["pets"] == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) > 1  # else nothing was compared
    assert found["alpha"] == ALPHAS[expected.index(max(expected))]
    assert found["splits"] == {"pets": "validation"}


def test_the_output_is_that_of_the_alpha_that_was_found(
    zoo: Path, pets: Path, tmp_path: Path
) -> None:
    common = [zoo / "vision", zoo / "flat", "--base-model", zoo / "base"]
    finer = ["--scale", "flat:*.bias=2", "--keep-base", "*.fc2.*", "--weights", "vision=0.5"]
    done = run("tune", *common, "--alphas", "0.25:1:0.25", "--task", f"pets={pets}", "--limit", "6",
               "--template", "{}", "-o", tmp_path / "m", "--json", *finer)  # fmt: skip
    assert done.code == 0, done.err
    tuning = done.json["tuning"]
    assert tuning["alphas"] == [0.25, 0.5, 0.75, 1.0] and tuning["images"] == {"pets": 6}
    assert f"α = {tuning['alpha']:g}" in done.err
    run("merge", *common, "--alpha", tuning["alpha"], *finer, "-o", tmp_path / "again")
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (
        tmp_path / "again" / "model.safetensors"
    ).read_bytes()
    recipe = yaml.safe_load((tmp_path / "m" / "hf_tsv_recipe.yaml").read_text())
    assert recipe["alpha"] == tuning["alpha"]
    card = (tmp_path / "m" / "README.md").read_text()
    assert "was the best of 4 values (0.25 … 1) on 6 validation images" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "m"]  # and nothing else


def test_the_base_model_as_the_best_merge_is_a_warning(
    zoo: Path, pets: Path, tmp_path: Path
) -> None:
    common = [zoo / "vision", zoo / "flat", "--base-model", zoo / "base", "-o", tmp_path / "m"]
    done = run("tune", *common, "--alphas", "0", "--task", f"pets={pets}", "--limit", "3")
    assert "Warning: α = 0 is best: the result is the base model." in done.err


def test_of_equal_scores_the_smallest_alpha_is_taken() -> None:
    search = AlphaSearch({"a": "x"}, "1,0.5,2", accuracies={"a": (0.5, 0.5, 0.25)})
    assert search.alpha == 0.5


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0:0.3:0.1", [0, 0.1, 0.2, 0.3]),
        ("0:3:0.1", [i / 10 for i in range(31)]),
        ("0.5", [0.5]),
        ("1,0.5", [1, 0.5]),
        ("0:1:0.4", [0, 0.4, 0.8]),
        ("2:2:1", [2]),
        ("-1:1:1", [-1, 0, 1]),
        ("0.05:0.1:0.05,1:2:0.5,7", [0.05, 0.1, 1, 1.5, 2, 7]),
    ],
)
def test_a_range_has_both_its_ends(text: str, values: list[float]) -> None:
    assert alphas_of(text) == values


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "0:1",
        "0:1:0",
        "0:1:-1",
        "1:0:0.1",
        "nan",
        "0:inf:1",
        "0:1:1e-9",
        "1,,2",
        "0:998:1,0:9:1",
    ],
)
def test_what_is_no_range_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"`alphas=` cannot be|more than 1000 values"):
        alphas_of(text)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "tall-mask"], "has no α to choose"),
        (["--method", "ada"], "not for the method ada"),
        (["--steps", "3"], "for the method ada only"),
        (["--split", "train2"], "pets: "),
        (["--limit", "0"], "--limit must be at least 1 (got 0)"),
    ],
)
def test_what_does_not_go_together_is_refused(
    zoo: Path, pets: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    done = run("tune", zoo / "vision", "--base-model", zoo / "base", "-o", tmp_path / "m",
               "--alphas", "0:1:0.5", "--task", f"pets={pets}", *options)  # fmt: skip
    assert done.code in (1, 2) and said in done.err, done.err
    assert not list(tmp_path.iterdir())


def test_an_alpha_that_is_given_is_not_chosen(zoo: Path, pets: Path) -> None:
    with pytest.raises(RecipeError, match="a search for α cannot be combined"):
        hf_tsv.tune(
            zoo / "vision", {"pets": str(pets)}, base_model=zoo / "base", alpha=1, dry_run=True
        )


def test_images_are_named(zoo: Path, tmp_path: Path) -> None:
    words = [zoo / "vision", "--base-model", zoo / "base", "-o", tmp_path / "m"]
    done = run("tune", *words)
    assert done.code == 2 and "no images to choose α on" in done.err
    done = run("merge", *words, "--task", "a=b")
    assert done.code == 2 and "--task" in done.err


def test_arguments_of_a_merge_are_arguments_of_tune() -> None:
    taken = inspect.signature(hf_tsv.tune).parameters
    assert {"output", "base_model", "alphas", "dtype", "steps"} <= taken.keys()
    assert not {"options", "recipe", "adaptation", "tune_alpha"} & taken.keys()


def test_test_images_are_never_taken_by_default(zoo: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "pets")
    with pytest.raises(DataError, match="has no split 'validation'"):
        hf_tsv.tune([zoo / "vision"], {"pets": str(data)}, alphas="0,1", base_model=zoo / "base",
                    output=tmp_path / "m")  # fmt: skip
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("method", ["tsv", "ada"])
def test_what_nobody_expects_of_a_task_names_it(
    zoo: Path, pets: Path, tmp_path: Path, method: str
) -> None:
    base, odd = with_an_odd_word(zoo, pets, tmp_path)
    with pytest.raises(DataError, match="odd failed with IndexError: index out of range"):
        hf_tsv.tune([zoo / "vision", zoo / "flat"], {"odd": str(odd)}, method=method,
                    base_model=base, output=tmp_path / "m", progress=False)  # fmt: skip
    assert not (tmp_path / "m").exists()
