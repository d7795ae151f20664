"""Class names of tasks: the embeddings beside a routed model, and what candidate labels change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import torch
from cli import copied
from cli import hf_tsv as run
from PIL import Image
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.checkpoints.names import CLASSES_FILE, ROUTING_FILE
from hf_tsv.routing import scores
from hf_tsv.routing.rule import Rule
from hf_tsv.system.errors import CheckpointError, HfTsvError

SEEDS = {"a": 13, "b": 15, "c": 17}
CLASSES = {"a": ["cat", "dog"], "b": ["zebra", "bus", "car"]}
Z = "zero-shot-image-classification"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clips.make_tasks(tmp_path_factory.mktemp("tasks"), SEEDS, "vision")


@pytest.fixture(scope="module")
def routed(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("routed") / "routed"
    hf_tsv.route([tasks / name for name in SEEDS], base_model=tasks / "base", output=output,
                 classes=CLASSES, templates=["a {}."], progress=False)  # fmt: skip
    return output


def pictures(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    return [
        Image.fromarray(generator.integers(0, 255, (n, n, 3), dtype=np.uint8)).resize((32, 32))
        for n in range(1, count + 1)
    ]


def test_embeddings_are_those_of_the_prompts(routed: Path) -> None:
    found = load_file(routed / CLASSES_FILE)
    assert set(found) == {f"{name}.classes" for name in CLASSES}
    pipe = hf_tsv.pipeline(Z, routed, progress=False)
    for name, own in CLASSES.items():
        texts = pipe.tokenizer([f"a {one}." for one in own], padding=True, return_tensors="pt")
        with torch.no_grad():
            embeddings = pipe.model.get_text_features(**texts).pooler_output
        expected = torch.nn.functional.normalize(embeddings, dim=-1)
        torch.testing.assert_close(found[f"{name}.classes"], expected, rtol=0, atol=1e-5)
    said = json.loads((routed / ROUTING_FILE).read_text())["tasks"]
    assert [task.get("classes") for task in said] == [CLASSES["a"], CLASSES["b"], None]


def test_evidence_is_the_equation_in_float64() -> None:
    generator = np.random.default_rng(0)
    unit = lambda n: (x := generator.normal(size=(n, 6))) / np.linalg.norm(x, axis=1)[:, None]  # noqa: E731
    labels, classes = generator.normal(size=(4, 6)), [unit(3), None, unit(5)]
    x = labels / np.linalg.norm(labels, axis=1, keepdims=True)
    near = [None if own is None else (x @ own.T).max(axis=1) for own in classes]
    best = np.maximum(near[0], near[2])
    powers = np.exp(np.stack([near[0], best, near[2]]) / 0.05)
    expected = np.log((powers / powers.sum(axis=0)).mean(axis=1))
    known = [None if own is None else torch.tensor(own) for own in classes]
    found = scores.label_evidence(torch.tensor(labels), known, 0.05)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)
    assert scores.label_evidence(torch.tensor(labels), [None, None], 0.05).tolist() == [0, 0]


def test_labels_of_two_tasks_leave_the_choice_to_the_image() -> None:
    """Ten labels of one task and ninety of another: shares of a tenth and nine tenths."""
    generator = torch.Generator().manual_seed(0)
    a, b, c = (
        torch.nn.functional.normalize(torch.randn(n, 64, generator=generator), dim=1)
        for n in (10, 90, 20)
    )
    found = scores.label_evidence(torch.cat([a, b]), [a, b, c], 0.02).exp()
    torch.testing.assert_close(found, torch.tensor([0.1, 0.9, 0.0]), rtol=0, atol=1e-4)
    assert scores.label_evidence(a, [a, b, c], 0.02).exp()[0] > 0.999


def test_labels_of_one_task_send_images_to_it_or_to_one_without_names(routed: Path) -> None:
    pipe = hf_tsv.pipeline(Z, routed, progress=False)
    model, images = pipe.model, clips.patterned(30)
    layers = model.router.rule.layers
    model.router.rule = Rule(layers, temperature=3, max_tasks=1, label_temperature=1e-4)
    without = model.route(images)
    assert {name for own in without.tasks for name in own} == set(SEEDS)
    for wanted, other in (("a", "b"), ("b", "a")):
        labels = [f"a {one}." for one in CLASSES[wanted]]
        texts = pipe.tokenizer(labels, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**texts, pixel_values=images).vision_model_output.tasks
        assert (wanted,) in found and (other,) not in found
        for scored, own in zip(without.scores, found, strict=True):
            better = scored[2] > scored[list(SEEDS).index(wanted)]
            assert own == (("c",) if better else (wanted,))


def test_the_model_answers_as_the_tower_of_its_tasks(routed: Path) -> None:
    """Logits of texts and images together are those of features one by one."""
    pipe = hf_tsv.pipeline(Z, routed, progress=False)
    model, pixels = pipe.model, clips.patterned(6)
    texts = pipe.tokenizer(CLASSES["b"], padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model(**texts, pixel_values=pixels, return_loss=False)
        seen = model.get_image_features(pixels, text_embeds=found.text_embeds)
        plain = model.get_image_features(pixels)
        pairs = model(**pipe.tokenizer(["x"] * 6, return_tensors="pt"), pixel_values=pixels,
                      return_loss=True, return_dict=False)  # fmt: skip
    assert found.vision_model_output.tasks == seen.tasks
    assert seen.tasks == model.route(pixels, found.text_embeds).tasks
    assert seen.tasks != plain.tasks
    image, text = (
        torch.nn.functional.normalize(part, dim=-1)
        for part in (seen.pooler_output, found.text_embeds)
    )
    expected = model.logit_scale.exp() * image @ text.mT
    torch.testing.assert_close(found.logits_per_image, expected)
    torch.testing.assert_close(found.logits_per_text, expected.mT)
    assert isinstance(pairs, tuple) and pairs[0].ndim == 0


def test_evaluate_uses_the_classes(routed: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for label, image in zip(CLASSES["a"], pictures(2), strict=True):
        (data / label).mkdir(parents=True)
        image.save(data / label / "0.png")
    seen = []
    pipe = hf_tsv.pipeline(Z, routed, progress=False)
    original = type(pipe.model.router).route

    def noting(self: Any, pixel_values: Any, text_embeds: Any = None, **options: Any) -> Any:
        seen.append(text_embeds)
        return original(self, pixel_values, text_embeds, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipe.model.router), "route", noting)
        hf_tsv.evaluate(routed, {"it": str(data)}, templates=["a {}."], progress=False)
    (embeds,) = seen
    own = load_file(routed / CLASSES_FILE)["a.classes"]
    torch.testing.assert_close(embeds, own, rtol=0, atol=1e-5)


def test_names_from_a_text_file_and_a_dataset(tasks: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for label in CLASSES["b"]:
        (data / label).mkdir(parents=True)
        pictures(1)[0].save(data / label / "0.png")
    (tmp_path / "a.txt").write_text("cat\ndog\n")
    words = ["route", tasks / "a", tasks / "b", "--base-model", tasks / "base"]
    words += ["-o", tmp_path / "r", "--classes", f"a={tmp_path / 'a.txt'}"]
    words += ["--classes", f"b={data}", "--template", "{}"]
    plan = run(*words, "--dry-run")
    assert plan.code == 0 and "class names" in plan.out and "a, b" in plan.out, plan.err
    done = run(*words)
    assert done.code == 0 and "class names of a, b" in done.err, done.err
    said = json.loads((tmp_path / "r" / ROUTING_FILE).read_text())["tasks"]
    assert [task["classes"] for task in said] == [CLASSES["a"], sorted(CLASSES["b"])]
    assert str(tmp_path) not in (tmp_path / "r" / ROUTING_FILE).read_text()
    assert "the classes of a, b are known" in (tmp_path / "r" / "README.md").read_text()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("x=names.txt", "names x, which is not one of the tasks"),
        ("a", "is not NAME=FILE"),
        ("a=missing.txt", "missing.txt cannot be read"),
        ("a=empty.txt", "is empty or has an empty line"),
        ("a=nowhere/at/all", "cannot be read"),
        ("", "--template are prompts of class names"),
    ],
)
def test_wrong_class_names(tasks: Path, tmp_path: Path, value: str, said: str) -> None:
    (tmp_path / "empty.txt").write_text("")
    name, equals, file = value.partition("=")
    where = f"{tmp_path / file}" if file.endswith(".txt") else file
    words = ["--classes", f"{name}{equals}{where}"] if value else ["--template", "{}"]
    done = run("route", tasks / "a", tasks / "b", "--base-model", tasks / "base", "-o",
               tmp_path / "r", *words)  # fmt: skip
    assert done.code != 0 and said in done.err, done.err
    assert not (tmp_path / "r").exists()


def test_names_need_a_tokenizer_and_a_text_tower(tasks: Path, tmp_path: Path) -> None:
    refs = [tasks / "a", tasks / "b"]
    base = copied(tasks / "base", tmp_path / "base")
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (base / name).unlink(missing_ok=True)
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        hf_tsv.route(refs, base_model=base, output=tmp_path / "r", classes={"a": ["x"]},
                     progress=False)  # fmt: skip
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"a": ["x", " "]}, "must be 1 to 100,000 texts"), ({"a": []}, "must be 1 to"),
        ({"a": 5}, "must be 1 to"), ({"a": {"x", "y"}}, "must be 1 to"),
        ({"a": ["\ud800"]}, "must be 1 to"), ({"a": ["x"] * 100_001}, "must be 1 to"),
        (["a"], "not names by task"),
    ],
)  # fmt: skip
def test_what_are_no_class_names(tasks: Path, tmp_path: Path, names: Any, said: str) -> None:
    with pytest.raises(HfTsvError, match=said):
        hf_tsv.route([tasks / "a", tasks / "b"], base_model=tasks / "base",
                     output=tmp_path / "r", classes=names, progress=False)  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_names_need_no_image_processor_and_no_images(tasks: Path, tmp_path: Path) -> None:
    import datasets

    base = copied(tasks / "base", tmp_path / "base")
    for name in ("preprocessor_config.json", "processor_config.json"):
        (base / name).unlink(missing_ok=True)
    rows = datasets.Dataset.from_dict({"label": ["dog", "cat", "dog"]})
    rows.to_parquet(tmp_path / "labels.parquet")
    (tmp_path / "b.TXT").write_bytes(b"\xef\xbb\xbfzebra\r\nbus\n")
    named = {"a": str(tmp_path / "labels.parquet"), "b": tmp_path / "b.TXT"}
    hf_tsv.route([tasks / "a", tasks / "b"], base_model=base, output=tmp_path / "r",
                 classes=named, templates="a {}.", progress=False)  # fmt: skip
    said = json.loads((tmp_path / "r" / ROUTING_FILE).read_text())["tasks"]
    assert [task["classes"] for task in said] == [["cat", "dog"], ["zebra", "bus"]]


def test_a_task_may_have_any_name(tasks: Path, tmp_path: Path) -> None:
    odd = copied(tasks / "b", tmp_path / "__metadata__")
    hf_tsv.route([tasks / "a", odd], base_model=tasks / "base", output=tmp_path / "r",
                 classes={"__metadata__": ["x"]}, progress=False)  # fmt: skip
    model = hf_tsv.load_model(tmp_path / "r", base_model=tasks / "base", progress=False)
    assert model.router.classes_1.shape[0] == 1


@pytest.mark.parametrize("classes", [[], [1], ["x", ""], "cat", {}])
def test_hostile_class_names_are_refused(routed: Path, tmp_path: Path, classes: Any) -> None:
    folder = copied(routed, tmp_path / "r")
    said = json.loads((folder / ROUTING_FILE).read_text())
    said["tasks"][0]["classes"] = classes
    (folder / ROUTING_FILE).write_text(json.dumps(said))
    with pytest.raises(CheckpointError, match=r"tasks\.0\.classes"):
        hf_tsv.load_model(folder, progress=False)


def test_embeddings_that_do_not_fit_are_refused(routed: Path, tmp_path: Path) -> None:
    folder = copied(routed, tmp_path / "r")
    (folder / CLASSES_FILE).unlink()
    with pytest.raises(CheckpointError, match=CLASSES_FILE):
        hf_tsv.load_model(folder, progress=False)
    found = load_file(routed / CLASSES_FILE)
    a, b = found["a.classes"], found["b.classes"]
    for own in ({}, {"a.classes": b}, {"a.classes": a[:, :5]}, {"a": a}):
        wrong = {"b.classes": b, **own}
        save_file({name: t.clone() for name, t in wrong.items()}, folder / CLASSES_FILE)
        with pytest.raises(CheckpointError, match="classes of a"):
            hf_tsv.load_model(folder, progress=False)
