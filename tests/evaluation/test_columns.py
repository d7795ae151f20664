"""Columns and configurations of datasets: names as labels, untyped images, hidden labels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from labelled import CLASSES, picture

from hf_tsv.evaluation.data import LabelledImages, load
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.system.errors import DataError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")

NUMBERS = [0, 2, 1, 2]
NAMES = [CLASSES[i] for i in NUMBERS]
CLASS = datasets.ClassLabel(names=list(CLASSES))


def png(number: int) -> bytes:
    file = io.BytesIO()
    picture(CLASSES[number], number).save(file, "PNG")
    return file.getvalue()


FILES = [{"bytes": png(number), "path": None} for number in NUMBERS]


def written(file: Path, labels: Any, feature: Any = None, images: Any = FILES) -> Path:
    """A parquet file with typed images and a column of labels."""
    feature = feature or datasets.Value("int64")
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = {"image": list(images), "label": list(labels)}
    features = datasets.Features({"image": datasets.Image(), "label": feature})
    datasets.Dataset.from_dict(rows, features=features).to_parquet(file)
    return file


def by_pandas(file: Path, **columns: Any) -> Path:
    """A parquet file as pandas writes it: without the types of `datasets`."""
    pd.DataFrame(columns).to_parquet(file)
    return file


def opened(source: object, **choices: Any) -> LabelledImages:
    return load(EvaluationTask("pets", str(source), **choices))


def refused(source: object, said: str, **choices: Any) -> None:
    """An error of one line that begins with the task and has a hint."""
    with pytest.raises(DataError, match=said) as error:
        opened(source, **choices)
    assert error.value.message.startswith("pets: ") and error.value.hint
    assert "\n" not in str(error.value)


def classes_of(images: LabelledImages) -> list[int]:
    found, labels = images.batch(0, len(images.rows), "pets")
    assert {image.mode for image in found} == {"RGB"} and len(found) == len(labels)
    return labels


# Labels


def test_names_are_looked_up_in_the_classes(tmp_path: Path) -> None:
    file = written(tmp_path / "a.parquet", NAMES, datasets.Value("string"))
    order = ("emu", "cat", "fox", "dog")
    found = opened(file, classes=order)
    assert found.classes == order
    assert classes_of(found) == [order.index(name) for name in NAMES]
    refused(file, "image 1 has the label 'emu', which is none of the 2 classes",
            classes=("cat", "dog"))  # fmt: skip


def test_without_classes_they_are_the_names_of_all_splits(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("INFO")
    text = datasets.Value("string")
    written(tmp_path / "d" / "train.parquet", ["yak", "cat", "dog", "cat"], text)
    written(tmp_path / "d" / "test.parquet", NAMES, text)
    found = opened(tmp_path / "d")
    assert found.classes == ("cat", "dog", "emu", "yak") and found.split == "test"
    assert classes_of(found) == [found.classes.index(name) for name in NAMES]
    assert "pets: 4 classes by the names in the column label." in caplog.text


@pytest.mark.parametrize(
    "labels",
    [
        np.array(NUMBERS, dtype=np.int8), np.array(NUMBERS, dtype=np.uint64),
        np.array(NUMBERS, dtype=np.float32), np.array(NUMBERS, dtype=np.float64), NUMBERS,
    ],
    ids=["int8", "uint64", "float32", "float64", "int"],
)  # fmt: skip
def test_whole_numbers_of_any_type_are_labels(tmp_path: Path, labels: Any) -> None:
    file = by_pandas(tmp_path / "a.parquet", image=FILES, label=labels)
    assert classes_of(opened(file, classes=CLASSES)) == NUMBERS


def test_yes_and_no_are_labels(tmp_path: Path) -> None:
    file = by_pandas(tmp_path / "a.parquet", image=FILES, label=[True, False, True, True])
    assert classes_of(opened(file, classes=("healthy", "ill"))) == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([0, 1, 2, 3], "image 3 has the label 3, and there are 3 classes"),
        ([0.0, 1.5, 2.0, 1.0], r"image 1 has the label 1\.5, and there are 3 classes"),
        ([0, 1, -2, 1], "image 2 has the label -2, and there are 3 classes"),
        ([0, -1, 2, -1], "2 of 4 images of the split test have no label, such as image 1"),
        ([0.0, float("nan"), 2.0, 1.0], "1 of 4 images of the split test have no label"),
        (["cat", None, "dog", ""], "2 of 4 images of the split test have no label"),
        ([[0], [1, 2], [0], [1]], "label of .* does not hold one label an image"),
        ([None, None, None, None], "the split test of .* has no labels"),
    ],
)
def test_labels_that_are_none_are_told(tmp_path: Path, labels: Any, said: str) -> None:
    file = by_pandas(tmp_path / "a.parquet", image=FILES, label=labels)
    refused(file, said, classes=CLASSES)


def test_several_class_labels_an_image_are_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "a.parquet", [[0], [1, 2], [0], [1]], datasets.List(CLASS))
    refused(file, "label of .* does not hold one label an image.*it has image, label")


def test_a_split_with_hidden_labels_names_one_that_has_some(tmp_path: Path) -> None:
    for split, labels in (("validation", NUMBERS), ("test", [-1] * 4), ("extra", [-1] * 4)):
        written(tmp_path / "d" / f"{split}.parquet", labels, CLASS)
    refused(tmp_path / "d", "the split test of .* has no labels.*Use `split=validation`")
    assert classes_of(opened(tmp_path / "d", split="validation")) == NUMBERS
    only = written(tmp_path / "e" / "test.parquet", [-1] * 4, CLASS)
    refused(only, "the split test of .* has no labels.*Choose another column with `label=`")


def test_learning_without_labels_takes_hidden_ones(tmp_path: Path) -> None:
    file = written(tmp_path / "test.parquet", [-1] * 4, CLASS)
    found = load(EvaluationTask("pets", str(file)), labelled=False)
    assert found.classes == CLASSES and found.total == 4


# Images


def test_images_as_pandas_writes_them(tmp_path: Path) -> None:
    for images in (FILES, [file["bytes"] for file in FILES]):
        file = by_pandas(tmp_path / "a.parquet", picture=images, label=NUMBERS)
        found = opened(file, classes=CLASSES, image="picture")
        assert classes_of(found) == NUMBERS
        image = found.batch(1, 2, "pets")[0][0]
        assert np.array_equal(np.asarray(image), np.asarray(picture("emu", 2)))
    by_pandas(tmp_path / "b.parquet", picture=FILES, label=NUMBERS)
    assert opened(tmp_path / "b.parquet", classes=CLASSES).image == "picture"  # found by its form


def test_paths_are_read_beside_the_file(tmp_path: Path) -> None:
    (tmp_path / "d" / "images").mkdir(parents=True)
    paths = [f"images/{i}.png" for i in range(4)]
    for path, number in zip(paths, NUMBERS, strict=True):
        (tmp_path / "d" / path).write_bytes(png(number))
    file = by_pandas(tmp_path / "d" / "a.parquet", path=paths, label=NUMBERS)
    assert classes_of(opened(file, classes=CLASSES, image="path")) == NUMBERS
    gone = by_pandas(tmp_path / "a.parquet", path=paths, label=NUMBERS)
    with pytest.raises(DataError, match=r"image 0 of .* cannot be read: .*No such file"):
        classes_of(opened(gone, classes=CLASSES, image="path"))


def test_a_missing_image_is_told(tmp_path: Path) -> None:
    file = written(tmp_path / "a.parquet", NUMBERS, CLASS, [FILES[0], None, *FILES[2:]])
    found = opened(file)
    with pytest.raises(DataError, match="image 1 of the split test cannot be read: it is missing"):
        classes_of(found)


@pytest.mark.parametrize("images", [[FILES] * 4, [[[0, 1], [2, 3]]] * 4, [1, 2, 3, 4]])
def test_a_column_without_one_image_a_row_is_refused(tmp_path: Path, images: Any) -> None:
    file = by_pandas(tmp_path / "a.parquet", image=images, label=NUMBERS)
    refused(file, "image of .* does not hold one image a row.*`image=`; it has image, label",
            image="image", classes=CLASSES)  # fmt: skip


def test_columns_of_unusual_names_are_listed(tmp_path: Path) -> None:
    file = by_pandas(tmp_path / "a.parquet", left=FILES, right=FILES, breed=NAMES)
    refused(file, "2 columns that may be the images.*`image=`; it has left, right, breed")
    refused(file, "0 columns that may be the labels.*`label=`; it has left", image="left")
    assert classes_of(opened(file, image="left", label="breed")) == NUMBERS


# Configurations


def folder_of_two(folder: Path) -> Path:
    card = "---\nconfigs:\n"
    for name, labels in (("small", NUMBERS[:2]), ("large", NUMBERS)):
        written(folder / name / "test.parquet", labels, CLASS, FILES[: len(labels)])
        card += f"- config_name: {name}\n  data_files:\n  - split: test\n"
        card += f"    path: {name}/test.parquet\n"
    (folder / "README.md").write_text(f"{card}---\n")
    return folder


@pytest.mark.parametrize("name", ["two", "a:b@c"])
def test_a_folder_has_configurations_as_a_repository_has(tmp_path: Path, name: str) -> None:
    folder = folder_of_two(tmp_path / name)
    for config, count in (("small", 2), ("large", 4)):
        assert load(EvaluationTask.parse(f"pets={folder}:{config}")).total == count
    refused(folder, f"has several configurations: small, large.*as in .*{name}:small")
    refused(folder, "has no configuration 'medium'.*It has small, large", config="medium")


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is here, and has no revision 'main'"):
        EvaluationTask.parse(f"pets={tmp_path}@main")


@pytest.mark.parametrize("place", ["absolute", "relative", "address"])
def test_a_typed_column_names_no_file_outside_the_dataset(tmp_path: Path, place: str) -> None:
    """`datasets` itself would open whatever path or address a row has."""
    (tmp_path / "secret.png").write_bytes(png(0))
    paths = {
        "absolute": str(tmp_path / "secret.png"), "relative": "../secret.png",
        "address": "http://localhost:1/secret.png",
    }  # fmt: skip
    features = datasets.Features({"image": datasets.Image(), "label": CLASS})
    rows = {"image": [{"bytes": None, "path": paths[place]}], "label": [0]}
    table = datasets.Dataset.from_dict(rows, features=features).data.table
    typed = {"huggingface": json.dumps({"info": {"features": features.to_dict()}})}
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "pets.parquet"
    pq.write_table(table.replace_schema_metadata(typed), file)
    images = opened(file)
    with pytest.raises(DataError, match=r"which is not in |No such file .*data/http:"):
        images.batch(0, 1, "pets")
    (tmp_path / "data" / "own.png").write_bytes(png(0))
    rows["image"] = [{"bytes": None, "path": "own.png"}]
    table = datasets.Dataset.from_dict(rows, features=features).data.table
    pq.write_table(table.replace_schema_metadata(typed), file)
    ((found,), (label,)) = opened(file).batch(0, 1, "pets")
    assert label == 0 and found.mode == "RGB"
