"""`hf_tsv_routing.json`: the tasks beside a merge and how images are routed to them, checked.

The format is specified in docs/routing.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from hf_tsv.checkpoints.formats.description import Entry, Origin, origin_of
from hf_tsv.checkpoints.names import CLASSES_FILE, ROUTING_FILE, TASKS_FOLDER
from hf_tsv.checkpoints.reference import PinnedCheckpoint, at_revision
from hf_tsv.checkpoints.storage.files import inside_folder, read_json
from hf_tsv.checkpoints.storage.headers import read_header
from hf_tsv.checkpoints.storage.tensors import read_tensor
from hf_tsv.routing.rule import LAYER, Rule
from hf_tsv.system.errors import CheckpointError, UsageError
from hf_tsv.system.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = "hf-tsv routing"
FORMAT_VERSION = 1
CLASSES = ".classes"
"""End of the names of tensors that hold embeddings of class names, after that of the task."""

MOST_TASKS, MOST_LAYERS, MOST_CLASSES, LONGEST_NAME = 1000, 10_000, 100_000, 200
NAME = re.compile(r"[\w-][\w.-]*")
AGAIN = "Download it again, or make it again with `hf-tsv route`."


@dataclass(frozen=True)
class RoutedTask:
    """Task of a merge: its name, where its factors are, and what they were made from.

    They are in a folder beside the merge, or in a repository of their own, at a commit. `classes`
    are the names of its classes, if they are known.
    """

    name: str
    folder: str | None
    source: Origin
    classes: tuple[str, ...] = ()
    factors: Origin | None = None

    def reference(self, pinned: PinnedCheckpoint) -> str:
        """Reference to its factors, for a merge that is pinned."""
        if self.factors is not None:
            return f"hf://{at_revision(self.factors.ref, self.factors.revision)}"
        if pinned.is_local:
            return f"{pinned.ref.rstrip('/')}/{self.folder}"
        return f"hf://{at_revision(f'{pinned.ref}/{self.folder}', pinned.revision)}"


@dataclass(frozen=True)
class Routing:
    """Tasks beside a merge, of one base model, and the rule that images are routed by."""

    base_model: Origin
    tasks: tuple[RoutedTask, ...]
    rule: Rule

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tasks."""
        return tuple(task.name for task in self.tasks)

    def to_json(self) -> str:
        """Content of the file."""
        content = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "hf_tsv_version": __version__,
            "base_model": _entry(self.base_model),
            "tasks": [_told(task) for task in self.tasks],
            "rule": {**vars(self.rule), "layers": list(self.rule.layers)},
        }
        return json.dumps(content, indent=2, ensure_ascii=False) + "\n"

    @staticmethod
    def from_dict(content: Mapping[str, Any], owner: str) -> Routing:
        """Parse and check the content of the file, whose owner errors name.

        Raises:
            [`CheckpointError`]: another format, a newer version, or a malformed entry.
        """
        version = content.get("format_version")
        if content.get("format") != FORMAT or type(version) is not int or version < 1:
            raise CheckpointError(f"{owner}: {ROUTING_FILE} does not describe routing.", AGAIN)
        if version > FORMAT_VERSION:
            said = f"has format version {version} and this hf-tsv reads up to {FORMAT_VERSION}."
            raise CheckpointError(f"{owner}: {ROUTING_FILE} {said}", "Update hf-tsv.")
        entry = Entry(content, owner, file=ROUTING_FILE, again=AGAIN)
        listed = entry.get("tasks", _are_objects)
        tasks = tuple(
            _task(Entry(task, owner, f"tasks.{i}.", ROUTING_FILE, AGAIN))
            for i, task in enumerate(listed)
        )
        for every in ([t.name for t in tasks], [t.folder for t in tasks if t.folder]):
            if len({one.lower() for one in every}) < len(every):
                problem = f"{owner}: two tasks in {ROUTING_FILE} have one name or folder."
                raise CheckpointError(problem, AGAIN)
        base = origin_of(entry.object("base_model"))
        return Routing(base, tasks, _rule(entry.object("rule")))


def open_routing(pinned: PinnedCheckpoint) -> Routing | None:
    """Read how a merge routes images; None for anything that does not."""
    if pinned.files.size(ROUTING_FILE) is None:
        return None
    return Routing.from_dict(read_json(pinned.files, ROUTING_FILE, str(pinned)), str(pinned))


def class_embeddings(
    pinned: PinnedCheckpoint, routing: Routing, width: int | None = None
) -> dict[str, Tensor]:
    """Embeddings of the class names, shape (classes, width), by task; of those that have some.

    Raises:
        [`CheckpointError`]: the file is missing or damaged, or is not of these classes.
    """
    wanted = [task for task in routing.tasks if task.classes]
    if not wanted:
        return {}
    infos = read_header(pinned.files, CLASSES_FILE, str(pinned))
    found = {}
    for task in wanted:
        info = infos.get(f"{task.name}{CLASSES}")
        wide = width or (info.shape[-1] if info and info.shape else 0)
        if info is None or tuple(info.shape) != (len(task.classes), wide):
            problem = f"{pinned}: {CLASSES_FILE} does not have the classes of {task.name}."
            raise CheckpointError(problem, AGAIN)
        found[task.name] = read_tensor(pinned.files, info, task.name, str(pinned))
    return found


def folder_of(name: str) -> str:
    """Folder of a task's factors, in that of the merge."""
    return f"{TASKS_FOLDER}/{name}"


def _entry(origin: Origin) -> dict[str, str | None]:
    return {"ref": origin.ref, "revision": origin.revision}


def _told(task: RoutedTask) -> dict[str, Any]:
    """Entry of a task."""
    there = {"folder": task.folder} if task.factors is None else {"factors": _entry(task.factors)}
    told = {"name": task.name, **there, "source": _entry(task.source)}
    return told | ({"classes": list(task.classes)} if task.classes else {})


def _task(entry: Entry) -> RoutedTask:
    name = entry.get("name", _is_name)
    classes = tuple(entry.get("classes", _are_classes) or ())
    source, folder, factors = origin_of(entry.object("source")), None, None
    if "factors" in entry.content:
        there = entry.object("factors")
        factors = origin_of(there)
        there.get("revision", bool)  # a repository, not a folder of some machine
    else:
        folder = entry.get("folder", _is_folder)
    return RoutedTask(name, folder, source, classes, factors)


def _are_objects(value: Any) -> bool:
    """Tell whether a value is a list of objects, one for each of several tasks."""
    fits = isinstance(value, list) and 2 <= len(value) <= MOST_TASKS
    return fits and all(isinstance(one, dict) for one in value)


def _are_classes(value: Any) -> bool:
    """Tell whether a value is a list of names of classes; none is one too."""
    if value is None:
        return True
    fits = isinstance(value, list) and 1 <= len(value) <= MOST_CLASSES
    return fits and all(isinstance(one, str) and one.strip() for one in value)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_NAME and bool(NAME.fullmatch(value))


def _is_folder(value: Any) -> bool:
    """Tell whether a folder is one directly in that of the tasks."""
    parts = PurePosixPath(value).parts if inside_folder(value) else ()
    return len(parts) == 2 and parts[0] == TASKS_FOLDER and _is_name(parts[1])


def _rule(entry: Entry) -> Rule:
    layers = entry.get("layers", _are_layers)
    numbers = {
        name: entry.get(name, lambda value: type(value) in (int, float))
        for name in ("temperature", "threshold", "max_tasks", "label_temperature")
    }
    try:
        return Rule(tuple(layers), **numbers)
    except UsageError as error:
        said = error.message.replace("`", "").replace("=", "")
        raise CheckpointError(f"{entry.owner}: in {entry.file} {said}", entry.again) from None


def _are_layers(value: Any) -> bool:
    if not isinstance(value, list) or not 1 <= len(value) <= MOST_LAYERS:
        return False
    return all(isinstance(v, str) and LAYER.fullmatch(v) for v in value) and (
        len(set(value)) == len(value)
    )
