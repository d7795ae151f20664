"""Labelled images of one task: from the Hub, a folder of images, or a parquet file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_tsv import hub
from hf_tsv.checkpoints.reference import local_kind
from hf_tsv.errors import DataError, RecipeError, RepoError
from hf_tsv.progress import first_line

if TYPE_CHECKING:
    from datasets import Dataset

LABELS = ("label", "labels", "fine_label", "class")
"""Names of label columns where no column has class labels, the likeliest first."""

SPLITS = ("test", "validation", "train")
PARQUET = ".parquet"

LIBRARIES = {"datasets": "datasets", "PIL": "pillow"}
"""Packages that every use of images needs, by the name of their module."""

SEED = 0
"""Seed of the random choice of images under a `limit`."""


@dataclass(frozen=True)
class EvaluationTask:
    """Classification task on a dataset.

    Args:
        name (`str`): name of the task.
        dataset (`str`): repository on the Hub (`org/name`), folder, or parquet file.
        revision (`str`, *optional*): revision of a repository.
        config (`str`, *optional*): configuration of a repository that has several.
        split (`str`, *optional*): default: `test`, else `validation`, else `train`.
        image (`str`, *optional*): column of the images; default: the only one there is.
        label (`str`, *optional*): column of the labels; default: the only class label.
        classes (`tuple[str, ...]`): names in the order of the labels; default: the dataset's.
        templates (`tuple[str, ...]`): prompts, with `{}` for the name of a class.
    """

    name: str
    dataset: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    image: str | None = None
    label: str | None = None
    classes: tuple[str, ...] = ()
    templates: tuple[str, ...] = ("a photo of a {}.",)

    @property
    def shown(self) -> str:
        """Name of the dataset, without the path of a folder or file on this machine."""
        on_hub = self.dataset.count("/") == 1 and not self.dataset.startswith((".", "/", "~"))
        return self.dataset if on_hub else Path(self.dataset).name

    def __post_init__(self) -> None:
        try:
            f"{self.name}{self.dataset}".encode()
        except UnicodeEncodeError:
            raise RecipeError(
                f"{self.dataset!r} is not valid text.", "Rename it: results are UTF-8."
            ) from None
        if not self.name.isprintable() or not self.name.strip() or not self.dataset.strip():
            raise RecipeError(f"The task {self.name!r} is incomplete.", "Write NAME=DATASET.")
        for template in self.templates:
            if template.count("{}") != 1:
                raise RecipeError(
                    f"The template {template!r} of {self.name} has no single {{}}.",
                    "Write {} where the name of the class goes.",
                )

    @staticmethod
    def parse(text: str, **choices: Any) -> EvaluationTask:
        """Read `NAME=DATASET`, `NAME=DATASET@REVISION` or `NAME=DATASET:CONFIG`.

        Args:
            text (`str`): text from the command line.
            choices: the other fields.

        Example:
            >>> EvaluationTask.parse("dtd=tanganke/dtd@main").revision
            'main'
        """
        name, equals, dataset = text.partition("=")
        if not equals:
            raise RecipeError(f"The task {text!r} names no dataset.", "Write NAME=DATASET.")
        if local_kind(dataset) is not None:
            return EvaluationTask(name, dataset, **choices)
        found = re.fullmatch(r"([^@:]+)(?::([^@]+))?(?:@(.+))?", dataset)
        if found is None:
            raise RecipeError(
                f"{dataset!r} is neither a path nor a dataset.", "Write org/name or a path."
            )
        return EvaluationTask(name, found[1], found[3], found[2], **choices)


@dataclass(frozen=True)
class LabelledImages:
    """Images with the numbers and names of their classes.

    Args:
        rows (`Dataset`): rows, as a Hugging Face dataset.
        image (`str`): column of the images.
        label (`str`): column of the labels.
        classes (`tuple[str, ...]`): names, in the order of the labels.
        split (`str`): split of the dataset.
        total (`int`): number of images in the split, of which `rows` may be a few.
        revision (`str`, *optional*): commit sha of the dataset; None if it is no repository.
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
        """Images as RGB, and their labels.

        Args:
            start (`int`): first row.
            stop (`int`): end, after the last row.
            task (`str`): name of the task, for errors.

        Raises:
            [`DataError`]: an image cannot be read, or a label is no class.
        """
        images, labels = [], []
        for i in range(start, stop):
            try:
                row = self.rows[i]
                images.append(row[self.image].convert("RGB"))
            except Exception as error:  # Pillow raises many types for damaged files
                raise DataError(
                    f"{task}: image {i} of the split {self.split} cannot be read:"
                    f" {first_line(error)}",
                    "Repair or remove it.",
                ) from None
            label = row[self.label]
            label = int(label) if isinstance(label, bool) else label
            if type(label) is not int or not 0 <= label < len(self.classes):
                raise DataError(
                    f"{task}: image {i} has the label {label!r}, and there are"
                    f" {len(self.classes)} classes.",
                    "Give the names of all classes, in the order of the labels.",
                )
            labels.append(label)
        return images, labels


def listed(
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    nothing: str,
    *,
    templates: Sequence[str] = (),
) -> list[EvaluationTask]:
    """Parse tasks in any of the forms that users give.

    Args:
        tasks (`Mapping[str, str]` or `Sequence`): datasets by the name of the task, or
            `NAME=DATASET` texts, or [`EvaluationTask`]s.
        nothing (`str`): message of the error if there is no task.
        templates (`Sequence[str]`): prompts of tasks that are given as text.

    Raises:
        [`RecipeError`]: there is no task, or a name comes twice.
    """
    named = [f"{n}={d}" for n, d in tasks.items()] if isinstance(tasks, Mapping) else tasks
    choices = {"templates": tuple(templates)} if templates else {}
    found = [
        task if isinstance(task, EvaluationTask) else EvaluationTask.parse(task, **choices)
        for task in named
    ]
    names = [task.name for task in found]
    if not names:
        raise RecipeError(nothing, "Name a task: --task NAME=DATASET.")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"The task {twice} is given twice.", "Give each its own name.")
    return found


def check_counts(**numbers: int | None) -> None:
    """Refuse values that are not whole numbers of images from 1 on.

    Args:
        numbers (`int`, *optional*): values by the name of their argument.
    """
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise RecipeError(f"{name} is {number!r}.", "Give a whole number from 1 on.")


def refuse_not_installed(what: str, **also: str) -> None:
    """Refuse to continue without the libraries that read images.

    Args:
        what (`str`): feature that needs them, for the error.
        also (`str`): further packages that it needs, by the name of their module.
    """
    needed = {**LIBRARIES, **also}
    if missing := [package for module, package in needed.items() if find_spec(module) is None]:
        raise RecipeError(
            f"{what} needs {', '.join(missing)}.", "Run `pip install 'hf-tsv[eval]'`."
        )


def load(
    task: EvaluationTask,
    *,
    limit: int | None = None,
    token: str | None = None,
) -> LabelledImages:
    """Find the images of a task.

    Args:
        task ([`EvaluationTask`]): task to load.
        limit (`int`, *optional*): number of images to draw at random, always the same ones.
        token (`str`, *optional*): token for private datasets.

    Raises:
        [`DataError`]: there is no such dataset, split or column, or the split is empty.
    """
    import datasets

    datasets.disable_progress_bars()  # our own bar counts images
    revision = _commit(task, token)
    splits = _splits(task, revision or task.revision, datasets, token)
    wanted = [task.split] if task.split else [s for s in SPLITS if s in splits] or list(splits)
    if wanted[0] not in splits:
        raise DataError(
            f"{task.name}: {task.dataset} has no split {wanted[0]!r}.",
            f"It has {', '.join(splits)}.",
        )
    rows = splits[wanted[0]]
    if not len(rows):
        raise DataError(f"{task.name}: the split {wanted[0]} of {task.dataset} is empty.")
    image = _column(task, rows.features, task.image, "image", datasets.Image)
    label = _column(task, rows.features, task.label, "label", datasets.ClassLabel, LABELS)
    classes = _classes(task, rows.features[label], label)
    total = len(rows)
    if limit is not None and limit < total:
        rows = rows.shuffle(seed=SEED).select(range(limit))
    return LabelledImages(rows, image, label, classes, wanted[0], total, revision)


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
    task: EvaluationTask,
    revision: str | None,
    datasets: Any,
    token: str | None,
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
        raise DataError(
            f"{task.name}: {task.dataset} has no column {asked!r}.",
            f"It has {', '.join(features)}.",
        )
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = found or [name for name in likely if name in features][:1]
    if len(found) == 1:
        return found[0]
    raise DataError(
        f"{task.name}: {task.dataset} has {len(found)} columns that may be the {what}s.",
        f"Say which; it has {', '.join(features)}.",
    )


def _classes(task: EvaluationTask, feature: Any, label: str) -> tuple[str, ...]:
    """Names of the classes, in the order of the labels."""
    own = tuple(getattr(feature, "names", None) or ())
    if task.classes and own and len(own) != len(task.classes):
        raise DataError(
            f"{task.name}: {len(task.classes)} names for the {len(own)} classes of {task.dataset}.",
            "Give one name for each class, in the order of the labels.",
        )
    if classes := task.classes or own:
        return classes
    raise DataError(
        f"{task.name}: the column {label} of {task.dataset} does not name its classes.",
        "Give their names, in the order of the labels.",
    )
