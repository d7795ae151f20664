"""A loopback Hub that the real client talks to, and tiny CLIP checkpoints made by transformers."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

from home import HF_HOME, HUB  # before anything imports huggingface_hub
from hub import Hub

# A shell's background jobs ignore it, and so would what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402

FIRST = ("test_wheel.py", "test_kills.py", "test_open_clip.py", "test_processes.py",
         "test_streaming.py", "test_faults.py", "test_determinism.py", "test_models.py",
         "test_compress.py", "test_cli.py", "test_numbers.py", "test_merge.py")  # fmt: skip
"""Files that take longest, and so begin; their fixtures are made by one process."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what needs a GPU, a browser or the live Hub; begin with what takes longest."""
    import torch  # which the process that only hands out the tests does without

    order = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(FIRST)))
    missing = {
        "gpu": not torch.cuda.is_available(),
        "browser": shutil.which("chromium") is None and "CI" not in os.environ,
        "live": "live" not in (config.option.markexpr or ""),  # unless asked for
    }
    without = [
        i for i in items if any(missing[m.name] for m in i.iter_markers() if m.name in missing)
    ]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if item not in without]


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of checkpoints made by transformers: `base`, and one fine-tune of every kind."""
    import clips

    folder = tmp_path_factory.mktemp("zoo")
    clips.make_base(folder / "base")
    for seed, kind in enumerate(clips.KINDS, start=1):
        clips.make_fine_tune(folder / "base", folder / kind, seed, kind)
    return folder


@pytest.fixture
def hub() -> Iterator[Hub]:
    """The loopback Hub, empty."""
    HUB.reset()
    for kept in ("hub", "datasets", "hf-tsv/unpushed"):  # shas repeat from test to test
        shutil.rmtree(Path(HF_HOME, kept), ignore_errors=True)
    yield HUB
    HUB.reset()


@pytest.fixture
def world(hub: Hub, zoo: Path, tmp_path: Path) -> Path:
    """A Hub with a base and fine-tunes of it, and an empty folder to work in."""
    import clips

    hub.add_repo("org/base", zoo / "base")
    for kind in ("vision", "flat", "full"):
        files = {file.name: file for file in (zoo / kind).iterdir()}
        hub.add_repo(f"org/{kind}", {**files, "README.md": clips.CARD})
    work = tmp_path / "work"
    work.mkdir()
    return work


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds waited between tries, by us and by the Hub client, which are not waited here."""
    import huggingface_hub.file_download
    import huggingface_hub.utils._http

    from hf_tsv.hub import client, uploads

    waited: list[float] = []
    patient = SimpleNamespace(**{**vars(time), "sleep": waited.append})
    for module in (client, uploads, huggingface_hub.file_download, huggingface_hub.utils._http):
        monkeypatch.setattr(module, "time", patient)
    return waited
