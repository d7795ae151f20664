"""Labelled images of one task: from the Hub, a folder of images, or a parquet file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_tsv import hub
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.system.errors import DataError, RecipeError, RepoError
from hf_tsv.system.folders import local_kind
from hf_tsv.system.text import counted, first_line

if TYPE_CHECKING:
    from datasets import Dataset

# Names of label columns where no column has class labels, the likeliest first.
LABELS = ("label", "labels", "fine_label", "class")
SPLITS = ("test", "validation", "train")
PARQUET = ".parquet"
LIBRARIES = {"datasets": "datasets", "PIL": "pillow"}  # package by the name of its module
SEED = 0  # of the random choice of images under a `limit`


@dataclass(frozen=True)
class LabelledImages:
    """Images with the names of their classes, in the order of the labels.

    `image` and `label` are columns; `total` is the number of images in the split, of which `rows`
    may be a few; `revision` is the dataset's commit sha, None if it is no repository.
    """

    rows: Dataset
    image: str
    label: str
    classes: tuple[str, ...]
    split: str
    total: int
    revision: str | None = None

    @property
    def identity(self) -> str:
        """Text that changes with the source files, and with the images chosen from them."""
        return f"{self.revision} {self.split} {self.rows._fingerprint}"

    def batch(self, start: int, stop: int, task: str) -> tuple[list[Any], list[int]]:
        """Images as RGB, and their labels, of a range of rows; `task` is for errors."""
        images, labels = [], []
        for i in range(start, stop):
            try:
                row = self.rows[i]
                images.append(row[self.image].convert("RGB"))
            except Exception as error:  # Pillow raises many types for damaged files
                raise DataError(
                    f"{task}: image {i} of the split {self.split} cannot be read:"
                    f" {first_line(error)}.",
                    "Repair or remove it.",
                ) from None
            label = row[self.label]
            label = int(label) if isinstance(label, bool) else label
            if type(label) is not int or not 0 <= label < len(self.classes):
                raise DataError(
                    f"{task}: image {i} has the label {label!r}, and there are"
                    f" {counted(len(self.classes), 'class', 'classes')}.",
                    "Give the names of all classes, in the order of the labels.",
                )
            labels.append(label)
        return images, labels


def refuse_not_installed(what: str, **also: str) -> None:
    """Refuse what needs libraries that read images, and others by the name of their module."""
    needed = {**LIBRARIES, **also}
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise RecipeError(
            f"{what} needs {' and '.join(missing)}.", f"Run `pip install {' '.join(missing)}`."
        )


def load(
    task: EvaluationTask, *, limit: int | None = None, token: str | None = None
) -> LabelledImages:
    """Find the images of a task, with a limit so many of them at random, always the same ones."""
    import datasets

    datasets.disable_progress_bars()  # our own bar counts images
    revision = _commit(task, token)
    splits = _splits(task, revision or task.revision, datasets, token)
    wanted = [task.split] if task.split else [s for s in SPLITS if s in splits] or list(splits)
    split = wanted[0]
    if split not in splits:
        said = f"{task.name}: {task.dataset} has no split {split!r}."
        raise DataError(said, f"It has {', '.join(splits)}.")
    rows = splits[split]
    if not len(rows):
        raise DataError(f"{task.name}: the split {split} of {task.dataset} is empty.")
    image = _column(task, rows.features, task.image, "image", datasets.Image)
    label = _column(task, rows.features, task.label, "label", datasets.ClassLabel, LABELS)
    classes = _classes(task, rows.features[label], label)
    total = len(rows)
    if limit is not None and limit < total:
        rows = rows.shuffle(seed=SEED).select(range(limit))
    return LabelledImages(rows, image, label, classes, split, total, revision)


def _commit(task: EvaluationTask, token: str | None) -> str | None:
    """Commit sha that a repository's revision stands for now; None for local data."""
    local = local_kind(task.dataset) is not None or task.dataset.startswith((".", "/", "~"))
    if local or task.dataset.endswith(PARQUET) or task.dataset.count("/") != 1:
        return None
    try:
        return hub.dataset_commit(task.dataset, task.revision, token=token)
    except RepoError as error:
        raise DataError(f"{task.name}: the dataset {error.message}", error.hint) from None


def _splits(
    task: EvaluationTask, revision: str | None, datasets: Any, token: str | None
) -> Mapping[str, Dataset]:
    options: dict[str, Any] = {"name": task.config, "revision": revision}
    source = task.dataset
    try:
        if task.dataset.endswith(PARQUET):
            path = str(Path(task.dataset).expanduser())
            source, options = "parquet", {"data_files": {task.split or SPLITS[0]: path}}
        elif local_kind(task.dataset) is not None:
            source, options = str(Path(task.dataset).expanduser()), {}
        found: Mapping[str, Dataset] = datasets.load_dataset(source, token=token, **options)
        return found
    except Exception as error:  # several libraries raise a dozen types
        raise DataError(
            f"{task.name}: the dataset {task.dataset} cannot be read: {first_line(error)}.",
            "Check its name, or the path; if the connection broke, try again.",
        ) from None


def _column(
    task: EvaluationTask,
    features: Mapping[str, Any],
    asked: str | None,
    what: str,
    kind: type,
    likely: Sequence[str] = (),
) -> str:
    """Name of the column of images, or of labels."""
    if asked is not None:
        if asked in features:
            return asked
        said = f"{task.name}: {task.dataset} has no column {asked!r}."
        raise DataError(said, f"It has {', '.join(features)}.")
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = found or [name for name in likely if name in features][:1]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{task.name}: {task.dataset} has {counted(len(found), 'column')} that may be the {what}s.",
        f"Say which; it has {', '.join(features)}.",
    )


def _classes(task: EvaluationTask, feature: Any, label: str) -> tuple[str, ...]:
    """Names of the classes, in the order of the labels."""
    own = tuple(getattr(feature, "names", None) or ())
    if task.classes and own and len(own) != len(task.classes):
        raise DataError(
            f"{task.name}: {counted(len(task.classes), 'name')} for the"
            f" {counted(len(own), 'class', 'classes')} of {task.dataset}.",
            "Give one name for each class, in the order of the labels.",
        )
    if classes := task.classes or own:
        return classes
    raise DataError(
        f"{task.name}: the column {label} of {task.dataset} does not name its classes.",
        "Give their names, in the order of the labels.",
    )
