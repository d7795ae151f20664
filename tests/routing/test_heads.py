"""Routed classifiers: of the tasks of an image the head that is most certain answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from cli import copied
from PIL import Image
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.system.errors import CheckpointError

LABELS = {"a": ["cat", "dog", "cow"], "b": ["red", "green", "blue"], "c": ["1", "2", "3"]}
SEEDS = {"a": 13, "b": 15, "c": 17}
KIND = "image-classification"


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = clips.make_tasks(tmp_path_factory.mktemp("tasks"), SEEDS, "classifier")
    for name, labels in LABELS.items():
        named(folder / name, labels)
    return folder


def named(folder: Path, labels: list[str]) -> None:
    """Give the classes of a classifier names."""
    from transformers import CLIPConfig

    config = CLIPConfig.from_pretrained(folder)
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}
    config.save_pretrained(folder)


@pytest.fixture(scope="module")
def routed(tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("routed") / "routed"
    hf_tsv.route([tasks / name for name in SEEDS], base_model=tasks / "base", output=output,
                 temperature=3, threshold=0.3, dtype="float32", progress=False)  # fmt: skip
    return output


def picture(pixels: torch.Tensor) -> Image.Image:
    values = ((pixels / 4 + 0.5).clamp(0, 1) * 255).to(torch.uint8)
    return Image.fromarray(values.permute(1, 2, 0).numpy())


def test_the_most_certain_head_of_the_chosen_tasks_answers(routed: Path, tmp_path: Path) -> None:
    """Every image against classifiers made of `hf_tsv.merge` of its tasks with each one's head."""
    model: Any = hf_tsv.load_model(routed, kind=KIND, progress=False)
    assert list(model.config.id2label.values()) == [*LABELS["a"], *LABELS["b"], *LABELS["c"]]
    images = clips.patterned(30)
    with torch.no_grad():
        found = model(pixel_values=images)
    assert found.tasks == model.route(images).tasks
    assert {len(own) for own in found.tasks} >= {1, 2}
    merged: dict[tuple[str, ...], list[Any]] = {}
    for row, own in enumerate(found.tasks):
        if own not in merged:
            folder, factors = tmp_path / "-".join(own), [routed / "tasks" / name for name in own]
            if len(own) == 1:
                hf_tsv.reconstruct(factors[0], output=folder, progress=False)
                merged[own] = [hf_tsv.load_model(folder, kind=KIND, progress=False)]
            else:
                hf_tsv.merge(factors, output=folder, keep_heads=True, progress=False)
                merged[own] = [hf_tsv.load_model(folder, head=n, progress=False) for n in own]
        with torch.no_grad():
            logits = [one(pixel_values=images[row : row + 1]).logits[0] for one in merged[own]]
        certain = [float(one.softmax(0).max()) for one in logits]
        best = certain.index(max(certain))
        places = model.places[own[best]]
        torch.testing.assert_close(found.logits[row, list(places)], logits[best], rtol=0, atol=1e-5)
        others = [i for i in range(9) if i not in places]
        assert (found.logits[row, others] == -torch.inf).all()


def test_the_card_says_that_heads_answer(routed: Path) -> None:
    assert 'hf_tsv.pipeline("image-classification"' in (routed / "README.md").read_text()


@pytest.mark.parametrize("batch_size", [1, 4])
def test_answers_of_the_pipeline(routed: Path, batch_size: int) -> None:
    pipe = hf_tsv.pipeline(KIND, routed, progress=False)
    images = [picture(one) for one in clips.patterned(8)]
    pixels = pipe.image_processor(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        logits = pipe.model(pixel_values=pixels).logits
    for answer, row in zip(pipe(images, batch_size=batch_size), logits, strict=True):
        (task,) = {entry["task"] for entry in answer}
        assert sorted(entry["label"] for entry in answer) == sorted(LABELS[task])
        assert sum(entry["score"] for entry in answer) == pytest.approx(1)
        assert answer[0]["label"] == pipe.model.config.id2label[int(row.argmax())]
        assert answer[0]["score"] == pytest.approx(float(row.softmax(0).max()), abs=1e-5)
    (one,) = pipe(images[:1], top_k=1, function_to_apply="none")
    assert len(one) == 1 and one[0]["score"] == pytest.approx(float(logits[0].max()), abs=1e-5)


def test_a_loss_counts_the_labels_of_all_heads(routed: Path) -> None:
    model: Any = hf_tsv.load_model(routed, kind=KIND, progress=False)
    images = clips.patterned(3)
    with torch.no_grad():
        logits = model(pixel_values=images).logits
        found = model(pixel_values=images, labels=logits.argmax(dim=1))
    expected = torch.nn.functional.cross_entropy(logits, logits.argmax(dim=1))
    torch.testing.assert_close(found.loss, expected)
    model(pixel_values=images, labels=logits.argmax(dim=1)).loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0


def test_a_task_without_a_head_and_a_head_by_name_are_refused(
    tasks: Path, routed: Path, tmp_path: Path
) -> None:
    clips.make_fine_tune(tasks / "base", tmp_path / "plain", 5, "vision")
    hf_tsv.route([tasks / "a", tmp_path / "plain"], base_model=tasks / "base",
                 output=tmp_path / "r", progress=False)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"task plain of .* has no classification head"):
        hf_tsv.pipeline(KIND, tmp_path / "r", progress=False)
    with pytest.raises(CheckpointError, match="each image chooses its head"):
        hf_tsv.load_model(routed, head="a", progress=False)


def test_a_head_that_is_no_linear_layer_is_refused(tasks: Path, tmp_path: Path) -> None:
    odd = copied(tasks / "b", tmp_path / "b")
    tensors = load_file(odd / "model.safetensors")
    tensors["classifier.weight"] = tensors["classifier.weight"][:, :7].clone()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    hf_tsv.route([tasks / "a", odd], base_model=tasks / "base", output=tmp_path / "r",
                 progress=False)  # fmt: skip
    with pytest.raises(CheckpointError, match=r"task b of .* is not one linear layer"):
        hf_tsv.load_model(tmp_path / "r", kind=KIND, progress=False)
