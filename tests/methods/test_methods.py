"""Merging methods: one row and one function each, ours or of another package."""

from __future__ import annotations

import ast
import os
import re
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch
from cli import hf_tsv as run
from cli import hf_tsv_script
from safetensors.torch import load_file

import hf_tsv.cli
from hf_tsv.methods.catalogue import BUILT_IN, GROUP, METHODS, Method, installed
from hf_tsv.methods.rules import MergedUpdate, Updates, rule_of
from hf_tsv.system.errors import RecipeError

ROOT = Path(__file__).parents[2]
RANKS = {"share": "at most ⌊k/T⌋", "free": "any", "all": "all", None: "–"}


def table_row(row: Method) -> str:
    """The row of a method in the table of docs/methods.md."""
    source = f"[{row.source}](https://arxiv.org/abs/{row.source})" if row.source else "–"
    alpha = "–" if row.alpha is None else f"{row.alpha:g}"
    if row.alpha_of_adapters is not None:
        alpha += f"; {row.alpha_of_adapters:g} for adapters"
    return f"| `{row.name}` | {row.does} | {source} | {alpha} | {RANKS[row.ranks]} |"


def test_the_table_of_the_docs_is_the_catalogue() -> None:
    table = "\n".join(map(table_row, BUILT_IN))
    page = (ROOT / "docs" / "methods.md").read_text("utf-8")
    assert f"|---|---|---|---|---|\n{table}\n\n" in page, table


@pytest.mark.parametrize("row", BUILT_IN, ids=lambda row: row.name)
def test_every_row_leads_to_its_rule(row: Method) -> None:
    delta = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    known = [0.0] * 2
    found = rule_of(row)(Updates([delta, delta], [0.0] * 2, (0, 1), (3, 3), 2, 1, known=known))
    assert found.matrix.shape == delta.shape and float(found.matrix[0, 0]) > 0


def compared(tree: ast.AST) -> list[int]:
    """Lines on which the name of a method is compared with a text."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            named = any(
                (isinstance(side, ast.Attribute) and side.attr == "method")
                or (isinstance(side, ast.Name) and side.id == "method")
                for side in sides
            )
            texts = [part for side in sides for part in ast.walk(side)]
            if named and any(isinstance(p, ast.Constant) and p.value in METHODS for p in texts):
                lines.append(node.lineno)
    return lines


def test_nothing_but_the_catalogue_tells_methods_apart_by_name() -> None:
    assert compared(ast.parse('a = settings.method in ("ties", "ada")\nb = "tsv" == method')) == [
        1,
        2,
    ]
    for file in (ROOT / "hf_tsv").rglob("*.py"):
        if file.parent.name != "methods":
            assert compared(ast.parse(file.read_text("utf-8"))) == [], file
    for template in (ROOT / "model_cards").iterdir():
        assert "method ==" not in template.read_text("utf-8"), template


def test_rows_are_checked() -> None:
    for wrong in ({"name": "A b"}, {"of": "rows"}, {"ranks": "some"}):
        with pytest.raises(ValueError, match="is"):
            Method(**{"name": "x", "rule": "m:f", "does": "nothing", **wrong})


# One function and one row


def largest(updates: Updates) -> MergedUpdate:
    """Of each entry the update that is largest in size."""
    found = torch.stack(list(updates.matrices()))
    return MergedUpdate(found.gather(0, found.abs().argmax(dim=0, keepdim=True))[0])


LARGEST = Method(
    "largest", f"{__name__}:largest", "largest update of each entry", of="entries", alpha=0.5
)


@pytest.fixture
def largest_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method, as if its row stood in the catalogue, and a command line that begins anew."""
    monkeypatch.setitem(METHODS, LARGEST.name, LARGEST)
    monkeypatch.delattr(hf_tsv, "cli")
    for name in [name for name in sys.modules if name.startswith("hf_tsv.cli")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("largest_is_there")
def test_a_method_is_one_function_and_one_row(zoo: Path, tmp_path: Path) -> None:
    words = ["merge", zoo / "full", zoo / "projection", "--base-model", zoo / "base"]
    method = ["--method", "largest"]
    planned = run(*words, *method, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert planned.json["method"] == "largest" and planned.json["weights"]["decomposed"] == 0
    done = run(*words, *method, "-o", tmp_path / "m")
    assert done.code == 0, done.err
    base, full, other = (
        load_file(zoo / name / "model.safetensors") for name in ("base", "full", "projection")
    )
    merged = load_file(tmp_path / "m" / "model.safetensors")
    for name, w0 in base.items():
        if not w0.is_floating_point():
            continue
        deltas = [full[name] - w0, other.get(name, w0) - w0]
        choice = torch.where(deltas[0].abs() >= deltas[1].abs(), *deltas)
        torch.testing.assert_close(merged[name], w0 + 0.5 * choice, rtol=0, atol=1e-7)
    recipe = hf_tsv.Recipe.load(tmp_path / "m")
    assert (recipe.settings.method, recipe.settings.alpha) == ("largest", 0.5)
    again = run("merge", "--recipe", tmp_path / "m", "-o", tmp_path / "n")
    assert again.code == 0, again.err
    for file in (tmp_path / "m").iterdir():
        assert file.read_bytes() == (tmp_path / "n" / file.name).read_bytes(), file.name
    card = (tmp_path / "m" / "README.md").read_text()
    assert "with the method `largest`" in card and re.search(
        r"[0-9]+ tensors were combined\.", card
    ), card
    listed = rf"\n  largest +{LARGEST.does} \(α = 0.5\)\n"
    assert re.search(listed, run("merge", "--help", COLUMNS="100").out)
    for more in (["--rank", "3"], ["--report"]):
        refused = run(*words, *method, *more, "-o", tmp_path / "x")
        assert refused.code == 2 and "The method largest" in refused.err


def test_a_rule_that_is_not_there_is_an_error_with_a_hint(
    zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "lost", Method("lost", "no_such_module:f", "x", package="a==1"))
    with pytest.raises(RecipeError, match=r"The method lost of a==1 cannot be loaded: No module"):
        hf_tsv.merge([zoo / "vision", zoo / "full"], base_model=zoo / "base",
                     output=tmp_path / "m", method="lost", progress=False)  # fmt: skip
    assert not (tmp_path / "m").exists()


# Of another package

ROWS = """
from hf_tsv.methods.catalogue import Method

FIRST = Method("first", "other_rules:first", "update of the first task", of="entries", alpha=0.25)
"""
RULES = """
from hf_tsv.methods.rules import MergedUpdate

def first(updates):
    return MergedUpdate(next(updates.matrices()))
"""


def install(folder: Path, name: str, points: dict[str, str], version: str = "1.2") -> Path:
    """Install what a wheel would: modules and metadata."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = [f"[{GROUP}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder of installed packages that holds one with a method."""
    folder = install(tmp_path / "site", "other-merges", {"first": "other_rows:FIRST"})
    (folder / "other_rows.py").write_text(ROWS)
    (folder / "other_rules.py").write_text(RULES)
    return folder


def beside(*folders: Path) -> dict[str, str]:
    """Environment of a process that finds these packages too."""
    return {"PYTHONPATH": os.pathsep.join(map(str, [*folders, ROOT])), "COLUMNS": "200"}


def test_a_package_brings_a_method(package: Path, zoo: Path, tmp_path: Path) -> None:
    words = ["merge", zoo / "full", zoo / "projection", "--base-model", zoo / "base"]
    here = beside(package)
    done = hf_tsv_script(*words, "--method", "first", "-o", tmp_path / "m", **here)
    assert done.code == 0, done.err
    base, full, merged = (
        load_file(folder / "model.safetensors")
        for folder in (zoo / "base", zoo / "full", tmp_path / "m")
    )
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(merged[name], torch.lerp(base[name], full[name], 0.25))
    card = (tmp_path / "m" / "README.md").read_text()
    assert "with the method `first` of `other-merges==1.2`: update of the first task." in card
    assert "  other-merges: '1.2'\n" in (tmp_path / "m" / "hf_tsv_recipe.yaml").read_text()
    again = hf_tsv_script("merge", "--recipe", tmp_path / "m", "-o", tmp_path / "n", **here)
    assert (again.code, "may differ" in again.err) == (0, False)
    for file in (tmp_path / "m").iterdir():
        assert file.read_bytes() == (tmp_path / "n" / file.name).read_bytes(), file.name

    newer = install(tmp_path / "newer", "other-merges", {"first": "other_rows:FIRST"}, "1.3")
    words = ["merge", "--recipe", tmp_path / "m", "--dry-run"]
    other = hf_tsv_script(*words, **beside(newer, package))
    assert "The recipe was made with other-merges 1.2 (here 1.3)" in other.err, other.err
    missing = run(*words)
    assert missing.code == 1
    assert "The method 'first' is not installed." in missing.err
    assert "pip install other-merges==1.2" in missing.err
    unknown = run("merge", zoo / "full", "--method", "first", "--dry-run")
    assert unknown.code == 2 and "tall-mask" in unknown.err


def test_help_does_not_import_the_rules_of_a_package(package: Path) -> None:
    (package / "other_rules.py").write_text("raise SystemExit('imported')")
    done = hf_tsv_script("merge", "--help", **beside(package))
    assert done.code == 0 and re.search(r"\n  first +update of the first task \(α", done.out)


@pytest.mark.parametrize(
    "rows",
    [
        "import no_such_module",
        "raise SystemExit(3)",
        "FIRST = 1",
        "from hf_tsv.methods.catalogue import Method\nFIRST = Method('A', 'm:f', 'x')",
        "LAST = None",
    ],
)
def test_a_row_that_cannot_be_had_costs_a_line(
    package: Path, rows: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "other_rows", raising=False)
    (package / "other_rows.py").write_text(rows)
    rows, said = found_in(package, caplog)
    assert rows == []
    assert said.startswith("The method first of other-merges==1.2 is left out: ")
    assert "\n" not in said


def found_in(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[list[Method], str]:
    """Rows of the packages in a folder, and what is said of others."""
    points = [point for found in distributions(path=[str(folder)]) for point in found.entry_points]
    rows = list(installed(points))
    return rows, "\n".join(caplog.messages)


def test_one_name_is_one_method(
    package: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "other_rows", raising=False)
    install(package, "second-merges", {"again": "other_rows:FIRST", "ties": "second_rows:TIES"})
    (package / "second_rows.py").write_text(
        ROWS.replace("FIRST", "TIES").replace('"first"', '"ties"')
    )
    rows, said = found_in(package, caplog)
    assert rows == []
    assert (
        "Methods of other-merges==1.2 and second-merges==1.2 are called first: none is used."
        in said
    )
    assert (
        "Methods of hf-tsv and second-merges==1.2 are called ties: that of hf-tsv is used." in said
    )


def test_a_package_that_is_broken_stops_no_command(package: Path, zoo: Path) -> None:
    (package / "other_rows.py").write_text("import no_such_module")
    done = hf_tsv_script("inspect", zoo / "base", **beside(package))
    assert done.code == 0
    assert "The method first of other-merges==1.2 is left out: ModuleNotFoundError" in done.err


def test_a_recipe_cannot_have_anything_installed(zoo: Path, tmp_path: Path) -> None:
    """It comes from anywhere: what it calls a package is shown only if it looks like one."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "hf_tsv_recipe: 1\nmethod: strange\nversions: {'x; rm -r ~': '1', '-r y': '2'}\n"
        f"base_model: {{ref: '{zoo / 'base'}'}}\ninputs: [{{ref: '{zoo / 'full'}'}}]\n"
    )
    done = run("merge", "--recipe", recipe, "--dry-run")
    assert done.code == 1 and "rm -r" not in done.err and "-r y" not in done.err
    assert "method cannot be 'strange'" in done.err and "tall-mask" in done.err
