"""Errors against float64, of the merge of one weight for all spectra, and of merged files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.speed import exact, plain
from benchmarks.speed.synthetic import SPECTRA, WEIGHT_RMS, Spectrum, Zoo, updates
from hf_tsv.linalg import products
from hf_tsv.linalg.updates import storage_noise
from hf_tsv.methods import tsv
from hf_tsv.methods.rules import MergedUpdate, Updates

SHAPE = (768, 768)
TASKS = (8, 20)


@dataclass(frozen=True)
class Errors:
    """Relative Frobenius errors of one merged update.

    Args:
        plain: error of the plain algorithm in float32.
        ours: error of hf-tsv.
    """

    plain: float
    ours: float


@dataclass(frozen=True)
class SpectrumErrors(Errors):
    """Relative Frobenius errors for one spectrum.

    Args:
        spectrum: name in `SPECTRA`.
        tasks: number of tasks.
        ranks: least and most triplets that hf-tsv used of a task that changes something.
    """

    spectrum: str
    tasks: int
    ranks: tuple[int, int]


@dataclass(frozen=True)
class FileErrors(Errors):
    """Largest errors of the updates of sampled weights, and errors of whole files.

    Args:
        weights: names of the sample.
        plain_file: largest relative error of a sampled weight in the plain file, W0 included.
        ours_file: the same in hf-tsv's file.
        apart: largest relative difference of any tensor between the two files.
        agree: whether both files equal the float64 result up to rounding and the error of their
            updates.
    """

    weights: tuple[str, ...]
    plain_file: float
    ours_file: float
    apart: float
    agree: bool


def merged(
    deltas: Sequence[Tensor], rank: int, floors: Sequence[float], device: str
) -> MergedUpdate:
    """Merge updates by hf-tsv as a merge does, without the tasks that change nothing."""
    changed = [(d.to(device), f) for d, f in zip(deltas, floors, strict=True) if d.any()]
    with products.threads():
        found, own = [d for d, _ in changed], [f for _, f in changed]
        tasks, shape = tuple(range(len(found))), tuple(found[0].shape)
        return tsv.orthogonal(Updates(found, own, tasks, shape, len(deltas), rank))


def spectrum_errors(
    name: str, tasks: int, shape: tuple[int, int] = SHAPE, device: str = "cpu"
) -> SpectrumErrors:
    """Measure the errors for a weight whose updates have a spectrum of `SPECTRA`."""
    rank = plain.rank_of(shape, tasks)
    with exact.one_thread_each():
        deltas, floors = _stored(SPECTRA[name], tasks, shape)
        expected = exact.merge(deltas, rank, floors)
        simple = plain.merge([delta.to(device) for delta in deltas], rank)
    ours = merged(deltas, rank, floors, device)
    return SpectrumErrors(
        exact.relative_error(simple, expected),
        exact.relative_error(ours.matrix, expected),
        name,
        tasks,
        (min(ours.ranks), max(ours.ranks)),
    )


def _stored(
    spectrum: Spectrum, tasks: int, shape: tuple[int, int]
) -> tuple[list[Tensor], list[float]]:
    """Updates as read from stored checkpoints, and their storage noise."""
    generator = torch.Generator().manual_seed(tasks)
    base = (torch.randn(shape, generator=generator) * WEIGHT_RMS).to(spectrum.dtype)
    drawn = updates(shape, tasks, spectrum, generator)
    stored = [(base.float() + delta).to(spectrum.dtype) for delta in drawn]
    return changes(base, stored)


def changes(base: Tensor, stored: Sequence[Tensor]) -> tuple[list[Tensor], list[float]]:
    """Updates of stored weights, and their storage noise."""
    deltas = [weight.float() - base.float() for weight in stored]
    return deltas, [storage_noise(base, weight) for weight in stored]


def update_errors(zoo: Zoo, name: str, device: str) -> tuple[float, float, int]:
    """Errors of one merged update, of the plain algorithm and of hf-tsv; and its full SVDs."""
    base, *stored = (_read(file, name) for file in zoo.files())
    deltas, floors = changes(base, stored)
    rank = plain.rank_of(base.shape, len(deltas))
    expected = exact.merge(deltas, rank, floors)
    with exact.one_thread_each():
        simple = plain.merge([delta.to(device) for delta in deltas], rank)
    ours = merged(deltas, rank, floors, device)
    errors = (exact.relative_error(found, expected) for found in (simple, ours.matrix))
    return *errors, ours.exact


def file_errors(zoo: Zoo, plain_file: Path, ours_file: Path, device: str) -> FileErrors:
    """Compare the files of two merges with each other, and a sample with float64.

    Args:
        zoo: checkpoints that were merged.
        plain_file: file of the plain algorithm.
        ours_file: file of hf-tsv.
        device: device that recomputes the updates of the sample.
    """
    files = {"plain": plain_file, "ours": ours_file}
    names = _sample(zoo)
    found = [_weight_errors(zoo, name, files, device) for name in names]
    worst = {key: max(errors[key] for errors, _ in found) for key in found[0][0]}
    return FileErrors(
        worst["plain"],
        worst["ours"],
        tuple(names),
        worst["plain file"],
        worst["ours file"],
        _apart(plain_file, ours_file),
        all(agree for _, agree in found),
    )


def _sample(zoo: Zoo) -> list[str]:
    """Names of one matrix of every shape, from a layer in the middle."""
    middle = f".layers.{zoo.layers // 2}."
    chosen: dict[tuple[int, ...], str] = {}
    with safe_open(zoo.base / plain.FILE, "pt") as file:
        for name in sorted(file.keys(), key=lambda name: middle not in name):
            shape = tuple(file.get_slice(name).get_shape())
            if len(shape) == 2:
                chosen.setdefault(shape, name)
    return list(chosen.values())


def _read(file: Path, name: str) -> Tensor:
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)


def _weight_errors(
    zoo: Zoo, name: str, files: dict[str, Path], device: str
) -> tuple[dict[str, float], bool]:
    """Errors of both updates and both files, and whether the files agree with float64."""
    base, *stored = (_read(file, name) for file in zoo.files())
    deltas, floors = changes(base, stored)
    rank = plain.rank_of(base.shape, len(deltas))
    update = exact.merge(deltas, rank, floors)
    expected = base.double() + update
    with exact.one_thread_each():
        simple = plain.merge([delta.to(device) for delta in deltas], rank)
    found = {
        "plain": exact.relative_error(simple, update),
        "ours": exact.relative_error(merged(deltas, rank, floors, device).matrix, update),
    }
    share, agree = float(update.norm() / expected.norm()), True
    for key, file in files.items():
        found[f"{key} file"] = exact.relative_error(_read(file, name), expected)
        allowed = torch.finfo(base.dtype).eps + 2 * found[key] * share
        agree = agree and found[f"{key} file"] <= allowed
    return found, agree


def _apart(first: Path, second: Path) -> float:
    with safe_open(first, "pt") as one, safe_open(second, "pt") as other:
        if set(one.keys()) != set(other.keys()):
            raise ValueError("The two merges have other tensors.")
        return max(
            exact.relative_error(other.get_tensor(name), one.get_tensor(name))
            for name in one.keys()  # noqa: SIM118
        )
