"""Candidates for compression and their singular vectors, weight by weight."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats.change import update_of
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.compression.candidates import Candidate, Compression, Measured, Spool
from hf_tsv.linalg import products, updates
from hf_tsv.linalg.shapes import matrix_shape
from hf_tsv.linalg.svd import truncated_svd
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.runs.journal import Journal
from hf_tsv.runs.reading import Seconds, expect, named, read_ahead, stop_fetching
from hf_tsv.system.memory import reused, share_one_heap

CURVE_POINTS = 49
"""Points of a curve in a picture."""


def energy_curves(measured: Sequence[Measured]) -> dict[str, tuple[list[float], list[float]]]:
    """Shares of k, and of ‖Δ‖² in the leading triplets, by kind of layer, up to known ranks."""
    kinds: dict[str, list[Measured]] = defaultdict(list)
    for item in measured:
        if len(item.singular_values):
            kinds[layout.block_and_kind(item.candidate.name)[1]].append(item)
    curves = {}
    for kind, items in kinds.items():
        sides = [min(matrix_shape(item.candidate.shape)) for item in items]
        pairs = list(zip(items, sides, strict=True))
        at = np.linspace(0, min(len(item.singular_values) / k for item, k in pairs), CURVE_POINTS)
        energy = np.zeros(CURVE_POINTS)
        for item, k in pairs:
            up_to = np.cumsum([0.0, *item.singular_values.square().tolist()])
            energy += np.interp(at * k, np.arange(len(up_to)), up_to)
        curves[kind] = (at.tolist(), (energy / sum(item.norm**2 for item in items)).tolist())
    return curves


def measure(
    job: Compression, spool: Spool, notes: Journal, device: torch.device, advance: Any
) -> tuple[list[Measured], Seconds]:
    """Decompose every weight once, one per thread, while the next one is read.

    On a GPU there are two threads: it does one thing after the other, in memory for each thread.

    Singular vectors go to the spool, whose weights are not decomposed again, all else to the
    journal; `advance(1)` is called after each weight. The result is every weight, and the time of
    reading and decomposing.
    """
    started, waited = time.monotonic(), 0.0
    share_one_heap()
    measured = {item.candidate.name: item for item in spool.held}
    left = [candidate for candidate in job.candidates if candidate.name not in measured]
    for item in (job.sources.base, job.source):
        expect(item, (candidate.name for candidate in left))
    workers = torch.get_num_threads() if device.type in ("cpu", "mps") else 2
    sizes = [4 * math.prod(candidate.shape) for candidate in left]
    reading_seconds: list[float] = []
    pending: set[Future[tuple[Measured, TaskSingularVectors | None]]] = set()

    def finish() -> None:
        """Keep what is done, after waiting for the first."""
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            pending.remove(future)
            item, vectors = future.result()
            if vectors is not None:
                item = spool.put(item, vectors)
            notes.add(item.to_entry())
            measured[item.candidate.name] = item
            advance(1)

    with (
        reused(),
        products.threads(),
        ThreadPoolExecutor(1, "hf-tsv-read") as reading,
        ThreadPoolExecutor(workers, "hf-tsv-compute") as computing,
    ):
        try:
            loads = read_ahead(reading, partial(_load, job), left, sizes)
            while True:
                asked = time.monotonic()
                loaded = next(loads, None)
                if loaded is None:
                    break
                waited += time.monotonic() - asked
                reading_seconds.append(loaded.seconds)
                pending.add(computing.submit(_decompose, loaded, job.source, device))
                del loaded
                if len(pending) >= workers:
                    finish()
            while pending:
                finish()
        except BaseException:
            stop_fetching([job.sources.base, job.source])
            raise
        finally:
            reading.shutdown(cancel_futures=True)
            computing.shutdown(cancel_futures=True)
    computed = time.monotonic() - started - waited
    in_order = [measured[candidate.name] for candidate in job.candidates]
    return in_order, Seconds(sum(reading_seconds), waited, computed)


@dataclass(frozen=True)
class _Loaded:
    """Update of one weight, its norm and storage noise, ‖W0‖, its digest, seconds of reading."""

    candidate: Candidate
    delta: Tensor
    norm: float
    base_norm: float
    base_sha256: str
    floor: float
    seconds: float


def _load(job: Compression, candidate: Candidate) -> _Loaded:
    started = time.monotonic()
    original = job.sources.base.original([candidate.name])
    rows, columns = matrix_shape(candidate.shape)
    w0 = original.tensor.reshape(rows, columns)
    w1 = job.source.exact(original).reshape(rows, columns)
    found = update_of(candidate.name, job.source, w1, w0, noisy=candidate.limit > 0)
    norm = found.norm if found.norm**2 else 0.0  # no stored type has numbers so small
    base_norm, sha256 = updates.norm_of(w0), original.digest()
    seconds = time.monotonic() - started
    return _Loaded(candidate, found.update, norm, base_norm, sha256, found.floor, seconds)


def _decompose(
    loaded: _Loaded, source: Task, device: torch.device
) -> tuple[Measured, TaskSingularVectors | None]:
    """Leading triplets of one weight, as many as may be kept; None if none may."""
    candidate, delta, norm = loaded.candidate, loaded.delta, loaded.norm
    item = Measured(candidate, loaded.base_sha256, norm, torch.empty(0), loaded.base_norm)
    if not norm or not candidate.limit:
        return item, None
    delta = delta.to(device)
    k = min(delta.shape)
    whole = 2 * candidate.limit > k  # then one full SVD has all of them
    wanted = k if whole else candidate.limit
    with named(candidate.name, [source]):
        svd = truncated_svd(
            delta, wanted, loaded.floor, "exact" if whole else "fast", spectrum=True
        )
    kept = TaskSingularVectors(svd.U, svd.S, svd.Vh).truncated(candidate.limit)
    values = kept.S.cpu().double()
    item = replace(item, singular_values=values, numerical_rank=svd.numerical_rank, exact=svd.exact)
    return item, kept
