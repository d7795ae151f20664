"""Settings of a merge, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

from hf_tsv.checkpoints.names import Format
from hf_tsv.linalg.choices import Dtype as Dtype  # noqa: PLC0414
from hf_tsv.linalg.choices import LayerScale, Orthogonalizer, Precision, WudiFilter
from hf_tsv.methods.catalogue import METHODS, Method
from hf_tsv.recipes.scaling import checked_scale
from hf_tsv.system.checks import argument, check_counts, check_number, choice, size_in_bytes
from hf_tsv.system.errors import UsageError
from hf_tsv.system.text import shortened
from hf_tsv.system.version import __version__

Qkv = Literal["split", "fused"]

AVERAGED_BY_DEFAULT = ("text_projection.weight",)
"""The paper's code averages the text projection although it is a matrix; so do we."""


def share(name: str, value: float | None) -> float | None:
    """Plain number of what may be a whole one or NumPy's, refused outside of (0, 1]."""
    if value is None:
        return None
    check_number(name, value)
    if not 0 < value <= 1:
        raise UsageError(f"{argument(name)} must be above 0 and at most 1 (got {float(value):g}).")
    return float(value)


def refuse_one_alone(checkpoints: Sequence[object]) -> None:
    """Refuse to compare fewer than two tasks."""
    if len(checkpoints) < 2:
        problem = f"Task interference compares tasks, and there is {len(checkpoints) or 'none'}."
        raise UsageError(problem, "Name at least two checkpoints.")


def refuse_no_report(settings: Settings) -> None:
    """Refuse to report on the interference of a method that has no singular vectors."""
    if settings.row.vectors is None:
        problem = f"The method {settings.method} uses no singular vectors, so it has no report."
        raise UsageError(problem, "Omit `report=True`, or use `hf-tsv interference`.")


def steps_of(settings: Mapping[str, Any]) -> list[str]:
    """Steps besides the method, and its own choices, as parts of a sentence.

    Example:
        >>> steps_of({"calibrate": True, "layer_scale": "none"})
        ['singular values calibrated']
    """
    said = [f"filter {settings['wudi_filter']}"] if settings.get("wudi_filter") else []
    said += ["singular values calibrated"] if settings.get("calibrate") else []
    scales = {"lines": "layers scaled by depth (LiNeS)", "larv": "tasks scaled by layer (LARV)"}
    scale = scales.get(settings.get("layer_scale", "none"))
    return [*said, scale] if scale else said


def current_versions() -> dict[str, str]:
    """Versions that decide about the bytes of a result."""
    return dict(_versions())


@cache
def _versions() -> tuple[tuple[str, str], ...]:
    from importlib.metadata import version  # which takes long to import

    names = ("torch", "numpy", "scipy")
    return ("hf_tsv", __version__), *((name, version(name)) for name in names)


def versions_of(method: Method) -> dict[str, str]:
    """Versions that decide about the bytes of a merge: also of the package that has its method."""
    package, _, release = method.package.partition("==")
    return {**current_versions(), **({package: release} if package else {})}


@dataclass(frozen=True)
class Settings:
    """Choices of a merge, checked: arguments of `hf_tsv.merge` that a recipe holds.

    Without `qkv`, `dtype` and `out_format` the result is like the base model; without `alpha` it is
    the method's own.
    """

    method: str = "tsv"
    orthogonalizer: Orthogonalizer = "procrustes"
    alpha: float = None  # type: ignore[assignment]  # a number once it is made
    rank: int | None = None
    rank_fraction: float | None = None
    exclude: tuple[str, ...] = AVERAGED_BY_DEFAULT
    qkv: Qkv | None = None
    dtype: Dtype | None = None
    max_shard_size: int | str = "5GB"
    precision: Precision = "fast"
    out_format: Format | None = None
    keep_heads: bool = False
    layer_scale: LayerScale = "none"
    calibrate: bool = False
    wudi_filter: WudiFilter | None = None
    scale: dict[str, float] = field(default_factory=dict)
    keep_base: tuple[str, ...] = ()

    @property
    def row(self) -> Method:
        """Row of the method in the catalogue."""
        return METHODS[self.method]

    def __post_init__(self) -> None:
        for name, allowed in {
            "method": tuple(METHODS),
            "orthogonalizer": get_args(Orthogonalizer),
            "precision": get_args(Precision),
            "qkv": (None, *get_args(Qkv)),
            "out_format": (None, *get_args(Format)),
            "dtype": (None, *get_args(Dtype)),
            "layer_scale": get_args(LayerScale),
            "wudi_filter": (None, *get_args(WudiFilter)),
        }.items():
            object.__setattr__(self, name, choice(name, getattr(self, name), allowed))
        if self.alpha is None:
            object.__setattr__(self, "alpha", 1.0 if self.row.alpha is None else self.row.alpha)
        check_number("alpha", self.alpha)
        object.__setattr__(self, "alpha", float(self.alpha))  # of NumPy or a whole number
        if self.row.alpha is None and self.alpha != 1:
            raise UsageError(f"The method {self.method} has no α.", "Omit `alpha=`.")
        ranked = self.rank is not None or self.rank_fraction is not None
        # Plain sums and means have always ignored them: older recipes may hold some.
        if ranked and self.row.ranks is None and self.row.of in ("matrices", "entries"):
            why = f"The method {self.method} has no rank."
            raise UsageError(why, "Omit `rank=` and `rank_fraction=`.")
        if self.rank is not None and self.rank_fraction is not None:
            raise UsageError(
                "`rank=` and `rank_fraction=` cannot be combined.", "Give one of them."
            )
        check_counts(rank=self.rank)
        object.__setattr__(self, "rank_fraction", share("rank_fraction", self.rank_fraction))
        for name in ("exclude", "keep_base"):
            globs: object = getattr(self, name)
            if not isinstance(globs, list | tuple) or not all(isinstance(g, str) for g in globs):
                said = (
                    f"{argument(name)} must be a list of names or globs (got {shortened(globs)})."
                )
                raise UsageError(said)
            object.__setattr__(self, name, tuple(globs))
        object.__setattr__(self, "scale", checked_scale(self.scale))
        if self.row.alpha is None and any(":" not in key for key in self.scale):
            why = f"The method {self.method} has no α to scale."
            raise UsageError(why, "Name a task: `scale=TASK:GLOB=FACTOR`.")
        size_in_bytes(self.max_shard_size, name="max_shard_size")
        for name in ("keep_heads", "calibrate"):
            if type(value := getattr(self, name)) is not bool:
                raise UsageError(
                    f"{argument(name)} must be true or false (got {shortened(value)})."
                )
        self._refuse_steps()

    def _refuse_steps(self) -> None:
        """Refuse what is done besides the rule of the method where it has no meaning."""
        for name in {option for row in METHODS.values() for option in row.options}:
            if getattr(self, name, None) is not None and name not in self.row.options:
                problem = f"{argument(name)} is no choice of the method {self.method}."
                raise UsageError(problem, "Omit it.")
        if self.calibrate and self.row.calibrates is None:
            able = ", ".join(name for name, row in METHODS.items() if row.calibrates)
            problem = f"The method {self.method} cannot be calibrated."
            raise UsageError(problem, f"Omit `calibrate=True`, or use one of: {able}.")
        if self.layer_scale != "none" and (self.row.learns or self.row.beside):
            problem = f"The method {self.method} scales no layers."
            raise UsageError(problem, "Omit `layer_scale=`.")
