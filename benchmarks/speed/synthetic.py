"""Synthetic checkpoints of real sizes, for measurements without downloads.

`python -m benchmarks.speed.synthetic` makes a base CLIP vision tower and fine-tunes of it, and
prints their folders. Most updates have spectra of fine-tuning: power laws, with or without a noise
floor, whose leading directions the tasks partly share. Others are Gaussian, LoRAs, or cases that
have no unique answer.
"""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CACHE = Path(__file__).parents[2] / ".bench"
PREFIX = "vision_model."
WEIGHT_RMS, UPDATE_RMS = 0.02, 3e-4
SHARED = 64
"""Most leading directions that tasks partly share."""
CLOSE, SMALLEST_ANGLE, MIDDLE_ANGLE, LARGEST_ANGLE = 0.15, 1e-3, 0.3, 1.5
"""Share of these directions that nearly coincide, and bounds of angles between tasks, in rad."""
NOISE = 0.1
"""Gaussian floor of a spectrum with noise, in units of the update."""
LORA_RANK = 16


@dataclass(frozen=True)
class Size:
    """Size of a vision tower, in the terms of its config.json."""

    hidden: int
    layers: int
    heads: int
    patch: int


MODELS: Mapping[str, Size] = {
    "ViT-B/32": Size(768, 12, 12, 32),
    "ViT-B/16": Size(768, 12, 12, 16),
    "ViT-L/14": Size(1024, 24, 16, 14),
    "tiny": Size(64, 4, 4, 32),
}
"""Sizes by model name; `tiny` is for tests of the benchmark itself."""


@dataclass(frozen=True)
class Spectrum:
    """Singular values and directions of the updates of a set of tasks.

    Args:
        exponent: exponent of σ_j = j^−exponent; None for Gaussian or low-rank updates.
        noise: size of a Gaussian floor, in units of the update.
        rank: rank of a LoRA.
        dtype: type of the stored checkpoints.
        special: `zero`: the first task changes nothing; `duplicate`: the last equals the first.
    """

    exponent: float | None = None
    noise: float = 0.0
    rank: int | None = None
    dtype: torch.dtype = torch.float32
    special: str = ""


SPECTRA: Mapping[str, Spectrum] = {
    **{f"power-{a:g}": Spectrum(a) for a in (1, 0.75, 0.5, 0.25)},
    **{f"power-{a:g}-noise": Spectrum(a, NOISE) for a in (1, 0.75, 0.5, 0.25)},
    "gaussian": Spectrum(),
    "lora-float32": Spectrum(rank=LORA_RANK),
    "lora-float16": Spectrum(rank=LORA_RANK, dtype=torch.float16),
    "lora-bfloat16": Spectrum(rank=LORA_RANK, dtype=torch.bfloat16),
    "zero": Spectrum(0.5, special="zero"),
    "duplicate": Spectrum(0.5, special="duplicate"),
}
DEFAULT_SPECTRUM = "power-0.5"


@dataclass(frozen=True)
class Zoo:
    """Base and fine-tunes on disk, with the parameters they were made with."""

    model: str
    layers: int
    spectrum: str
    base: Path
    tasks: tuple[Path, ...]

    def files(self) -> list[Path]:
        """Paths of all weight files."""
        return [folder / "model.safetensors" for folder in (self.base, *self.tasks)]

    def bytes(self) -> int:
        """Size of all weight files, in bytes."""
        return sum(file.stat().st_size for file in self.files())


def config(model: str, layers: int) -> Any:
    """Configuration of a vision tower with this number of layers."""
    from transformers import CLIPVisionConfig

    size = MODELS[model]
    return CLIPVisionConfig(
        hidden_size=size.hidden,
        intermediate_size=4 * size.hidden,
        num_hidden_layers=layers,
        num_attention_heads=size.heads,
        patch_size=size.patch,
        image_size=224,
        architectures=["CLIPVisionModel"],
    )


def shapes(model: str, layers: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor, as in transformers."""
    from transformers import CLIPVisionModel

    with torch.device("meta"):
        tower = CLIPVisionModel(config(model, layers))
    return {PREFIX + name: tuple(tensor.shape) for name, tensor in tower.state_dict().items()}


def updates(
    shape: tuple[int, int], tasks: int, spectrum: Spectrum, generator: torch.Generator
) -> list[Tensor]:
    """Draw the update of one weight by every task, in float32, before it is stored.

    Args:
        shape: (d_out, d_in), d_out >= d_in.
        tasks: number of tasks.
        spectrum: spectrum of each update.
        generator: generator of random numbers.
    """
    if spectrum.exponent is not None:
        found = _power_law(shape, tasks, spectrum.exponent, generator)
    elif spectrum.rank is not None:
        found = [_low_rank(shape, spectrum.rank, generator) for _ in range(tasks)]
    else:
        found = [_randn(shape, generator) for _ in range(tasks)]
    found = [_with_rms(delta) for delta in found]
    if spectrum.noise:
        floor = spectrum.noise * UPDATE_RMS
        found = [delta + floor * _randn(shape, generator) for delta in found]
    if spectrum.special == "zero":
        found[0] = torch.zeros(shape)
    if spectrum.special == "duplicate":
        found[-1] = found[0]
    return [delta.float() for delta in found]


def _power_law(
    shape: tuple[int, int], tasks: int, exponent: float, generator: torch.Generator
) -> list[Tensor]:
    k = min(shape)
    sigma = torch.arange(1, k + 1, dtype=torch.float64) ** -exponent
    shared = max(1, min(k // max(tasks, 2), SHARED))
    sides = [_related_bases(size, k, shared, tasks, generator) for size in shape]
    return [(U * sigma) @ V.mT for U, V in zip(*sides, strict=True)]


def _related_bases(
    size: int, columns: int, shared: int, tasks: int, generator: torch.Generator
) -> Iterable[Tensor]:
    """Orthonormal (size, columns) of each task; the first `shared` columns lean to one subspace."""
    common = torch.linalg.qr(_randn((size, shared), generator))[0]
    for _ in range(tasks):
        own = _away_from(common, shared, generator)
        angles = _angles(shared, generator)
        leading = common * angles.cos() + own * angles.sin()
        yield torch.cat([leading, _away_from(leading, columns - shared, generator)], dim=1)


def _away_from(basis: Tensor, columns: int, generator: torch.Generator) -> Tensor:
    """Draw random orthonormal columns, orthogonal to those of a basis."""
    drawn = _randn((basis.shape[0], columns), generator)
    return torch.linalg.qr(drawn - basis @ (basis.mT @ drawn))[0]


def _angles(count: int, generator: torch.Generator) -> Tensor:
    """Draw angles between a task's and the common directions, in rad; small ones log-uniform."""
    close = torch.empty(count, dtype=torch.float64)
    close.uniform_(math.log(SMALLEST_ANGLE), math.log(MIDDLE_ANGLE), generator=generator)
    wide = torch.empty(count, dtype=torch.float64)
    wide.uniform_(MIDDLE_ANGLE, LARGEST_ANGLE, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < CLOSE, close.exp(), wide)


def _low_rank(shape: tuple[int, int], rank: int, generator: torch.Generator) -> Tensor:
    return _randn((shape[0], rank), generator) @ _randn((rank, shape[1]), generator)


def _randn(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _with_rms(delta: Tensor) -> Tensor:
    return delta * (UPDATE_RMS * math.sqrt(delta.numel()) / float(delta.norm()))


@dataclass(frozen=True)
class Scramble:
    """Permutation of rows, columns and signs, for another weight with the same geometry."""

    rows: Tensor
    columns: Tensor
    row_signs: Tensor
    column_signs: Tensor

    def __call__(self, matrix: Tensor) -> Tensor:
        """Permute a matrix."""
        picked = matrix[self.rows][:, self.columns]
        return picked.mul_(self.row_signs[:, None]).mul_(self.column_signs)


def scramble(name: str, shape: tuple[int, int]) -> Scramble:
    """Permutation of a weight, the same for all tasks."""
    generator = _generator(name)
    rows, columns = (torch.randperm(size, generator=generator) for size in shape)
    signs = [torch.randn(size, generator=generator).sign() for size in shape]
    return Scramble(rows, columns, *signs)


def _generator(label: str) -> torch.Generator:
    """Generator of random numbers that a label determines."""
    return torch.Generator().manual_seed(zlib.crc32(label.encode()))


def base_weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """Draw a tensor of the base: scales of norms near one, all else of the usual size."""
    drawn = torch.randn(shape, generator=_generator(f"base {name}")) * WEIGHT_RMS
    return drawn + 1 if "norm" in name and name.endswith(".weight") else drawn


def checkpoints(
    model: str, tasks: int, layers: int, spectrum: str = DEFAULT_SPECTRUM, folder: Path = CACHE
) -> Zoo:
    """Make a base and fine-tunes of it, unless the folder holds them.

    Args:
        model: name in `MODELS`.
        tasks: number of fine-tunes.
        layers: number of layers of the towers.
        spectrum: name in `SPECTRA`.
        folder: folder in which they are kept.
    """
    name = f"{model.replace('/', '-')}-{layers}-layers-{tasks}-tasks-{spectrum}"
    final = folder / name
    if not final.exists():
        folder.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=folder))
        try:
            _make(draft, model, tasks, layers, SPECTRA[spectrum])
            draft.rename(final)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
    names = tuple(final / _task_name(i) for i in range(tasks))
    return Zoo(model, layers, spectrum, final / "base", names)


def _task_name(index: int) -> str:
    return f"task-{index:02}"


def _make(folder: Path, model: str, tasks: int, layers: int, spectrum: Spectrum) -> None:
    sizes = shapes(model, layers)
    settings = config(model, layers)
    base = {name: base_weight(name, shape).to(spectrum.dtype) for name, shape in sizes.items()}
    _save(base, settings, folder / "base")

    @cache
    def drawn(tall: tuple[int, int]) -> list[Tensor]:
        return updates(tall, tasks, spectrum, _generator(f"updates {tall} {tasks}"))

    for task in range(tasks):
        state = {}
        for name, shape in sizes.items():
            if len(shape) == 2:
                tall = (max(shape), min(shape))
                delta = drawn(tall)[task]
                delta = scramble(name, shape)(delta if tall == shape else delta.mT)
            else:
                delta = _vector_update(name, shape, task, tasks, spectrum)
            state[name] = (base[name].float() + delta).to(spectrum.dtype)
        _save(state, settings, folder / _task_name(task))


def _vector_update(
    name: str, shape: tuple[int, ...], task: int, tasks: int, spectrum: Spectrum
) -> Tensor:
    """Draw the update of a tensor that is no matrix; special tasks are special here too."""
    if spectrum.special == "zero" and task == 0:
        return torch.zeros(shape)
    if spectrum.special == "duplicate" and task == tasks - 1:
        task = 0
    return torch.randn(shape, generator=_generator(f"{name} {task}")) * UPDATE_RMS


def _save(state: dict[str, Tensor], settings: Any, folder: Path) -> None:
    folder.mkdir()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    settings.save_pretrained(folder)


def main() -> None:
    """Make one set and print its folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=MODELS, default="ViT-B/32")
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--depth", type=int, help="layers [default: all]")
    parser.add_argument("--spectrum", choices=SPECTRA, default=DEFAULT_SPECTRUM)
    arguments = parser.parse_args()
    layers = arguments.depth or MODELS[arguments.model].layers
    zoo = checkpoints(arguments.model, arguments.tasks, layers, arguments.spectrum)
    print(zoo.base, *zoo.tasks, sep="\n")


if __name__ == "__main__":
    main()
