"""Results in `.eval_results`, as the Hub's own library writes and reads them."""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from cli import copied
from cli import hf_tsv as run
from hub import Hub
from huggingface_hub import EvalResultEntry, HfApi, ModelCard, parse_eval_result_entries
from labelled import add_dataset

import hf_tsv
from hf_tsv.evaluation.eval_results import ANY, entry_of, is_nameable, path_of, texts, with_entry
from hf_tsv.system.errors import HfTsvError, OutputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")

FILE = ".eval_results/hf-tsv-data.yaml"
FOUND: dict[str, Any] = {
    "dataset": "org/data", "config": None, "split": "test", "revision": "a" * 40, "images": 12,
    "total": 12, "accuracy": 1 / 3, "templates": ["a photo of a {}."],
}  # fmt: skip
OTHERS = """\
- dataset: {id: cais/hle, task_id: default}
  value: 20.9
  date: 2025-01-15
  evaluation_framework: hle
- dataset: {id: org/data, task_id: default}
  value: 0.5
  notes: measured by hand
"""


@pytest.fixture
def world(hub: Hub, zoo: Path, tmp_path: Path) -> Path:
    """A model with a card and a dataset, and a folder to work in."""
    hub.add_repo("org/clip", zoo / "base")
    hub.commit("org/clip", {"README.md": "---\nlicense: mit\n---\n\n# Mine\n"})
    (tmp_path / "rows").mkdir()
    add_dataset(hub, "org/data", tmp_path / "rows")
    return tmp_path


def read(content: bytes) -> list[EvalResultEntry]:
    return parse_eval_result_entries(yaml.safe_load(content))


def shown(repo_id: str, revision: str = "main") -> list[EvalResultEntry]:
    """Results as the Hub answers them."""
    info = HfApi().model_info(repo_id, revision=revision, expand=["evalResults"])
    return info.eval_results or []


def test_names_of_files_are_safe_and_differ() -> None:
    names = ["data", "Data", "my data", "my-data", "..", "a/b", "ä", "x" * 300, "con"]
    paths = [path_of(name) for name in names]
    assert len({path.lower() for path in paths}) == len(names)
    assert all(re.fullmatch(r"\.eval_results/hf-tsv-[a-z0-9_-]{1,80}\.yaml", p) for p in paths)
    assert path_of("data") == FILE


def test_only_datasets_of_the_hub_can_be_named(tmp_path: Path) -> None:
    named = ["org/data", str(tmp_path), "./a", "org/rows.parquet", "mnist", "a/b/c"]
    assert [name for name in named if is_nameable(name)] == ["org/data"]


def test_an_entry_says_what_was_measured(tmp_path: Path) -> None:
    entry = entry_of(FOUND, "default", "2026-01-02T03:04:05Z")
    assert (entry.dataset_id, entry.task_id, entry.value) == ("org/data", "default", 0.3333)
    assert (entry.dataset_revision, entry.date) == ("a" * 40, "2026-01-02T03:04:05Z")
    assert (entry.source_url, entry.verify_token) == (None, None)
    own = {"ref": str(tmp_path), "accuracy": 0.5}
    few = {"images": 5, "config": "a;b\n", "templates": ["a {}.", "the {}."], "revision": "v1"}
    entry = entry_of({**FOUND, **few, "reference": own, "normalised": 2 / 3}, "x", "2026-01-02")
    assert entry.dataset_revision is None and entry.notes is not None
    assert entry.notes.startswith(
        "config a,b , split test, 5 images drawn at random; 12 images in all;"
        f" zero-shot top-1 accuracy with 2 prompts; fine-tune {tmp_path.name}: 50.0%, of which"
        " 66.7% is kept; hf-tsv "
    )


def test_the_same_is_replaced_and_all_else_stays() -> None:
    entry = entry_of(FOUND, "default", "2026-01-02")
    few = entry_of({**FOUND, "images": 5}, "default", "2026-01-02")
    later = entry_of({**FOUND, "revision": "b" * 40, "total": 14, "images": 14}, "default", "2027")
    text = OTHERS
    for new in (entry, few, later, later):
        text = with_entry(text, new, "x")
    data = yaml.safe_load(text)
    assert data[:2] == yaml.safe_load(OTHERS)
    assert parse_eval_result_entries(data)[2:] == [few, later]


@pytest.mark.parametrize(
    "text",
    ["a: [", "3", "false", "a: b", "- 3", "- null", "- {}", "- {dataset: {id: a}, value: 1}",
     "- error: hostile", "- dataset: 3\n  value: 1", "- &a [*a]",
     "- {dataset: {id: a, task_id: b}, value: 1, source: {name: x}}",
     "[" * 50_000, "- !!python/object/apply:os.system [true]"],
)  # fmt: skip
def test_a_file_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(
        OutputError, match=r"^x is no list of evaluation results\. Repair or delete"
    ):
        with_entry(text, ANY, "x")


def test_a_repository_gets_everything_in_one_commit(hub: Hub, world: Path) -> None:
    before = len(hub.repos["org/clip"].commits)
    hub.commit("org/clip", {FILE: OTHERS, ".eval_results/other.yaml": "a: ["})
    tasks = {"data": "org/data", "again": "org/data"}
    report = hf_tsv.evaluate("org/clip", tasks, references={"data": "org/clip"}, card=True)
    assert len(hub.repos["org/clip"].commits) == before + 2
    files = hub.files("org/clip")
    assert files[".eval_results/other.yaml"] == b"a: ["
    *kept, ours = read(files[FILE])
    assert yaml.safe_load(files[FILE])[:2] == yaml.safe_load(OTHERS) and len(kept) == 2
    assert (ours.value, ours.date) == (round(report.accuracy, 4), report.date)
    assert ours.dataset_revision == report.tasks["data"]["revision"]
    assert ours.notes and "fine-tune org/clip: " in ours.notes
    (second,) = read(files[".eval_results/hf-tsv-again.yaml"])
    assert second.notes and "fine-tune" not in second.notes
    assert ours in shown("org/clip") and second in shown("org/clip")
    assert len(ModelCard(files["README.md"].decode()).data.eval_results or []) == 2

    fewer = hf_tsv.evaluate("org/clip", {"data": "org/data"}, card=True, limit=5)
    again = hf_tsv.evaluate("org/clip", {"data": "org/data"}, card=True)
    *same, few, new = read(hub.files("org/clip")[FILE])
    assert same == kept and (few.date, new.date) == (fewer.date, again.date)
    assert few.notes and few.notes.startswith("split test, 5 images drawn at random; 12 images")


def test_a_pull_request_has_all_of_it(hub: Hub, world: Path) -> None:
    before = hub.files("org/clip")
    words = ["evaluate", "org/clip", "--task", "data=org/data", "--card", "--create-pr"]
    done = run(*words)
    assert done.code == 0, done.err
    assert hub.files("org/clip") == before and not shown("org/clip")
    assert [entry.dataset_id for entry in shown("org/clip", "refs/pr/1")] == ["org/data"]
    assert b"model-index" in hub.files("org/clip", "refs/pr/1")["README.md"]
    assert "/discussions/1" in done.err


def test_the_dataset_says_which_of_its_tasks_it_is(
    hub: Hub, world: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [{"id": "other", "split": "train"}, {"id": "colours", "config": "any", "split": "test"}]
    hub.commit("datasets/org/data", {"eval.yaml": yaml.safe_dump({"tasks": tasks})})
    folder = world / "none"
    folder.mkdir()
    add_dataset(hub, "org/none", folder)
    add_dataset(hub, "org/large", folder)
    hub.commit("datasets/org/none", {"eval.yaml": yaml.safe_dump({"tasks": tasks[:1]})})
    hub.commit("datasets/org/large", {"eval.yaml": "#" * 1_000_001})
    add_dataset(hub, "org/broken", folder)
    hub.commit("datasets/org/broken", {"eval.yaml": "tasks: [3]"})
    named = {name: f"org/{name}" for name in ("data", "none", "large", "broken")}
    report = hf_tsv.evaluate("org/clip", named, card=True)
    assert [entry.task_id for entry in shown("org/clip")] == ["colours"]
    assert report.card and not report.errors
    said = "is in the card alone, and not in .eval_results: eval.yaml of"
    assert f"of none {said} org/none defines no task for the split test." in caplog.text
    assert f"of broken {said} org/broken defines no tasks." in caplog.text
    assert f"of large {said} org/large has 1000001 bytes" in caplog.text
    data = ModelCard(hub.files("org/clip")["README.md"].decode()).data
    assert len(data.eval_results or []) == 4


@pytest.mark.parametrize(
    ("config", "defined", "task_id"),
    [
        (None, None, "default"),
        ("small", None, "small"),
        (None, [{"id": "a", "config": "any"}, {"id": "b"}], "a"),
        ("default", [{"id": "a", "config": "any"}, {"id": "b", "split": "test"}], "b"),
        ("small", [{"id": "a"}, {"id": "b", "config": "small", "split": "test"}], "b"),
    ],
)
def test_the_id_of_a_task(
    hub: Hub, config: str | None, defined: list[dict[str, str]] | None, task_id: str
) -> None:
    files = {} if defined is None else {"eval.yaml": yaml.safe_dump({"tasks": defined})}
    sha = hub.add_repo("org/data", {"a.csv": "", **files}, kind="datasets")
    new = texts({"data": {**FOUND, "config": config, "revision": sha}}, {}, "2026-01-02")
    assert [entry.task_id for entry in read(new[FILE].encode())] == [task_id]


@pytest.mark.parametrize("create_pr", [True, False])
def test_a_broken_file_is_refused_before_the_work(hub: Hub, world: Path, create_pr: bool) -> None:
    hub.commit("org/clip", {FILE: "- error: hostile\n"})
    before = hub.repos["org/clip"].refs.copy()
    with pytest.raises(HfTsvError, match=f"^{FILE} of org/clip is no list of evaluation results"):
        hf_tsv.evaluate("org/clip", {"data": "org/data"}, card=True, create_pr=create_pr)
    assert hub.repos["org/clip"].refs == before
    assert not any("datasets" in request.path for request in hub.requests)


def test_a_folder_gets_all_files_or_none(
    hub: Hub, zoo: Path, world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(zoo / "base", world / "clip")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    tasks = {"data": "org/data", "more": "org/data", "mine": str(world / "rows" / "rows.parquet")}
    replace, most = Path.replace, [math.inf]
    done: list[str] = []

    def counted(self: Path, target: Path) -> Path:
        done.append(target.name)
        if len(done) > most[0]:
            raise OSError(28, "No space left on device")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", counted)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for count in (0, 1, 2):
        done.clear()
        most[0] = count
        report = hf_tsv.evaluate(folder, tasks, card=True)
        assert "No space left" in report.errors["README.md"] and len(report.tasks) == 3
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        assert not (folder / ".eval_results").exists()
    most[0] = math.inf
    done.clear()
    assert not hf_tsv.evaluate(folder, tasks, card=True).errors
    assert done == ["hf-tsv-data.yaml", "hf-tsv-more.yaml", "README.md"]
    assert len(list((folder / ".eval_results").iterdir())) == 2
    assert str(world) not in "".join(p.read_text() for p in (folder / ".eval_results").iterdir())
    assert len(ModelCard.load(folder / "README.md").data.eval_results or []) == 3


def test_a_folder_of_results_that_is_a_link_is_refused(hub: Hub, zoo: Path, world: Path) -> None:
    folder = copied(zoo / "base", world / "clip")
    (folder / "README.md").write_text("hello")
    (world / "elsewhere").mkdir()
    os.symlink(world / "elsewhere", folder / ".eval_results")
    with pytest.raises(OutputError, match=r"\.eval_results is not a folder\. Delete it, or omit"):
        hf_tsv.evaluate(folder, {"data": "org/data"}, card=True)


def test_results_are_pushed_with_a_folder_and_go_with_its_weights(
    hub: Hub, zoo: Path, world: Path
) -> None:
    merged = world / "merged"
    hf_tsv.merge([zoo / "full", zoo / "vision"], base_model=zoo / "base", output=merged)
    hf_tsv.evaluate(merged, {"data": "org/data"}, card=True)
    (merged / ".eval_results" / ".hidden").touch()
    hf_tsv.push(merged, "me/merged")
    assert [entry.dataset_id for entry in shown("me/merged")] == ["org/data"]
    assert ".eval_results/.hidden" not in hub.files("me/merged")
    hub.commit("me/merged", {".eval_results/mine.yaml": OTHERS})
    hf_tsv.merge([zoo / "full"], base_model=zoo / "base", push_to="me/merged")
    assert [name for name in hub.files("me/merged") if name.startswith(".eval")] == [
        ".eval_results/mine.yaml"
    ]
