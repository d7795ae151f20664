"""Several tasks in one base model, whose weights are exchanged in place."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

import torch
from torch import Tensor

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.fit import check_fit
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.reference import listed, task_name
from hf_tsv.checkpoints.sources import Access, open_sources
from hf_tsv.linalg.choices import AnyDevice, AnyDtype
from hf_tsv.linalg.updates import TaskSingularVectors, Update
from hf_tsv.models import building
from hf_tsv.models.building import Found
from hf_tsv.system.errors import CheckpointError, RecipeError, public
from hf_tsv.system.progress import visible_by_default
from hf_tsv.system.text import one_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


Keep = Literal["memory", "disk"]


class TaskSwitcher:
    """Base model in memory whose weights become those of one task after another.

    [`activate`] writes W0 + U diag(σ) Vh into the model's own parameters, in their dtype;
    [`deactivate`] restores W0 bit for bit. Both hold a lock, so several threads may call them. A
    forward pass at the same time would see weights of two tasks, so callers must not overlap them.
    W0 is read again from the checkpoint `base`; without it a copy is kept of every weight that a
    task changes.

    `tasks["a"]` activates a task and is the model; `len`, `in`, iteration and `keys()` are about
    the names. A `with` block ends with the base model. Whoever knows PEFT: [`activate`] is
    `set_adapter`, [`deactivate`] `disable_adapters`, `active` `active_adapter`.

    Example:
        >>> with TaskSwitcher.from_pretrained(["me/a-tsv", "me/b-tsv"]) as tasks:  # doctest: +SKIP
        ...     tasks["a"].get_image_features(pixel_values)
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tasks: Mapping[str, Mapping[str, Update]],
        model_class: str,
        base: Checkpoint | None = None,
    ) -> None:
        self.model = model
        self.active: str | None = None
        parameters = dict(model.named_parameters())
        changed = dict.fromkeys(name for updates in tasks.values() for name in updates)
        self._parameters = {
            name: parameters[str(layout.name_in_class(name, model_class))] for name in changed
        }
        self._tasks = {
            task: {name: self._prepared(name, update) for name, update in updates.items()}
            for task, updates in tasks.items()
        }
        self._base = base
        kept = {} if base else self._parameters
        self._copies = {name: parameter.detach().clone() for name, parameter in kept.items()}
        self._touched: set[str] = set()
        self._lock = threading.RLock()

    @classmethod
    @public
    def from_pretrained(  # noqa: PLR0913  (what users may ask for)
        cls,
        references: Sequence[str | PathLike[str]] | Mapping[str, str | PathLike[str]],
        *,
        base_model: str | PathLike[str] | None = None,
        model_class: str | None = None,
        keep: Keep = "memory",
        dtype: AnyDtype | None = None,
        device: AnyDevice | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        progress: bool | None = None,
    ) -> TaskSwitcher:
        """Load the base model once, and the factors of every task.

        Args:
            references (`Sequence[str]` or `Mapping[str, str]`): task factors, with the names of the
                tasks; default names: those of the repositories, without `-tsv`.
            base_model (`str`, *optional*): default: the one the factors were made from.
            model_class (`str`, *optional*): for example `CLIPVisionModel`; default: that of the
                base model.
            keep (`str`): source of the restored W0: a copy in `"memory"` of what tasks change, or
                the base model's file on `"disk"`, slower and without the copy.
            dtype (`torch.dtype` or `str`, *optional*): default: that of the stored base.
            device (`str`, `int` or `torch.device`, *optional*): as in [`load_model`].
            token, cache_dir, progress: as in [`merge`].

        Raises:
            [`HfTsvError`]: not task factors, or of different base models.
        """
        named = _named(references)
        if keep not in ("memory", "disk"):
            raise RecipeError(f"`keep=` cannot be {keep!r}.", "Choose memory or disk.")
        sources = open_sources(
            [fspath(ref) for ref in named.values()],
            None if base_model is None else fspath(base_model),
            Access.of(token, cache_dir),
        )
        building.check_clip(sources.base)
        check_fit(sources.base, sources.inputs)
        show = visible_by_default() if progress is None else progress
        sources = sources.within_reach(visible=show)
        items, base = sources.inputs, sources.base
        model_class = model_class or layout.saved_class(base.model_config)
        if model_class not in layout.MODEL_CLASSES:
            raise RecipeError(
                f"There is no CLIP class {model_class!r}.",
                f"Choose {one_of(layout.MODEL_CLASSES)}.",
            )
        building.check_head(base, model_class)
        building.check_parts([base], model_class)
        digests: dict[str, str] = {}
        tasks = {
            name: _updates(item, base, model_class, digests)
            for name, item in zip(named, items, strict=True)
        }
        model = building.build(Found(base, base, model_class), dtype, device)
        switcher = cls(model, tasks, model_class, base if keep == "disk" else None)
        for item in items:
            item.pinned.files.close()
        return switcher

    @property
    def names(self) -> list[str]:
        """Names of the tasks."""
        return list(self._tasks)

    def keys(self) -> list[str]:
        """Names of the tasks, as those of a dictionary."""
        return self.names

    def __len__(self) -> int:
        return len(self._tasks)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tasks)

    def __getitem__(self, task: str) -> PreTrainedModel:
        """The model, with the weights of a task."""
        self.activate(task)
        return self.model

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.deactivate()

    def __repr__(self) -> str:
        return f"TaskSwitcher({type(self.model).__name__}, {self.names}, active={self.active!r})"

    @torch.no_grad()
    @public
    def activate(self, task: str) -> None:
        """Write the weights of a task, one of `names`, into the model."""
        if task not in self._tasks:
            raise RecipeError(f"There is no task {task!r}.", f"Choose {one_of(self.names)}.")
        with self._lock:
            if self.active == task:
                return
            self.active = None
            wanted = self._tasks[task]
            self._restore(self._touched - wanted.keys())
            for name, update in wanted.items():
                self._touched.add(name)
                _add(self._parameters[name].data, self._original(name), update)
            self.active = task

    @torch.no_grad()
    def deactivate(self) -> None:
        """Restore the weights of the base model, bit for bit."""
        with self._lock:
            self.active = None
            self._restore(set(self._touched))

    def _restore(self, names: set[str]) -> None:
        for name in names:
            self._parameters[name].data.copy_(self._original(name))
            self._touched.discard(name)

    def _original(self, name: str) -> Tensor:
        data = self._parameters[name].data  # not cached, because the model may have been moved
        original = self._copies[name] if self._base is None else self._base.read(name)
        return original.to(data.device, data.dtype)

    def _prepared(self, name: str, update: Update) -> Tensor | _Product:
        """Update on the device and in the dtype it is added in; σ is multiplied into U once."""
        data = self._parameters[name]
        dtype = torch.float32 if data.dtype.itemsize < 4 else data.dtype
        if isinstance(update, TaskSingularVectors):
            update = update.to(data.device).to(dtype)
            return _Product(update.U * update.S, update.Vh)
        return update.to(data.device, dtype)


@dataclass(frozen=True)
class _Product:
    """Product U diag(σ) Vh, with σ in the left factor."""

    left: Tensor
    right: Tensor

    def to(self, device: torch.device) -> _Product:
        return _Product(self.left.to(device), self.right.to(device))


def _add(target: Tensor, base: Tensor, update: Tensor | _Product) -> None:
    """Set target = W0 + update, without a temporary matrix where the dtypes agree."""
    update = update.to(target.device)  # a copy only if the model was moved
    if isinstance(update, _Product):
        if update.left.dtype == target.dtype:
            torch.addmm(base, update.left, update.right, out=target)
        else:
            target.copy_(torch.addmm(base.to(update.left.dtype), update.left, update.right))
    elif update.dtype == target.dtype:
        torch.add(base, update, out=target)
    else:
        target.copy_(base.to(update.dtype) + update)


def _updates(
    item: Task, base: Checkpoint, model_class: str, digests: dict[str, str]
) -> dict[str, Update]:
    """Updates of a task in a model class, after a check of the base; reads each weight once."""
    if item.description is None:
        raise CheckpointError(
            f"{item} is a {item.kind}, not task factors.", item.for_factors.format(item)
        )
    there = [name for name in item.tensors if layout.name_in_class(name, model_class) is not None]
    changes = ((name, item.change(base.original([name], digests=digests))) for name in there)
    return {name: change.update for name, change in changes if change is not None}


def _named(
    references: Sequence[str | PathLike[str]] | Mapping[str, str | PathLike[str]],
) -> dict[str, str | PathLike[str]]:
    if not references:
        raise RecipeError("There are no tasks to switch between.", "Name at least one.")
    if isinstance(references, Mapping):
        return dict(references)
    named: dict[str, str | PathLike[str]] = {}
    for reference in listed(references):
        name = task_name(reference)
        if name in named:
            raise RecipeError(
                f"{named[name]} and {reference} are both called {name!r}.",
                "Give names: TaskSwitcher.from_pretrained({'a': …, 'b': …}).",
            )
        named[name] = reference
    return named
