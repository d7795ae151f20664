"""Classification of a task's images by a model, in one or several processes, and its results."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, TypeVar

from hf_tsv.checkpoints.sources import Access
from hf_tsv.checkpoints.storage.tensors import digest, fingerprint
from hf_tsv.evaluation import prompt_heads, zero_shot
from hf_tsv.evaluation.data import LabelledImages, load
from hf_tsv.evaluation.finished import Finished
from hf_tsv.evaluation.job import Evaluation, in_one_line, noted
from hf_tsv.evaluation.pixels import batches
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.models.building import ZERO_SHOT
from hf_tsv.models.loading import pipeline
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.recipes.settings import current_versions
from hf_tsv.system.device import pick_device
from hf_tsv.system.errors import HfTsvError
from hf_tsv.system.processes import Processes
from hf_tsv.system.progress import bar, logger

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")

Data = dict[str, tuple[EvaluationTask, LabelledImages]]
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Classified:
    """True and predicted class of images, and the tasks chosen for each by a model that routes."""

    labels: list[int] = field(default_factory=list)
    predicted: list[int] = field(default_factory=list)
    chosen: zero_shot.Chosen = field(default_factory=list)


@dataclass(frozen=True)
class Scoring:
    """Settings that every model and task of an evaluation shares."""

    job: Evaluation
    device: AnyDevice | None
    access: Access
    show: bool
    group: Processes
    finished: Finished

    def model(self, reference: str) -> Loaded:
        """Load a model with its tokenizer and image processor, in every process."""
        known: Any = {"token": self.access.token, "cache_dir": self.access.cache_dir}
        known |= {"base_model": self.job.base_model, "progress": self.show}

        def loaded() -> Loaded:
            device = str(pick_device(self.device))
            pipe = pipeline(ZERO_SHOT, reference, device=device, **known)
            return Loaded(pipe, prompt_heads.text_identity(pipe.model))

        return self._own(reference, loaded)

    def _own(self, what: str, call: Callable[[], T]) -> T:
        """Result of a call that stays in its process; the error of one is raised in each."""
        mine: list[T] = []
        self._together(what, lambda: mine.append(call()))
        return mine[0]

    def _together(self, what: str, call: Callable[[], T]) -> list[T]:
        """Results of a call in all processes; the error of one is raised in each.

        An exception that no code expects is an error of `what`, a task or model, too: the others
        are not made to wait, and the next task can follow.
        """
        mine: T | HfTsvError
        try:
            with in_one_line(what):
                mine = call()
        except HfTsvError as error:
            mine = error
        found = self.group.gathered(mine)
        for item in found:
            if isinstance(item, HfTsvError):
                raise item
        return found

    def all_scored(self, model: Loaded) -> tuple[Data, Results, dict[str, str]]:
        """Images and results of the tasks that can be evaluated, and the errors of the others."""
        data: Data = {}
        results: Results = {}
        errors: dict[str, str] = {}
        for task in self.job.tasks:
            opened = partial(load, task, limit=self.job.limit, token=self.access.token)
            with noted(errors, task.name, alone=len(self.job.tasks) == 1):
                images = self._own(task.name, opened)
                results[task.name] = self.scored(model, task, images)
                data[task.name] = task, images
        return data, results, errors

    def compare(self, data: Data, results: Results, errors: dict[str, str]) -> None:
        """Add the accuracies of the tasks' own fine-tunes to the results."""
        for name, (task, images) in data.items():
            if ref := self.job.fine_tunes.get(name):
                with noted(errors, name, "its reference: "):
                    own = self.scored(self.model(ref), task, images)["accuracy"]
                    results[name]["reference"] = {"ref": ref, "accuracy": own}
                    if own:
                        results[name]["normalised"] = results[name]["accuracy"] / own

    def scored(self, model: Loaded, task: EvaluationTask, images: LabelledImages) -> dict[str, Any]:
        """Accuracy and confusion of one model on one task, from an earlier run if it has them."""
        key = self._own(task.name, lambda: self._key(model, task, images))
        found: dict[str, Any] | None = self.group.shared(self.finished.get(key))
        if found is not None:
            logger.info("Resuming: %s is done.", task.name)
            return found
        classified = self._classified(model, task, images)
        found = self._own(task.name, lambda: _counted(task, images, classified))
        self.finished.add(key, found)
        return found

    def _key(self, model: Loaded, task: EvaluationTask, images: LabelledImages) -> str | None:
        return model.key(task, images) if self.finished.kept else None

    def _classified(
        self, model: Loaded, task: EvaluationTask, images: LabelledImages
    ) -> Classified:
        """Classes and tasks of every image; the processes take batches in turn."""
        starts = range(0, len(images.rows), self.job.batch_size)
        own = starts[self.group.rank :: self.group.count]
        count = sum(min(self.job.batch_size, len(images.rows) - start) for start in own)
        with bar(f"Evaluating {task.name}", count, visible=self.show) as advance:
            parts = self._together(
                task.name, lambda: self._batches(model, task, images, own, advance)
            )
        batches = {start: batch for part in parts for start, batch in part.items()}
        every = Classified()
        for start in starts:
            every.labels.extend(batches[start].labels)
            every.predicted.extend(batches[start].predicted)
            every.chosen.extend(batches[start].chosen)
        return every

    def _batches(
        self,
        model: Loaded,
        task: EvaluationTask,
        images: LabelledImages,
        starts: Sequence[int],
        advance: Callable[[int], None],
    ) -> dict[int, Classified]:
        directions = model.head(images.classes, task.templates)
        every = range(len(images.rows))
        parts = [every[start : start + self.job.batch_size] for start in starts]
        found = by_batches(model.pipe, directions, images, parts, task.name, advance)
        return dict(zip(starts, found, strict=True))


def by_batches(
    pipe: Any,
    directions: Tensor,
    images: LabelledImages,
    parts: Sequence[Sequence[int]],
    task: str,
    advance: Callable[[int], None],
) -> list[Classified]:
    """Classify parts of the rows with a zero-shot pipeline and the head of their classes."""
    found = []
    with closing(batches(images, pipe.image_processor, parts, task)) as read:
        for pixels, labels in read:
            predicted, chosen = zero_shot.classify(pipe.model, directions, pixels)
            found.append(Classified(labels, predicted.tolist(), chosen))
            advance(len(labels))
    return found


def _counted(
    task: EvaluationTask, images: LabelledImages, classified: Classified
) -> dict[str, Any]:
    from sklearn.metrics import accuracy_score, confusion_matrix

    every, both = list(range(len(images.classes))), (classified.labels, classified.predicted)
    found = {
        "dataset": task.dataset,
        "revision": images.revision or task.revision,
        "config": task.config,
        "split": images.split,
        "images": len(classified.labels),
        "total": images.total,
        "classes": list(images.classes),
        "templates": list(task.templates),
        "accuracy": float(accuracy_score(*both)),
        "confusion": confusion_matrix(*both, labels=every).tolist(),
    }
    sent = Counter(" + ".join(own) for own in classified.chosen)
    return found | ({"sent_to": dict(sent.most_common())} if sent else {})


@dataclass(frozen=True)
class Loaded:
    """Model with its tokenizer and image processor, and a digest of its text tower."""

    pipe: Any
    text: str

    @cached_property
    def identity(self) -> str:
        """Digest of the model's weights, its settings, and those of its image processor."""
        model, processor = self.pipe.model, self.pipe.image_processor
        tensors = {name: digest(t.cpu().contiguous()) for name, t in model.state_dict().items()}
        settings = model.config.to_json_string(use_diff=False) + processor.to_json_string()
        return fingerprint({**tensors, "": hashlib.sha256(settings.encode()).hexdigest()})

    def key(self, task: EvaluationTask, images: LabelledImages) -> str:
        """Digest of everything that determines the model's result on a task."""
        head = self._head_key(images.classes, task.templates)
        said = [self.identity, head, asdict(task), images.identity, current_versions()]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def _head_key(self, classes: Sequence[str], templates: Sequence[str]) -> str:
        model, tokenizer = self.pipe.model, self.pipe.tokenizer
        return prompt_heads.key_of(self.text, model, tokenizer, classes, templates)

    def head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Zero-shot head of a task."""
        key = self._head_key(classes, templates)
        return prompt_heads.head(self.pipe.model, self.pipe.tokenizer, classes, templates, key)
