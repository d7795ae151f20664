"""Calibration and factors of layers in whole merges, against float64 from the files."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest
from cli import hf_tsv
from deep import deep_checkpoints
from ends import ends, ranks
from numpy.typing import NDArray
from safetensors.numpy import load_file

import hf_tsv as library

TASKS = 3
BLOCK = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.")

Array = NDArray[np.float64]
Weights = dict[str, Array]
Updates = tuple[Weights, dict[str, list[Array]]]


def weights(folder: Path) -> Weights:
    found = load_file(folder / "model.safetensors")
    return {name: value.astype(np.float64) for name, value in found.items()}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and fine-tunes of three blocks."""
    folder = tmp_path_factory.mktemp("deep")
    deep_checkpoints(folder, 3, width=32, tasks=TASKS)
    return folder


@pytest.fixture(scope="module")
def updates(deep: Path) -> Updates:
    """W0, and Δ of each task in each weight."""
    base, tasks = weights(deep / "base"), [weights(deep / f"t{i + 1}") for i in range(TASKS)]
    return base, {name: [task[name] - value for task in tasks] for name, value in base.items()}


def merged(deep: Path, folder: Path, **options: object) -> Weights:
    """Merged update of every weight."""
    tasks = [str(deep / f"t{i + 1}") for i in range(TASKS)]
    library.merge(tasks, base_model=deep / "base", output=folder, progress=False, **options)  # type: ignore[arg-type]
    base = weights(deep / "base")
    return {name: value - base[name] for name, value in weights(folder).items()}


def assert_near(found: Array, expected: Array, name: str) -> None:
    """Equal, but for rounding of W0 + ΔW to float32."""
    assert np.abs(found - expected).max() < 4e-6, name


def depth(name: str, blocks: int) -> float | None:
    found = BLOCK.match(name)
    return None if found is None else int(found[1]) / (blocks - 1)


def test_task_arithmetic_is_calibrated_in_its_matrices(
    tmp_path: Path, deep: Path, updates: Updates
) -> None:
    found = merged(deep, tmp_path / "out", method="task-arithmetic", alpha=1.0, calibrate=True)
    seen = 0
    for name, deltas in updates[1].items():
        total = np.sum(deltas, axis=0)
        if total.ndim != 2 or "embedding" in name:
            assert_near(found[name], total, name)
            continue
        u, s, vh = np.linalg.svd(total, full_matrices=False)
        own = [u.T @ delta for delta in deltas]
        ratios = [(s[:, None] * vh * a).sum(1) / (a * a).sum(1) for a in own]
        eta = np.mean([np.maximum(ratio, 1 / TASKS) for ratio in ratios], axis=0)
        assert_near(found[name], u * (s / eta) @ vh, name)
        seen += 1
    assert seen > 10


def test_lines_scales_by_depth(tmp_path: Path, deep: Path, updates: Updates) -> None:
    plain = merged(deep, tmp_path / "plain")
    scaled = merged(deep, tmp_path / "scaled", layer_scale="lines", alpha=0.7)
    deltas = updates[1]
    summed = sum(np.abs(np.sum(own, axis=0)).sum() for own in deltas.values())
    start = summed / (TASKS * sum(np.abs(plain[name]).sum() for name in deltas))
    blocks = 1 + max(int(found[1]) for name in deltas if (found := BLOCK.match(name)))
    for name in deltas:
        at = depth(name, blocks)
        factor = start if at is None else start + 0.7 * at
        assert_near(scaled[name], factor * plain[name], name)


def test_larv_scales_each_task_before(tmp_path: Path, deep: Path, updates: Updates) -> None:
    base, deltas = updates
    found = merged(deep, tmp_path / "out", method="task-arithmetic", alpha=1.0, layer_scale="larv")
    matrices = [name for name in deltas if deltas[name][0].ndim == 2]
    blocks = 1 + max(int(match[1]) for name in deltas if (match := BLOCK.match(name)))

    def effective_rank(a: Array) -> float:
        shares = np.linalg.svd(a, compute_uv=False) ** 2
        shares = shares[shares > 0] / shares.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))

    expected = {name: np.zeros_like(base[name]) for name in matrices}
    for task in range(TASKS):
        c = {}
        for name in matrices:
            w, d = base[name], deltas[name][task]
            apart = np.linalg.norm(w @ d.T - d @ w.T) + np.linalg.norm(w.T @ d - d.T @ w)
            c[name] = apart / 2 / np.linalg.norm(w) / np.linalg.norm(d)
        values = np.array(list(c.values()))
        for name in matrices:
            match = BLOCK.match(name)
            block = int(match[1]) if match else 0 if "embedding" in name else blocks - 1
            conflict = np.log1p(np.exp((c[name] - values.mean()) / values.std()))
            e = effective_rank(base[name]) / effective_rank(deltas[name][task])
            q = e * np.sqrt((block + 1) / blocks) / (conflict + 1)
            expected[name] += (1 + 0.5 * np.tanh(3 * (q - 1))) * deltas[name][task]
    for name in matrices:
        assert_near(found[name], expected[name], name)
    others = [name for name in deltas if name not in expected]
    for name in others:
        assert_near(found[name], np.sum(deltas[name], axis=0), name)


def command(deep: Path, folder: str, *options: str) -> list[str]:
    tasks = [str(deep / f"t{i + 1}") for i in range(TASKS)]
    return ["merge", *tasks, "--base-model", str(deep / "base"), "-o", folder, *options]


STEPS = ("--method", "wudi", "--calibrate", "--layer-scale", "lines")


def test_processes_streams_and_recipes_give_the_same_bytes(tmp_path: Path, deep: Path) -> None:
    for folder, more in (("one", ()), ("thrifty", ("--max-memory", "2GB", "--stream"))):
        done = hf_tsv(*command(deep, folder, *STEPS, *more), cwd=tmp_path)
        assert done.code == 0, done.err
    several = ends(ranks(*command(deep, "two", *STEPS), count=2, cwd=tmp_path))
    assert [one.code for one in several] == [0, 0], several
    again = hf_tsv("merge", "--recipe", "one", "-o", "again", cwd=tmp_path)
    assert again.code == 0, again.err
    first = (tmp_path / "one" / "model.safetensors").read_bytes()
    for folder in ("thrifty", "two", "again"):
        assert (tmp_path / folder / "model.safetensors").read_bytes() == first, folder
    recipe = (tmp_path / "one" / "hf_tsv_recipe.yaml").read_text(encoding="utf-8")
    assert "layer_scale: lines" in recipe and "calibrate: true" in recipe


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--method", "iso-c", "--calibrate"), "The method iso-c cannot be calibrated."),
        (("--wudi-filter", "tact"), "--wudi-filter is no choice of the method tsv."),
        (("--method", "tall-mask", "--layer-scale", "larv"),
         "The method tall-mask scales no layers."),
        (("--layer-scale", "deep"), "'deep'"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(
    tmp_path: Path, deep: Path, options: tuple[str, ...], problem: str
) -> None:
    done = hf_tsv(*command(deep, "out", *options), cwd=tmp_path)
    assert done.code == 2 and problem in done.err, done.err
    assert not list(tmp_path.iterdir())


def test_one_task_has_no_depth_to_scale_by(tmp_path: Path, deep: Path) -> None:
    alone = ["merge", str(deep / "t1"), "--base-model", str(deep / "base"), "-o", "out"]
    done = hf_tsv(*alone, "--layer-scale", "lines", cwd=tmp_path)
    assert done.code == 2 and "there is one" in done.err


def test_the_plan_shows_what_is_held(tmp_path: Path, deep: Path) -> None:
    """Sums hold one task at a time, calibrated sums all of them."""
    sizes = []
    for options in ((), ("--calibrate",)):
        words = command(deep, "out", "--method", "task-arithmetic", "--dry-run", "--json", *options)
        sizes.append(json.loads(hf_tsv(*words, cwd=tmp_path).out)["peak_memory_bytes"])
    assert all(a < b for a, b in itertools.pairwise(sizes))


def test_lines_with_nothing_left_to_merge_is_the_base(tmp_path: Path, deep: Path) -> None:
    words = command(deep, "out", "--layer-scale", "lines", "--keep-base", "*")
    done = hf_tsv(*words, cwd=tmp_path)
    assert done.code == 0 and "No update is left to merge" in done.err, done.err
    for name, value in weights(tmp_path / "out").items():
        assert np.array_equal(value, weights(deep / "base")[name]), name


def test_with_lines_no_alpha_means_the_base(tmp_path: Path, deep: Path) -> None:
    done = hf_tsv(*command(deep, "out", "--layer-scale", "lines", "--alpha", "0"), cwd=tmp_path)
    assert done.code == 0 and "the result is the base model" not in done.err
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "the result is the base model" not in card


def test_depth_is_that_of_the_tower_whatever_is_kept(tmp_path: Path, deep: Path) -> None:
    plain = merged(deep, tmp_path / "all", method="task-arithmetic", layer_scale="lines", alpha=1.0)
    kept = merged(deep, tmp_path / "kept", method="task-arithmetic", layer_scale="lines", alpha=1.0,
                  keep_base=["vision_model.encoder.layers.2.*"])  # fmt: skip
    for name, value in kept.items():
        if ".layers.2." not in name:
            assert_near(value, plain[name], name)


def test_calibration_is_left_out_beside_a_recipe(tmp_path: Path, deep: Path) -> None:
    words = command(deep, "calibrated", "--method", "task-arithmetic", "--calibrate")
    assert hf_tsv(*words, cwd=tmp_path).code == 0
    repeated = ["merge", "--recipe", "calibrated", "-o"]
    assert hf_tsv(*repeated, "plain", "--no-calibrate", cwd=tmp_path).code == 0
    other = hf_tsv(*repeated, "iso", "--method", "iso-c", cwd=tmp_path)
    assert other.code == 0 and "calibrate is False here" in other.err, other.err
    direct = command(deep, "direct", "--method", "task-arithmetic")
    assert hf_tsv(*direct, cwd=tmp_path).code == 0
    found, expected = (
        (tmp_path / n / "model.safetensors").read_bytes() for n in ("plain", "direct")
    )
    assert found == expected
