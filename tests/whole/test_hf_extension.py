"""`hf tsv`: installed by `hf extensions install` itself, from a GitHub on this machine.

What a download would bring is linked from the environment of the tests: pip is told to install no
dependencies, and finds in PYTHONPATH what the wheel says it needs and what builds it.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from environments import link
from github import github

from benchmarks.tiny_clip import BASE, TINY

ROOT = Path(__file__).parents[2]
HF = Path(sys.executable).with_name("hf")
SHA = "0123456789abcdef0123456789abcdef01234567"
SOURCES = ("pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "hf_tsv", "model_cards")


def archive() -> bytes:
    """The repository as GitHub zips it, without what the wheel leaves out."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        for source in SOURCES:
            path = ROOT / source
            for item in [path] if path.is_file() else sorted(path.rglob("*")):
                if item.is_file() and "__pycache__" not in item.parts:
                    file.write(item, Path(f"hf-tsv-{SHA}") / item.relative_to(ROOT))
    return stream.getvalue()


@pytest.fixture
def pages() -> dict[str, bytes]:
    """Pages of OWNER/hf-tsv on GitHub that the installation reads."""
    raw = "raw.githubusercontent.com/me/hf-tsv/HEAD"
    files = {f"{raw}/{item.name}": item.read_bytes() for item in ROOT.iterdir() if item.is_file()}
    return {
        **files,
        "github.com/me/hf-tsv": b"",
        "github.com/me/hf-tsv/archive/HEAD.zip": archive(),
        "github.com/me/hf-tsv.git/info/refs": f"0155{SHA} HEAD\0".encode(),
    }


def test_hf_installs_and_runs_the_extension(tmp_path: Path, pages: dict[str, bytes]) -> None:
    site, home = tmp_path / "site", tmp_path / "home"
    site.mkdir()
    home.mkdir()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    link(needed, site, set())
    offline = {
        "PIP_NO_DEPS": "1", "PIP_NO_BUILD_ISOLATION": "0", "PIP_NO_INDEX": "1",
        "PIP_CONFIG_FILE": "/dev/null", "PYTHONPATH": str(site), "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    }  # fmt: skip
    system = {"HOME": str(home), "PATH": "/usr/bin:/bin", "COLUMNS": "100"}
    with github(pages, tmp_path) as (network, asked):
        environment = {**system, **offline, **network}

        def hf(*words: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(
                [HF, *words], env=environment, cwd=tmp_path, capture_output=True, text=True,
                check=False, timeout=600,
            )  # fmt: skip

        done = hf("extensions", "install", "me/hf-tsv")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "github.com/me/hf-tsv/archive/HEAD.zip" in asked
        installed = home / ".local/share/hf/extensions/hf-tsv"
        manifest = json.loads((installed / "manifest.json").read_text())
        assert (manifest["type"], manifest["commit_sha"]) == ("python", SHA)
        assert manifest["description"].startswith("Merge fine-tuned CLIP checkpoints")

        done = hf("tsv", "merge", "--help")
        assert done.returncode == 0 and "Merge fine-tuned CLIP checkpoints" in done.stdout

        tasks = [TINY / "digits", TINY / "letters"]
        done = hf("tsv", "merge", *tasks, "--base-model", BASE, "-o", "merged")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == str(tmp_path / "merged")
        assert (tmp_path / "merged" / "model.safetensors").is_file()

        assert hf("tsv", "merge", "--no-such-option").returncode == 2
    (package,) = installed.glob("venv/lib/python*/site-packages/hf_tsv")
    assert package.is_dir()  # its own environment, not the checkout of the tests
