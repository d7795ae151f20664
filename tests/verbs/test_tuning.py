"""Choosing method, α and slope on labelled validation images."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from cli import ended
from cli import hf_tsv as run
from forks import fork
from hub import Hub
from labelled import CLASSES, make_folder, parquet, with_an_odd_word
from PIL import Image

import hf_tsv
from hf_tsv import Search
from hf_tsv.evaluation import zero_shot
from hf_tsv.merging.plan import MergePlan
from hf_tsv.merging.scaling import by_block
from hf_tsv.merging.work import prepare
from hf_tsv.recipes.searching import Trial, numbers_of
from hf_tsv.recipes.settings import Settings
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
    [("vision", {}), ("full", {"scale": {"*.mlp.*": 0.5, "full:*": 0.5},
                               "keep_base": "*.layers.0.*"})],
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
    assert [t["accuracies"]["pets"] for t in found["trials"]] == pytest.approx(expected, abs=1e-12)
    assert found["mean"] == pytest.approx(expected, abs=1e-12) and found["alphas"] == list(ALPHAS)
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


GRID = {"method": ["tsv", "task-arithmetic"], "alphas": (4.0, 40.0), "slopes": (0.0, 0.75)}


@pytest.mark.parametrize(
    ("options", "merged"),
    [({}, range(8)), ({"layer_scale": "lines"}, (1, 2, 4, 7)),
     ({"qkv": "fused", "scale": {"vision_model.*.mlp.*": 0.5}}, (1, 2, 4, 7))],
    ids=["plain", "lines", "fused"],
)  # fmt: skip
def test_every_trial_scores_as_its_own_merge_does(
    zoo: Path, pets: Path, tmp_path: Path, options: Any, merged: Sequence[int]
) -> None:
    """`full` changes both towers, whose last block counts 1.75 times with the slope.

    All eight trials, or four in which every two values of method, slope and α meet.
    """
    common: Any = {"base_model": zoo / "base", "progress": False, **options}
    found = hf_tsv.tune([zoo / "full", zoo / "flat"], {"pets": str(pets)}, **GRID, **common,
                        output=tmp_path / "m")  # fmt: skip
    assert found.tuning is not None
    task = hf_tsv.EvaluationTask("pets", str(pets), split="validation")
    trials, expected = found.tuning["trials"], []
    for i in merged:
        trial, scale = trials[i], dict(options.get("scale", {}))
        if slope := trial["slope"]:
            scale |= {f"*.layers.{n}.*": f for n, f in enumerate((1 - slope, 1 + slope))}
        own = {**common, "scale": scale, "output": tmp_path / str(i)}
        hf_tsv.merge([zoo / "full", zoo / "flat"], method=trial["method"], alpha=trial["alpha"],
                     **own)  # fmt: skip
        report = hf_tsv.evaluate(tmp_path / str(i), [task], base_model=zoo / "base")
        expected.append(report.accuracy)
    points = [(t["method"], t["slope"], t["alpha"]) for t in trials]
    grid = [(m, s, a) for m in GRID["method"] for s in GRID["slopes"] for a in GRID["alphas"]]
    assert points == grid and len(set(expected)) > 2
    scores = [t["accuracies"]["pets"] for t in trials]
    assert [scores[i] for i in merged] == pytest.approx(expected, abs=1e-12)
    best = trials[scores.index(max(scores))]
    assert [found.tuning[n] for n in ("method", "alpha", "slope")] == [
        best[n] for n in ("method", "alpha", "slope")
    ]
    assert found.method == best["method"] and found.settings["alpha"] == best["alpha"]
    assert found.tuning["best_of_each"][0] == best and len(found.tuning["best_of_each"]) == 2
    assert "alphas" not in found.tuning and "mean" not in found.tuning


def test_the_recipe_repeats_the_best_of_several_methods_and_slopes(
    zoo: Path, pets: Path, tmp_path: Path
) -> None:
    """Also its factors by block, beside those that the user gave."""
    first = "vision_model.encoder.layers.0.*"
    done = run("tune", zoo / "vision", zoo / "flat", "--base-model", zoo / "base", "--method",
               "iso_c,tsv", "--alphas", "0.5,1", "--slopes", "0.25", "--scale", f"{first}=2",
               "--task", f"pets={pets}", "--limit", "6", "--json", "-o", tmp_path / "m",
               )  # fmt: skip
    assert done.code == 0, done.err
    found = done.json["tuning"]
    assert found["images"] == {"pets": 6} and len(found["trials"]) == 4
    assert re.search(r"^best of each method +α +slope +mean accuracy$", done.err, re.MULTILINE)
    assert re.search(r"^iso-c +(0\.5|1) +0\.25 +\d+\.\d\d%$", done.err, re.MULTILINE), done.err
    recipe = yaml.safe_load((tmp_path / "m" / "hf_tsv_recipe.yaml").read_text())
    assert (recipe["method"], recipe["alpha"]) == (found["method"], found["alpha"])
    assert recipe["scale"] == {first: 1.5, first.replace("0", "1"): 1.25}
    run("merge", "--recipe", tmp_path / "m", "-o", tmp_path / "again", cwd=tmp_path)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("m", "again")]
    assert weights[0] == weights[1]
    card = (tmp_path / "m" / "README.md").read_text()
    best = f"{found['method']} with α = {found['alpha']:g} and slope 0.25"
    said = "was the best of 4 trials (iso-c, tsv; α 0.5 … 1; slope 0.25) on 6 validation images"
    assert f"{best} {said}" in card
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "m"]


def test_a_tower_of_one_block_has_no_slope(zoo: Path) -> None:
    def planned(*keep: str) -> MergePlan:
        given = [str(zoo / "full")], str(zoo / "base"), None, Settings(keep_base=keep)
        return prepare(*given)[0].plan

    names = {f"{t}_model.encoder.layers.{i}.*": 0.5 + i for t in ("text", "vision") for i in (0, 1)}
    assert by_block(planned(), 0.5) == names and by_block(planned(), 0.0) == {}
    kept = {name: factor for name, factor in names.items() if not name.startswith("text")}
    assert by_block(planned("text_model.*"), 0.5) == kept
    plan = planned()
    one = [w for w in plan.weights if ".layers.1." not in w.names[0]]
    assert by_block(replace(plan, weights=tuple(one)), 0.5) == {}


def test_slopes_need_blocks_that_are_merged(zoo: Path, pets: Path, tmp_path: Path) -> None:
    words = ["tune", zoo / "vision", "--base-model", zoo / "base", "--keep-base", "*.layers.*",
             "--task", f"pets={pets}", "-o", tmp_path / "m", "--slopes"]  # fmt: skip
    done = run(*words, "0,0.5")
    assert done.code == 2 and "--slopes scales blocks" in done.err, done.err
    assert run(*words, "0", "--alphas", "1", "--limit", "3").code == 0


# The grid


def tried(**given: Any) -> list[tuple[str, float, float]]:
    search = Search({"a": "x"}, **{"alphas": "0:2:0.5", "methods": "tsv,dc", **given})  # type: ignore[arg-type]
    return [(point.method, point.slope, point.alpha) for point in search.points]


def test_trials_are_drawn_from_the_grid_by_the_seed() -> None:
    grid = tried(slopes="0,0.5")
    assert len(grid) == len(set(grid)) == 20 and grid == tried(slopes="0,0.5", trials=20)
    some = tried(slopes="0,0.5", trials=7)
    assert len(some) == 7 and some == [point for point in grid if point in some]
    assert some == tried(slopes="0,0.5", trials=7, seed=0)
    assert some != tried(slopes="0,0.5", trials=7, seed=1)


def test_values_that_are_given_twice_are_tried_once() -> None:
    assert tried(alphas="1,0:1:0.5", methods=["tsv", "TSV"], slopes=[0, 0.0]) == [
        ("tsv", 0, 1), ("tsv", 0, 0), ("tsv", 0, 0.5),
    ]  # fmt: skip


def result(points: str, *accuracies: float) -> Search:
    made = []
    for point, accuracy in zip(points.split(), accuracies, strict=True):
        method, alpha, slope = point.split(":")
        made.append(Trial(method, float(alpha), float(slope), {"a": accuracy}))
    return Search({"a": "x"}, "1", results=tuple(made))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("points", "best"),
    [
        ("tsv:1:0 tsv:0.5:0 dc:0.25:0", "tsv:0.5:0"),
        ("tsv:1:0.5 dc:1:0", "tsv:1:0.5"),
        ("tsv:0.5:0.5 tsv:1:-0.25 tsv:1:0.5", "tsv:1:-0.25"),
    ],
)
def test_of_equal_scores_the_simplest_trial_is_taken(points: str, best: str) -> None:
    search = result(f"{points} wudi:0:0", *[0.5] * len(points.split()), 0.25)
    assert search.best == result(best, 0.5).results[0]


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
    assert numbers_of(text, "alphas") == values


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
    with pytest.raises(RecipeError, match=r"`alphas=` (cannot be|has more than 1,000 values)"):
        numbers_of(text, "alphas")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "tall-mask"], "has no α to choose"),
        (["--method", "ada", "--alphas", "1"], "not for the method ada"),
        (["--steps", "3"], "for the method ada only"),
        (["--split", "train2"], "pets: "),
        (["--limit", "0"], "--limit must be at least 1 (got 0)"),
        (["--trials", "0"], "--trials must be at least 1 (got 0)"),
        (["--slopes", "0,2"], "--slopes must be from -1 to 1 (got 2)"),
        (["--slopes", "0:1"], "--slopes cannot be '0:1'"),
        (["--seed", "1"], "--seed draws points of the grid, and all are tried"),
        (["--method", "tsv,adda"], "'adda'. Did you mean ada?"),
        (["--method", "tsv,ada"], "ada learns coefficients, and is compared with no other"),
        (["--method", "ada", "--slopes", "0,1"], "--slopes is not for the method ada"),
        (["--method", "ada", "--trials", "1"], "--trials is not for the method ada"),
        (["--method", "tsv,tall-mask"], "The method tall-mask has no α to choose"),
        (["--method", "tsv,ties", "--rank", "3"], "The method ties has no rank"),
        (["--method", "tsv,iso-c", "--calibrate"], "The method iso-c cannot be calibrated"),
        (["--method", "wudi,tsv", "--wudi-filter", "tact"], "no choice of the method tsv"),
    ],
)
def test_what_does_not_go_together_is_refused(
    zoo: Path, pets: Path, tmp_path: Path, options: list[str], said: str
) -> None:
    if "ada" not in options:
        options = ["--alphas", "0:1:0.5", *options]
    done = run("tune", zoo / "vision", "--base-model", zoo / "base", "-o", tmp_path / "m",
               "--task", f"pets={pets}", *options)  # fmt: skip
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
    assert {"output", "base_model", "alphas", "dtype", "steps", "slopes"} <= taken.keys()
    assert not {"options", "recipe", "adaptation", "search"} & taken.keys()


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


# Test images


@pytest.mark.parametrize("split", ["test", "Test", "testing"])
def test_test_images_of_the_hub_are_refused_before_anything_is_asked(
    hub: Hub, tmp_path: Path, split: str
) -> None:
    words = ["tune", "org/a", "org/b", "--task", "pets=org/pets", "--split", split]
    done = run(*words, "-o", tmp_path / "m")
    assert done.code == 2 and hub.requests == []
    assert f"pets: the split {split} of org/pets has test images. What is chosen on" in done.err
    assert "Hint: Choose on others: --split validation, or --split train with --limit." in done.err


def test_test_images_of_a_folder_with_other_splits_are_refused(zoo: Path, tmp_path: Path) -> None:
    data = make_folder(tmp_path / "pets")
    common: Any = {"base_model": zoo / "base", "alphas": "0,1", "output": tmp_path / "m"}
    task = hf_tsv.EvaluationTask("pets", str(data), split="test", templates=["a {}."])  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match=r"the split test of .*pets has test images"):
        hf_tsv.tune([zoo / "vision"], [task], **common)
    assert not (tmp_path / "m").exists()
    shutil.rmtree(data / "train")
    assert hf_tsv.tune([zoo / "vision"], [task], **common).tuning["images"] == {"pets": 24}


def test_a_file_has_whatever_split_it_is_said_to_have(zoo: Path, tmp_path: Path) -> None:
    parquet(tmp_path)
    task = hf_tsv.EvaluationTask("pets", str(tmp_path / "rows.parquet"), split="test")
    report = hf_tsv.tune([zoo / "vision"], [task], alphas="0,1", base_model=zoo / "base",
                         output=tmp_path / "m")  # fmt: skip
    assert report.tuning is not None and report.tuning["splits"] == {"pets": "test"}


# A dry run


def test_a_dry_run_counts_trials_and_merges(zoo: Path, pets: Path, tmp_path: Path) -> None:
    words = ["tune", zoo / "vision", zoo / "flat", "--base-model", zoo / "base", "-o",
             tmp_path / "m", "--task", f"pets={pets}", "--method", "tsv,dc,wudi", "--alphas",
             "0:1:0.1", "--slopes", "0,0.25", "--dry-run"]  # fmt: skip
    rows = dict(re.split(r"  +", line, maxsplit=1) for line in run(*words).out.splitlines())
    assert rows["methods"] == "tsv, dc, wudi" and rows["trials"] == "66, from 3 merges"
    found = run(*words, "--trials", "2", "--json").json["tuning"]
    assert len(found["trials"]) == 2 and found.keys() == {"trials", "splits"}
    assert found["trials"][0].keys() == {"method", "alpha", "slope"}
    assert not list(tmp_path.iterdir())


# Searches that stop


@pytest.fixture
def stops(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts of `heads` and `images`; with `at`, the search is interrupted at that many heads."""
    return counted(monkeypatch)


def counted(patch: pytest.MonkeyPatch) -> dict[str, int]:
    seen = {"heads": 0, "images": 0}
    head, classify = zero_shot.head, zero_shot.classify

    def counted_head(*given: Any) -> Any:
        if seen["heads"] == seen.get("at"):
            raise KeyboardInterrupt
        seen["heads"] += 1
        return head(*given)

    def counted_images(model: Any, directions: Any, pixels: Any) -> Any:
        seen["images"] += len(pixels)
        return classify(model, directions, pixels)

    patch.setattr(zero_shot, "head", counted_head)
    patch.setattr(zero_shot, "classify", counted_images)
    return seen


def searched(zoo: Path, pets: Path, output: Path, **options: Any) -> Any:
    """Search of two methods on two tasks: one head for each of the four, of a changed vision."""
    own = {"method": "tsv,ties", "alphas": "4,40", "limit": 6, **options}
    tasks = {"pets": str(pets), "same": str(pets)}
    return hf_tsv.tune([zoo / "vision", zoo / "flat"], tasks, base_model=zoo / "base",
                       output=output, progress=False, **own).tuning  # fmt: skip


def test_a_search_that_stopped_goes_on_with_the_next_task_of_a_method(
    zoo: Path, pets: Path, tmp_path: Path, stops: dict[str, int], caplog: Any
) -> None:
    whole = searched(zoo, pets, tmp_path / "whole")
    assert (stops["heads"], stops["images"]) == (4, 4 * 2 * 6)
    output, kept = tmp_path / "m", tmp_path / ".m.hf-tsv-tasks"
    for at, finished in ((1, 1), (2, 3)):  # heads of this run, and results of both
        stops |= {"heads": 0, "at": at}
        with pytest.raises(KeyboardInterrupt):
            searched(zoo, pets, output)
        assert len(kept.read_text().splitlines()) == finished and not output.exists()
    assert f"Progress saved (3 results) in {kept}" in caplog.text
    stops |= {"heads": 0, "at": 99, "images": 0}
    assert searched(zoo, pets, output) == whole
    assert (stops["heads"], stops["images"]) == (1, 2 * 6)  # of ties and the second task alone
    assert {path.name for path in tmp_path.iterdir()} == {"m", "whole"}
    assert (output / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


@pytest.fixture(scope="module")
def interrupted(zoo: Path, pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a search keeps that stopped before the last of four results."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        counted(patch)["at"] = 3
        searched(zoo, pets, folder / "m", method="tsv,dc")
    return folder / ".m.hf-tsv-tasks"


@pytest.mark.parametrize(
    ("change", "heads"),
    [({}, 1), *(({name: value}, 4) for name, value in (
        ("alphas", "4,41"), ("limit", 5), ("slopes", "0.5"), ("weights", [1, 0.5]), ("rank", 3),
        ("precision", "exact"),
    ))],
    ids=str,
)  # fmt: skip
def test_results_of_another_search_are_not_used(
    zoo: Path, pets: Path, tmp_path: Path, stops: dict[str, int], interrupted: Path, change: Any,
    heads: int,
) -> None:  # fmt: skip
    """With another grid, images or merge, all is evaluated."""
    shutil.copy(interrupted, tmp_path)
    searched(zoo, pets, tmp_path / "m", **{"method": "tsv,dc", **change})
    assert stops["heads"] == heads
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_a_method_that_is_added_leaves_the_others_done(
    zoo: Path, pets: Path, tmp_path: Path, stops: dict[str, int]
) -> None:
    stops["at"] = 2
    with pytest.raises(KeyboardInterrupt):
        searched(zoo, pets, tmp_path / "m")
    stops |= {"heads": 0, "at": 99}
    found = searched(zoo, pets, tmp_path / "m", method="dc,tsv")
    assert stops["heads"] == 2 and {t["method"] for t in found["trials"]} == {"dc", "tsv"}


def test_a_search_that_is_killed_goes_on(zoo: Path, pets: Path, tmp_path: Path) -> None:
    """In processes of their own, the first of which ends without a chance to tidy up."""
    words = ["tune", zoo / "vision", zoo / "flat", "--base-model", zoo / "base", "--method",
             "tsv,ties,dc", "--alphas", "1,2", "--task", f"pets={pets}", "--task",
             f"same={pets}", "--limit", "12", "-o", tmp_path / "m", "--json"]  # fmt: skip
    process = fork(*words, cwd=tmp_path, environment=dict(os.environ))
    kept = tmp_path / ".m.hf-tsv-tasks"
    while process.poll() is None and not (kept.exists() and kept.stat().st_size):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert ended(process).code == -signal.SIGKILL
    finished = len(kept.read_text().splitlines())
    done = run(*words)
    assert done.code == 0, done.err
    assert done.err.count("Resuming: pets with tsv is done.") == 1
    assert len(re.findall(r"Resuming: \w+ with", done.err)) == finished
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_nothing_is_kept_of_what_is_only_pushed(
    hub: Hub, zoo: Path, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = hf_tsv.tune([zoo / "vision", zoo / "flat"], {"pets": str(pets)}, alphas="0.5,1",
                         base_model=zoo / "base", push_to="me/tuned", limit=3)  # fmt: skip
    assert report.url is not None and not list(tmp_path.iterdir())
