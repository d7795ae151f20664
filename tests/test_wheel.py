"""The built wheel, installed with its dependencies into an empty environment."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_wheel_installs_and_works_in_an_empty_environment(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("hf_tsv-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    cards = {path.name for path in (ROOT / "model_cards").iterdir()}
    assert {f"hf_tsv/model_cards/{name}" for name in cards} <= set(names)
    assert len(cards) == 4 and "hf_tsv/py.typed" in names
    assert not [name for name in names if name.startswith(("tests", "benchmarks"))]

    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "-c", ROOT / "constraints.txt", wheel], check=True, capture_output=True)
    code = """
from hf_tsv import TaskSwitcher, cards, compress, load_model, merge, reconstruct
assert (cards.templates() / "merge.md.jinja").is_file()
assert "site-packages" in str(cards.templates()), cards.templates()
"""
    subprocess.run([python, "-c", code], check=True, cwd=tmp_path)
    script = python.with_name("hf-tsv")
    for command, said in (
        ([script], "Merge or compress"),
        ([script, "compress"], "Compress a fine-tuned CLIP checkpoint"),
        ([script, "reconstruct"], "Make a whole checkpoint"),
        ([python, "-m", "hf_tsv", "merge"], "Merge fine-tuned CLIP checkpoints"),
    ):
        help_of = [*command, "--help"]
        done = subprocess.run(help_of, check=True, capture_output=True, text=True, cwd=tmp_path)
        assert said in done.stdout
