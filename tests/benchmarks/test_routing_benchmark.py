"""The benchmark of routing: runs on tiny models that really route, and tables of known runs."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from benchmarks.accuracy import ablation, choices, results
from benchmarks.accuracy.routed import images_of, made, opened
from benchmarks.accuracy.routing import own_factors, routed, routing_runs
from benchmarks.accuracy.runs import METHODS, Seed, command, stepped
from benchmarks.accuracy.suites import SUITES
from hf_tsv.routing import scores

TASKS = ("a", "b", "c")
COUNTS = (2, 3)
IMAGES = 60
SUITE = replace(SUITES["routing"], counts=COUNTS)


@pytest.fixture(scope="module", autouse=True)
def _logger() -> Iterator[None]:
    """Give the logger back as it was: the benchmark's commands run in this process, quietly."""
    own = logging.getLogger("hf_tsv")
    before = own.handlers, own.level, own.propagate
    yield
    own.handlers, own.propagate = before[0], before[2]
    own.setLevel(before[1])


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> Seed:
    """Three fine-tunes of a tiny CLIP, with images for each, whose labels are random."""
    models = tmp_path_factory.mktemp("models")
    clips.make_base(models / "base")
    for number, task in enumerate(TASKS):
        make_fine_tune(models / "base", models / task, number)
        for split, first in (("test", 0), ("validation", 50)):
            write_images(models / "images" / f"{task}-{split}.parquet", 100 * number + first)
    return Seed(0, models, models / "images", models / "results", TASKS)


def make_fine_tune(base: Path, folder: Path, seed: int) -> None:
    """Change the vision tower so much that it classifies otherwise."""
    from transformers import CLIPModel

    model = clips.load(CLIPModel, base)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.vision_model.parameters():
        weight.data += 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)
    clips.save(model, folder)


def write_images(file: Path, seed: int) -> None:
    """Write images that differ in colour and pattern, so that they belong to several tasks."""
    import datasets

    datasets.disable_progress_bars()
    rng = np.random.default_rng(seed)
    parts = [np.kron(rng.normal(size=(IMAGES, n, n, 3)), np.ones((1, 32 // n, 32 // n, 1)))
             for n in (1, 4, 32)]  # fmt: skip
    pixels = np.clip(128 + 60 * sum(parts), 0, 255).astype(np.uint8)
    names = datasets.ClassLabel(names=["cat", "dog", "emu"])
    rows = {
        "image": list(map(Image.fromarray, pixels)),
        "label": rng.integers(0, 3, IMAGES).tolist(),
    }
    features = datasets.Features({"image": datasets.Image(), "label": names})
    file.parent.mkdir(exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)


def route_of(seed: Seed, folder: Path, split: str) -> Any:
    pipe = opened(seed, folder, TASKS)
    parts = [images_of(seed, task, split, pipe.image_processor).pixels for task in TASKS]
    return pipe.model.route(torch.cat(parts))


def test_a_run_tells_where_test_images_are_sent(seed: Seed) -> None:
    found = routed(seed, 3)
    folder = seed.results / "routed"
    route, own = route_of(seed, folder, "test"), [i // IMAGES for i in range(3 * IMAGES)]
    nearest = np.zeros((3, 3))
    np.add.at(nearest, (own, route.scores.argmax(dim=1).tolist()), 1 / IMAGES)
    np.testing.assert_allclose(found["nearest"], nearest, atol=1e-6)
    among = [task in chosen for task, chosen in zip(own, route.chosen, strict=True)]
    assert found["among"] == pytest.approx(np.reshape(among, (3, IMAGES)).mean(axis=1).tolist())
    assert found["sets"] == len(set(route.chosen))
    assert found["chosen"] == pytest.approx(np.mean([len(c) for c in route.chosen]))
    assert found["accuracies"] == seed.accuracies(folder, TASKS)
    files = [folder / "model.safetensors", *folder.glob("tasks/*/*.safetensors")]
    whole = 3 * (seed.models / "base" / "model.safetensors").stat().st_size
    assert found["ratio"] == pytest.approx(sum(f.stat().st_size for f in files) / whole, rel=0.2)
    single = routed(seed, 3, "--max-tasks", 1)
    assert single["chosen"] == 1
    assert single["among"] == pytest.approx(np.diag(single["nearest"]).tolist())


def test_a_task_alone_is_measured_on_its_factors(seed: Seed) -> None:
    found = own_factors(seed, 3)["accuracies"]
    folders = {task: seed.results / "routed" / "tasks" / task for task in TASKS}
    assert found == {t: seed.accuracies(folder, [t])[t] for t, folder in folders.items()}
    assert found != seed.accuracies(seed.results / "routed", TASKS)


def test_the_layers_by_default_are_compared_as_a_routed_model_compares_them(seed: Seed) -> None:
    found = ablation.compare_layers(seed, 3)
    folder, _ = made(seed, TASKS)
    route = route_of(seed, folder, "validation")
    own = torch.arange(3).repeat_interleave(IMAGES)
    right = (route.scores.argmax(dim=1) == own).float().mean().item()
    assert found["default"] == {"nearest": pytest.approx(right), "three": 1}
    assert found["only queries"].keys() == {"nearest", "three"} and len(found) > 12


def test_tokens_are_those_at_the_inputs_of_layers(seed: Seed) -> None:
    folder, _ = made(seed, TASKS)
    pipe = opened(seed, folder, TASKS)
    pixels = images_of(seed, "a", "test", pipe.image_processor).pixels
    tower, layer = pipe.model.router.first, "vision_model.encoder.layers.1.self_attn.q_proj"
    states = tower.vision_model(pixel_values=pixels, output_hidden_states=True).hidden_states
    expected = tower.vision_model.encoder.layers[1].layer_norm1(states[1])
    parts = [pixels[:10], pixels[10:]]
    for mean, wanted in ((False, expected[:, 0]), (True, expected.mean(dim=1))):
        found = ablation.tokens(tower, [layer], parts, mean=mean)[layer]
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_residuals_are_weighted_by_singular_values(seed: Seed) -> None:
    folder, _ = made(seed, TASKS)
    layer = "vision_model.encoder.layers.0.mlp.fc1"
    stored = [
        load_file(folder / "tasks" / t / "task_factors.safetensors") for t in TASKS
    ]  # fmt: skip
    V = torch.stack([own[f"{layer}.weight.Vh"].float() for own in stored])
    x = torch.nn.functional.normalize(torch.randn(5, V.shape[2]), dim=1)
    found = scores.residuals(x, ablation.weighted(folder, TASKS, {layer: V})[layer])
    for i, own in enumerate(stored):
        sigma = own[f"{layer}.weight.S"].float()
        expected = torch.linalg.norm(x - (x @ V[i].T * (sigma / sigma[0])) @ V[i], dim=1)
        torch.testing.assert_close(found[:, i], expected, atol=1e-4, rtol=1e-3)


def test_sets_are_measured_as_a_routed_model_classifies(seed: Seed) -> None:
    """The rule of a routed folder, on validation images, by `hf-tsv evaluate`."""
    settings = ablation.compare_sets(seed, 3)
    assert len(settings) == 27
    one = next(s for s in settings if s["max_tasks"] == 2 and s["threshold"] == 0.3)
    layers = 6  # of two blocks
    rule = ("--temperature", layers * one["temperature"], "--threshold", 0.3, "--max-tasks", 2)
    folder, report = made(seed, TASKS, *rule)
    assert len(report["rule"]["layers"]) == layers
    base = ("--base-model", seed.models / "base")
    options = seed.options(TASKS, "validation")
    found = command("evaluate", folder, *base, *options)["tasks"]
    own = ablation.fine_tuned(seed, TASKS)
    expected = np.mean([found[t]["accuracy"] / own[i] for i, t in enumerate(TASKS)])
    assert one["normalised"] == pytest.approx(expected)
    sent = [len(own) for own in route_of(seed, folder, "validation").chosen]
    assert one["chosen"] == pytest.approx(np.mean(sent)) and {1, 2} == set(sent)


def kept(rng: np.random.Generator, name: str) -> Any:
    """What a run of this name would have kept."""

    def accuracies() -> dict[str, float]:
        return {task: float(rng.uniform(0.2, 0.9)) for task in TASKS}

    if name == "references":
        return {"base": accuracies(), "fine-tuned": accuracies()}
    kind, _, count = name.rpartition("-")
    if kind == "routing-layers":
        return {
            "default": {"nearest": 0.5, "three": 0.75},
            "2.mlp.fc1": {"nearest": 0.25, "three": 1},
        }
    if kind == "routing-sets":
        keys = ("temperature", "threshold", "max_tasks")
        grid = ablation.product(ablation.TEMPERATURES, ablation.THRESHOLDS, ablation.MOST_TASKS)
        return [
            dict(zip(keys, one, strict=True)) | {"normalised": one[1], "chosen": 1.5}
            for one in grid
        ]
    found: dict[str, Any] = {"accuracies": accuracies()}
    if kind in (*METHODS, *stepped()):
        found |= {"alpha": 0.5, "alphas": [0.5, 1.0], "validation": [0.6, 0.4]}
    if kind.startswith("routed"):
        n = int(count)
        found |= {"nearest": rng.dirichlet(np.ones(n), n).tolist(), "among": [0.75] * n}
        found |= {"chosen": 1.5, "sets": 4, "ratio": 0.5}
    return found


@pytest.fixture
def seeds(tmp_path: Path) -> list[Seed]:
    """Two seeds of which everything has been run."""
    found = []
    for number in (0, 1):
        rng = np.random.default_rng(number)
        seed = Seed(number, tmp_path, tmp_path, tmp_path / str(number), TASKS)
        for name in routing_runs(seed, COUNTS):
            seed.kept(name, lambda name=name, rng=rng: kept(rng, name))
        found.append(seed)
    return found


def test_routing_is_compared_with_the_best_merge_of_each_seed(seeds: list[Seed]) -> None:
    found = results.summary(SUITE, seeds)
    best = []
    for seed in seeds:
        own = json.loads((seed.results / "references.json").read_text())["fine-tuned"]
        values = {}
        for name in choices.BEST["alone"]:
            run = json.loads((seed.results / f"{name}-3.json").read_text())["accuracies"]
            values[name] = 100 * np.mean([run[task] / own[task] for task in TASKS])
        best.append(max((value, name) for name, value in values.items()))
    rows = found["accuracy"]["3"]
    assert rows["alone"]["names"] == [name for _, name in best]
    assert rows["alone"]["normalised"] == pytest.approx([value for value, _ in best])
    apart = np.array(rows["routed"]["normalised"]) - [value for value, _ in best]
    cell = f"{apart.mean():.1f} ± {apart.std(ddof=1):.1f}; {apart.min():+.1f} |"
    line = next(x for x in results.markdown(found).splitlines() if x.startswith("| **routed** −"))
    assert line.endswith(cell)


def test_the_most_confused_pairs_come_first(seeds: list[Seed]) -> None:
    found = results.summary(SUITE, seeds)
    matrices = 100 * np.array(
        [json.loads((s.results / "routed-3.json").read_text())["nearest"] for s in seeds]
    )
    np.testing.assert_allclose(found["confusion"]["3"], matrices.mean(axis=0), atol=1e-3)
    others = matrices.mean(axis=0) * (1 - np.eye(3))
    i, j = np.unravel_index(others.argmax(), others.shape)
    shares = [f"{x:.1f}" for x in (others[i, j], *matrices[:, i, j])]
    lines = results.markdown(found).split("| images of |")[1].splitlines()
    assert lines[2] == f"| {' | '.join([TASKS[i], TASKS[j], *shares])} |"


def test_the_report_of_routing_is_written(seeds: list[Seed], tmp_path: Path) -> None:
    found = results.summary(SUITE, seeds)
    results.write(found, tmp_path / "out")
    assert {f.name for f in (tmp_path / "out").iterdir()} == {
        "routing.json", "routing.md", choices.PICTURE,
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "routing.json").read_text()) == found
    text = (tmp_path / "out" / "routing.md").read_text()
    assert "--suite routing" in text and "50.0 ± 0.0 (75.0 ± 0.0)" in text
    lines = [line for line in text.splitlines() if line.startswith(("| 1 |", "| 2 |", "| 3 |"))]
    assert len(lines) == 1 + 2 * 9  # the nearest task; by threshold and temperature
