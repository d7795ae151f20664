"""The verb `evaluate`: what a model scores on labelled images, beside each task's own fine-tune."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hf_tsv import plots, processes
from hf_tsv.checkpoints.reader import digest, fingerprint
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.checkpoints.writer import check_output_folder, whole_folder
from hf_tsv.errors import DataError, HfTsvError, LostProcessError, RecipeError
from hf_tsv.evaluation import kept_heads, model_index, pictures, suites, zero_shot
from hf_tsv.evaluation.data import EvaluationTask, LabelledImages, load
from hf_tsv.evaluation.finished import Finished, finished_tasks
from hf_tsv.processes import Processes
from hf_tsv.progress import bar, logger, visible_by_default
from hf_tsv.recipe import current_versions

if TYPE_CHECKING:
    from torch import Tensor

RESULTS_FILE = "evaluation.json"
T = TypeVar("T")
ZERO_SHOT = "zero-shot-image-classification"
NEEDED = {"datasets": "datasets", "PIL": "pillow", "sklearn": "scikit-learn"}


@dataclass(frozen=True)
class EvaluateReport:
    """What a model scores.

    Args:
        ref (`str`): the model.
        revision (`str`, *optional*): commit sha; None for a folder.
        accuracy (`float`): top-1, 0 to 1, mean over the tasks that could be evaluated.
        normalised (`float`, *optional*): mean share of the fine-tunes' own accuracy (eq. 9), over
            the tasks that have one.
        tasks (`dict[str, dict]`): by name: `dataset`, `revision` (the commit), `config`, `split`,
            `images` of its `total`, `classes`, `templates`, `accuracy`, `confusion` (rows: the true
            class), and where the fine-tune is known `reference` with its `accuracy`, and
            `normalised`.
        errors (`dict[str, str]`): tasks that could not be evaluated, and why; `README.md` where
            the card could not be written.
        limit (`int`, *optional*): images of each task, if not all.
        suite (`dict`, *optional*): its `name`, `tasks`, and over those that could be evaluated
            `accuracy` and `normalised`; what its paper reports, not measured here, is `published`.
        device (`str`): type of device computed on.
        seconds (`float`): wall time.
        versions (`dict[str, str]`): of hf-tsv and torch.
    """

    ref: str
    revision: str | None
    accuracy: float
    normalised: float | None
    tasks: dict[str, dict[str, Any]]
    errors: dict[str, str]
    limit: int | None
    device: str
    seconds: float
    card: str | None = None
    suite: dict[str, Any] | None = None
    versions: dict[str, str] = field(default_factory=current_versions)

    def to_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return asdict(self)


def evaluate(
    reference: str | PathLike[str],
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask] = (),
    *,
    suite: str | None = None,
    references: Mapping[str, str | PathLike[str]] | None = None,
    output: str | Path | None = None,
    force: bool = False,
    card: bool = False,
    create_pr: bool = False,
    limit: int | None = None,
    batch_size: int = 64,
    templates: Sequence[str] = (),
    base_model: str | PathLike[str] | None = None,
    device: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    progress: bool | None = None,
) -> EvaluateReport:
    """Classify labelled images zero-shot and count how often that is right (section 5, eq. 9).

    Every class is named to the text tower in prompts; an image belongs to the class whose prompts
    lie nearest. The heads made of prompts are kept in the Hub client's home (`hf-tsv/heads`). A
    task that cannot be read does not cost the results of the others.

    Args:
        reference (`str`): the model: `org/name`, `org/name@revision`, `hf://…` or a folder.
        tasks (`Mapping[str, str]` or `Sequence`): datasets by the name of the task, or
            `NAME=DATASET` texts, or [`EvaluationTask`]s. A dataset is a repository on the Hub, a
            folder of images, or a parquet file.
        suite (`str`, *optional*): tasks of a paper, with their base model and fine-tunes:
            `vit-b-32-8`, with b-16 or l-14, and 14 or 20 tasks; `tasks` are evaluated too.
        references (`Mapping[str, str]`, *optional*): the fine-tune of each task, which its accuracy
            is divided by; default: those of the suite; {} for none.
        output (`str` or `Path`, *optional*): folder to write `evaluation.json` to, and with
            matplotlib the pictures `accuracy.png`, `radar.png` and `confusion-….png`.
        force (`bool`): replace a folder that holds earlier results.
        card (`bool`): add the results to the model's card, as `model-index`: to the README.md of a
            folder, or by a commit to a repository.
        create_pr (`bool`): as a pull request.
        limit (`int`, *optional*): so many images of each task, for a quick look.
        batch_size (`int`): images at a time.
        templates (`Sequence[str]`): of prompts, of tasks that are given as text.
        base_model (`str`, *optional*): whose text tower and processor serve where the model has
            none; default: that of the suite, else what the model's card names.
        device (`str`, *optional*): default: the one accelerate chooses.
        token (`str`, *optional*): default: the one the Hub client is logged in with.
        cache_dir (`str` or `Path`, *optional*): default: the Hub client's cache.
        subfolder (`str`, *optional*): of the model, where its reference has none.
        progress (`bool`, *optional*): show bars; default: on a terminal.

    Returns:
        [`EvaluateReport`]: every task that could be evaluated, and why others could not.

    Raises:
        [`HfTsvError`]: the model cannot be loaded, or no task can be evaluated.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.evaluate("me/merged", {"dtd": "tanganke/dtd"}).accuracy  # doctest: +SKIP
    """
    started = time.monotonic()
    cache = None if cache_dir is None else str(cache_dir)
    with processes.joined() as group, ExitStack() as stack:
        job, finished = None, Finished()
        if not group.rank:
            stack.enter_context(group.leading())
            job = _job(
                fspath(reference), tasks, suite, references, templates, base_model, output,
                limit, batch_size, token, cache, subfolder,
                force=force, card=card, create_pr=create_pr,
            )  # fmt: skip
            finished = stack.enter_context(finished_tasks(job.folder))
        job = group.shared(job)
        show = not group.rank and (visible_by_default() if progress is None else progress)
        run = _Run(job, device, token, cache, show, group, finished)
        model = run.model(fspath(reference), subfolder)
        where = model.device
        data, results, errors = run.all_scored(model)
        del model
        run.compare(data, results, errors)
        if not results:
            first = next(iter(errors.values()))
            raise DataError(f"No task could be evaluated; the first: {first}")
        group.agree()
        if group.rank:
            done: EvaluateReport = group.receive()
            return done
        report = EvaluateReport(
            ref=job.ref,
            revision=job.revision,
            accuracy=_mean(results, "accuracy") or 0.0,
            normalised=_mean(results, "normalised"),
            tasks=results,
            errors=errors,
            limit=limit,
            device=where,
            seconds=round(time.monotonic() - started, 3),
            suite=None if job.suite is None else _of_suite(job.suite, results),
        )
        report = _delivered(report, job, token)
        group.dismiss(report)
        return report


@dataclass(frozen=True)
class _Job:
    """What an evaluation is of, the same in all processes.

    Args:
        ref (`str`): the model.
        revision (`str`, *optional*): commit sha; None for a folder.
        tasks (`list[EvaluationTask]`): all of them.
        fine_tunes (`dict[str, str]`): by task.
        suite ([`suites.Suite`], *optional*): of tasks.
        base_model (`str`, *optional*): of all models.
        limit (`int`, *optional*): images of each task.
        batch_size (`int`): images at a time.
        folder (`Path`, *optional*): to write.
        card ([`model_index.Card`], *optional*): to write.
    """

    ref: str
    revision: str | None
    tasks: list[EvaluationTask]
    fine_tunes: dict[str, str]
    suite: suites.Suite | None
    base_model: str | None
    limit: int | None
    batch_size: int
    folder: Path | None
    card: model_index.Card | None


def _job(
    reference: str,
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    suite: str | None,
    references: Mapping[str, str | PathLike[str]] | None,
    templates: Sequence[str],
    base_model: str | PathLike[str] | None,
    output: str | Path | None,
    limit: int | None,
    batch_size: int,
    token: str | None,
    cache_dir: str | None,
    subfolder: str | None,
    *,
    force: bool,
    card: bool,
    create_pr: bool,
) -> _Job:
    """Everything that can be refused before any work, checked."""
    _check_installed()
    if create_pr and not card:
        raise RecipeError("create_pr is about the card.", "Add --card.")
    _check_numbers(limit=limit, batch_size=batch_size)
    chosen = None if suite is None else suites.named(suite)
    listed = _listed(tasks, templates, chosen)
    base = None if base_model is None else fspath(base_model)
    if chosen is not None:
        references = chosen.references if references is None else references
        base = base or chosen.base_model
    fine_tunes = _fine_tunes(references or {}, listed)
    folder = None if output is None else _checked_folder(Path(output), force=force)
    pinned = pin(parse(reference, subfolder), token=token, cache_dir=cache_dir)
    to_write = model_index.open_card(pinned, token=token, create_pr=create_pr) if card else None
    return _Job(
        pinned.ref, pinned.revision, listed, fine_tunes, chosen, base, limit, batch_size, folder,
        to_write,
    )  # fmt: skip


Data = dict[str, tuple[EvaluationTask, LabelledImages]]
Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class _Run:
    """What every model and task of an evaluation shares."""

    job: _Job
    device: str | None
    token: str | None
    cache_dir: str | None
    show: bool
    group: Processes
    finished: Finished

    def model(self, reference: str, subfolder: str | None = None) -> _Loaded:
        """A model with its tokenizer and image processor, in every process."""
        from transformers.utils import logging

        from hf_tsv.models import pipeline
        from hf_tsv.stream import pick_device

        if not self.show:
            logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        loaded: list[_Loaded] = []

        def load_it() -> None:
            pipe = pipeline(
                ZERO_SHOT,
                reference,
                base_model=self.job.base_model,
                device=str(pick_device(self.device)),
                token=self.token,
                cache_dir=self.cache_dir,
                subfolder=subfolder,
                progress=self.show,
            )
            loaded.append(_Loaded(pipe, kept_heads.text_identity(pipe.model)))

        self._together(load_it)
        return loaded[0]

    def _together(self, call: Callable[[], T]) -> list[T]:
        """What all processes make of something; the error of one is everybody's."""
        mine: T | HfTsvError
        try:
            mine = call()
        except HfTsvError as error:
            mine = error
        found = self.group.gathered(mine)
        for item in found:
            if isinstance(item, HfTsvError):
                raise item
        return found

    def all_scored(self, model: _Loaded) -> tuple[Data, Results, dict[str, str]]:
        """Images and results of the tasks that can be evaluated, and why others cannot."""
        data: Data = {}
        results: Results = {}
        errors: dict[str, str] = {}
        for task in self.job.tasks:
            try:
                images = self._images(task)
                results[task.name] = self.scored(model, task, images)
                data[task.name] = task, images
            except LostProcessError:
                raise
            except HfTsvError as error:
                errors[task.name] = str(error)
                logger.warning("%s", error)
        return data, results, errors

    def _images(self, task: EvaluationTask) -> LabelledImages:
        found: list[LabelledImages] = []
        self._together(lambda: found.append(load(task, limit=self.job.limit, token=self.token)))
        return found[0]

    def compare(self, data: Data, results: Results, errors: dict[str, str]) -> None:
        """Add to the results what the tasks' own fine-tunes score."""
        for name, (task, images) in data.items():
            if ref := self.job.fine_tunes.get(name):
                try:
                    own = self.scored(self.model(ref), task, images)["accuracy"]
                except LostProcessError:
                    raise
                except HfTsvError as error:
                    errors[name] = f"its reference: {error}"
                    logger.warning("%s", error)
                else:
                    results[name] |= _beside(results[name], ref, own)

    def scored(
        self, model: _Loaded, task: EvaluationTask, images: LabelledImages
    ) -> dict[str, Any]:
        """Accuracy and confusion of one model on one task, unless a run before has them."""
        key = model.key(task, images) if self.finished.kept else None
        found: dict[str, Any] | None = self.group.shared(self.finished.get(key))
        if found is not None:
            logger.info("%s is there already.", task.name)
            return found
        found = _counted(task, images, *self._classified(model, task, images))
        self.finished.add(key, found)
        return found

    def _classified(
        self, model: _Loaded, task: EvaluationTask, images: LabelledImages
    ) -> tuple[list[int], list[int]]:
        """The class of every image, and the one it is taken for; batches in turn by process."""
        starts = range(0, len(images.rows), self.job.batch_size)
        own = starts[self.group.rank :: self.group.count]
        count = sum(min(self.job.batch_size, len(images.rows) - start) for start in own)
        with bar(f"Evaluating {task.name}", count, visible=self.show) as advance:
            parts = self._together(lambda: self._batches(model, task, images, own, advance))
        batches = {start: batch for part in parts for start, batch in part.items()}
        labels = [label for start in starts for label in batches[start][0]]
        predicted = [label for start in starts for label in batches[start][1]]
        return labels, predicted

    def _batches(
        self,
        model: _Loaded,
        task: EvaluationTask,
        images: LabelledImages,
        starts: Sequence[int],
        advance: Callable[[int], None],
    ) -> dict[int, tuple[list[int], list[int]]]:
        directions = model.head(images.classes, task.templates)
        found = {}
        for start in starts:
            stop = min(start + self.job.batch_size, len(images.rows))
            pictures, labels = images.batch(start, stop, task.name)
            pixels = model.pipe.image_processor(pictures, return_tensors="pt")["pixel_values"]
            predicted = zero_shot.classify(model.pipe.model, directions, pixels)
            found[start] = labels, predicted.tolist()
            advance(len(labels))
        return found


def _counted(
    task: EvaluationTask, images: LabelledImages, labels: list[int], predicted: list[int]
) -> dict[str, Any]:
    from sklearn.metrics import accuracy_score, confusion_matrix

    every = list(range(len(images.classes)))
    return {
        "dataset": task.dataset,
        "revision": images.revision or task.revision,
        "config": task.config,
        "split": images.split,
        "images": len(labels),
        "total": images.total,
        "classes": list(images.classes),
        "templates": list(task.templates),
        "accuracy": float(accuracy_score(labels, predicted)),
        "confusion": confusion_matrix(labels, predicted, labels=every).tolist(),
    }


@dataclass(frozen=True)
class _Loaded:
    """A model with its tokenizer and image processor, and a digest of its text tower."""

    pipe: Any
    text: str

    @property
    def device(self) -> str:
        """Type of it."""
        return str(self.pipe.model.device.type)

    @cached_property
    def identity(self) -> str:
        """A digest of all its weights, and of how it sees images."""
        model, processor = self.pipe.model, self.pipe.image_processor
        tensors = {name: digest(t.cpu().contiguous()) for name, t in model.state_dict().items()}
        settings = model.config.to_json_string(use_diff=False) + processor.to_json_string()
        return fingerprint({**tensors, "": hashlib.sha256(settings.encode()).hexdigest()})

    def key(self, task: EvaluationTask, images: LabelledImages) -> str:
        """A digest of everything that decides about its result on a task."""
        said = [
            self.identity,
            self._head_key(images.classes, task.templates),
            asdict(task),
            images.identity,
            current_versions(),
        ]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()

    def _head_key(self, classes: Sequence[str], templates: Sequence[str]) -> str:
        return kept_heads.key_of(self.text, self.pipe.tokenizer, classes, templates, self.device)

    def head(self, classes: Sequence[str], templates: Sequence[str]) -> Tensor:
        """The zero-shot head of a task."""
        key = self._head_key(classes, templates)
        return kept_heads.head(self.pipe.model, self.pipe.tokenizer, classes, templates, key)


def _mean(results: Results, what: str) -> float | None:
    values = [found[what] for found in results.values() if what in found]
    return sum(values) / len(values) if values else None


def _of_suite(suite: suites.Suite, results: Results) -> dict[str, Any]:
    names = [task.name for task in suite.tasks]
    own = {name: found for name, found in results.items() if name in names}
    return {
        "name": suite.name,
        "tasks": names,
        "accuracy": _mean(own, "accuracy"),
        "normalised": _mean(own, "normalised"),
        "published": suite.published,
    }


def _delivered(report: EvaluateReport, job: _Job, token: str | None) -> EvaluateReport:
    """Write folder and card, as asked."""
    if job.folder is not None:
        _write(report, job.folder)
    if job.card is None:
        return report
    try:
        return replace(report, card=model_index.write(job.card, report.tasks, token=token))
    except HfTsvError as error:  # what was measured is worth more
        logger.warning("%s", error)
        return replace(report, errors={**report.errors, model_index.CARD: str(error)})


def _write(report: EvaluateReport, folder: Path) -> None:
    """Results and pictures as a folder that appears whole."""
    drawn = plots.attempted(lambda: pictures.of_evaluation(report.tasks)) or []
    with whole_folder(folder) as staging:
        text = json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n"
        (staging / RESULTS_FILE).write_text(text, encoding="utf-8")
        for picture in drawn:
            (staging / picture.file).write_bytes(picture.png)


def _beside(found: dict[str, Any], reference: str, accuracy: float) -> dict[str, Any]:
    """What a task's own fine-tune scores, and the share of it that is kept."""
    beside: dict[str, Any] = {"reference": {"ref": reference, "accuracy": accuracy}}
    return beside | ({"normalised": found["accuracy"] / accuracy} if accuracy else {})


def _listed(
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    templates: Sequence[str],
    suite: suites.Suite | None,
) -> list[EvaluationTask]:
    named = [f"{n}={d}" for n, d in tasks.items()] if isinstance(tasks, Mapping) else list(tasks)
    choices = {"templates": tuple(templates)} if templates else {}
    listed = [] if suite is None else list(suite.tasks)
    for task in named:
        parsed = task if isinstance(task, EvaluationTask) else None
        listed.append(parsed or EvaluationTask.parse(str(task), **choices))
    names = [task.name for task in listed]
    if not names:
        raise RecipeError(
            "There is nothing to evaluate on.", "Name a task or suite: --task NAME=DATASET."
        )
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(f"The task {twice} is given twice.", "Give each its own name.")
    return listed


def _fine_tunes(
    references: Mapping[str, str | PathLike[str]], tasks: Sequence[EvaluationTask]
) -> dict[str, str]:
    if unknown := sorted(references.keys() - {task.name for task in tasks}):
        raise RecipeError(
            f"There is a reference for {unknown[0]}, and no such task.",
            f"The tasks are {', '.join(task.name for task in tasks)}.",
        )
    return {name: fspath(ref) for name, ref in references.items()}


def _checked_folder(output: Path, *, force: bool) -> Path:
    folder = output.expanduser().absolute()
    check_output_folder(folder, [RESULTS_FILE], force=force)
    return folder


def _check_numbers(**numbers: int | None) -> None:
    for name, number in numbers.items():
        if number is not None and (type(number) is not int or number < 1):
            raise RecipeError(f"{name} is {number!r}.", "Give a whole number from 1 on.")


def _check_installed() -> None:
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if missing:
        raise RecipeError(
            f"Evaluation needs {', '.join(missing)}.", "Run `pip install 'hf-tsv[eval]'`."
        )


def chosen_tasks(
    tasks: Mapping[str, str] | Sequence[str | EvaluationTask],
    suite: str | None,
    references: Mapping[str, str | PathLike[str]] | None,
    base_model: str | PathLike[str] | None,
) -> tuple[list[EvaluationTask], dict[str, str], str | None]:
    """Tasks, the fine-tune of each, and the base model, from what users say.

    Args:
        tasks (`Mapping[str, str]` or `Sequence`): see [`evaluate`].
        suite (`str`, *optional*): that has more of them.
        references (`Mapping[str, str]`, *optional*): default: those of the suite.
        base_model (`str`, *optional*): default: that of the suite.
    """
    named = None if suite is None else suites.named(suite)
    listed = _listed(tasks, (), named)
    if named is not None:
        references = named.references if references is None else references
        base_model = base_model or named.base_model
    base = None if base_model is None else fspath(base_model)
    return listed, _fine_tunes(references or {}, listed), base
