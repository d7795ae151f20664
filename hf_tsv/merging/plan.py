"""Treatment of each weight, decided from headers alone, before anything is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import prod
from typing import Literal, get_args

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.fit import check_fit, config_warnings
from hf_tsv.checkpoints.formats import open_clip
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.storage.dtypes import DTYPES_OF_TORCH
from hf_tsv.checkpoints.storage.tensors import TensorInfo, TensorSpec
from hf_tsv.checkpoints.storage.writer import ShardPlan, plan_shards
from hf_tsv.linalg.shapes import default_rank, rank_at
from hf_tsv.recipes.scaling import kept
from hf_tsv.recipes.settings import AVERAGED_BY_DEFAULT, Qkv, Settings
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import counted

NEGLIGIBLE_ENERGY = 0.01
"""Share of an update's squared norm that is too small to warn of."""

Treatment = Literal["decomposed", "averaged", "summed", "combined", "copied"]
"""`combined`: entry by entry, of all tasks at once."""

KEPT = "kept from the base"
"""Reason of a weight that is copied because the user says so."""


@dataclass(frozen=True)
class Weight:
    """One unit of work: a tensor, or the stacked q, k, v projections of one attention.

    Args:
        names (`tuple[str, ...]`): canonical names, stacked along dimension 0 when several.
        shape (`tuple[int, ...]`): shape of the stack.
        reason (`str`): why it is not decomposed; empty otherwise.
        rank (`int`): triplets kept of each task; 0 unless decomposed.
        inputs (`tuple[int, ...]`): which checkpoints hold it.
        forms (`str`, *optional*): matrices that the method forms besides, see [`Method`].
        calibrated (`bool`): singular values of the merged update are calibrated by the tasks.
        surveyed (`bool`): each task is scaled by what is measured of its update.
        alpha_factor (`float`): factor of α in this weight.
        task_factors (`tuple[float, ...]`): factor of the update of every checkpoint in this
            weight, beside its factor in all weights; empty if all are 1.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    treatment: Treatment
    reason: str = ""
    rank: int = 0
    inputs: tuple[int, ...] = ()
    forms: str | None = None
    calibrated: bool = False
    surveyed: bool = False
    alpha_factor: float = 1.0
    task_factors: tuple[float, ...] = ()

    @property
    def together(self) -> bool:
        """Tell whether the updates of all tasks are needed at once."""
        return self.treatment in ("decomposed", "combined") or self.calibrated

    def factor_of(self, task: int) -> float:
        """Factor of the update of a checkpoint in this weight."""
        return self.task_factors[task] if self.task_factors else 1.0

    @property
    def is_kept(self) -> bool:
        """Tell whether it is copied although checkpoints may have changed it."""
        return self.reason == KEPT

    @property
    def label(self) -> str:
        """Its name; stacked projections share one."""
        if len(self.names) == 1:
            return self.names[0]
        return self.names[0].replace("q_proj", "{q,k,v}_proj")


@dataclass(frozen=True)
class MergePlan:
    """Everything that is known before the first weight is read.

    Weights are in the order of the work; `specs` has every output tensor, `shards` their files.
    """

    weights: tuple[Weight, ...]
    shards: ShardPlan
    specs: dict[str, TensorSpec]
    warnings: tuple[str, ...]

    def counts(self, frozen: frozenset[str] = frozenset()) -> dict[str, int]:
        """Tensors per treatment; those in `frozen` turned out unchanged and were copied.

        Sums and entries that are combined are counted only where the method has them.
        """
        count: Counter[str] = Counter()
        for weight in self.weights:
            treatment = "copied" if weight.label in frozen else weight.treatment
            count[treatment] += len(weight.names)
        always = ("decomposed", "averaged", "copied")
        return {t: count[t] for t in get_args(Treatment) if t in always or count[t]}


def make_plan(base: Checkpoint, inputs: Sequence[Task], settings: Settings) -> MergePlan:
    """Compare all headers and choose a treatment for every tensor of the base.

    Raises:
        [`CheckpointError`]: weights missing, extra or of another shape; all are listed.
    """
    check_fit(base, inputs)
    written = list(base.tensors)
    if settings.out_format == "open_clip":
        written = [name for name in written if not name.endswith(layout.BUFFER)]
    groups = _group(written, settings.qkv)
    weights = tuple(_treat(names, base, inputs, settings) for names in groups)
    specs = {name: spec_of(base.tensors[name], settings) for name in written}
    warnings = [*config_warnings(base, inputs), *_rank_warnings(weights, len(inputs), settings)]
    warnings += _exclude_warnings(base, settings)
    if len(inputs) > 1:  # one task alone is reconstructed, not merged
        warnings += _energy_warnings(weights, inputs)
    return MergePlan(weights, lay_out(specs, base, settings), specs, tuple(warnings))


def lay_out(specs: dict[str, TensorSpec], base: Checkpoint, settings: Settings) -> ShardPlan:
    """Files of the output, for tensors by canonical name."""
    if settings.out_format != "open_clip":
        return plan_shards(specs, settings.max_shard_size)
    if not layout.is_full_model(base.tensors):
        problem = f"The base model {base} is one tower, and OpenCLIP stores whole models."
        raise CheckpointError(problem, "Omit `out_format=`.")
    placed = open_clip.placed(specs)
    return plan_shards(specs, settings.max_shard_size, open_clip.SINGLE_FILE, placed)


def resolved(base: Task, settings: Settings) -> Settings:
    """Settings with what depends on the base model: its format, and how it stores attention."""
    qkv: Qkv = settings.qkv or ("fused" if base.format == "open_clip" else "split")
    return replace(settings, qkv=qkv, out_format=settings.out_format or base.format)


def treatments(task: Task, settings: Settings) -> tuple[Weight, ...]:
    """Plan of a merge for every tensor of a base model or fine-tune, as far as its headers say."""
    settings = resolved(task, settings)
    groups = _group(task.tensors, settings.qkv)
    return tuple(_treat(names, task, [task], settings) for names in groups)


def _group(tensors: Iterable[str], qkv: str | None) -> list[tuple[str, ...]]:
    """Names in order, with the q, k, v weights of an attention together when they are fused."""
    names = sorted(tensors)
    if qkv != "fused":
        return [(name,) for name in names]
    present = set(names)
    groups: list[tuple[str, ...]] = []
    for name in names:
        attention, letter = layout.qkv_group(name) or ("", "")
        stack = tuple(f"{attention}.{part}_proj.weight" for part in "qkv")
        if not letter or not present.issuperset(stack):
            groups.append((name,))
        elif letter == "q":
            groups.append(stack)
    return groups


def _treat(
    names: tuple[str, ...], base: Task, inputs: Sequence[Task], settings: Settings
) -> Weight:
    infos = [base.tensors[name] for name in names]
    shape = infos[0].shape
    if len(infos) > 1:
        shape = (sum(info.shape[0] for info in infos), *shape[1:])
    holders = tuple(i for i, item in enumerate(inputs) if any(n in item.tensors for n in names))

    def weight(treatment: Treatment, reason: str = "", rank: int = 0) -> Weight:
        forms = settings.row.forms if treatment == "decomposed" else None
        merged = treatment == settings.row.treatment and len(shape) == 2
        # of tables of positions no singular value is calibrated, as in the authors' code
        calibrated = settings.calibrate and merged and "embedding" not in names[0]
        surveyed = settings.layer_scale == "larv" and merged
        return Weight(names, shape, treatment, reason, rank, holders, forms, calibrated, surveyed)

    if not infos[0].dtype.is_floating_point:
        return weight("copied", "not a floating-point tensor")
    if not holders:
        return weight("copied", "no checkpoint has it")
    if not prod(shape):
        return weight("copied", "empty")
    if kept(names, settings.keep_base):
        return weight("copied", KEPT)
    method = settings.row
    if method.of == "mean":
        return weight(method.treatment)
    # The default exclusion says what is not decomposed; others decompose nothing.
    default = method.of != "matrices" and settings.exclude == AVERAGED_BY_DEFAULT
    exclude = () if default else settings.exclude
    if any(fnmatchcase(name, glob) for name in names for glob in exclude):
        return weight("averaged", "excluded")
    if method.of != "matrices":
        return weight(method.treatment)
    if len(shape) != 2:
        return weight("averaged", "not a matrix")
    if (tasks := len(inputs)) > min(shape) and method.ranks in ("share", "free"):
        return weight(
            "averaged",
            f"{counted(tasks, 'task')} do not fit into {counted(min(shape), 'direction')}",
        )
    return weight(method.treatment, rank=_rank(shape, tasks, settings))


def _rank(shape: tuple[int, ...], tasks: int, settings: Settings) -> int:
    if settings.row.ranks == "all":
        return min(shape)
    wanted = _wanted_rank(shape, tasks, settings)
    # T·r orthonormal directions must fit into k
    return min(wanted, default_rank(shape, tasks)) if settings.row.ranks == "share" else wanted


def _wanted_rank(shape: tuple[int, ...], tasks: int, settings: Settings) -> int:
    if settings.rank is not None:
        return min(settings.rank, *shape)
    if settings.rank_fraction is not None:
        return rank_at(settings.rank_fraction, shape)
    return default_rank(shape, tasks)


def spec_of(info: TensorInfo, settings: Settings) -> TensorSpec:
    """Data type and shape of a tensor in the output."""
    wanted = settings.dtype if info.dtype.is_floating_point else None
    return TensorSpec(DTYPES_OF_TORCH[wanted] if wanted else info.dtype, info.shape)


def _rank_warnings(weights: Sequence[Weight], tasks: int, settings: Settings) -> Iterator[str]:
    chosen = settings.rank is not None or settings.rank_fraction is not None
    if settings.row.ranks != "share" or not chosen:
        return
    decomposed = [weight for weight in weights if weight.treatment == "decomposed"]
    if lowered := sum(w.rank < _wanted_rank(w.shape, tasks, settings) for w in decomposed):
        yield (
            f"The rank was lowered to ⌊k/{tasks}⌋ in {counted(lowered, 'weight')}: more"
            f" directions of {counted(tasks, 'task')} cannot be orthogonal."
        )


def _exclude_warnings(base: Checkpoint, settings: Settings) -> list[str]:
    return [
        f"`exclude={glob}` matches no weight."
        for glob in settings.exclude
        if glob not in AVERAGED_BY_DEFAULT
        and not any(fnmatchcase(name, glob) for name in base.tensors)
    ]


def _energy_warnings(weights: Sequence[Weight], inputs: Sequence[Task]) -> Iterator[str]:
    """Warning of factors that keep fewer triplets than this merge uses."""
    short: dict[str, float] = {}
    for i, item in enumerate(inputs):
        missing, total = 0.0, 0.0
        for weight in weights:
            alone = weight.treatment == "decomposed" and len(weight.names) == 1
            for name in weight.names if i in weight.inputs else ():
                lost, energy = item.missing_energy(name, weight.rank if alone else None)
                total += energy
                missing += lost
        if missing > NEGLIGIBLE_ENERGY * total:
            short[str(item)] = missing / total
    if short:
        said = [f"{name} ({100 * share:.2g}%" for name, share in short.items()]
        yield (
            f"Task factors with fewer singular vectors than this merge uses: {said[0]} of the"
            f" energy of its update is missing){''.join(f', {one})' for one in said[1:])}."
            " Compress with a larger rank for the exact merge."
        )
