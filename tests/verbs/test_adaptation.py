"""Coefficients learned on images without labels, against differences and NumPy in float64."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import adapters
import clips
import numpy as np
import pytest
import reference
import torch
import yaml
from cli import hf_tsv as run
from safetensors.torch import load_file
from torch import Tensor

import hf_tsv
from hf_tsv import Adaptation, CheckpointError, DataError, Recipe, RecipeError
from hf_tsv.checkpoints.names import RECIPE_FILE
from hf_tsv.cli.tune import LearningOptions
from hf_tsv.evaluation import data
from hf_tsv.merging.work import prepare
from hf_tsv.recipes.settings import Settings
from hf_tsv.system import progress
from hf_tsv.verbs.learning import descent
from hf_tsv.verbs.learning.coefficients import layers_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")

CLASSES = {"pets": ("cat", "dog", "emu"), "things": ("cup", "hat")}
FC1 = "vision_model.encoder.layers.1.mlp.fc1.weight"
BIAS = "vision_model.encoder.layers.1.mlp.fc1.bias"
CPU = torch.device("cpu")


def write_images(file: Path, classes: tuple[str, ...], seed: int, labels: int | None = 0) -> None:
    """A parquet file of noisy pictures; `labels` is the seed of the labels, None of no labels."""
    import datasets
    from PIL import Image

    datasets.disable_progress_bars()
    rng = np.random.default_rng(seed)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)) for _ in range(12)]
    numbers = np.random.default_rng(labels).integers(0, len(classes), 12)
    numbers = np.full(12, -1) if labels is None else numbers
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(classes))}
    rows = {"image": pictures, "label": numbers.tolist()}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).to_parquet(file)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two datasets."""
    folder = tmp_path_factory.mktemp("images")
    for seed, (name, classes) in enumerate(CLASSES.items()):
        write_images(folder / f"{name}.parquet", classes, seed)
    return folder


def how(images: Path, **choices: Any) -> Adaptation:
    tasks = {name: str(images / f"{name}.parquet") for name in CLASSES}
    choices = {"steps": 4, "learning_rate": 0.02, "batch_size": 12, **choices}
    return Adaptation(tasks, **choices)  # type: ignore[arg-type]


def adapted(
    zoo: Path, output: Path, found: Adaptation, *kinds: str, **options: Any
) -> hf_tsv.MergeReport:
    names = [zoo / kind for kind in kinds or ("vision", "full")]
    return hf_tsv.merge(
        names, base_model=zoo / "base", output=output, method="ada", adaptation=found, **options
    )


@pytest.fixture(scope="module")
def usual(
    zoo: Path, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, hf_tsv.MergeReport]:
    """What is learned of two fine-tunes as [`how`] says: the folder, and the report."""
    folder = tmp_path_factory.mktemp("usual") / "out"
    return folder, adapted(zoo, folder, how(images))


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def repeated(recipe: Recipe, output: Path) -> Path:
    hf_tsv.merge(recipe=recipe, output=output)
    return output


def with_coefficients(zoo: Path, folder: Path, value: Any, **options: Any) -> Recipe:
    """A recipe of two fine-tunes whose coefficients are `value(label)`, for every weight."""
    options = {"base_model": zoo / "base", "output": folder, **options}
    report = hf_tsv.merge([zoo / "vision", zoo / "full"], **options)
    recipe = Recipe.load(folder)
    merged = [n for n, found in report.treatments.items() if found["treatment"] != "copied"]
    return replace(
        recipe,
        settings=replace(recipe.settings, method="ada"),
        coefficients={name: tuple(value(name)) for name in merged},
    )


# What is computed


@pytest.mark.parametrize("options", [{}, {"qkv": "fused", "alpha": 0.7}], ids=["split", "fused"])
def test_gradients_are_those_of_differences_in_float64(
    zoo: Path, images: Path, options: dict[str, Any]
) -> None:
    from transformers import CLIPModel

    settings = Settings(method="ada", **options)
    tasks = [str(zoo / "vision"), str(zoo / "full")]
    merge, sources = prepare(tasks, str(zoo / "base"), [1, 0.5], settings)
    model = clips.load(CLIPModel, zoo / "base", dtype=torch.float64).eval().requires_grad_(False)
    layers = layers_of(model, merge, sources, CPU, show=False)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(3, 3, 32, 32, generator=generator, dtype=torch.float64)
    classes = torch.nn.functional.normalize(torch.randn(5, 24, generator=generator).double())
    start = 1 + 0.3 * torch.randn(len(layers), 2, generator=generator, dtype=torch.float64)

    def loss(coefficients: Tensor) -> Tensor:
        for layer, row in zip(layers, coefficients, strict=True):
            layer.place(row)
        return descent.entropy(model, classes, pixels).mean()

    for layer in layers:
        for parameter in layer.parameters:
            parameter.requires_grad_(True)
    loss(start).backward()
    found = torch.stack([layer.gradient(2) for layer in layers])
    expected = torch.zeros_like(start)
    with torch.no_grad():
        for index in np.ndindex(*start.shape):
            step = torch.zeros_like(start)
            step[index] = 1e-3
            expected[index] = (loss(start + step) - loss(start - step)) / 2e-3
    assert len(layers) > 20 and float(expected.abs().max()) > 1e-6
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_entropy_is_that_of_the_equation(zoo: Path) -> None:
    from transformers import CLIPModel

    model = clips.load(CLIPModel, zoo / "base").eval()
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(3, 3, 32, 32, generator=generator)
    classes = torch.nn.functional.normalize(torch.randn(5, 24, generator=generator))
    with torch.no_grad():
        found = descent.entropy(model, classes, pixels).numpy()
        seen = model.get_image_features(pixel_values=pixels)
        seen = getattr(seen, "pooler_output", seen).double().numpy()
        scale = np.exp(float(model.logit_scale))
    seen /= np.linalg.norm(seen, axis=1, keepdims=True)
    p = np.exp(scale * seen @ classes.double().numpy().T)
    p /= p.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, -(p * np.log(p)).sum(axis=1), rtol=1e-5)


def test_a_merge_with_coefficients_is_that_of_the_equations(zoo: Path, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    recipe = with_coefficients(zoo, tmp_path / "tsv", lambda _: rng.random(2).round(3).tolist())
    merged = weights(repeated(recipe, tmp_path / "ada"))
    base, tasks = weights(zoo / "base"), [weights(zoo / "vision"), weights(zoo / "full")]
    for name, row in recipe.coefficients.items():
        w0 = base[name].double()
        deltas = [task[name].double() - w0 if name in task else 0 * w0 for task in tasks]
        if w0.ndim == 2 and name != "text_projection.weight":
            rank = min(w0.shape) // 2
            held = [i for i, delta in enumerate(deltas) if delta.any()]
            U, s, Vh = reference.concatenation([deltas[i] for i in held], [rank] * len(held))
            s = s * torch.tensor([row[i] for i in held for _ in range(rank)]).double()
            update = reference.procrustes(U) * s @ reference.procrustes(Vh.T).T
        else:
            update = (row[0] * deltas[0] + row[1] * deltas[1]) / 2
        error = (merged[name].double() - w0 - update).norm()
        assert error < 1e-6 * w0.norm() + 1e-4 * update.norm(), name


@pytest.mark.parametrize("options", [{}, {"qkv": "fused", "alpha": 0.5, "weights": [1, -0.5]}])
def test_coefficients_of_1_give_the_bytes_of_tsv(
    zoo: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    recipe = with_coefficients(zoo, tmp_path / "tsv", lambda _: (1, 1), **options)
    assert bytes_of(repeated(recipe, tmp_path / "ada")) == bytes_of(tmp_path / "tsv")


def test_a_coefficient_of_0_leaves_a_task_out_of_a_weight(zoo: Path, tmp_path: Path) -> None:
    recipe = with_coefficients(zoo, tmp_path / "tsv", lambda _: (0, 0))
    merged, base = weights(repeated(recipe, tmp_path / "ada")), weights(zoo / "base")
    assert all(torch.equal(merged[name], base[name]) for name in base)
    some = {name: row for name, row in recipe.coefficients.items() if name == BIAS}
    other = weights(repeated(replace(recipe, coefficients=some), tmp_path / "some"))
    plain = weights(tmp_path / "tsv")
    assert [name for name in plain if not torch.equal(plain[name], other[name])] == [BIAS]


def test_one_task_alone_has_coefficients_too(zoo: Path, images: Path, tmp_path: Path) -> None:
    report = adapted(zoo, tmp_path / "out", how(images), "vision")
    found = report.treatments[FC1]["coefficients"]
    base, tuned, merged = (
        weights(f)[FC1].double() for f in (zoo / "base", zoo / "vision", tmp_path / "out")
    )
    assert len(found) == 1 and found[0] != 1
    assert torch.allclose(merged, base + found[0] * (tuned - base), atol=1e-7)


def test_shares_are_scaled_as_the_merge_is(zoo: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    finer: Any = {"scale": {"*.layers.1.*": 0.5, "full:*.mlp.*": -2}, "keep_base": ("*.q_proj.*",)}
    tasks = [str(zoo / "vision"), str(zoo / "full")]
    hf_tsv.merge(tasks, base_model=zoo / "base", output=tmp_path / "tsv", alpha=0.7, **finer)
    settings = Settings(method="ada", alpha=0.7, **finer)
    merge, sources = prepare(tasks, str(zoo / "base"), None, settings)
    model = clips.load(CLIPModel, zoo / "base", dtype=torch.float64).requires_grad_(False)
    layers_of(model, merge, sources, CPU, show=False)
    merged = weights(tmp_path / "tsv")
    for name, parameter in model.named_parameters():
        assert torch.allclose(parameter, merged[name].double(), atol=1e-6), name


# What is learned


def test_entropy_falls_and_is_told(zoo: Path, images: Path, tmp_path: Path) -> None:
    report = adapted(zoo, tmp_path / "out", how(images, steps=15))
    assert report.adaptation is not None
    before, after = report.adaptation["entropy"]
    assert after < before - 1e-4
    assert report.adaptation["images"] == [12, 12]
    assert [task["split"] for task in report.adaptation["tasks"]] == ["test", "test"]
    learned = {n for n, found in report.treatments.items() if "coefficients" in found}
    assert {FC1, BIAS, "visual_projection.weight"} <= learned
    assert all(name.startswith(("vision_model.", "visual_projection.")) for name in learned)
    assert report.treatments[FC1]["coefficients"] != [1, 1]
    from transformers import CLIPModel

    CLIPModel.from_pretrained(tmp_path / "out")


def test_the_model_that_is_written_has_the_entropy_that_is_told(
    images: Path, usual: tuple[Path, hf_tsv.MergeReport]
) -> None:
    """What is learned in float32 from factors is what the merge makes of it."""
    from hf_tsv.evaluation import zero_shot
    from hf_tsv.evaluation.data import load

    folder, report = usual
    assert report.adaptation is not None
    pipe: Any = hf_tsv.pipeline("zero-shot-image-classification", folder)
    means = []
    for task in how(images).tasks:
        data = load(task)
        head = zero_shot.head(pipe.model, pipe.tokenizer, data.classes, task.templates)
        pictures, _ = data.batch(0, len(data.rows), task.name)
        pixels = pipe.image_processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            means.append(float(descent.entropy(pipe.model, head.clone(), pixels).mean()))
    assert abs(sum(means) / 2 - report.adaptation["entropy"][1]) < 1e-5


def test_a_recipe_repeats_it_without_images(zoo: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "images")
    adapted(zoo, tmp_path / "out", how(tmp_path / "images"))
    shutil.rmtree(tmp_path / "images")
    report = hf_tsv.merge(recipe=tmp_path / "out" / RECIPE_FILE, output=tmp_path / "again")
    for file in ("model.safetensors", RECIPE_FILE, "README.md"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    assert report.method == "ada" and report.adaptation is not None
    assert report.adaptation["images"] == [12, 12]


def test_labels_are_not_used(
    zoo: Path, tmp_path: Path, usual: tuple[Path, hf_tsv.MergeReport]
) -> None:
    for name, seed in (("second", 1), ("none", None)):
        folder = tmp_path / name
        folder.mkdir()
        for number, (task, classes) in enumerate(CLASSES.items()):
            write_images(folder / f"{task}.parquet", classes, number, labels=seed)
        adapted(zoo, tmp_path / f"out-{name}", how(folder))
    folders = (usual[0], tmp_path / "out-second", tmp_path / "out-none")
    assert len({bytes_of(folder) for folder in folders}) == 1


def test_the_seed_decides(zoo: Path, images: Path, tmp_path: Path) -> None:
    found = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        adapted(zoo, tmp_path / name, how(images, batch_size=3, steps=2, seed=seed))
        found[name] = Recipe.load(tmp_path / name).coefficients
    assert found["a"] == found["b"] != found["c"]


@pytest.mark.parametrize("kind", ["factors", "adapter"])
def test_compressed_inputs_are_adapted_like_whole_ones(
    zoo: Path, images: Path, tmp_path: Path, kind: str
) -> None:
    from transformers import CLIPModel

    compressed, same = tmp_path / "compressed", zoo / "vision"
    if kind == "factors":
        hf_tsv.compress(same, base_model=zoo / "base", rank_fraction=1.0, output=compressed)
    else:
        state = adapters.trained(zoo, compressed, "plain")
        model = clips.load(CLIPModel, zoo / "base")
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        same = clips.save(model, tmp_path / "same")
    found = {}
    for name, task in (("compressed", compressed), ("whole", same)):
        hf_tsv.merge([task, zoo / "full"], base_model=zoo / "base", output=tmp_path / f"of-{name}",
                     method="ada", adaptation=how(images, steps=2))  # fmt: skip
        found[name] = Recipe.load(tmp_path / f"of-{name}").coefficients
    assert list(found["compressed"]) == list(found["whole"])
    of_compressed, of_whole = (torch.tensor(list(rows.values())) for rows in found.values())
    assert torch.allclose(of_compressed, of_whole, atol=1e-3)
    assert not torch.allclose(of_whole, torch.ones_like(of_whole), atol=1e-2)


# What is written


def test_the_recipe_is_compact_and_the_card_says_what_was_learned(
    images: Path, usual: tuple[Path, hf_tsv.MergeReport]
) -> None:
    folder, _ = usual
    text = (folder / RECIPE_FILE).read_text()
    lines = [line for line in text.splitlines() if line.startswith(f"  {FC1}: [")]
    assert len(lines) == 1 and lines[0].endswith("]")
    content = yaml.safe_load(text)
    assert content["adaptation"]["steps"] == 4 and content["method"] == "ada"
    assert all(len(f"{c:.6f}") >= len(str(c)) for row in content["coefficients"].values()
               for c in row)  # fmt: skip
    card = (folder / "README.md").read_text()
    assert "without data" not in card and FC1 not in card
    assert "unlabelled images" in card and "`pets`" in card and "| 12 |" in card
    assert str(images) not in text and str(images) not in card.partition("<details>")[0]
    assert Recipe.from_yaml(text).to_yaml() == text


def test_an_adaptation_is_the_same_after_a_round_trip() -> None:
    tasks = (
        hf_tsv.EvaluationTask("name", "dataset", split="train", classes=("a", "b")),
        hf_tsv.EvaluationTask("b", "x", "v1", "small", templates=("{}", "a {}")),
    )
    found = Adaptation(tasks, 3, 0.1, 2, 5, images=(7, 8), entropy=(1.5, 0.25))
    content = yaml.safe_load(yaml.safe_dump(found.to_dict()))
    assert Adaptation.from_dict(content) == found


# What is refused


def refused(match: str, zoo: Path, output: Path, *kinds: str, **options: Any) -> None:
    options = {"base_model": zoo / "base", "method": "ada", **options}
    names = [zoo / kind for kind in kinds or ("vision", "full")]
    with pytest.raises((RecipeError, CheckpointError, DataError), match=match):
        hf_tsv.merge(names, output=output, **options)
    assert not output.exists()


def test_what_cannot_be_learned_is_refused(
    zoo: Path, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, found = tmp_path / "out", how(images)
    refused("learns from images, and there are none", zoo, out)
    refused("method tsv does not learn", zoo, out, method="tsv", adaptation=found)
    refused("no checkpoint has a vision tower", zoo, out, "text", adaptation=found)
    refused("not a CLIPModel", zoo, out, "flat", base_model=zoo / "vision", adaptation=found)
    for steps in (1, 4):
        bad = how(images, learning_rate=1e30, steps=steps)
        refused(r"entropy of predictions is nan after step 1", zoo, out, adaptation=bad)
    gone = Adaptation({"pets": str(tmp_path / "gone.parquet")})  # type: ignore[arg-type]
    refused("pets: the dataset .* cannot be read", zoo, out, adaptation=gone)
    with pytest.raises(RecipeError, match="what was learned"):
        hf_tsv.merge(recipe=tmp_path / "recipe.yaml", adaptation=found, output=out)
    monkeypatch.setitem(data.LIBRARIES, "no_such_module", "no-such-package")
    refused(r"needs no-such-package.*pip install no-such-package", zoo, out, adaptation=found)


def test_a_vision_tower_that_is_the_base_s_own_is_refused(
    zoo: Path, images: Path, tmp_path: Path
) -> None:
    """The fine-tune is a whole model of which only the text tower was trained."""
    from transformers import CLIPModel

    model = clips.load(CLIPModel, zoo / "base")
    state = clips.fine_tuned_state(zoo / "base", 9, "text_model.")
    model.load_state_dict(state)
    clips.save(model, tmp_path / "task")
    with pytest.raises(CheckpointError, match="No checkpoint changes the vision tower"):
        hf_tsv.merge([tmp_path / "task"], base_model=zoo / "base", method="ada",
                     adaptation=how(images), output=tmp_path / "out")  # fmt: skip


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"tasks": ()}, "no images to learn from"),
        ({"tasks": ["a"]}, "names no dataset"),
        ({"tasks": ["a=x", "a=y"]}, "given twice"),
        ({"steps": 0}, "`steps=` must be a whole number, at least 1"),
        ({"batch_size": 1.5}, "`batch_size=` must be a whole number, at least 1"),
        ({"seed": -1}, "`seed=` must be a whole number, at least 0"),
        ({"learning_rate": 0}, "`learning_rate=` must be above 0"),
        ({"learning_rate": float("nan")}, "`learning_rate=` must be a finite number"),
    ],
)
def test_bad_choices_are_refused(choices: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Adaptation(**{"tasks": ["a=x"], **choices})


@pytest.fixture(scope="module")
def good(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A recipe with coefficients."""
    return with_coefficients(
        zoo, tmp_path_factory.mktemp("good") / "tsv", lambda _: (1, 1)
    ).to_yaml()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"coefficients": {FC1: [1.0]}}, "has 1 coefficient for 2 inputs"),
        ({"coefficients": {FC1: [1.0, float("nan")]}}, "got nan"),
        ({"coefficients": {FC1: [1.0, float("inf")]}}, "got inf"),
        ({"coefficients": {FC1: [1.0, True]}}, "got True"),
        ({"coefficients": {FC1: [1.0, "1"]}}, "got '1'"),
        ({"coefficients": {FC1: [1.0, -0.5]}}, "is -0.5"),
        ({"coefficients": {FC1: 1.0}}, "malformed"),
        ({"coefficients": [1.0]}, "malformed"),
        ({"coefficients": {}}, "has no coefficients"),
        ({"coefficients": {"no.weight": [1.0, 1.0]}}, "coefficients of no.weight"),
        ({"coefficients": {1: [1.0, 1.0]}}, "coefficients of 1, which"),
        ({"coefficients": {"logit_scale": [1.0, 1.0], "text_model.x": [1.0, 1.0]}}, "text_model.x"),
        ({"method": "tsv"}, "method tsv has coefficients"),
        ({"adaptation": {"steps": 1}}, "malformed"),
        ({"adaptation": {"tasks": ["a"]}}, "malformed"),
        ({"adaptation": {"tasks": [{"name": "a", "dataset": "b", "odd": 1}]}}, "malformed"),
        ({"adaptation": {"tasks": [{"name": "a", "dataset": "b"}], "entropy": ["x"]}}, "'x'"),
        ({"adaptation": {"tasks": [{"name": "a", "dataset": "b"}]}}, "does not say what was found"),
    ],
)
def test_bad_recipes_are_refused(
    good: str, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    content = {**yaml.safe_load(good), **change}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(RecipeError, match=said):
        hf_tsv.merge(recipe=tmp_path / "recipe.yaml", output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# On the command line


def test_the_command(zoo: Path, images: Path, tmp_path: Path) -> None:
    tasks = [w for name in CLASSES for w in ("--task", f"{name}={images / f'{name}.parquet'}")]
    numbers = ["--steps", "2", "--learning-rate", "0.02", "--batch-size", "4", "--seed", "3"]
    done = run("tune", zoo / "vision", zoo / "full", "--base-model", zoo / "base", "-o",
               tmp_path / "out", "--method", "ada", *tasks, "--template", "a {}", *numbers,
               "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert "Entropy of predictions: " in done.err
    told = done.json["adaptation"]
    assert (told["steps"], told["batch_size"], told["seed"]) == (2, 4, 3)
    assert told["tasks"][0]["templates"] == ["a {}"]
    assert len(done.json["treatments"][FC1]["coefficients"]) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--method ada", "no images to learn from"),
        ("--method ada --task a=b --limit 3", "limit"),
        ("--method ada --task a=b --alphas 0:1:1", "alphas"),
        ("--task a=b --steps 3", "for the method ada only"),
        ("--task a=b --learning-rate 0.1", "for the method ada only"),
        ("--task a=b --seed 1", "--seed draws points of the grid"),
    ],
)
def test_options_that_do_not_fit_together(
    zoo: Path, tmp_path: Path, options: str, said: str
) -> None:
    done = run("tune", zoo / "full", "--base-model", zoo / "base", "-o", tmp_path / "out",
               *options.split())  # fmt: skip
    assert done.code == 2 and said in done.err, done.err
    assert not (tmp_path / "out").exists()


def test_merge_names_the_command_that_learns(tmp_path: Path) -> None:
    done = run("merge", "org/a", "--method", "ada", "-o", tmp_path / "out")
    assert done.code == 2 and "Use `hf-tsv tune --method ada --task" in done.err


def test_help_tells_the_defaults() -> None:
    hints = get_type_hints(LearningOptions, include_extras=True)
    for name in ("steps", "learning_rate", "batch_size", "seed"):
        told = hints[name].__metadata__[-1]
        assert re.search(rf"\[default: (64; )?{getattr(Adaptation, name)}\b", told)


def test_the_bar_shows_the_entropy(
    zoo: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(progress, "drawable", lambda: True)
    report = adapted(zoo, tmp_path / "out", how(images, steps=1), progress=True)
    assert report.adaptation is not None
    assert f"Adapting, entropy {report.adaptation['entropy'][0]:.3f}" in capsys.readouterr().err


def test_images_of_fewer_tasks_are_warned_of(zoo: Path, images: Path, tmp_path: Path) -> None:
    one = Adaptation({"pets": str(images / "pets.parquet")}, steps=1)  # type: ignore[arg-type]
    report = adapted(zoo, tmp_path / "out", one, dry_run=True)
    assert any("images of 1 task for 2 checkpoints" in warning for warning in report.warnings)


def test_threads_move_what_is_learned_by_rounding_only(
    zoo: Path, images: Path, tmp_path: Path, usual: tuple[Path, hf_tsv.MergeReport]
) -> None:
    """Passes through the model are on torch's own threads, unlike everything else."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4 if before == 1 else 1)
        other = adapted(zoo, tmp_path / "out", how(images))
    finally:
        torch.set_num_threads(before)
    first, second = (
        torch.tensor([e["coefficients"] for e in report.treatments.values() if "coefficients" in e])
        for report in (usual[1], other)
    )
    assert float((first - 1).abs().max()) > 0.01  # something was learned
    assert float((second - first).abs().max()) < 1e-5
