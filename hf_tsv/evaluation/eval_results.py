"""Results as `.eval_results/*.yaml`: the form from which the Hub shows them on a model's page.

An entry names a data set of the Hub and one of its tasks. `notes` say in short what the format has
no field for: configuration, split, number of images, prompts and fine-tune. There is no `source`:
the numbers are published nowhere else.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import (
    EvalResultEntry,
    constants,
    eval_result_entries_to_yaml,
    parse_eval_result_entries,
)

from hf_tsv import hub
from hf_tsv.recipes.images import EvaluationTask
from hf_tsv.system.errors import OutputError, RepoError
from hf_tsv.system.folders import local_kind
from hf_tsv.system.progress import logger
from hf_tsv.system.text import counted, one_line
from hf_tsv.system.untrusted import parse_yaml
from hf_tsv.system.version import __version__

FOLDER = constants.EVAL_RESULTS_FOLDER
DIGITS = 4  # of an accuracy
DEFINITION = "eval.yaml"  # file in which a data set that is a benchmark defines its tasks
DEFINITION_BYTES = 1_000_000
TASK = "default"  # id of the only task of a data set that defines none; also a configuration
LONGEST_NAME = 60  # characters of a task's name that are kept in the name of its file
LONGEST_TEXT = 200  # characters of a name in a note
SHA = re.compile(r"[0-9a-f]{40}")
ANY = EvalResultEntry("org/name", TASK, 0.0)
"""Entry to find out whether a file can take one."""

BROKEN = (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
          ValueError)  # fmt: skip
"""Errors that YAML of another form raises, here or in the client."""


def path_of(task: str) -> str:
    """Path of a task's file in a repository, valid in every file system and always the same.

    Example:
        >>> path_of("sun397"), path_of("My pets")
        ('.eval_results/hf-tsv-sun397.yaml', '.eval_results/hf-tsv-my-pets-c165724d.yaml')
    """
    plain = re.sub(r"[^a-z0-9_]+", "-", task.lower())[:LONGEST_NAME].strip("-")
    if plain != task:  # others may be spelled alike
        plain = f"{plain}-{hashlib.sha256(task.encode()).hexdigest()[:8]}".lstrip("-")
    return f"{FOLDER}/hf-tsv-{plain}.yaml"


def is_nameable(dataset: str) -> bool:
    """Tell whether a data set is a repository on the Hub, as `org/name`."""
    return dataset.count("/") == 1 and not EvaluationTask("any", dataset).is_local


def reference_of(found: Mapping[str, Any]) -> str | None:
    """Fine-tune that a result is compared with, as it may be published."""
    if "reference" not in found:
        return None
    ref = str(found["reference"]["ref"])
    return ref if local_kind(ref) is None else Path(ref).expanduser().name


def entry_of(found: Mapping[str, Any], task_id: str, date: str) -> EvalResultEntry:
    """Entry for the result of a task on a data set of the Hub; the date is that of the run."""
    revision = str(found["revision"])
    return EvalResultEntry(
        dataset_id=found["dataset"],
        task_id=task_id,
        value=round(found["accuracy"], DIGITS),
        dataset_revision=revision if SHA.fullmatch(revision) else None,
        date=date,
        notes="; ".join(part.replace(";", ",") for part in _notes(found)),
    )


def _notes(found: Mapping[str, Any]) -> list[str]:
    """Facts about a result; the first one says which images were classified."""

    def short(text: object) -> str:
        return one_line(str(text))[:LONGEST_TEXT]

    images = [f"config {short(found['config'])}"] if found["config"] else []
    images += [f"split {short(found['split'])}"]
    if found["images"] < found["total"]:
        images += [f"{counted(found['images'], 'image')} drawn at random"]
    prompts = list(found.get("templates", ()))
    prompt = f'prompt "{short(prompts[0])}"' if len(prompts) == 1 else f"{len(prompts)} prompts"
    notes = [", ".join(images), f"{counted(found['total'], 'image')} in all"]
    notes += ["zero-shot top-1 accuracy" + (f" with {prompt}" if prompts else "")]
    if own := reference_of(found):
        notes += [f"fine-tune {short(own)}: {found['reference']['accuracy']:.1%}"]
    if "normalised" in found:
        notes[-1] += f", of which {found['normalised']:.1%} is kept"
    return [*notes, f"hf-tsv {__version__}"]


def texts(
    tasks: Mapping[str, Mapping[str, Any]],
    before: Mapping[str, str],
    date: str,
    *,
    token: str | None = None,
    cache_dir: str | None = None,
) -> dict[str, str]:
    """New text of the file of each task whose data set the Hub can name; `before` has old ones.

    A line says why a result on a data set of the Hub has no entry.
    """
    changed: dict[str, str] = {}
    for name, found in tasks.items():
        if not is_nameable(found["dataset"]):
            continue
        try:
            task_id = _task_id(found, token, cache_dir)
        except RepoError as error:
            said = "The result of %s is in the card alone, and not in %s: %s"
            logger.warning(said, name, FOLDER, error.message)
            continue
        path = path_of(name)
        old = changed.get(path, before.get(path, ""))
        changed[path] = with_entry(old, entry_of(found, task_id, date), path)
    return changed


def _task_id(found: Mapping[str, Any], token: str | None, cache_dir: str | None) -> str:
    """Id of a result's task in its data set, as the data set defines it."""
    dataset, config, split = found["dataset"], found["config"], found["split"]
    raw = hub.dataset_file(
        dataset, DEFINITION, found["revision"], most=DEFINITION_BYTES, token=token,
        cache_dir=cache_dir,
    )  # fmt: skip
    if raw is None:
        return config or TASK
    try:
        defined = parse_yaml(raw.decode())["tasks"]
        matching = [
            task["id"]
            for task in defined
            if task.get("split", split) == split and config in (None, task.get("config", TASK))
        ]
        if matching and isinstance(matching[0], str) and 0 < len(matching[0]) < LONGEST_TEXT:
            return matching[0]
    except BROKEN:
        raise RepoError(f"{DEFINITION} of {dataset} defines no tasks.") from None
    of = f"configuration {config}, split {split}" if config else f"split {split}"
    raise RepoError(f"{DEFINITION} of {dataset} defines no task for the {of}.")


def with_entry(text: str, entry: EvalResultEntry, path: str) -> str:
    """Text of a file with a new entry, which replaces an earlier one of the same images.

    Raises:
        [`OutputError`]: the text is no list of entries; the message names `path`.
    """
    try:
        found = parse_yaml(text)
        data = [] if found is None else found
        kept = [
            item
            for item, known in zip(data, _entries(data), strict=True)
            if _images(known) != _images(entry)
        ]
        wanted = [*kept, *eval_result_entries_to_yaml([entry])]
        written = yaml.safe_dump(wanted, sort_keys=False, allow_unicode=True, width=10_000)
        if parse_yaml(written) != wanted:
            raise ValueError
    except BROKEN:
        said = f"{path} is no list of evaluation results."
        raise OutputError(said, "Repair or delete it.") from None
    return written


def _entries(data: Any) -> Sequence[EvalResultEntry]:
    """Entries as the client reads them, which passes over those with an error."""
    if not isinstance(data, list) or any("error" in item for item in data):
        raise ValueError
    return parse_eval_result_entries(data)


def _images(entry: EvalResultEntry) -> tuple[object, ...]:
    """Key that is equal for results of the same task and data, whatever the data's commit."""
    return entry.dataset_id, entry.task_id, str(entry.notes or "").partition(";")[0]
