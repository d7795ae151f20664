"""Pictures of reports: readable on white and on black, for any number of tasks and any names."""

from __future__ import annotations

import io
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
from PIL import Image

import hf_tsv
from hf_tsv import plots
from hf_tsv.interfering import InterferenceReport

PAGES = ("#ffffff", "#0b0f19")  # of the Hub, in light and dark
SIGHTS = {  # Machado, Oliveira and Fernandes (2009), severity 1
    "any": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}
HOSTILE = [
    "$\\frac{x}{$",
    "数字 <script>alert(1)</script>",
    "a\nb\x1b[31mred\u202e",
    "x" * 300,
    "_^$",
]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> InterferenceReport:
    """Of three fine-tunes of both towers."""
    folder = tmp_path_factory.mktemp("tasks")
    clips.make_base(folder / "base")
    for seed, name in enumerate("abc", start=60):
        clips.make_fine_tune(folder / "base", folder / name, seed, "full")
    return hf_tsv.interference(
        [folder / name for name in "abc"], base_model=folder / "base", progress=False
    )


def with_tasks(report: InterferenceReport, names: list[str]) -> InterferenceReport:
    """The report as if there were these tasks."""
    count = len(names)
    of = [i % len(report.tasks) for i in range(count)]
    pairs = np.abs(np.subtract.outer(np.arange(count), np.arange(count))) * 11.7
    spectra = {key: [values[i] for i in of] for key, values in report.spectra.items()}
    return replace(
        report,
        tasks=[{**report.tasks[i], "name": name} for i, name in zip(of, names, strict=True)],
        pairs=pairs.tolist(),
        spectra={**spectra, "rank_share": report.spectra["rank_share"]},
        weights={n: {**w, "ranks": [w["ranks"][i] for i in of]} for n, w in report.weights.items()},
    )


def deeper(report: InterferenceReport, blocks: int) -> InterferenceReport:
    """The report as if each tower had so many blocks."""
    weights: dict[str, Any] = {}
    for name, weight in report.weights.items():
        for block in range(blocks) if ".layers.0." in name else ():
            weights[name.replace(".0.", f".{block}.")] = weight
        if ".layers." not in name:
            weights[name] = weight
    names = [f"{tower} {block}" for tower in ("vision", "text") for block in range(blocks)]
    return replace(
        report, weights=weights, blocks=dict.fromkeys([*names, "other"], report.blocks["vision 0"])
    )


def linear(colour: str) -> Any:
    part = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(part <= 0.04045, part / 12.92, ((part + 0.055) / 1.055) ** 2.4)


def contrast(first: str, second: str) -> float:
    """As the Web Content Accessibility Guidelines define it."""
    low, high = sorted(float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (first, second))
    return (high + 0.05) / (low + 0.05)


def seen(colour: str, sight: str) -> Any:
    """CIELAB of a colour, as somebody sees it."""
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    rgb = np.clip(np.array(SIGHTS[sight]) @ linear(colour), 0, 1)
    xyz = np.array(to_xyz) @ rgb / [0.9505, 1.0, 1.089]
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("page", PAGES)
def test_colours_stand_out_from_the_page(page: str) -> None:
    assert contrast(plots.TEXT, page) >= 4
    assert all(contrast(colour, page) >= 3 for colour in plots.COLOURS)


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_are_told_apart(sight: str) -> None:
    for first, second in combinations(plots.COLOURS, 2):
        assert np.linalg.norm(seen(first, sight) - seen(second, sight)) > 10, (first, second)


@pytest.mark.parametrize("names", [["a", "b"], [f"clip-{i}" for i in range(20)], HOSTILE])
@pytest.mark.parametrize("blocks", [1, 24])
def test_nothing_is_cut_off(measured: InterferenceReport, names: list[str], blocks: int) -> None:
    report = deeper(with_tasks(measured, names), blocks)
    for picture in (*plots.of_interference(report), plots.of_merge(report)):
        image = Image.open(io.BytesIO(picture.png))
        assert image.format == "PNG" and image.width == plots.WIDTH * plots.DPI
        alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        frame = [alpha[:2], alpha[-2:], alpha[:, :2].T, alpha[:, -2:].T]
        assert not any(edge.any() for edge in frame), picture.file
        assert 0.01 < (alpha > 0).mean() < 0.95  # drawn, on nothing
        assert picture.alt and picture.alt.isprintable()


def test_every_picture_is_there_and_says_what_it_shows(measured: InterferenceReport) -> None:
    drawn = {picture.file: picture for picture in plots.of_interference(measured)}
    assert set(drawn) == {"pairs.png", "blocks.png", "layers.png", "spectrum.png", "ranks.png"}
    (i, j), (_, m) = measured.extremes()
    names = [task["name"] for task in measured.tasks]
    said = drawn["pairs.png"].alt
    assert said.startswith(f"{names[i]} and {names[j]} disturb") and f"{names[m]} least" in said
    worst = max(measured.weights, key=lambda name: measured.weights[name]["sti"])
    assert worst in drawn["layers.png"].alt


def test_pictures_are_the_same_every_time(measured: InterferenceReport) -> None:
    assert plots.of_merge(measured).png == plots.of_merge(measured).png


def test_a_larger_interference_is_a_higher_bar(measured: InterferenceReport) -> None:
    """From the pixels: the block made ten times as large reaches ten times as high."""
    report = deeper(measured, 2)
    small = {"sti": 1.0, "sti_after": 0.0}
    blocks = {"vision 0": small, "vision 1": {**small, "sti": 10.0}}
    picture = plots.of_interference(replace(report, blocks=blocks))[1]
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGBA")).astype(int)
    blue = np.array([int(plots.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
    bars = (np.abs(pixels[:, :, :3] - blue).sum(axis=2) < 30) & (pixels[:, :, 3] > 200)
    heights = bars.sum(axis=0)
    drawn = heights.nonzero()[0]
    first, second = np.array_split(heights[drawn.min() : drawn.max()], 2)
    assert np.median(second[second > 0]) / np.median(first[first > 0]) == pytest.approx(10, rel=0.1)


def test_layers_are_in_the_order_of_depth() -> None:
    names = [
        "visual_projection.weight", "vision_model.encoder.layers.10.mlp.fc1.weight",
        "text_model.encoder.layers.0.mlp.fc2.weight",
        "vision_model.encoder.layers.2.self_attn.out_proj.weight",
        "vision_model.encoder.layers.2.self_attn.k_proj.weight",
        "vision_model.encoder.layers.2.self_attn.q_proj.weight",
    ]  # fmt: skip
    layers = plots.layers_of({name: float(i) for i, name in enumerate(names)})
    assert [layer.value for layer in layers] == [5, 4, 3, 1, 2, 0]


def test_names_lose_what_all_begin_with(measured: InterferenceReport) -> None:
    names = [
        "clip-vit-base-patch32_sun397",
        "clip-vit-base-patch32_svhn",
        "clip-vit-base-patch32_s",
    ]
    assert plots._labels(with_tasks(measured, names)) == ["sun397", "svhn", "s"]
    assert plots._labels(with_tasks(measured, ["sun", "sum"])) == ["sun", "sum"]
    short = plots._labels(with_tasks(measured, ["a", "x" * 50]))[1]
    assert len(short) == plots.LONGEST_NAME and short.startswith("…")


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [
        (0.0, None, "0"), (416.3, None, "416"), (60.0, 81.2, "60.0"), (2.5, 2.5, "2.50"),
        (43_210.0, None, "43.2k"), (1.9e-15, None, "1.9e-15"), (3e7, None, "3.0e7"),
        (0.012, None, "0.0120"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, largest: float | None, text: str) -> None:
    assert plots._number(value, largest) == text


def test_a_compression_is_drawn(tmp_path: Path) -> None:
    curve = ([0.0, 0.1, 0.2], [0.0, 0.5, 0.7])
    stem = "vision_model.encoder.layers"
    ranks = {f"{stem}.{i}.mlp.fc1.weight": 3 + i for i in range(12)}
    ranks[f"{stem}.0.mlp.fc2.weight"] = 4
    picture = plots.of_compression({"mlp.fc1": curve, "mlp.fc2": curve}, ranks)
    alpha = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGBA"))[:, :, 3]
    assert picture.file == "compression.png" and 0.01 < (alpha > 0).mean() < 0.95
    assert not any(edge.any() for edge in (alpha[:2], alpha[-2:], alpha[:, :2], alpha[:, -2:]))
