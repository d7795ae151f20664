"""Pixels prepared beside the model: the same to the bit, in order, bounded, and no thread left."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from labelled import make_folder
from transformers import CLIPImageProcessorPil

import hf_tsv
from hf_tsv.evaluation import pixels
from hf_tsv.evaluation.data import LabelledImages, load
from hf_tsv.system.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")

SIZE = 5


@pytest.fixture(scope="module")
def processor() -> Any:
    return CLIPImageProcessorPil()


@pytest.fixture
def images(tmp_path: Path) -> LabelledImages:
    return load(hf_tsv.EvaluationTask("pets", str(make_folder(tmp_path / "pets"))))


def parts_of(images: LabelledImages) -> list[range]:
    every = range(len(images.rows))
    return [every[i : i + SIZE] for i in range(0, len(every), SIZE)]


def by_turns(images: LabelledImages, processor: Any) -> Iterator[pixels.Batch]:
    """Batches as they are prepared by one thread when they are due."""
    for part in parts_of(images):
        pictures, labels = images.batch(part[0], part[-1] + 1, "pets")
        yield processor(pictures, return_tensors="pt")["pixel_values"], labels


def workers() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("hf-tsv-images")]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that have been read, in the order of their reading."""
    found: list[int] = []
    plain = LabelledImages.read

    def noted(self: LabelledImages, i: int, task: str) -> Any:
        found.append(i)
        return plain(self, i, task)

    monkeypatch.setattr(LabelledImages, "read", noted)
    return found


def settled(read: list[int]) -> set[int]:
    """Rows that are read until nothing more is for a while."""
    before = -1
    while before < len(read):
        before = len(read)
        time.sleep(0.3)
    return set(read)


@pytest.mark.parametrize("threads", [1, 2, 8])
def test_batches_are_those_of_one_thread(
    images: LabelledImages, processor: Any, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pixels, "THREADS", threads)
    plain = LabelledImages.read

    def uneven(self: LabelledImages, i: int, task: str) -> Any:
        time.sleep(0.02 * (i % 3 == 0))  # so that later images are ready first
        return plain(self, i, task)

    expected = list(by_turns(images, processor))
    monkeypatch.setattr(LabelledImages, "read", uneven)
    found = list(pixels.batches(images, processor, parts_of(images), "pets"))
    assert [labels for _, labels in found] == [labels for _, labels in expected]
    for (own, _), (other, _) in zip(found, expected, strict=True):
        assert own.dtype == other.dtype and torch.equal(own, other)
    assert not workers()


def test_one_batch_is_prepared_ahead_and_no_more(
    images: LabelledImages, processor: Any, read: list[int]
) -> None:
    with closing(pixels.batches(images, processor, parts_of(images), "pets")) as found:
        for number in range(3):
            next(found)
            assert settled(read) == set(range((number + 2) * SIZE))
    assert not workers()


def test_a_damaged_image_is_an_error_when_its_batch_is_due(
    images: LabelledImages, processor: Any
) -> None:
    row = 2 * SIZE + 1
    file = images.rows.with_format(None).cast_column("image", undecoded())[row]["image"]["path"]
    Path(file).write_bytes(b"\x89PNG no more")
    with pytest.raises(DataError) as expected:
        list(by_turns(images, processor))
    found = pixels.batches(images, processor, parts_of(images), "pets")
    assert [len(next(found)[1]) for _ in range(2)] == [SIZE, SIZE]
    with pytest.raises(DataError) as error:
        next(found)
    said = error.value.message, error.value.hint
    assert said == (expected.value.message, expected.value.hint)
    assert f"pets: image {row} of the split test cannot be read" in error.value.message
    assert not workers()


def undecoded() -> Any:
    import datasets

    return datasets.Image(decode=False)


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError])
def test_an_end_in_the_model_leaves_no_thread_and_begins_no_image(
    zoo: Path,
    tmp_path: Path,
    read: list[int],
    kind: type[BaseException],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from hf_tsv.evaluation import zero_shot

    monkeypatch.setattr(pixels, "THREADS", 1)
    plain = LabelledImages.read

    def slow(self: LabelledImages, i: int, task: str) -> Any:
        time.sleep(0.05 if i < SIZE else 0.5)
        return plain(self, i, task)

    def ended(*_: Any) -> Any:
        raise kind

    monkeypatch.setattr(LabelledImages, "read", slow)
    monkeypatch.setattr(zero_shot, "classify", ended)
    task = {"pets": str(make_folder(tmp_path / "pets"))}
    with pytest.raises(KeyboardInterrupt if kind is KeyboardInterrupt else DataError):
        hf_tsv.evaluate(zoo / "base", task, batch_size=SIZE)
    assert not workers()
    assert len(read) <= SIZE + 1  # the one that was being read


def test_an_evaluation_reads_ahead_of_its_model(
    zoo: Path, tmp_path: Path, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_tsv.evaluation import zero_shot

    plain, seen = zero_shot.classify, list[int]()

    def noted(*given: Any) -> Any:
        seen.append(len(settled(read)))
        return plain(*given)

    task = {"pets": str(make_folder(tmp_path / "pets"))}
    expected = hf_tsv.evaluate(zoo / "base", task, batch_size=SIZE).tasks
    read.clear()
    monkeypatch.setattr(zero_shot, "classify", noted)
    assert hf_tsv.evaluate(zoo / "base", task, batch_size=SIZE).tasks == expected
    assert seen == [10, 15, 20, 24, 24]


def test_all_variants_see_every_image_once(
    zoo: Path, images: LabelledImages, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More images than are held at once, and neither number divides the other."""
    from hf_tsv.evaluation import zero_shot

    monkeypatch.setattr(zero_shot, "IMAGES_AT_ONCE", 7)
    task = hf_tsv.EvaluationTask("pets", str(images.folder))
    pipe = hf_tsv.pipeline("zero-shot-image-classification", zoo / "base", progress=False)
    calls = list[str]()
    variants = [lambda: calls.append("a"), lambda: calls.append("b")]
    found = zero_shot.accuracies(pipe, variants, task, images, batch_size=3, show=False)
    assert sorted(read) == list(range(len(images.rows)))
    assert calls == ["a", "b"] * 5  # the heads, and four times 7 images or less
    assert found == [hf_tsv.evaluate(zoo / "base", [task]).accuracy] * 2
    assert not workers()
