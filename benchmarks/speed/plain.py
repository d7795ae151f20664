"""The plain algorithm as a process, with which hf-tsv is compared.

`python -m benchmarks.speed.plain merge --base DIR --out DIR TASK...` merges, and
`… plain compress --base DIR --out DIR --rank-fraction F TASK` compresses, with `torch.linalg.svd`
in float32 throughout and with all threads that torch has. Prints its seconds as JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

FILE = "model.safetensors"


@dataclass
class Seconds:
    """Seconds by activity."""

    reading: float = 0.0
    computing: float = 0.0
    writing: float = 0.0


def svd(
    matrix: Tensor, transpose: bool = False, driver: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute U, S, Vh; with `transpose` a wide matrix is transposed first, faster in LAPACK.

    On a GPU `driver` is a routine of cuSOLVER: gesvd, gesvdj or gesvda.
    """
    if transpose and matrix.shape[0] < matrix.shape[1]:
        V, S, Uh = svd(matrix.mT.contiguous(), driver=driver)
        return Uh.mT, S, V.mT
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return U, S, Vh


def merge(
    deltas: Sequence[Tensor], rank: int, transpose: bool = False, driver: str | None = None
) -> Tensor:
    """Merged update of one weight (algorithm 1 of the paper), in the dtype given."""
    factors = [svd(delta, transpose, driver) for delta in deltas]
    U = torch.cat([U[:, :rank] for U, _, _ in factors], dim=1)
    S = torch.cat([S[:rank] for _, S, _ in factors])
    V = torch.cat([Vh[:rank] for _, _, Vh in factors])
    P, _, Qh = svd(U, transpose, driver)
    R, _, Th = svd(V, transpose, driver)
    return ((P @ Qh) * S) @ (R @ Th)


def rank_of(shape: Sequence[int], tasks: int) -> int:
    """Number of triplets per task, ⌊k/T⌋, at least 1."""
    return max(1, min(shape) // tasks)


def task_vector(task: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute Δ of every weight in float32."""
    fine_tuned = load_file(task / FILE)
    return {name: fine_tuned[name].float() - w0.float() for name, w0 in base.items()}


def merge_checkpoints(
    base: Path,
    tasks: Sequence[Path],
    out: Path,
    device: str,
    transpose: bool,
    driver: str | None = None,
) -> Seconds:
    """Merge whole checkpoints.

    Args:
        base: folder of W0.
        tasks: folders of the fine-tunes.
        out: folder to write.
        device: device that computes.
        transpose: transpose wide matrices first, see [`svd`].
        driver: routine of cuSOLVER, see [`svd`].
    """
    seconds, started = Seconds(), time.perf_counter()
    w0 = load_file(base / FILE)
    vectors = [task_vector(task, w0) for task in tasks]
    seconds.reading, started = _lap(started)
    merged = {}
    for name, tensor in w0.items():
        deltas = [vector[name].to(device) for vector in vectors]
        if tensor.ndim == 2 and len(tasks) <= min(tensor.shape):
            update = merge(deltas, rank_of(tensor.shape, len(tasks)), transpose, driver)
        else:
            update = torch.stack(deltas).mean(0)
        merged[name] = (tensor.to(device).float() + update).to(tensor.dtype).cpu()
    seconds.computing, started = _lap(started)
    _save(merged, out)
    seconds.writing, _ = _lap(started)
    return seconds


def compress_checkpoint(
    base: Path, task: Path, out: Path, device: str, transpose: bool, rank_fraction: float
) -> Seconds:
    """Write the leading singular triplets of every matrix, and Δ of every other tensor.

    Args:
        base: folder of W0.
        task: folder of the fine-tune.
        out: folder to write.
        device: device that computes.
        transpose: transpose wide matrices first, see [`svd`].
        rank_fraction: share of min(shape) that is kept.
    """
    seconds, started = Seconds(), time.perf_counter()
    vector = task_vector(task, load_file(base / FILE))
    seconds.reading, started = _lap(started)
    kept = {}
    for name, delta in vector.items():
        if delta.ndim != 2:
            kept[name] = delta
            continue
        rank = max(1, int(rank_fraction * min(delta.shape) + 1e-9))
        U, S, Vh = svd(delta.to(device), transpose)
        parts = {"U": U[:, :rank], "S": S[:rank], "Vh": Vh[:rank]}
        kept |= {f"{name}.{key}": part.contiguous().cpu() for key, part in parts.items()}
    seconds.computing, started = _lap(started)
    _save(kept, out)
    seconds.writing, _ = _lap(started)
    return seconds


def _lap(started: float) -> tuple[float, float]:
    """Seconds since `started`, and the current time."""
    now = time.perf_counter()
    return now - started, now


def _save(state: dict[str, Tensor], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / FILE, metadata={"format": "pt"})


def main() -> None:
    """Run once and print the seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("verb", choices=("merge", "compress"))
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--transpose", action="store_true", help="wide matrices first")
    parser.add_argument("--rank-fraction", type=float, default=0.1, help="with compress")
    parser.add_argument("tasks", type=Path, nargs="+")
    chosen = parser.parse_args()
    if chosen.verb == "merge":
        seconds = merge_checkpoints(
            chosen.base, chosen.tasks, chosen.out, chosen.device, chosen.transpose
        )
    else:
        (task,) = chosen.tasks
        seconds = compress_checkpoint(
            chosen.base, task, chosen.out, chosen.device, chosen.transpose, chosen.rank_fraction
        )
    print(json.dumps(asdict(seconds)))


if __name__ == "__main__":
    main()
