"""Bases and outputs in 16 bits: what is exact is kept, and what rounding takes is told."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import adapters
import clips
import pytest
import reference
import torch
from cli import hf_tsv as run
from ends import ends, ranks
from reference import generator, one_thread
from safetensors.torch import load_file, save_file
from torch import Tensor

import hf_tsv
from hf_tsv.merging.findings import Finding, Findings

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

SHAPES = {"square.weight": (96, 96), "tall.weight": (160, 64), "bias": (64,)}
SIXTEEN = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
EPS = torch.finfo(torch.float32).eps

State = dict[str, Tensor]


def save(folder: Path, tensors: State) -> Path:
    """A checkpoint of no known architecture."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "odd"}')
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def of(folder: Path) -> State:
    return load_file(folder / "model.safetensors")


def original() -> State:
    g = generator(1)
    return {name: 0.03 * torch.randn(shape, generator=g) for name, shape in SHAPES.items()}


def tuned(start: State, seed: int, size: float, dtype: torch.dtype = torch.float32) -> State:
    g = generator(seed)
    return {
        name: (w.float() + size * torch.randn(w.shape, generator=g)).to(dtype)
        for name, w in start.items()
    }


def world(folder: Path, start: State, dtype: torch.dtype, size: float) -> list[Path]:
    """A base in 16 bits and two fine-tunes of `start` in float32."""
    save(folder / "base", {name: w.to(dtype) for name, w in start.items()})
    return [save(folder / name, tuned(start, seed, size)) for seed, name in ((2, "a"), (3, "b"))]


def stored(dtype: torch.dtype) -> State:
    """The base as it is in 16 bits."""
    return {name: w.to(dtype) for name, w in original().items()}


def merge(folder: Path, tasks: list[Path], output: str = "m", **options: Any) -> Any:
    return hf_tsv.merge(tasks, base_model=folder / "base", output=folder / output, progress=False,
                        **options)  # fmt: skip


def errors(folder: Path, output: str, tasks: list[Path]) -> tuple[float, float, float]:
    """Norms of the error of a merge to the equations in float64, of the update, and of W0."""
    base, made, states = of(folder / "base"), of(folder / output), list(map(of, tasks))
    error = update = size = 0.0
    for name, w in base.items():
        deltas = [state[name].double() - w.double() for state in states]
        ranks = [min(w.shape) // 2] * 2
        wanted = reference.tsv(deltas, ranks) if w.dim() == 2 else reference.average(deltas)
        error += float((made[name].double() - w.double() - wanted).square().sum())
        update += float(wanted.square().sum())
        size += float(w.double().square().sum())
    return error**0.5, update**0.5, size**0.5


def of_kind(report: Any, *words: str) -> list[str]:
    """Its warnings with these words, but that of the architecture."""
    told = (text for text in report.warnings if "generic layout" not in text)
    return [text for text in told if all(word in text for word in words)]


@SIXTEEN
@pytest.mark.parametrize("size", [1e-5, 1e-4, 3e-4])
def test_float32_fine_tunes_of_a_16_bit_base_merge_as_the_equations_say(
    tmp_path: Path, dtype: torch.dtype, size: float
) -> None:
    tasks = world(tmp_path, stored(dtype), dtype, size)
    report = merge(tmp_path, tasks, dtype="float32")
    error, update, base = errors(tmp_path, "m", tasks)
    assert error < 1e-6 * update + EPS / 2 * base  # the second is rounding of W0 + Δ to float32
    assert of_kind(report) == []
    narrow = merge(tmp_path, tasks, "narrow")
    error, update, _ = errors(tmp_path, "narrow", tasks)
    lost = of_kind(narrow, "of the merged update is lost by rounding to", "`dtype=float32`")
    assert bool(lost) == (error >= 0.1 * update)
    if lost:
        assert of_kind(narrow) == lost and str(dtype)[6:] in lost[0]
        said = float(lost[0].split("About ")[1].split("%")[0]) / 100
        assert said == pytest.approx(error / update, abs=0.006)


def test_methods_that_decompose_nothing_keep_the_update_too(tmp_path: Path) -> None:
    tasks = world(tmp_path, stored(torch.bfloat16), torch.bfloat16, 1e-5)
    merge(tmp_path, tasks, method="average", dtype="float32")
    base, states = of(tmp_path / "base"), list(map(of, tasks))
    for name, made in of(tmp_path / "m").items():
        mean = sum(state[name].double() for state in states) / 2
        assert float((made.double() - mean).norm()) < EPS * float(base[name].double().norm())


def test_a_base_that_was_rounded_afterwards_is_told(tmp_path: Path) -> None:
    tasks = world(tmp_path, original(), torch.bfloat16, 3e-5)
    report = merge(tmp_path, tasks, dtype="float32")
    told = of_kind(report, "looks like a copy, rounded to bfloat16", "`base_model=REF`")
    assert len(told) == 2 and of_kind(report) == told  # of each task, and it is nothing else
    error, update, base = errors(tmp_path, "m", tasks)
    assert error < 1e-6 * update + EPS / 2 * base  # nothing is dropped
    found = hf_tsv.interference(tasks, base_model=tmp_path / "base", progress=False)
    assert [d["kind"] for d in found.diagnoses] == ["rounded-base"] * 2


def test_updates_of_large_entries_are_no_rounding_of_the_base(tmp_path: Path) -> None:
    """They grow with the weights faster than rounding does."""
    weights = 0.03 * torch.randn(10, 160, 128, generator=generator(1))
    base = {f"{i}.weight": w.to(torch.bfloat16) for i, w in enumerate(weights)}
    tasks = [tmp_path / "a", tmp_path / "b"]
    for seed, task in enumerate(tasks):
        large, rest = tuned(base, 2 + seed, 1.8e-4), tuned(base, 4 + seed, 1e-7)
        is_large = {name: w.float().abs() > 0.03 for name, w in base.items()}
        save(task, {n: torch.where(is_large[n], large[n], rest[n]) for n in base})
    save(tmp_path / "base", base)
    found = hf_tsv.interference(tasks, base_model=tmp_path / "base", progress=False)
    assert "rounded-base" not in [told["kind"] for told in found.diagnoses]


def test_fine_tunes_in_16_bits_are_said_to_be_rounded_and_not_their_base(tmp_path: Path) -> None:
    world(tmp_path, stored(torch.bfloat16), torch.bfloat16, 1e-4)
    coarse = tuned(stored(torch.bfloat16), 2, 1e-4, torch.bfloat16)
    tasks = [save(tmp_path / "coarse", coarse), tmp_path / "b"]
    report = merge(tmp_path, tasks, dtype="float32")
    (text,) = of_kind(report, "rounding to bfloat16")
    assert str(tasks[0]) in text and not of_kind(report, "looks like")


def test_several_processes_tell_the_same(tmp_path: Path) -> None:
    tasks = world(tmp_path, original(), torch.bfloat16, 3e-5)
    words = ["merge", *tasks, "--base-model", tmp_path / "base", "--json"]
    one = run(*words, "-o", tmp_path / "one")
    first, second = ends(ranks(*words, "-o", tmp_path / "two", count=2, cwd=tmp_path))
    assert (one.code, first.code, second.code) == (0, 0, 0), (first, second)
    assert one.json["warnings"] == first.json["warnings"] and len(one.json["warnings"]) == 4
    assert (tmp_path / "two" / "model.safetensors").read_bytes() == (
        tmp_path / "one" / "model.safetensors"
    ).read_bytes()


def test_findings_are_the_same_after_a_journal() -> None:
    weights = [
        Finding(str(i), tasks=(1,), norms=(1.0,), rounded_base=((90.0, 100.0 + i),),
                update_norm=3.0 + i, lost=1.0)
        for i in range(2)
    ]  # fmt: skip
    again = [Finding.from_dict(json.loads(json.dumps(asdict(found)))) for found in weights]
    assert again == weights
    assert Findings(2, again).lost == pytest.approx((2 / 25) ** 0.5)
    assert Findings(2, again).rounded_base(1) == pytest.approx((180 / 201, 201**-0.5))
    assert Findings(2, again).rounded_base(0)[0] == 0.0


def test_a_reconstruction_in_16_bits_tells_what_it_loses(tmp_path: Path) -> None:
    task, _ = world(tmp_path, stored(torch.bfloat16), torch.bfloat16, 1e-4)
    base = tmp_path / "base"
    made = hf_tsv.compress(task, base_model=base, output=tmp_path / "f", rank_fraction=1.0)
    assert made.config.update_error < 1e-4  # nothing of it is taken for rounding
    narrow = hf_tsv.reconstruct(tmp_path / "f", output=tmp_path / "r", progress=False)
    assert len(of_kind(narrow, "of the merged update is lost by rounding to bfloat16")) == 1
    wide = hf_tsv.reconstruct(tmp_path / "f", output=tmp_path / "w", dtype="float32")
    assert of_kind(wide) == []
    for name, w in of(task).items():
        update = float((w.double() - of(base)[name].double()).norm())
        assert float((of(tmp_path / "w")[name] - w).norm()) < 1e-4 * update, name


def float32_copy(base: Path, folder: Path) -> Path:
    """The same base stored in float32, as transformers would load it for training."""
    shutil.copytree(base, folder)
    state = {name: tensor.float() for name, tensor in of(base).items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text()) | {"dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("kind", ["plain", "dora", "convolution", "lora bias"])
def test_an_adapter_on_a_16_bit_base_is_exact(tmp_path: Path, kind: str) -> None:
    base = clips.make_base(tmp_path / "sixteen", dtype=torch.bfloat16)
    float32_copy(base, tmp_path / "base")
    truth = adapters.trained(tmp_path, tmp_path / "lora", kind)
    for method in ("tsv", "task-arithmetic"):
        output = tmp_path / method
        report = hf_tsv.merge(tmp_path / "lora", base_model=base, output=output, dtype="float32",
                              method=method, alpha=1.0, progress=False)  # fmt: skip
        assert not of_kind(report, "rounding"), report.warnings
        made = of(output)
        for name, w in truth.items():
            if w.is_floating_point():
                assert float((made[name] - w).abs().max()) < 1e-6, (method, name)


def test_of_a_small_adapter_the_output_alone_is_rounded(tmp_path: Path) -> None:
    base = clips.make_base(tmp_path / "sixteen", dtype=torch.bfloat16)
    float32_copy(base, tmp_path / "base")
    adapters.trained(tmp_path, tmp_path / "lora", "vision")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({n: t * 0.03 ** ("lora_B" in n) for n, t in load_file(file).items()}, file)
    for dtype in (None, "float32"):
        report = hf_tsv.merge(tmp_path / "lora", base_model=base, output=tmp_path / f"{dtype}",
                              dtype=dtype, progress=False)  # fmt: skip
        assert not of_kind(report, "use a checkpoint in float32"), report.warnings
        assert len(of_kind(report, "is lost by rounding to bfloat16")) == (dtype is None)
