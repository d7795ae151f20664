"""The demo of a minute, and the trained models in `examples/tiny/` that it shows."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path

import pytest
from cli import hf_tsv
from PIL import Image
from safetensors import safe_open
from transformers import CLIPModel, CLIPProcessor

from benchmarks import demo
from benchmarks.prepared import bars
from benchmarks.tiny_clip import BASE, NAMES, TINY
from benchmarks.tiny_clip.first_tasks import FIRST_TASKS

README = (TINY / "README.md").read_text(encoding="utf-8")
TEXTS = [p for p in TINY.rglob("*") if p.suffix in (".md", ".json", ".yaml", ".jinja")]
POINTS = 0.6
"""Difference in accuracy that another processor may make: 3 of 500 images."""


def claimed(heading: str) -> dict[str, list[str]]:
    """Rows of the table below a heading of the README, by their first cell."""
    lines = README.partition(f"## {heading}\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "|" in line]
    return {row[0]: row[1:] for row in rows if not set(row[0]) <= {"-", ":"}}


def test_the_demo_shows_what_the_readme_claims_and_a_model_that_loads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("benchmarks.demo.quiet_libraries", lambda: None)  # for this whole process
    numbers = tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["demo", "-o", "merged", "--json", str(numbers)])
    demo.main()
    said = capsys.readouterr().out

    found = json.loads(numbers.read_text())
    table = claimed("Accuracies")
    models = table["task"]
    assert list(found["accuracy"]) == models and found["tasks"] == list(NAMES)
    for i, name in enumerate(NAMES):
        for column, model in enumerate(models):
            accuracy = found["accuracy"][model][i]
            assert accuracy == pytest.approx(float(table[name][column]), abs=POINTS), (name, model)
    means = {model: float(table["mean"][i]) for i, model in enumerate(models)}
    assert means[demo.TSV] > means[demo.AVERAGE] > means[demo.UNTRAINED]

    assert "hf-tsv merge" in said and "The merged model is in merged." in said
    lines = [line.strip() for line in said.splitlines() if line.startswith("  ")][-3:]
    scope: dict[str, object] = {}
    exec("\n".join(lines), scope)
    assert isinstance(scope["model"], CLIPModel)
    assert isinstance(scope["processor"], CLIPProcessor)


def test_the_shipped_files_are_as_large_as_the_readme_claims() -> None:
    sizes = claimed("Files")
    for name in ("base", *NAMES):
        total = sum(file.stat().st_size for file in (TINY / name).iterdir()) / 1e6
        assert total == pytest.approx(float(sizes[f"`{name}/`"][0].split()[0]), abs=0.006), name
    assert sum(file.stat().st_size for file in TINY.rglob("*") if file.is_file()) < 3e6


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_task_is_factors_in_bfloat16(name: str) -> None:
    (file,) = (TINY / name).glob("*.safetensors")
    with safe_open(file, "pt") as tensors:
        kinds = {tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118
    assert kinds <= {"BF16", "F32"} and "BF16" in kinds


def test_the_commands_of_the_readme_run(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(TINY.parent)
    commands = re.findall(r"^hf-tsv (.*examples/tiny/base.*|inspect .*)$", README, re.MULTILINE)
    assert len(commands) == 4
    for command in commands:
        done = hf_tsv(*command.split(), cwd=tmp_path)
        assert done.code == 0, (command, done.err)


def test_no_shipped_file_holds_a_path_of_the_machine_that_made_it() -> None:
    assert len(TEXTS) > 2 * len(NAMES)
    for file in [*TEXTS, *TINY.rglob("*.safetensors")]:
        found = re.findall(rb"/(?:home|root|tmp|work|Users|mnt)/[\w.-]*", file.read_bytes())
        assert found == [], file


def test_labels_and_images_are_those_of_the_tasks() -> None:
    labels = json.loads((TINY / "labels.json").read_text())
    assert labels == {task.name: list(task.prompts) for task in FIRST_TASKS}
    assert tuple(labels) == NAMES
    images = list((TINY / "images").iterdir())
    assert all(sum(file.stem in labels[name] for file in images) == 1 for name in NAMES)
    for file in images:
        with Image.open(file) as image:
            assert image.size == (32, 32)


def test_the_base_says_nothing_of_where_it_was_trained() -> None:
    assert "_name_or_path" not in (BASE / "config.json").read_text()


def test_a_demo_without_a_terminal_says_every_few_seconds_what_it_does(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with bars(every=0.05) as progress:
        job = progress.add_task("Measuring", total=4)
        progress.advance(job)
        time.sleep(0.2)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1 and all(line.endswith("Measuring: 1 of 4") for line in lines)
