"""Labels of images: the classes that a column has, and the class of each label."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING

from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.system.errors import DataError
from hf_tsv.system.progress import logger
from hf_tsv.system.text import counted, shortened

if TYPE_CHECKING:
    from datasets import Dataset

NUMBER = re.compile(r"bool|null|u?int\d+|float\d+")
TEXT = re.compile(r"(large_)?string(_view)?")

Splits = Mapping[str, "Dataset"]
"""Splits of a dataset by their names."""


def check_column(task: EvaluationTask, splits: Splits, split: str, label: str) -> None:
    """Refuse a column that does not hold one label an image, such as one of lists."""
    feature = splits[split].features[label]
    if not _matches(NUMBER, feature) and not _matches(TEXT, feature):
        raise DataError(
            f"{task.name}: the column {label} of {task.dataset} does not hold one label an image.",
            _another_column(splits[split]),
        )


def classes_of(task: EvaluationTask, splits: Splits, split: str, label: str) -> tuple[str, ...]:
    """Names of the classes, in the order of the labels: the user's, else the column's own.

    Those of a column of text are the distinct texts of all splits, sorted.
    """
    feature = splits[split].features[label]
    own = tuple(getattr(feature, "names", None) or ())
    if task.classes and own and len(own) != len(task.classes):
        raise DataError(
            f"{task.name}: {counted(len(task.classes), 'name')} for the"
            f" {counted(len(own), 'class', 'classes')} of {task.dataset}.",
            "Give one name for each class, in the order of the labels.",
        )
    if _matches(TEXT, feature) and not task.classes:
        every = [rows.unique(label) for rows in splits.values() if label in rows.features]
        own = tuple(sorted({name for found in every for name in found if not is_missing(name)}))
        what = counted(len(own), "class", "classes")
        logger.info("%s: %s by the names in the column %s.", task.name, what, label)
    if classes := task.classes or own:
        return classes
    raise DataError(
        f"{task.name}: the column {label} of {task.dataset} does not name its classes.",
        "Give their names with `classes=`, in the order of the labels.",
    )


def is_missing(label: object) -> bool:
    """Tell whether a label stands for none: null, NaN, -1 as in hidden test sets, or no text."""
    return label is None or label in (-1, "") or (isinstance(label, float) and math.isnan(label))


def class_of(label: object, classes: Sequence[str]) -> int | None:
    """Number of the class of a label, which is that number or its name; None: it is no class."""
    if isinstance(label, str):
        return classes.index(label) if label in classes else None
    if isinstance(label, float) and label.is_integer():
        label = int(label)
    if not isinstance(label, Integral) or not 0 <= int(label) < len(classes):
        return None
    return int(label)


def refuse_hidden(task: EvaluationTask, splits: Splits, split: str, label: str) -> None:
    """Refuse a split without labels, and one in which some images have none."""
    rows = splits[split]
    distinct = rows.unique(label)
    if not any(map(is_missing, distinct)):
        return
    if all(map(is_missing, distinct)):
        other = next((name for name in splits if _has_labels(splits[name], label)), None)
        hint = f"Use `split={other}`, which has some." if other else _another_column(rows)
        raise DataError(f"{task.name}: the split {split} of {task.dataset} has no labels.", hint)
    without = [i for i, value in enumerate(rows[label]) if is_missing(value)]
    raise DataError(
        f"{task.name}: {len(without)} of {counted(len(rows), 'image')} of the split {split} have no"
        f" label, such as image {without[0]}.",
        "Remove them, or choose another split with `split=`.",
    )


def refuse_unknown(task: EvaluationTask, rows: Dataset, label: str, classes: Sequence[str]) -> None:
    """Refuse labels that are no class."""
    if all(class_of(value, classes) is not None for value in rows.unique(label)):
        return
    wrong = ((i, v) for i, v in enumerate(rows[label]) if class_of(v, classes) is None)
    image, value = next(wrong)
    said = f"{task.name}: image {image} has the label {shortened(value)}"
    there = counted(len(classes), "class", "classes")
    if isinstance(value, str):
        hint = "Give the names of all classes with `classes=`, as the dataset writes them."
        raise DataError(f"{said}, which is none of the {there}.", hint)
    hint = "Give the names of all classes with `classes=`, in the order of the labels."
    raise DataError(f"{said}, and there are {there}.", hint)


def _has_labels(rows: Dataset, label: str) -> bool:
    return label in rows.features and not all(map(is_missing, rows.unique(label)))


def _another_column(rows: Dataset) -> str:
    return f"Choose another column with `label=`; it has {', '.join(rows.features)}."


def _matches(kinds: re.Pattern[str], feature: object) -> bool:
    """Tell whether a feature is of one of these types, by their names in `datasets`."""
    return kinds.fullmatch(str(getattr(feature, "dtype", ""))) is not None
