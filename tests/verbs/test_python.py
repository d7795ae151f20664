"""What a person meets in Python: short reprs, names of devices and types, handles, types."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_tsv
from hf_tsv import RecipeError
from hf_tsv.methods.catalogue import METHODS, MethodName
from hf_tsv.reports.report import Report
from hf_tsv.system.device import pick_device

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, zoo: Path) -> dict[str, Any]:
    """A report of everything that runs without a Hub, and factors."""
    folder = tmp_path_factory.mktemp("made")
    tasks: Any = {"base_model": zoo / "base", "progress": False}
    two = [zoo / "vision", zoo / "flat"]
    return {
        "merge": hf_tsv.merge(two, output=folder / "<b>merged", **tasks),
        "plan": hf_tsv.merge(two, dry_run=True, **tasks),
        "interference": hf_tsv.interference(two, **tasks),
        "factors": hf_tsv.compress(zoo / "vision", output=folder / "vision-tsv", **tasks),
        "flat": hf_tsv.compress(zoo / "flat", output=folder / "flat-tsv", **tasks),
        "peft": hf_tsv.export_peft(zoo / "vision", output=folder / "lora", **tasks),
        "whole": hf_tsv.reconstruct(folder / "vision-tsv", output=folder / "whole", **tasks),
        "inspect": hf_tsv.inspect(zoo / "vision"),
    }


def test_reports_are_a_line_in_python(made: dict[str, Any]) -> None:
    said = {name: repr(report) for name, report in made.items()}
    assert all(len(text) < 200 and "\n" not in text for text in said.values())
    merged = r"MergeReport\(2 tasks → '<b>merged', tsv, \d+ decomposed, \d+ averaged, [\d.]+ [kM]B,"
    assert re.fullmatch(merged + r" [\d.]+ s\)", said["merge"])
    assert said["plan"].startswith("MergeReport(2 tasks, dry run, tsv, ")
    assert said["interference"].startswith("InterferenceReport(2 tasks, interference ")
    assert re.search(r"% of the checkpoint, [\d.]+ kB, [\d.]+ s\)", said["peft"])
    assert "vision-tsv', 39 weights, " in said["factors"] and said["factors"].startswith(
        "TaskFactors('"
    )
    assert "checkpoint, CLIPVisionModel" in said["inspect"]


def test_reports_are_some_lines_as_text(made: dict[str, Any]) -> None:
    for report in made.values():
        if isinstance(report, Report):
            text = str(report)
            assert text.startswith(repr(report) + "\n") and len(text.splitlines()) < 40
            assert max(map(len, text.splitlines())) < 400


def test_notebooks_show_tables_and_escape_names(made: dict[str, Any]) -> None:
    page = made["merge"]._repr_html_()
    assert "&lt;b&gt;merged" in page and "<b>" not in page and len(page) < 10_000
    report = made["interference"]
    odd = [{**report.tasks[0], "name": "<script>x</script>"}, report.tasks[1]]
    page = replace(report, tasks=odd)._repr_html_()
    assert "<script>" not in page and "<th>&lt;script&gt;x&lt;/script&gt;</th>" in page
    assert len(re.findall(r'<td style="background: rgba\(230, 120, 30, 0\.\d\d\)">', page)) == 4
    assert f"{report.pairs[0][1]:.4g}</td>" in page


def test_results_are_tables() -> None:
    task = {"accuracy": 0.5, "normalised": 0.9}
    report = hf_tsv.EvaluateReport(
        "me/m", None, 0.5, 0.9, {"a": task, "b": {"accuracy": 0.25}}, {}, None, "cpu", 1.0
    )
    assert repr(report) == "EvaluateReport(2 tasks, accuracy 50.0%, 1.0 s)"
    assert "<td>a</td><td>50.0%</td><td>90.0%</td>" in report._repr_html_()
    swept = hf_tsv.SweepReport(
        [0.1], [0.4], 0.5, [0.2], {"a": {"accuracies": [0.4], "full": 0.5}}, {}, None, "cpu", 1.0
    )
    assert "<td>a</td><td>40.0%</td><td>50.0%</td>" in swept._repr_html_()


def test_names_of_devices() -> None:
    for name in (None, "auto", "cpu", -1, "-1", torch.device("cpu")):
        device = pick_device(name)
        assert device.type == "cpu" or torch.accelerator.is_available()
    if not torch.accelerator.is_available():
        for wrong in (0, "0", "cuda:1", "gpu"):
            with pytest.raises(RecipeError, match=r"no device .* here"):
                pick_device(wrong)


def test_names_of_types(made: dict[str, Any], zoo: Path) -> None:
    options: Any = {"base_model": zoo / "base", "progress": False, "dry_run": True}
    sizes = {
        str(dtype): hf_tsv.merge(zoo / "vision", dtype=dtype, **options).output_bytes
        for dtype in ("auto", "fp32", torch.float16, "half")
    }
    assert sizes["auto"] == sizes["fp32"] > sizes["torch.float16"] == sizes["half"]
    with pytest.raises(RecipeError, match=r"dtype.* '?int3"):
        hf_tsv.merge(zoo / "vision", dtype="int3", **options)
    factors = Path(str(made["factors"]))
    for dtype in ("fp16", torch.float16):
        model = hf_tsv.load_model(factors, base_model=zoo / "base", dtype=dtype, device=-1)
        assert model.dtype == torch.float16
    with pytest.raises(RecipeError, match=r"dtype.* '?int3"):
        hf_tsv.load_model(factors, base_model=zoo / "base", dtype="int3")  # type: ignore[arg-type]


def test_a_pipeline_is_made_as_transformers_makes_one(zoo: Path) -> None:
    made = hf_tsv.pipeline(
        task="image-feature-extraction", model=zoo / "vision", base_model=zoo / "base", device="cpu"
    )
    assert made.task == "image-feature-extraction"


def test_a_plan_of_a_compression_has_its_report(zoo: Path, tmp_path: Path) -> None:
    options: Any = {"base_model": zoo / "base", "progress": False, "rank": 3}
    plan = hf_tsv.compress(zoo / "vision", output=tmp_path / "f", dry_run=True, **options).report
    assert plan is not None and plan.dry_run and not (tmp_path / "f").exists()
    done = hf_tsv.compress(zoo / "vision", output=tmp_path / "f", **options).report
    assert done is not None and 0 < (done.factors_bytes or 0) <= (plan.factors_bytes or 0)
    alone = hf_tsv.compress(zoo / "vision", dry_run=True, **options).report
    assert alone is not None and alone.output is None
    adapter = hf_tsv.export_peft(zoo / "vision", dry_run=True, **options)
    assert (
        adapter.dry_run
        and repr(adapter).startswith("CompressReport('")
        and "dry run" in repr(adapter)
    )


def test_several_checkpoints_that_are_no_list() -> None:
    call: Any = hf_tsv.merge
    with pytest.raises(RecipeError, match=r"Write `merge\(\['org/a', 'org/b'\], …\)`\."):
        call("org/a", "org/b", output="merged")


def test_one_name_is_a_list_of_one(zoo: Path) -> None:
    with pytest.raises(RecipeError, match="at least two"):
        hf_tsv.interference(str(zoo / "vision"), base_model=zoo / "base")


def test_factors_are_a_mapping_of_updates(made: dict[str, Any]) -> None:
    factors = made["factors"]
    assert list(factors) == list(factors.keys()) == list(factors.weights)
    assert len(factors) == len(factors.weights) and "nothing" not in factors
    name = next(n for n, weight in factors.weights.items() if weight.stored == "factors")
    assert name in factors and torch.equal(factors[name].U, factors.update(name).U)
    opened = hf_tsv.TaskFactors.from_pretrained(str(factors))
    assert opened.report is None and opened.config == factors.config


def test_tasks_are_a_mapping_and_a_context(made: dict[str, Any], zoo: Path) -> None:
    paths = [str(made["factors"]), str(made["flat"])]
    with hf_tsv.TaskSwitcher.from_pretrained(paths, base_model=zoo / "base", device=-1) as tasks:
        assert list(tasks) == list(tasks.keys()) == ["vision", "flat"] and len(tasks) == 2
        assert "flat" in tasks and "other" not in tasks
        before = {n: p.clone() for n, p in tasks.model.named_parameters()}
        assert tasks["flat"] is tasks.model and tasks.active == "flat"
        assert repr(tasks) == "TaskSwitcher(CLIPModel, ['vision', 'flat'], active='flat')"
        assert any(not torch.equal(before[n], p) for n, p in tasks.model.named_parameters())
    assert tasks.active is None
    assert all(torch.equal(before[n], p) for n, p in tasks.model.named_parameters())


def test_method_names_are_those_of_the_catalogue() -> None:
    own = [method.name for method in METHODS.values() if not method.package]
    assert sorted(own) == sorted(MethodName.__args__)  # type: ignore[attr-defined]


SCRIPT = """
from pathlib import Path

import torch
import hf_tsv
from hf_tsv import TaskFactors, TaskSwitcher

report = hf_tsv.merge(
    ["org/a", Path("b")], output="merged", method="ties", precision="exact", qkv="fused",
    dtype=torch.bfloat16, device=0,
)
print(report.output_bytes + 1, report.seconds, report.method.upper())
hf_tsv.merge("org/a", dtype="fp16", device=torch.device("cpu"))
factors = hf_tsv.compress("org/a", rank_fraction=0.1)
assert factors.report is not None
print(factors.report.checkpoint_bytes + 1, len(factors), list(factors), factors.weights["x"].rank)
planned = hf_tsv.compress("org/a", dry_run=True).report
assert planned is not None
print(planned.checkpoint_bytes + 1)
print(hf_tsv.export_peft("org/a", output="lora", dry_run=True).left_out)
print(hf_tsv.reconstruct("me/f", output="full", dtype="bf16", device="auto").update_error + 1)
print(hf_tsv.interference(["org/a", "org/b"]).total + 1)
print(hf_tsv.evaluate("me/m", {"dtd": "tanganke/dtd"}, device=-1).accuracy + 1)
print(hf_tsv.sweep({"dtd": "tanganke/dtd"}, {"dtd": "org/a"}, rank_fraction=0.1).full + 1)
print(hf_tsv.push("merged", "me/m", progress=False).bytes + 1)
print(hf_tsv.inspect("org/a").parameters + 1)
model = hf_tsv.load_model("me/m", kind="image-classification", head="a", dtype="auto")
print(model.device.type.upper())
print(hf_tsv.pipeline(task="zero-shot-image-classification", model="me/m").task)
TaskFactors.from_pretrained("me/f").push_to_hub("me/g", progress=False)
with TaskSwitcher.from_pretrained({"a": "me/f"}, keep="disk") as tasks:
    print(tasks["a"].device.type.upper())

hf_tsv.merge(["org/a"], precision="exactly")
hf_tsv.merge("org/a", "org/b")
hf_tsv.load_model("me/m", kind="text-generation")
hf_tsv.load_model("me/m", dtype="float7")
TaskSwitcher.from_pretrained("me/f", keep="cloud")
"""


def test_a_script_of_a_user_is_typed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--no-error-summary", str(script)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    lines = SCRIPT.splitlines()
    found = re.findall(r"script\.py:(\d+): error", done.stdout)
    wrong = [lines[int(number) - 1] for number in found]
    assert wrong == lines[-5:], done.stdout + done.stderr
