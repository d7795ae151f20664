"""Pictures of reports: readable on white and on black, for any number of tasks and any names."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
from cli import ended
from forks import fork
from names import HOSTILE
from PIL import Image

import hf_tsv
from hf_tsv.checkpoints.layout import block_and_kind
from hf_tsv.reports import drawing, pictures
from hf_tsv.reports.interference import InterferenceReport

PAGES = ("#ffffff", "#0b0f19")  # of the Hub, in light and dark
SIGHTS = {  # Machado, Oliveira and Fernandes (2009), severity 1
    "any": np.eye(3),
    "protanopia": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deuteranopia": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritanopia": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


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
    assert contrast(drawing.TEXT, page) >= 4
    assert all(contrast(colour, page) >= 3 for colour in drawing.COLOURS)


@pytest.mark.parametrize("sight", SIGHTS)
def test_colours_are_told_apart(sight: str) -> None:
    for first, second in combinations(drawing.COLOURS, 2):
        assert np.linalg.norm(seen(first, sight) - seen(second, sight)) > 10, (first, second)


@pytest.mark.parametrize(
    ("names", "blocks"), [(["a", "b"], 1), ([f"clip-{i}" for i in range(20)], 24), (HOSTILE, 1)]
)
def test_nothing_is_cut_off(
    measured: InterferenceReport, names: list[str], blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(drawing, "DPI", 60)  # the frame below is wider so, and drawn sooner
    report = deeper(with_tasks(measured, names), blocks)
    for picture in (*pictures.of_interference(report), pictures.of_merge(report)):
        image = Image.open(io.BytesIO(picture.png))
        assert image.format == "PNG" and image.width == drawing.WIDTH * drawing.DPI
        alpha = np.asarray(image.convert("RGBA"))[:, :, 3]
        frame = [alpha[:2], alpha[-2:], alpha[:, :2].T, alpha[:, -2:].T]
        assert not any(edge.any() for edge in frame), picture.file
        assert 0.01 < (alpha > 0).mean() < 0.95  # drawn, on nothing
        assert picture.alt and picture.alt.isprintable()


def test_every_picture_is_there_and_says_what_it_shows(measured: InterferenceReport) -> None:
    drawn = {picture.file: picture for picture in pictures.of_interference(measured)}
    assert set(drawn) == {"pairs.png", "blocks.png", "layers.png", "spectrum.png", "ranks.png"}
    (i, j), (_, m) = measured.extremes()
    names = [task["name"] for task in measured.tasks]
    said = drawn["pairs.png"].alt
    assert said.startswith(f"{names[i]} and {names[j]} interfere most")
    assert f"{names[m]} least" in said
    blocks = {name: block["sti"] for name, block in measured.blocks.items()}
    worst = max(blocks, key=lambda name: blocks[name])
    assert f"block {worst} ({drawing.number_text(blocks[worst])})" in drawn["blocks.png"].alt
    inside = {n: w["sti"] for n, w in measured.weights.items() if ".layers." in n}
    name = max(inside, key=lambda name: inside[name])
    block, kind = block_and_kind(name)
    said = f"Most in {kind} of block {block}: {drawing.number_text(inside[name])}."
    assert drawn["layers.png"].alt == said
    ranks = [rank for weight in measured.weights.values() for rank in weight["ranks"] if rank]
    assert f"{min(ranks)} to {max(ranks)} triplets" in drawn["ranks.png"].alt
    energies = [task["energy"] for task in measured.tasks]
    assert f"{min(energies):.0%} to {max(energies):.0%}" in drawn["spectrum.png"].alt


def axes_of(draw: Any, report: InterferenceReport) -> Any:
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    draw(axes, report)
    return axes


def test_the_heat_map_has_every_pair(measured: InterferenceReport) -> None:
    axes = axes_of(pictures._pairs, measured)
    texts = {text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts}
    found = [measured.pairs[i][j] for i, j in combinations(range(3), 2)]
    low, top = min(found), max(found)
    for i, j in combinations(range(3), 2):
        value = measured.pairs[i][j]
        for place in ((i, j), (j, i)):
            assert texts[place][0] == drawing.number_text(value, top)
            assert texts[place][1] == ("black" if value - low > 0.6 * (top - low) else "white")
    assert len(texts) == 6 and axes.images[0].get_array()[0, 1] == measured.pairs[0][1]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]


def test_blocks_are_drawn_before_and_after(measured: InterferenceReport) -> None:
    axes = axes_of(pictures._blocks, measured)
    blocks = sorted(measured.blocks, key=pictures._depth)
    heights = [bar.get_height() for bar in sorted(axes.patches, key=lambda bar: bar.get_x())]
    assert heights == [measured.blocks[block]["sti"] for block in blocks]
    (after,) = axes.lines
    assert list(after.get_ydata()) == [measured.blocks[block]["sti_after"] for block in blocks]
    as_it_is = {n: {**b, "sti_after": b["sti"]} for n, b in measured.blocks.items()}
    untouched = replace(measured, total_after=measured.total, blocks=as_it_is)
    assert not axes_of(pictures._blocks, untouched).lines
    assert "orthogonalisation" not in pictures._blocks_alt(untouched)


def figures_of(monkeypatch: pytest.MonkeyPatch, draw: Any, place: int = -1) -> Any:
    """The figure that a picture, the last of those drawn or another, is made of."""
    made: list[Any] = []
    monkeypatch.setattr(drawing, "to_png", lambda figure: made.append(figure) or b"")
    draw()
    return made[place]


def test_spectra_are_those_of_the_report(
    measured: InterferenceReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right = figures_of(monkeypatch, lambda: pictures._spectra(measured)).axes
    share = measured.spectra["rank_share"]
    for task in range(3):
        sigma, energy = (measured.spectra[k][task] for k in ("singular_values", "energy"))
        known = [value for value in sigma if value > 0]
        assert list(left.lines[task].get_ydata()) == known
        assert list(right.lines[task].get_ydata()) == energy
        assert list(right.lines[task].get_xdata()) == share
    kept = sorted(w["rank"] / min(w["shape"]) for w in measured.weights.values())
    assert right.lines[3].get_xdata()[0] == pytest.approx(np.median(kept))


def test_of_many_tasks_the_extremes_have_names(measured: InterferenceReport) -> None:
    report = with_tasks(measured, [f"t{i}" for i in range(8)])
    tasks = [{**task, "effective_rank": 10.0 + i} for i, task in enumerate(report.tasks)]
    lines = pictures._task_lines(replace(report, tasks=tasks))
    named = [(i, name) for i, (_, name, _) in enumerate(lines) if name]
    assert named == [(0, "t0: effective rank 10"), (7, "t7: effective rank 17")]


@pytest.mark.parametrize(("place", "key"), [(2, "sti"), (4, "ranks")])
def test_bars_over_depth_are_those_of_the_report(
    measured: InterferenceReport, monkeypatch: pytest.MonkeyPatch, place: int, key: str
) -> None:
    unequal = {n: {**w, "ranks": [2, 5, 3]} for n, w in measured.weights.items()}
    measured = replace(measured, weights=unequal)
    figure = figures_of(monkeypatch, lambda: pictures.of_interference(measured), place)
    assert len(figure.axes) == 2  # a row a tower, and none for the few beside
    for axes, tower in zip(figure.axes, ("vision", "text"), strict=True):
        weights = [n for n in measured.weights if n.startswith(f"{tower}_model.encoder")]
        values = [measured.weights[name][key] for name in weights]
        wanted = sorted(max(v) if isinstance(v, list) else v for v in values)
        assert sorted(bar.get_height() for bar in axes.patches) == pytest.approx(wanted)


def test_a_merge_has_pairs_beside_blocks(
    measured: InterferenceReport, monkeypatch: pytest.MonkeyPatch
) -> None:
    left, right, *_ = figures_of(monkeypatch, lambda: pictures.of_merge(measured)).axes
    assert (left.get_title(), right.get_title()) == ("Pairwise interference (STI)", "STI by block")


def test_settings_of_the_user_change_nothing(measured: InterferenceReport, tmp_path: Path) -> None:
    """Neither a backend that is not there nor the fonts of a matplotlibrc."""
    code = f"""
import pickle, hashlib, sys
from hf_tsv.reports import drawing, pictures
from hf_tsv.checkpoints.layout import block_and_kind
report = pickle.load(open({str(tmp_path / "report")!r}, "rb"))
picture = drawing.attempted(lambda: pictures.of_merge(report))
print(hashlib.sha256(picture.png).hexdigest())
"""
    (tmp_path / "report").write_bytes(pickle.dumps(measured))
    (tmp_path / "matplotlibrc").write_text(
        "axes.labelsize: 30\nsavefig.bbox: tight\ntext.usetex: True\n"
    )
    odd = {"MPLBACKEND": "module://nowhere.at_all", "MATPLOTLIBRC": str(tmp_path)}
    done = ended(fork("-c", code, environment={**os.environ, **odd}))
    expected = pictures.of_merge(measured)
    assert done.out.strip() == hashlib.sha256(expected.png).hexdigest()


@pytest.mark.parametrize(("text", "said"), [("no font\nof this", "no font"), ("", "RuntimeError")])
def test_a_picture_that_fails_is_a_warning(
    caplog: pytest.LogCaptureFixture, text: str, said: str
) -> None:
    def fails() -> None:
        raise RuntimeError(text)

    with caplog.at_level("WARNING", logger="hf_tsv"):
        assert drawing.attempted(fails) is None
    assert f"No pictures: matplotlib is installed, but it ({said}) failed" in caplog.text


def test_pictures_are_the_same_every_time(measured: InterferenceReport) -> None:
    assert pictures.of_merge(measured).png == pictures.of_merge(measured).png


def test_a_larger_interference_is_a_higher_bar(measured: InterferenceReport) -> None:
    """From the pixels: the block made ten times as large reaches ten times as high."""
    report = deeper(measured, 2)
    small = {"sti": 1.0, "sti_after": 0.0}
    blocks = {"vision 0": small, "vision 1": {**small, "sti": 10.0}}
    picture = pictures.of_interference(replace(report, blocks=blocks))[1]
    pixels = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGBA")).astype(int)
    blue = np.array([int(drawing.COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)])
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
    layers = pictures.layers_of({name: float(i) for i, name in enumerate(names)})
    assert [layer.value for layer in layers] == [5, 4, 3, 1, 2, 0]


def test_names_lose_what_all_begin_with(measured: InterferenceReport) -> None:
    names = [
        "clip-vit-base-patch32_sun397",
        "clip-vit-base-patch32_svhn",
        "clip-vit-base-patch32_s",
    ]
    assert pictures._labels(with_tasks(measured, names)) == ["sun397", "svhn", "s"]
    assert pictures._labels(with_tasks(measured, ["sun", "sum"])) == ["sun", "sum"]
    short = pictures._labels(with_tasks(measured, ["a", "x" * 50]))[1]
    assert len(short) == drawing.LONGEST_NAME and "…" in short
    names = [f"{task}-clip-vit-base-patch32-finetuned" for task in ("sun397", "svhn")]
    assert pictures._labels(with_tasks(measured, names)) == ["sun397", "svhn"]
    alike = [f"{'x' * 20}{middle}{'y' * 20}" for middle in "abc"]
    assert len(set(pictures._labels(with_tasks(measured, alike)))) == 3


@pytest.mark.parametrize(
    ("value", "largest", "text"),
    [
        (0.0, None, "0"), (416.3, None, "416"), (60.0, 81.2, "60.0"), (2.5, 2.5, "2.50"),
        (43_210.0, None, "43.2k"), (1.9e-15, None, "1.9e-15"), (3e7, None, "3.0e7"),
        (0.012, None, "0.0120"),
    ],
)  # fmt: skip
def test_numbers_are_short(value: float, largest: float | None, text: str) -> None:
    assert drawing.number_text(value, largest) == text


def test_a_compression_is_drawn(tmp_path: Path) -> None:
    curve = ([0.0, 0.1, 0.2], [0.0, 0.5, 0.7])
    stem = "vision_model.encoder.layers"
    ranks = {f"{stem}.{i}.mlp.fc1.weight": 3 + i for i in range(12)}
    ranks[f"{stem}.0.mlp.fc2.weight"] = 4
    picture = pictures.of_compression({"mlp.fc1": curve, "mlp.fc2": curve}, ranks)
    alpha = np.asarray(Image.open(io.BytesIO(picture.png)).convert("RGBA"))[:, :, 3]
    assert picture.file == "compression.png" and 0.01 < (alpha > 0).mean() < 0.95
    assert not any(edge.any() for edge in (alpha[:2], alpha[-2:], alpha[:, :2], alpha[:, -2:]))
