"""The seam of inputs: a form of fine-tunes is one file and one row, and nobody asks which it is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from cli import hf_tsv as run
from dense_diff import DIFF, save_diff
from safetensors.torch import load_file

import hf_tsv
from hf_tsv.checkpoints import opening
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.names import CONFIGS, ROUTING_FILE
from hf_tsv.system.errors import CheckpointError

PACKAGE = Path(hf_tsv.__file__).parent


@pytest.fixture
def diff(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fine-tune in a form that is new: one file, and this row."""
    monkeypatch.setattr(opening, "FORMATS", (DIFF, *opening.FORMATS))
    return save_diff(zoo / "base", zoo / "vision", tmp_path / "diff")


@pytest.mark.parametrize("options", [[], ["--method", "average"], ["--qkv", "fused"]], ids=str)
def test_a_new_form_is_merged(zoo: Path, tmp_path: Path, diff: Path, options: list[str]) -> None:
    """As the checkpoint it was made of is, with the base model that it names."""
    for name, task in (("a", diff), ("b", zoo / "vision")):
        base = [] if task is diff else ["--base-model", zoo / "base"]
        done = run("merge", task, zoo / "full", *base, *options, "-o", tmp_path / name)
        assert done.code == 0, done.err
    found, expected = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name
    again = run("merge", "--recipe", tmp_path / "a" / "hf_tsv_recipe.yaml", "-o", tmp_path / "c")
    assert again.code == 0, again.err
    written = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ac"]
    assert written[0] == written[1]


def test_a_new_form_is_inspected(zoo: Path, diff: Path) -> None:
    done = run("inspect", diff, "--json")
    assert done.code == 0, done.err
    assert (done.json["kind"], done.json["base_model"]) == ("diff", [str(zoo / "base")])
    assert done.json["tensors"].keys() == load_file(diff / "diff.safetensors").keys()


def test_a_new_form_is_loaded(zoo: Path, diff: Path) -> None:
    found = hf_tsv.load_model(diff, kind="image-feature-extraction", progress=False)
    expected = hf_tsv.load_model(zoo / "vision", progress=False)
    for name, parameter in expected.state_dict().items():
        assert torch.allclose(found.state_dict()[name], parameter, atol=1e-6), name


def test_a_new_form_is_compressed(zoo: Path, tmp_path: Path, diff: Path) -> None:
    done = run("compress", diff, "--rank-fraction", "1.0", "-o", tmp_path / "f", "--json")
    assert done.code == 0, done.err
    assert done.json["update_error"] < 1e-3
    made = hf_tsv.load_model(tmp_path / "f", kind="image-feature-extraction", progress=False)
    expected = hf_tsv.load_model(zoo / "vision", progress=False)
    for name, parameter in expected.state_dict().items():
        assert torch.allclose(made.state_dict()[name], parameter, atol=1e-4), name


def test_a_new_form_is_named_where_another_is_wanted(zoo: Path, tmp_path: Path, diff: Path) -> None:
    with pytest.raises(CheckpointError, match="is a dense update, not task factors"):
        hf_tsv.reconstruct(diff, output=tmp_path / "r", progress=False)
    with pytest.raises(CheckpointError, match=r"The base model .* is a dense update"):
        hf_tsv.merge([zoo / "vision"], base_model=diff, output=tmp_path / "m", progress=False)


def test_the_cache_is_searched_for_every_form() -> None:
    """Offline, a repository is found by the file that says what it holds."""
    markers = {marker for form in opening.FORMATS for marker in form.markers}
    assert set(CONFIGS) == markers | {ROUTING_FILE}  # beside a merge


def kinds(task: type[Task]) -> set[str]:
    """Names of all forms of fine-tunes."""
    return {task.__name__}.union(*map(kinds, task.__subclasses__()))


@pytest.mark.parametrize(
    ("inside", "names"),
    [
        ("checkpoints/formats", kinds(Task) | {"TaskFactors"}),
        ("checkpoints", {"LocalFiles", "HubFiles", "AheadFiles"}),
    ],
    ids=["kinds of fine-tunes", "kinds of files"],
)
def test_nobody_asks_which_kind_it_is(inside: str, names: set[str]) -> None:
    found = []
    for file in sorted(PACKAGE.rglob("*.py")):
        if not file.is_relative_to(PACKAGE / inside):
            text = file.read_text(encoding="utf-8")
            found += [f"{file}:{node.lineno}" for node in asking(ast.parse(text), names)]
    assert not found


def asking(tree: ast.AST, names: set[str]) -> list[ast.Call]:
    """Calls of `isinstance` with one of these names."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and len(node.args) == 2]
    return [
        call
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in ("isinstance", "issubclass")
        and {node.id for node in ast.walk(call.args[1]) if isinstance(node, ast.Name)} & names
    ]


def test_who_asks_is_found() -> None:
    assert asking(ast.parse("x = 1 if isinstance(a, int | Factors) else 2"), {"Factors"})
    assert not asking(ast.parse("isinstance(a, int)"), {"Factors"})
