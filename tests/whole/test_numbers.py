"""Numbers at the ends of their range, and matrices of odd shapes, through whole commands."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from cli import copied
from cli import hf_tsv as run
from hypothesis import given, settings
from hypothesis import strategies as st
from others import as_numpy, consensus
from reference import gaussian, generator, one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_tsv
from hf_tsv.linalg import lapack
from hf_tsv.linalg import svd as svd_module
from hf_tsv.linalg.svd import _scaled, truncated_svd
from hf_tsv.system.errors import CheckpointError

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SHAPES: Mapping[str, tuple[int, ...]] = {
    "wide.weight": (6, 8), "tall.weight": (9, 4), "column.weight": (6, 1), "row.weight": (1, 8),
    "one.weight": (1, 1), "scalar": (), "bias": (8,), "conv.weight": (4, 3, 2, 2),
    "no_rows.weight": (0, 8), "no_columns.weight": (8, 0), "nothing": (0,),
}  # fmt: skip
METHODS = ("tsv", "low-rank", "orthogonal", "task-arithmetic", "average", "consensus", "iso-c",
           "iso-cts", "dc", "wudi", "ties", "tall-mask")  # fmt: skip
ALPHA = {"task-arithmetic": 0.3, "low-rank": 0.3, "consensus": 0.3, "iso-cts": 1.3, "dc": 2.0}

Make = Callable[[tuple[int, ...], int], Tensor]
"""The update of a tensor by a task."""


def random(scale: float, dtype: torch.dtype = torch.float32) -> Make:
    """Normal numbers of this size, which a type may round to few bits."""

    def make(shape: tuple[int, ...], task: int) -> Tensor:
        g = generator(1000 * task + math.prod(shape) + len(shape))
        return (scale * torch.randn(shape, generator=g, dtype=torch.float64)).to(dtype)

    return make


def constant(shape: tuple[int, ...], task: int) -> Tensor:
    return torch.full(shape, 0.25 * (task + 1))


def equal(shape: tuple[int, ...], task: int) -> Tensor:
    return random(0.5)(shape, 7)


def rank_one(shape: tuple[int, ...], task: int) -> Tensor:
    if len(shape) != 2:
        return random(0.5)(shape, task)
    left, right = (random(1.0)((n,), task + 10) for n in shape)
    return torch.outer(left, right)


def apart(shape: tuple[int, ...], task: int) -> Tensor:
    """Huge, ordinary and denormal columns side by side."""
    sizes = torch.tensor([1e29, 1.0, 1e-20, 1e-42] * 2, dtype=torch.float64)
    update = random(1.0, torch.float64)(shape, task)
    return (update * sizes[: shape[-1]] if shape else update).float()


def only_the_second(shape: tuple[int, ...], task: int) -> Tensor:
    return random(0.5)(shape, task) * float(task == 1 or shape == (8,))


KINDS: Mapping[str, Make] = {
    "denormal": random(1e-42),
    "denormal-float16": random(3e-7, torch.float16),
    "huge": random(1e29),
    "float64-small": random(1e-300, torch.float64),
    "constant": constant,
    "equal": equal,
    "rank-one": rank_one,
    "apart": apart,
    "zero": only_the_second,
}


@pytest.fixture(scope="module")
def extremes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of zeros and two fine-tunes of every kind: the update is what is stored."""
    folder = tmp_path_factory.mktemp("extremes")
    for kind, make in KINDS.items():
        for task, name in enumerate(("a", "b")):
            save(folder / kind / name, {n: make(s, task) for n, s in SHAPES.items()})
        zeros = {n: torch.zeros_like(make(s, 0)) for n, s in SHAPES.items()}
        save(folder / kind / "base", zeros)
    return folder


def save(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A checkpoint of no known architecture."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "odd"}')
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def expected(name: str, deltas: list[Tensor], method: str) -> Tensor | None:
    """By NumPy and the equations, in float64; None where that takes the whole checkpoint."""
    shape, (changed, whole) = SHAPES[name], ([d for d in deltas if d.any()], deltas)
    if method in ("ties", "tall-mask"):
        return None
    if not math.prod(shape) or not changed:
        return torch.zeros(shape, dtype=torch.float64)
    if method == "task-arithmetic":
        return reference.task_arithmetic(deltas)
    if method == "consensus":
        return torch.from_numpy(consensus(as_numpy(whole)))
    few = method in ("tsv", "low-rank") and min(shape, default=0) < 2
    if method == "average" or len(shape) != 2 or few:
        return reference.average(whole)
    rank = min(shape) // 2
    kept = [min(rank, int(torch.linalg.matrix_rank(d, rtol=1e-6))) for d in changed]
    if method == "tsv":
        return reference.tsv(changed, kept)
    if method == "low-rank":
        return reference.low_rank(changed, kept)
    if method == "iso-c":
        U, S, Vh = torch.linalg.svd(reference.task_arithmetic(changed), full_matrices=False)
        has = 1e-6 * S[0] < S  # directions that the sum does not have stay zero
        return S.sum() / len(S) * U[:, has] @ Vh[has]
    return None  # of null directions there are too many to compare


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_merge_of_extreme_numbers_is_finite_and_right(
    extremes: Path, tmp_path: Path, kind: str, method: str
) -> None:
    world = extremes / kind
    report = hf_tsv.merge(
        [world / "a", world / "b"], base_model=world / "base", output=tmp_path / "m", method=method
    )
    assert strict_json(report.to_dict())
    merged, tasks = of(tmp_path / "m"), [of(world / name) for name in "ab"]
    for name, tensor in merged.items():
        assert bool(tensor.isfinite().all()), name
        deltas = [task[name].double() for task in tasks]
        want = expected(name, deltas, method)
        if want is None or not tensor.numel():
            continue
        largest = max(float(delta.abs().max()) for delta in deltas)
        step = 2 * torch.finfo(tensor.dtype).smallest_normal * torch.finfo(tensor.dtype).eps
        if report.treatments[name]["treatment"] != "decomposed" or method == "iso-c":
            step = max(step, 2e-45)  # means and sums are those of float32
        error = float((tensor.double() - ALPHA.get(method, 1.0) * want).abs().max())
        bar = 1e-3 if tensor.dtype == torch.float16 else 1e-6
        assert error <= bar * largest + step, (name, error, largest)


def strict_json(content: Any) -> str:
    """As other programs read it: without NaN and Infinity."""
    return json.dumps(content, allow_nan=False)


@pytest.mark.parametrize("kind", KINDS)
def test_who_disturbs_whom_is_told_in_finite_numbers(extremes: Path, kind: str) -> None:
    world = extremes / kind
    report = hf_tsv.interference([world / "a", world / "b"], base_model=world / "base")
    assert strict_json(report.to_dict())
    for name in ("wide.weight", "tall.weight"):
        found = report.weights[name]
        rounding = 1e-12 * max(1.0, found["sti"])
        assert found["sti"] + rounding >= found["sti_after"] >= 0


RULES: Mapping[str, dict[str, Any]] = {
    "rank": {"rank": 2},
    "share": {"rank_fraction": 0.5, "compress_conv": True},
    "energy": {"energy": 0.9},
    "budget": {"budget": "90%", "dtype": "bfloat16"},
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "float64-small"])
def test_compressing_extreme_numbers_loses_what_it_says(
    extremes: Path, tmp_path: Path, kind: str, rule: str
) -> None:
    world, options = extremes / kind, RULES[rule]
    hf_tsv.compress(world / "b", base_model=world / "base", output=tmp_path / "f", **options)
    hf_tsv.reconstruct(tmp_path / "f", base_model=world / "base", output=tmp_path / "r")
    said = json.loads((tmp_path / "f" / "tsv_config.json").read_text())
    assert strict_json(said)
    made, task = of(tmp_path / "r"), of(world / "b")
    lost = total = 0.0
    for name, tensor in made.items():
        assert bool(tensor.isfinite().all()), name
        lost += float((tensor.double() - task[name].double()).square().sum())
        total += float(task[name].double().square().sum())
    # norms are summed in float32, and W0 + Δ is rounded to the type of the checkpoint
    rounding = {"denormal": 2e-3, "denormal-float16": 0.1}.get(kind, 3e-4)
    assert math.sqrt(lost / total) == pytest.approx(said["update_error"], rel=1e-3, abs=rounding)


def test_an_update_below_every_stored_type_is_no_update(extremes: Path, tmp_path: Path) -> None:
    world = extremes / "float64-small"
    with pytest.raises(CheckpointError, match="it has no update"):
        hf_tsv.compress(world / "b", base_model=world / "base", output=tmp_path / "f")


def test_float64_fine_tunes_closer_than_float32_tells_apart_are_merged(tmp_path: Path) -> None:
    g = generator(3)
    w0 = gaussian(8, 6, g)
    deltas = [1e-11 * gaussian(8, 6, g) for _ in range(2)]
    save(tmp_path / "base", {"a.weight": w0})
    tasks = [save(tmp_path / f"t{i}", {"a.weight": w0 + delta}) for i, delta in enumerate(deltas)]
    hf_tsv.merge(tasks, base_model=tmp_path / "base", output=tmp_path / "m")
    update = of(tmp_path / "m")["a.weight"] - w0
    assert reference.relative_error(update, reference.tsv(deltas, [3, 3])) < 1e-3


# What is no number, or too large to be one


def told(done: Any, *parts: str) -> None:
    assert done.code == 1 and "Traceback" not in done.err
    (error,) = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert all(part in error for part in parts), error
    assert "Hint: " in done.err


@pytest.fixture(scope="module")
def ordinary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes whose numbers are as usual."""
    folder = tmp_path_factory.mktemp("ordinary")
    base = {name: random(0.02)(shape, 5) for name, shape in SHAPES.items()}
    save(folder / "base", base)
    for task, name in enumerate(("a", "b")):
        save(folder / name, {n: w + random(3e-4)(SHAPES[n], task) for n, w in base.items()})
    return folder


def edited(folder: Path, new: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    tensors = of(copied(folder, new))
    edit(tensors)
    save_file(tensors, new / "model.safetensors", metadata={"format": "pt"})
    return new


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("wide.weight", math.nan),
        ("scalar", math.inf),
        ("bias", -math.inf),
        ("conv.weight", math.nan),
    ],
)
@pytest.mark.parametrize("where", ["base", "a"])
def test_what_is_no_number_is_refused_wherever_it_is(
    ordinary: Path, tmp_path: Path, where: str, name: str, value: float
) -> None:
    bad = edited(ordinary / where, tmp_path / "bad", lambda t: t[name].view(-1)[-1:].fill_(value))
    base, task = (bad, ordinary / "a") if where == "base" else (ordinary / "base", bad)
    for verb in (["merge", ordinary / "b"], ["interference", ordinary / "b"], ["compress"]):
        done = run(*verb, task, "--base-model", base, "-o", tmp_path / "out")
        told(done, str(bad), f"values of {name} are NaN or Inf")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_a_task_that_makes_its_update_overflow_is_named(
    ordinary: Path, tmp_path: Path, method: str
) -> None:
    done = run("merge", ordinary / "a", ordinary / "b", "--base-model", ordinary / "base",
               "--weights", "1e300,1", "-o", tmp_path / "m", "--method", method)  # fmt: skip
    told(done, f"{ordinary / 'a'}: the update of ", "times 1e+300")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("method", [name for name in METHODS if name != "tall-mask"])
def test_merged_values_that_overflow_are_named(ordinary: Path, tmp_path: Path, method: str) -> None:
    done = run("merge", ordinary / "a", ordinary / "b", "--base-model", ordinary / "base",
               "--alpha", "1e300", "-o", tmp_path / "m", "--method", method)  # fmt: skip
    told(done, "Merged values of ", "do not fit into float32")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["factor", "singular value", "dense"])
def test_factors_of_no_task_are_named(ordinary: Path, tmp_path: Path, what: str) -> None:
    hf_tsv.compress(ordinary / "a", base_model=ordinary / "base", output=tmp_path / "f", rank=2)
    file = tmp_path / "f" / "task_factors.safetensors"
    tensors = load_file(file)
    name = {"factor": "wide.weight.U", "singular value": "wide.weight.S", "dense": "bias.delta"}
    tensors[name[what]].view(-1)[0] = 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    weight = "bias" if what == "dense" else "wide.weight"
    for verb in ("reconstruct", "merge"):
        out = tmp_path / verb
        done = run(verb, tmp_path / "f", "--base-model", ordinary / "base", "-o", out)
        if what == "factor":  # times a singular value as it should be it is a number, still
            assert done.code == 0 and all(t.isfinite().all() for t in of(out).values())
        else:
            told(done, f"{tmp_path / 'f'}: {weight} differs from the base model by more than 1e+30")
            assert not out.exists()


# Decompositions that fail


class Failing:
    """Which routines say that they did not converge."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch = patch

    def everything(self, only: tuple[int, ...] | None = None) -> None:
        """Every eigensolver and every SVD, or those of matrices of this shape."""
        call = lapack._call

        def failing(name: str, *arguments: Any) -> None:
            call(name, *arguments)
            sizes = sorted(a for a in arguments if isinstance(a, int))
            if name in ("dlarre", "dstemr", "dgesvd") and (only is None or max(only) in sizes):
                arguments[-1].value = 1

        def refusing(routine: Callable[..., Any]) -> Callable[..., Any]:
            def call(a: Tensor, **options: Any) -> Any:
                if only is None or sorted(a.shape) == sorted(only):
                    raise torch.linalg.LinAlgError("did not converge")
                return routine(a, **options)

            return call

        self.patch.setattr(lapack, "_call", failing)
        for routine in ("svd", "eigh"):
            self.patch.setattr(torch.linalg, routine, refusing(getattr(torch.linalg, routine)))


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Failing:
    return Failing(monkeypatch)


NOT = "cannot be decomposed: no solver converges"


@pytest.mark.parametrize("options", [
    ["--method", "tsv"], ["--method", "low-rank"], ["--method", "orthogonal"],
    ["--method", "iso-c"], ["--method", "iso-cts"], ["--report"], ["--precision", "exact"],
    ["--precision", "exact", "--orthogonalizer", "whitening"],
], ids=lambda options: options[-1])  # fmt: skip
def test_a_merge_that_cannot_decompose_names_weight_and_checkpoint(
    ordinary: Path, tmp_path: Path, failing: Failing, options: list[str]
) -> None:
    failing.everything()
    done = run("merge", ordinary / "a", ordinary / "b", "--base-model", ordinary / "base", "-o",
               tmp_path / "m", *options)  # fmt: skip
    told(done, str(ordinary / "a"), f".weight {NOT}")
    assert re.search(r"--exclude \w+\.weight", done.err)
    assert not any(tmp_path.iterdir())  # it would fail again: nothing is kept to go on with


def test_the_checkpoint_whose_update_it_is_is_named(
    ordinary: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the first task, and among others that need no decomposition."""
    hf_tsv.compress(ordinary / "a", base_model=ordinary / "base", output=tmp_path / "f", rank=2)
    culprit = of(ordinary / "b")["wide.weight"] - of(ordinary / "base")["wide.weight"]
    scaled = _scaled

    def refusing(matrix: Tensor, floor: float) -> Any:
        if torch.equal(matrix.float(), culprit):
            raise lapack.NotConvergedError("no solver converges")
        return scaled(matrix, floor)

    monkeypatch.setattr(svd_module, "_scaled", refusing)
    done = run("merge", tmp_path / "f", ordinary / "a", ordinary / "b", "--base-model",
               ordinary / "base", "-o", tmp_path / "m")  # fmt: skip
    told(done, f"Error: {ordinary / 'b'}: wide.weight {NOT}")


def test_the_other_verbs_name_weight_and_checkpoint_too(
    ordinary: Path, tmp_path: Path, failing: Failing
) -> None:
    failing.everything()
    base = ["--base-model", ordinary / "base"]
    done = run("compress", ordinary / "a", *base, "-o", tmp_path / "f")
    told(done, f"{ordinary / 'a'}: ", f".weight {NOT}")
    done = run("interference", ordinary / "a", ordinary / "b", *base)
    told(done, f"{ordinary / 'a'}: tall.weight {NOT}")
    assert not any(tmp_path.iterdir())


def test_an_excluded_weight_needs_no_decomposition(
    ordinary: Path, tmp_path: Path, failing: Failing
) -> None:
    """What the hint of the error says."""
    failing.everything(only=SHAPES["tall.weight"])
    done = run("merge", ordinary / "a", ordinary / "b", "--base-model", ordinary / "base", "-o",
               tmp_path / "m", "--exclude", "tall.weight")  # fmt: skip
    assert done.code == 0, done.err


# One weight of any size and scale


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 9)),
    st.sampled_from([-1060, -1040, -1023, -900, -120, 0, 120, 900, 1018]),
    st.integers(0, 2**32),
    st.sampled_from(["fast", "exact"]),
)
@settings(max_examples=40, derandomize=True, deadline=None)
def test_a_power_of_two_scales_the_singular_values_alone(
    shape: tuple[int, int], exponent: int, seed: int, precision: Any
) -> None:
    """From the denormal numbers of float64 to its largest."""
    matrix = gaussian(*shape, generator(seed)).float().double()
    scaled = torch.ldexp(matrix, torch.tensor(exponent // 2))
    scaled = torch.ldexp(scaled, torch.tensor(exponent - exponent // 2))
    found, plain = (truncated_svd(m, 9, 0.0, precision) for m in (scaled, matrix))
    error = abs(found.S * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2) - plain.S)
    few_bits = 2.0 ** max(-52, -1074 - exponent + 3)
    assert float(error.max() / plain.S[0]) < 10 * few_bits
