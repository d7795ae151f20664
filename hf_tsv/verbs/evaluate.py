"""The verb `evaluate`: accuracy of a model on labelled images, beside each task's own fine-tune."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from hf_tsv.checkpoints.reference import at_revision, parse, pin
from hf_tsv.checkpoints.sources import Access
from hf_tsv.evaluation import model_index, suites
from hf_tsv.evaluation.classifying import Results, Scoring
from hf_tsv.evaluation.data import refuse_not_installed
from hf_tsv.evaluation.eval_results import is_nameable
from hf_tsv.evaluation.finished import Finished, finished_tasks
from hf_tsv.evaluation.job import (
    Evaluation,
    checked_folder,
    chosen,
    nothing_measured,
    refuse_no_card,
)
from hf_tsv.linalg.choices import AnyDevice
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.recipes.settings import current_versions
from hf_tsv.reports.report import Report
from hf_tsv.reports.results import with_table
from hf_tsv.system import processes
from hf_tsv.system.checks import check_counts
from hf_tsv.system.errors import HfTsvError, public
from hf_tsv.system.progress import logger, visible_by_default
from hf_tsv.verbs import pictures

RESULTS_FILE = "evaluation.json"
MEASURES = ("accuracy", "normalised")


@dataclass(frozen=True, repr=False)
class EvaluateReport(Report):
    """Accuracy of a model on tasks.

    Args:
        ref (`str`): the model.
        revision (`str`, *optional*): commit sha; None for a folder.
        accuracy (`float`): top-1, 0 to 1, mean over the tasks that could be evaluated.
        normalised (`float`, *optional*): mean share of the fine-tunes' own accuracy (eq. 9), over
            the tasks that have one.
        tasks (`dict[str, dict]`): results by task: `dataset`, `revision` (the commit), `config`,
            `split`, `images` of its `total`, `classes`, `templates`, `accuracy`, `confusion` (rows:
            the true class), of a model that routes `sent_to` (number of images by the tasks whose
            tower they went through), and where the fine-tune is known `reference` with its
            `accuracy`, and `normalised`.
        errors (`dict[str, str]`): error of each task that could not be evaluated; under `README.md`
            the error if the card could not be written.
        limit (`int`, *optional*): number of images per task, if not all.
        suite (`dict`, *optional*): its `name`, `tasks`, and over those that could be evaluated
            `accuracy` and `normalised`; `published` has results of others, not measured here: a
            list of `source`, `origin`, `fine_tunes`, `comparable` (measured with the suite's
            fine-tunes) and `rows` by method.
        device (`str`): type of the device that computed.
        seconds (`float`): wall time.
        versions (`dict[str, str]`): versions of hf-tsv and torch.
        date (`str`): end of the evaluation, in UTC (ISO 8601).
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
    date: str = ""

    def table(self) -> list[list[str | float]]:
        """Accuracy of each task, and the share of its fine-tune's."""
        rows: list[list[str | float]] = [
            [name, *(f"{found[what]:.1%}" if what in found else "" for what in MEASURES)]
            for name, found in self.tasks.items()
        ]
        return [["task", "accuracy", "of the fine-tune's"], *rows]


@public
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
    device: AnyDevice | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    subfolder: str | None = None,
    progress: bool | None = None,
) -> EvaluateReport:
    """Classify labelled images zero-shot and measure the accuracy (section 5, eq. 9).

    The text tower embeds prompts with the name of every class; an image is classified as the class
    whose prompts are nearest. The heads made of prompts are kept in the Hub client's home
    (`hf-tsv/heads`). An error in one task leaves the results of the others intact. Processes that
    torchrun or accelerate started share the images. With an output, the same call resumes a stopped
    one at the next task.

    Args:
        reference (`str`): the model: `org/name`, `org/name@revision`, `hf://…` or a folder.
        tasks (`Mapping[str, str]` or `Sequence`): datasets by the name of the task, or
            `NAME=DATASET` texts, or [`EvaluationTask`]s. A dataset is a repository on the Hub, a
            folder of images, or a parquet file.
        suite (`str`, *optional*): tasks of a paper, with their base model and fine-tunes:
            `vit-b-32-8`, with b-16 or l-14, and 14 or 20 tasks; `tasks` are evaluated too.
        references (`Mapping[str, str]`, *optional*): the fine-tune of each task, by whose accuracy
            the model's is divided; default: those of the suite; {} for none.
        output (`str` or `Path`, *optional*): folder to write `evaluation.json` to, and with
            matplotlib the pictures `accuracy.png`, `radar.png` and `confusion-….png`.
        card (`bool`): add the results to the model's card, as `model-index` and as a table, and
            those on data sets of the Hub to `.eval_results`: in a folder, or by one commit to a
            repository.
        create_pr (`bool`): add them by a pull request.
        limit (`int`, *optional*): number of images per task, for a quick look; default: all.
        batch_size (`int`): images at a time.
        templates (`Sequence[str]`): prompts of tasks that are given as text.
        base_model (`str`, *optional*): model whose text tower and processor are used if the model
            has none; default: that of the suite, else the one named in the model's card.
        force, device, token, cache_dir, subfolder, progress: as in [`merge`].

    Returns:
        [`EvaluateReport`]: results of the tasks, and the errors of those that failed.

    Raises:
        [`HfTsvError`]: the model cannot be loaded, or no task can be evaluated.

    Example:
        >>> import hf_tsv
        >>> hf_tsv.evaluate("me/merged", {"dtd": "tanganke/dtd"}).accuracy  # doctest: +SKIP
    """
    started = time.monotonic()
    access = Access.of(token, cache_dir, subfolder)
    with processes.joined() as group, ExitStack() as stack:
        job, finished = None, Finished()
        if not group.rank:
            stack.enter_context(group.leading())
            refuse_not_installed("Evaluation", sklearn="scikit-learn")
            refuse_no_card(card=card, create_pr=create_pr)
            check_counts(limit=limit, batch_size=batch_size)
            choice = chosen(tasks, suite, references, base_model, templates)
            folder = checked_folder(output, RESULTS_FILE, force=force)
            named = parse(fspath(reference), subfolder)
            pinned = pin(named, token=token, cache_dir=access.cache_dir)
            on_hub = [task.name for task in choice.tasks if is_nameable(task.dataset)]
            may_write: Any = {"token": token, "create_pr": create_pr}
            to_write = model_index.open_card(pinned, on_hub, **may_write) if card else None
            job = Evaluation(
                **vars(choice), ref=pinned.ref, revision=pinned.revision, limit=limit,
                batch_size=batch_size, folder=folder, card=to_write,
            )  # fmt: skip
            finished = stack.enter_context(finished_tasks(folder))
        job = group.shared(job)
        show = not group.rank and (visible_by_default() if progress is None else progress)
        scoring = Scoring(job, device, access, show, group, finished)
        model = scoring.model(at_revision(job.ref, job.revision))
        where = model.pipe.model.device.type
        data, results, errors = scoring.all_scored(model)
        del model
        scoring.compare(data, results, errors)
        if not results:
            raise nothing_measured(errors)
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
            date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            seconds=round(time.monotonic() - started, 3),
            suite=None if job.suite is None else _of_suite(job.suite, results),
        )
        report = _delivered(report, job, access)
        group.dismiss(report)
        return report


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
        "published": [asdict(published) for published in suite.published],
    }


def _delivered(report: EvaluateReport, job: Evaluation, access: Access) -> EvaluateReport:
    """Write folder and card, as asked."""
    if job.folder is not None:
        report.write(job.folder, RESULTS_FILE, lambda: pictures.of_evaluation(report.tasks))
    if job.card is None:
        return report
    try:
        where: Any = {"token": access.token, "cache_dir": access.cache_dir}
        card = model_index.write(job.card, report.tasks, report.date, body=with_table, **where)
        return replace(report, card=card)
    except HfTsvError as error:  # the measured results must not be lost
        logger.warning("The results were not added to the card.")
        return replace(report, errors={**report.errors, model_index.CARD: str(error)})
