"""The code for GPUs, walked through on a device that mixes with nothing; see `devices`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import FROM, TO, WAIT, Device, MixedDevicesError, elsewhere
from reference import (
    fine_tunes,
    gaussian,
    generator,
    ill_conditioned,
    one_thread,
    orthonormal,
    relative_error,
)
from rules import decompose, updates_of
from safetensors.torch import load_file
from torch import Tensor

import hf_tsv
from hf_tsv.linalg.choices import Precision, WudiFilter
from hf_tsv.linalg.svd import singular_values, truncated_svd
from hf_tsv.linalg.updates import TaskSingularVectors, Update
from hf_tsv.methods.ada import Layer, orthonormal_vectors
from hf_tsv.methods.calibration import calibrated
from hf_tsv.methods.catalogue import METHODS
from hf_tsv.methods.interference import measured
from hf_tsv.methods.layer_scales import likenesses, size, sum_of
from hf_tsv.methods.rules import MergedUpdate, Updates, rule_of
from hf_tsv.routing import scores

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

BARS = {"cuda": 3e-9, "mps": 1e-4}
"""Largest relative errors: float64, and float32, which is all that there is on MPS.

The CPU's own way is wrong by up to 1e-9 here, in Iso-CTS, with one eigensolver or another.
"""

WAITS = {"tsv": 12, "ada": 12, "orthogonal": 12, "low-rank": 11, "dc": 12, "iso-cts": 9, "iso-c": 2}
"""Times that the CPU may wait for a GPU, per task of a weight; for WUDI see below."""

READING, COMPUTING, WRITING = "hf-tsv-read", "main", "hf-tsv-write"
SHAPE, TASKS, RANK = (48, 64), 4, 12

every_kind = pytest.mark.parametrize("kind", BARS)
shapes = pytest.mark.parametrize("shape", [SHAPE, SHAPE[::-1]])


def there(device: Device, update: Update) -> Update:
    """An update on the device."""
    if isinstance(update, Tensor):
        return device.put(update)
    return TaskSingularVectors(*(device.put(part) for part in (update.U, update.S, update.Vh)))


def moved(device: Device, updates: Updates) -> Updates:
    """Updates as a merge hands them to a rule on the device."""
    own = device.kind == "mps"
    deltas = [u.to(torch.float32) if own else u for u in updates.deltas]
    return replace(updates, deltas=[there(device, delta) for delta in deltas])


def both(name: str, updates: Updates, kind: str) -> tuple[MergedUpdate, MergedUpdate, Device]:
    """The results of a method on the CPU and on the device, which is where the second one is."""
    rule = rule_of(METHODS[name])
    expected = rule(replace(updates, deltas=list(updates.deltas)))
    with elsewhere(kind) as device:
        found = rule(moved(device, updates))
        assert found.matrix.device.type == kind
        return expected, replace(found, matrix=found.matrix.cpu()), device


def assert_same(found: MergedUpdate, expected: MergedUpdate, kind: str) -> None:
    assert relative_error(found.matrix, expected.matrix) < BARS[kind]
    assert (found.ranks, found.null_directions) == (expected.ranks, expected.null_directions)


def whole(rank: int = RANK, shape: tuple[int, int] = SHAPE, **options: Any) -> Updates:
    deltas = fine_tunes(shape, TASKS, 0.5, seed=3)
    return updates_of(deltas, rank, known=[1e-4] * TASKS, **options)


# The device itself


def test_devices_do_not_mix() -> None:
    with elsewhere() as device:
        near, far = torch.ones(3), device.put(torch.ones(3))
        assert (far.device.type, far.to(torch.float64).dtype) == ("cuda", torch.float64)
        for mixed in (
            lambda: far + near,
            lambda: torch.cat([far, near]),
            lambda: near.mul_(far),
            lambda: far[torch.tensor([0])],
            lambda: torch.stack([far, torch.zeros_like(near)]),
        ):
            with pytest.raises(MixedDevicesError):
                mixed()
        for reach in (far.numpy, far.data_ptr):
            with pytest.raises(TypeError):
                reach()
        assert (far * 2 + torch.tensor(1.0)).cpu().tolist() == [3.0] * 3  # numbers may


def test_what_crosses_and_what_waits_is_counted() -> None:
    with elsewhere() as device:
        far = torch.ones(3, device="cuda")
        assert not device.counts
        assert float(far.sum()) == 3 and (far > 0).all()
        assert far[far > 0].tolist() == [1.0] * 3
        near = torch.zeros(3).to("cuda").cpu()
        near.copy_(far)
    assert [device.counted(what) for what in (TO, FROM, WAIT)] == [1, 3, 6]


def test_mps_has_no_float64() -> None:
    with elsewhere("mps") as device:
        assert device.put(torch.ones(2)).half().dtype == torch.float16
        for made in (lambda: device.put(torch.ones(2)).double(), lambda: torch.ones(2).double()):
            with pytest.raises(TypeError, match="float64"):
                made().to("mps")


# Every method


@every_kind
@shapes
@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_the_same_on_a_device(name: str, shape: tuple[int, int], kind: str) -> None:
    expected, found, _ = both(
        name, whole(min(shape) if name == "orthogonal" else RANK, shape), kind
    )
    assert_same(found, expected, kind)
    if kind == "cuda":
        assert found.exact == expected.exact


@pytest.mark.parametrize("name", METHODS)
def test_a_gpu_is_seldom_waited_for(name: str) -> None:
    """TSV-Merge waits 4 times a task, 3 times a filter of the batch, and 8 times; sums never."""
    _, found, device = both(name, whole(), "cuda")
    assert found.exact == 0
    assert device.counted(WAIT) - 1 <= TASKS * (5 if name == "wudi" else WAITS.get(name, 0))
    assert device.counted(TO) <= 3 * TASKS and device.counted(FROM) <= 3


@every_kind
@pytest.mark.parametrize("name", ["tsv", "low-rank", "iso-cts", "dc", "wudi"])
@pytest.mark.parametrize("precision", ["fast", "exact"])
def test_factors_and_full_svds_are_the_same_on_a_device(
    name: str, precision: Precision, kind: str
) -> None:
    updates = whole(precision=precision)
    deltas = [d if i % 2 else decompose(d, RANK) for i, d in enumerate(updates.deltas)]
    expected, found, _ = both(name, replace(updates, deltas=deltas), kind)
    assert_same(found, expected, kind)


@every_kind
@pytest.mark.parametrize("chosen", ["swudi-a", "swudi", "tact"])
@pytest.mark.parametrize("factors", [False, True])
def test_filters_of_wudi_are_the_same_on_a_device(
    chosen: WudiFilter, factors: bool, kind: str
) -> None:
    updates = whole()
    if factors:
        updates = replace(updates, deltas=[decompose(d, RANK) for d in updates.deltas])
    updates = replace(updates, how=replace(updates.how, wudi_filter=chosen))
    expected, found, _ = both("wudi", updates, kind)
    assert_same(found, expected, kind)


@pytest.mark.parametrize("special", ["duplicate", "opposite", "ill-conditioned", "zero"])
@pytest.mark.parametrize("name", ["tsv", "iso-cts"])
def test_special_tasks_are_the_same_on_a_gpu(name: str, special: str) -> None:
    deltas = fine_tunes(SHAPE, TASKS, 0.5, seed=4)
    if special == "ill-conditioned":
        deltas = ill_conditioned(SHAPE, RANK, TASKS, 1e-7, generator(17))
    elif special == "zero":
        deltas[0] = torch.zeros(SHAPE)
    else:
        deltas[-1] = deltas[0] * (1 if special == "duplicate" else -2.5)
    expected, found, _ = both(name, updates_of(deltas, RANK), "cuda")
    assert relative_error(found.matrix, expected.matrix) < 1e-6
    assert (found.ranks, found.null_directions) == (expected.ranks, expected.null_directions)


def test_whitening_is_the_same_on_a_gpu() -> None:
    expected, found, _ = both("tsv", whole(precision="exact", solver="whitening"), "cuda")
    assert_same(found, expected, "cuda")


# What is done beside them


@every_kind
@pytest.mark.parametrize("name", ["tsv", "low-rank", "orthogonal"])
def test_interference_is_the_same_on_a_device(name: str, kind: str) -> None:
    rule, updates = rule_of(METHODS[name]), whole(keep=True)
    expected = measured(rule(replace(updates, deltas=list(updates.deltas))))
    with elsewhere(kind) as device:
        found = measured(rule(moved(device, updates)))
    assert expected is not None and found is not None
    for field in ("sti", "pairs", "kept", "effective_ranks", "spectra", "energies"):
        one, other = (torch.tensor(getattr(x, field)) for x in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


@every_kind
@pytest.mark.parametrize("factors", [False, True])
def test_calibration_and_layer_scales_are_the_same_on_a_device(factors: bool, kind: str) -> None:
    deltas: Sequence[Update] = fine_tunes(SHAPE, TASKS, 0.5, seed=5)
    if factors:
        deltas = [TaskSingularVectors(*parts) for parts in map(_float32, deltas)]
    merged, base = gaussian(*SHAPE, generator(6)).float(), gaussian(*SHAPE, generator(7)).float()
    expected, _ = calibrated(merged, deltas, TASKS, 0.25, "fast")
    like, total = likenesses(base, deltas), size(sum_of(deltas))
    with elsewhere(kind) as device:
        far = [there(device, delta) for delta in deltas]
        found, _ = calibrated(device.put(merged), far, TASKS, 0.25, "fast")
        assert relative_error(found.cpu(), expected) < BARS[kind]
        assert size(sum_of(far)) == pytest.approx(total, rel=BARS[kind])
        for one, other in zip(likenesses(device.put(base), far), like, strict=True):
            assert one.contrast == pytest.approx(other.contrast, rel=BARS[kind])
            assert one.commutator == pytest.approx(other.commutator, rel=BARS[kind])


def _float32(delta: Tensor) -> list[Tensor]:
    found = decompose(delta, RANK)
    return [part.float() for part in (found.U, found.S, found.Vh)]


@every_kind
def test_spectra_are_the_same_on_a_device(kind: str) -> None:
    (matrix,) = fine_tunes(SHAPE, 1, 0.5, seed=8)
    expected = truncated_svd(matrix, RANK, spectrum=True)
    assert expected.spectrum is not None
    with elsewhere(kind) as device:
        found = truncated_svd(device.put(matrix), RANK, spectrum=True)
        assert found.spectrum is not None
        spectra = found.spectrum.cpu(), singular_values(device.put(matrix)).cpu()
    for spectrum in spectra:
        assert relative_error(spectrum, expected.spectrum) < BARS[kind]


def test_learned_coefficients_are_applied_on_a_gpu() -> None:
    vectors, ranks = orthonormal_vectors(whole())
    base, gradient = (gaussian(*SHAPE, generator(seed)) for seed in (9, 10))
    coefficients = torch.tensor([0.5, 1.0, 1.5, 2.0])

    def learned(put: Any) -> tuple[Tensor, Tensor]:
        parameter = put(torch.zeros(SHAPE, dtype=torch.float64))
        shares = TaskSingularVectors(*map(put, (vectors.U, vectors.S, vectors.Vh)))
        layer = Layer("w", (parameter,), put(base), tuple(range(TASKS)), shares, ranks)
        layer.place(coefficients)
        parameter.grad = put(gradient)
        return parameter.cpu(), layer.gradient(TASKS)

    expected = learned(lambda tensor: tensor.clone())
    with elsewhere() as device:
        found = learned(device.put)
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-12


@every_kind
def test_images_are_routed_the_same_on_a_device(kind: str) -> None:
    g = generator(11)
    tokens = [gaussian(5, 32, g).float() for _ in range(2)]
    bases = [torch.stack([orthonormal(32, 4, g).T for _ in range(3)]).float() for _ in range(2)]
    labels, classes = gaussian(6, 16, g).float(), [gaussian(4, 16, g).float(), None, labels_of(g)]

    def routed(put: Any) -> tuple[Tensor, list[tuple[int, ...]]]:
        found = [scores.residuals(put(x), put(V)) for x, V in zip(tokens, bases, strict=True)]
        known = [None if own is None else put(own) for own in classes]
        evidence = scores.label_evidence(put(labels), known, 0.02)
        shares = scores.scores(found, 0.5, evidence)
        return shares.cpu(), scores.choose(shares, 0.15, 2)

    expected = routed(lambda tensor: tensor)
    with elsewhere(kind) as device:
        found = routed(device.put)
    torch.testing.assert_close(found[0], expected[0])
    assert found[1] == expected[1]
    assert device.counted(WAIT) == 3


def labels_of(g: torch.Generator) -> Tensor:
    return gaussian(3, 16, g).float()


# Whole runs


@pytest.fixture(scope="module")
def compressed(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task of the zoo as factors."""
    folder = tmp_path_factory.mktemp("compressed") / "text"
    hf_tsv.compress(zoo / "full", base_model=zoo / "base", output=folder, rank=4)
    return folder


RUNS: Mapping[str, dict[str, Any]] = {
    "tsv": {},
    "average": {"method": "average"},
    "tall-mask": {"method": "tall-mask"},
    "ties": {"method": "ties"},
    "report": {"report": True},
    "calibrated": {"calibrate": True},
    "larv": {"layer_scale": "larv"},
    "lines": {"layer_scale": "lines"},
    "bfloat16": {"dtype": "bfloat16"},
}


def merged(zoo: Path, other: Path, out: Path, device: str, **options: Any) -> Mapping[str, Tensor]:
    tasks = [zoo / "vision", other]
    report = hf_tsv.merge(tasks, base_model=zoo / "base", output=out, device=device, **options)
    assert report.device == device
    return load_file(out / "model.safetensors")


@every_kind
@pytest.mark.parametrize("run", RUNS)
def test_a_merge_is_the_same_on_a_device(
    zoo: Path, compressed: Path, tmp_path: Path, run: str, kind: str
) -> None:
    """Through pinned memory, in all threads, and back into the files."""
    other = zoo / "full" if run == "tall-mask" else compressed
    expected = merged(zoo, other, tmp_path / "cpu", "cpu", **RUNS[run])
    with elsewhere(kind):
        found = merged(zoo, other, tmp_path / kind, kind, **RUNS[run])
    base = load_file(zoo / "base" / "model.safetensors")
    bar = 2e-2 if run == "bfloat16" else 1e-4
    for name, tensor in expected.items():
        change = (tensor.double() - base[name].double()).norm()
        assert (found[name].double() - tensor.double()).norm() <= bar * change, name


def test_each_tensor_crosses_once(zoo: Path, tmp_path: Path) -> None:
    """W0 and every input go there, samples of 4,096 entries and the result come back."""
    with elsewhere() as device:
        tasks = [zoo / "vision", zoo / "flat"]
        report = hf_tsv.merge(
            tasks, base_model=zoo / "base", output=tmp_path / "out", device="cuda"
        )
    weights, changes = len(report.treatments), 2 * len(report.treatments)
    assert device.counted(TO, READING) <= weights + changes
    assert device.counted(FROM, READING) <= changes
    assert device.counted(WAIT, READING) <= weights + 9 * changes
    assert device.counted(FROM, WRITING) == device.counted(WAIT, WRITING) <= weights


@pytest.mark.parametrize("largest", [4 * 16 * 16, 8 * 64 * 32 - 1])
def test_a_device_without_memory_is_told_of(zoo: Path, tmp_path: Path, largest: int) -> None:
    """As is read, and where it is decomposed."""
    with elsewhere() as device, pytest.raises(hf_tsv.CheckpointError) as error:
        device.largest = largest
        merged(zoo, zoo / "full", tmp_path / "out", "cuda")
    assert "The device has not enough memory for " in str(error.value)
    assert "device=" in str(error.value)


@every_kind
def test_compression_and_interference_are_the_same_on_a_device(
    zoo: Path, tmp_path: Path, kind: str
) -> None:
    def run(device: str) -> tuple[Mapping[str, Tensor], Any]:
        options: Any = {"base_model": zoo / "base", "device": device}
        hf_tsv.compress(zoo / "full", output=tmp_path / device, rank=4, **options)
        (file,) = (tmp_path / device).glob("*.safetensors")
        return load_file(file), hf_tsv.interference([zoo / "vision", zoo / "full"], **options)

    (factors, report) = run("cpu")
    with elsewhere(kind):
        found, other = run(kind)
    for name in (name for name in factors if name.endswith(".U")):
        S = name.removesuffix("U") + "S"
        Vh = name.removesuffix("U") + "Vh"
        one, two = (part[name] * part[S] @ part[Vh] for part in (found, factors))
        assert relative_error(one, two) < 1e-4
    assert other.device == kind and report.device == "cpu"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """After a test the CPU is alone again."""
    yield
    assert not isinstance(torch.empty(1), torch.nn.Parameter)
    assert torch.empty(1).device.type == "cpu"
