"""The built wheel, in an environment with what it says it needs and nothing else."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
from environments import link_requirements

ROOT = Path(__file__).parents[2]


def test_the_wheel_installs_and_works_in_an_empty_environment(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("hf_tsv-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    cards = {path.name for path in (ROOT / "model_cards").iterdir()}  # and the page's parts
    assert {f"hf_tsv/model_cards/{name}" for name in cards} <= set(names)
    assert {"merge.md.jinja", "_citation.jinja", "sortable.js"} <= cards
    assert "hf_tsv/py.typed" in names
    suites = {f"hf_tsv/evaluation/suites/{name}.yaml" for name in ("suites", "tasks")}
    assert suites <= set(names)
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "examples"))]

    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps",
           "--no-index", "--disable-pip-version-check", "--no-compile"]  # fmt: skip
    subprocess.run([*pip, wheel], check=True, capture_output=True)
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(tmp_path / "env")}))
    (metadata,) = site.glob("hf_tsv-*.dist-info")
    link_requirements(PathDistribution(metadata), site, set())
    monkeypatch.delenv("PYTHONPATH", raising=False)
    script = python.with_name("hf-tsv")
    for command, said in (
        ([script], "Merge or compress"),
        ([script, "compress"], "Compress a fine-tuned CLIP checkpoint"),
        ([script, "reconstruct"], "Rebuild a full checkpoint"),
        ([python, "-m", "hf_tsv", "merge"], "Merge fine-tuned CLIP checkpoints"),
    ):
        help_of = [*command, "--help"]
        done = subprocess.run(help_of, check=True, capture_output=True, text=True, cwd=tmp_path)
        assert said in done.stdout

    # matplotlib is an extra: without it there are reports and cards, without pictures
    code = f"""
from hf_tsv import TaskSwitcher, compress, interference, load_model, merge, reconstruct
from hf_tsv.reports.templates import templates
assert (templates() / "merge.md.jinja").is_file()
assert "site-packages" in str(templates()), templates()
tasks, base = [{str(zoo / "vision")!r}, {str(zoo / "flat")!r}], {str(zoo / "base")!r}
compress(tasks[0], base_model=base, output="compress", report=True)
interference(tasks, base_model=base, output="interference")
"""
    merging = [zoo / "vision", zoo / "flat", "--base-model", zoo / "base", "--report"]
    missing = "Warning: No pictures: matplotlib is not installed. Run `pip install"
    for words, count in (
        ([script, "merge", *merging, "-o", "merge"], 1),
        ([python, "-c", code], 2),
    ):
        done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count(missing) == count, done.stderr
    for verb, page in (
        ("merge", "README.md"), ("compress", "README.md"), ("interference", "interference.html"),
    ):  # fmt: skip
        folder = tmp_path / verb
        text = (folder / page).read_text()
        assert "effective rank" in text or "by kind of layer" in text
        assert ".png" not in text and "<img" not in text and not list(folder.glob("*.png"))
