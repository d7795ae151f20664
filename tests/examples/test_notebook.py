"""The notebook of `examples/`, run in a real kernel on the models that lie beside it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from hub import Hub
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[2] / "examples"
SKIPPED = "skip-execution"
"""The tag of cells that need the network or a token; nbclient leaves them out."""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(jupyter|nbclient|zmq).*")


def notebook() -> nbformat.NotebookNode:
    return nbformat.read(EXAMPLES / "first_merge.ipynb", as_version=4)


def test_the_notebook_runs_and_pushes_a_model(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(EXAMPLES / "tiny", tmp_path / "tiny")
    monkeypatch.setenv(
        "PYTHONPATH", os.pathsep.join([str(EXAMPLES.parent), os.environ.get("PYTHONPATH", "")])
    )
    content = notebook()
    for cell in content.cells:
        if "YOUR_NAME/" in cell.source and cell.cell_type == "code":
            cell.source = cell.source.replace("YOUR_NAME/", "me/")
            cell.metadata["tags"].remove(SKIPPED)  # the loopback Hub is there, and a token
    client = NotebookClient(
        content, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    said = "".join(
        output.get("text", "") for cell in content.cells for output in cell.get("outputs", ())
    )
    assert "Most: " in said and "before the merge" in said
    assert hub.repos["me/first-merge"].private
    assert "model.safetensors" in hub.repos["me/first-merge"].resolve("main").files


def test_cells_that_need_the_network_or_a_token_say_so() -> None:
    cells = notebook().cells
    skipped = [i for i, cell in enumerate(cells) if SKIPPED in cell.metadata.get("tags", ())]
    assert len(skipped) == 2
    for i, need in zip(skipped, ("needs the network", "needs a token"), strict=True):
        assert need in cells[i - 1].source


def test_shown_outputs_hold_no_path_of_the_machine_that_made_them() -> None:
    text = (EXAMPLES / "first_merge.ipynb").read_text(encoding="utf-8")
    assert not [
        start for start in ("/home/", "/root/", "/tmp/", str(EXAMPLES.parent)) if start in text
    ]
    assert '"output_type": "error"' not in text
