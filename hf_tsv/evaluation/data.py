"""Labelled images of one task: from the Hub, a folder of images, or a parquet file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_tsv import hub
from hf_tsv.evaluation import decoding, labels
from hf_tsv.recipes.images import PARQUET, EvaluationTask
from hf_tsv.system.errors import DataError, RecipeError, RepoError
from hf_tsv.system.folders import local_kind
from hf_tsv.system.text import counted, first_line

if TYPE_CHECKING:
    from datasets import Dataset
    from PIL.Image import Image

# Names of label columns where no column has class labels, the likeliest first.
LABELS = ("label", "labels", "fine_label", "class")
SPLITS = ("test", "validation", "train")
LIBRARIES = {"datasets": "datasets", "PIL": "pillow"}  # package by the name of its module
FILE = {"bytes", "path"}  # parts of an image as `datasets` stores it
LISTED = "imagefolder"  # builder of `datasets` that lists the files of a folder itself
CONFIGS = 12  # most names of configurations in an error
SEED = 0  # of the random choice of images under a `limit`


@dataclass(frozen=True)
class LabelledImages:
    """Images with the names of their classes, in the order of the labels.

    `image` and `label` are columns; `total` is the number of images in the split, of which `rows`
    may be a few; `revision` is the dataset's commit sha, None if it is no repository; `folder` is
    that of a local dataset; `splits` are the names of all its splits.
    """

    rows: Dataset
    image: str
    label: str
    classes: tuple[str, ...]
    split: str
    total: int
    revision: str | None = None
    folder: Path | None = None
    splits: tuple[str, ...] = ()

    @property
    def identity(self) -> str:
        """Text that changes with the source files, and with the images chosen from them."""
        return f"{self.revision} {self.split} {self.rows._fingerprint}"

    def batch(self, start: int, stop: int, task: str) -> tuple[list[Any], list[int]]:
        """Images as RGB, and their classes, of a range of rows; `task` is for errors."""
        found = [self.read(i, task) for i in range(start, stop)]
        return [image for image, _ in found], [label for _, label in found]

    def read(self, i: int, task: str) -> tuple[Image, int]:
        """Image of a row as RGB, and its class; several threads may read at a time."""
        try:
            row = self.rows[i]
            image = decoding.read(row[self.image], self.folder)
        except Exception as error:  # Pillow raises many types for damaged files
            raise DataError(
                f"{task}: image {i} of the split {self.split} cannot be read: {first_line(error)}.",
                "Repair or remove it.",
            ) from None
        found = labels.class_of(row[self.label], self.classes)
        assert found is not None  # checked by load
        return image, found


def refuse_not_installed(what: str, **also: str) -> None:
    """Refuse what needs libraries that read images, and others by the name of their module."""
    needed = {**LIBRARIES, **also}
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise RecipeError(
            f"{what} needs {' and '.join(missing)}.", f"Run `pip install {' '.join(missing)}`."
        )


def load(
    task: EvaluationTask,
    *,
    limit: int | None = None,
    token: str | None = None,
    labelled: bool = True,
) -> LabelledImages:
    """Find the images of a task, with a limit so many of them at random, always the same ones.

    Unless `labelled`, the labels may be missing or wrong.
    """
    import datasets

    datasets.disable_progress_bars()  # our own bar counts images
    revision = _commit(task, token)
    splits = _splits(task, revision or task.revision, datasets, token)
    split = _split(task, splits)
    rows = splits[split]
    if not len(rows):
        raise DataError(f"{task.name}: the split {split} of {task.dataset} is empty.")
    columns = rows.features
    stored = [name for name, feature in columns.items() if _holds_files(feature)]
    image = _column(task, columns, task.image, "image", datasets.Image, stored)
    label = _label(task, columns, datasets)
    _check_images(task, columns, image, datasets.Image)
    if isinstance(columns[image], datasets.Image) and rows.info.builder_name != LISTED:
        # Rows of a table may name any path or address; those of a folder are what is in it.
        rows = rows.cast_column(image, datasets.Image(decode=False))
    labels.check_column(task, splits, split, label)
    if labelled:
        labels.refuse_hidden(task, splits, split, label)
    classes = labels.classes_of(task, splits, split, label)
    if labelled:
        labels.refuse_unknown(task, rows, label, classes)
    total = len(rows)
    if limit is not None and limit < total:
        rows = rows.shuffle(seed=SEED).select(range(limit))
    every = tuple(splits)
    return LabelledImages(rows, image, label, classes, split, total, revision, _folder(task), every)


def _split(task: EvaluationTask, splits: Mapping[str, Dataset]) -> str:
    """Name of the split of a task."""
    wanted = [task.split] if task.split else [s for s in SPLITS if s in splits] or list(splits)
    if wanted[0] not in splits:
        said = f"{task.name}: {task.dataset} has no split {wanted[0]!r}."
        raise DataError(said, f"It has {', '.join(splits)}.")
    return wanted[0]


def _label(task: EvaluationTask, columns: Mapping[str, Any], datasets: Any) -> str:
    """Name of the column of labels."""
    named = [name for name in LABELS if name in columns][:1]
    return _column(task, columns, task.label, "label", datasets.ClassLabel, named)


def class_names(task: EvaluationTask, *, token: str | None = None) -> tuple[str, ...]:
    """Names of the classes of a task; without its images, where the dataset describes them."""
    import datasets

    datasets.disable_progress_bars()
    revision = _commit(task, token) or task.revision
    try:
        source, options = _source(task, revision)
        features = datasets.load_dataset_builder(source, token=token, **options).info.features
    except Exception:  # of several libraries; reading its tables says it well
        features = None
    named = [f for f in (features or {}).values() if isinstance(f, datasets.ClassLabel)]
    if len(named) == 1 and task.label is None:
        return tuple(named[0].names)
    splits = _splits(task, revision, datasets, token)
    split = _split(task, splits)
    label = _label(task, splits[split].features, datasets)
    labels.check_column(task, splits, split, label)
    return labels.classes_of(task, splits, split, label)


def _folder(task: EvaluationTask) -> Path | None:
    """Folder that images of a local dataset may lie in."""
    kind, path = local_kind(task.dataset), Path(task.dataset)
    return None if kind is None else (path if kind == "folder" else path.parent).expanduser()


def _commit(task: EvaluationTask, token: str | None) -> str | None:
    """Commit sha that a repository's revision stands for now; None for local data."""
    if task.is_local or task.dataset.count("/") != 1:
        return None
    try:
        return hub.dataset_commit(task.dataset, task.revision, token=token)
    except RepoError as error:
        raise DataError(f"{task.name}: the dataset {error.message}", error.hint) from None


def _source(task: EvaluationTask, revision: str | None) -> tuple[str, dict[str, Any]]:
    """Name by which `datasets` finds the dataset of a task, and the options to load it with."""
    if task.dataset.endswith(PARQUET):
        path = str(Path(task.dataset).expanduser())
        return "parquet", {"data_files": {task.split or SPLITS[0]: path}}
    if local_kind(task.dataset) is not None:
        return str(Path(task.dataset).expanduser()), {"name": task.config}
    return task.dataset, {"name": task.config, "revision": revision}


def _splits(
    task: EvaluationTask, revision: str | None, datasets: Any, token: str | None
) -> Mapping[str, Dataset]:
    source, options = task.dataset, dict[str, Any]()
    try:
        source, options = _source(task, revision)
        found: Mapping[str, Dataset] = datasets.load_dataset(source, token=token, **options)
        return found
    except Exception as error:  # several libraries raise a dozen types
        if isinstance(error, ValueError) and source != "parquet":
            _refuse_config(task, datasets, source, options.get("revision"), token)
        raise DataError(
            f"{task.name}: the dataset {task.dataset} cannot be read: {first_line(error)}.",
            "Check its name, or the path; if the connection broke, try again.",
        ) from None


def _refuse_config(
    task: EvaluationTask, datasets: Any, source: str, revision: str | None, token: str | None
) -> None:
    """Refuse no configuration of a dataset that has several, or one that it does not have."""
    try:
        names = datasets.get_dataset_config_names(source, revision=revision, token=token)
    except Exception:  # it cannot be read for another reason
        return
    those = ", ".join(names[:CONFIGS]) + (", …" if len(names) > CONFIGS else "")
    if task.config is None and len(names) > 1:
        problem = f"{task.name}: {task.dataset} has several configurations: {those}."
        raise DataError(problem, f"Name one, as in {task.dataset}:{names[0]}.")
    if task.config not in (None, *names):
        problem = f"{task.name}: {task.dataset} has no configuration {task.config!r}."
        raise DataError(problem, f"It has {those}.")


def _column(
    task: EvaluationTask,
    features: Mapping[str, Any],
    asked: str | None,
    what: str,
    kind: type,
    likely: Sequence[str],
) -> str:
    """Name of the column of images, or of labels: the one of a type, else the likely one."""
    if asked is not None:
        if asked in features:
            return asked
        said = f"{task.name}: {task.dataset} has no column {asked!r}."
        raise DataError(said, f"It has {', '.join(features)}.")
    found = [name for name, feature in features.items() if isinstance(feature, kind)] or likely
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{task.name}: {task.dataset} has {counted(len(found), 'column')} that may be the {what}s.",
        f"Say which with `{what}=`; it has {', '.join(features)}.",
    )


def _check_images(
    task: EvaluationTask, features: Mapping[str, Any], image: str, kind: type
) -> None:
    """Refuse a column that cannot hold one image a row, such as one of lists."""
    feature = features[image]
    files = str(getattr(feature, "dtype", "")).removeprefix("large_") in ("binary", "string")
    if not (isinstance(feature, kind) or files or _holds_files(feature)):
        raise DataError(
            f"{task.name}: the column {image} of {task.dataset} does not hold one image a row.",
            f"Choose another with `image=`; it has {', '.join(features)}.",
        )


def _holds_files(feature: Any) -> bool:
    """Tell whether a column holds `{bytes, path}` as images are stored, without their type."""
    return isinstance(feature, Mapping) and "bytes" in feature and feature.keys() <= FILE
