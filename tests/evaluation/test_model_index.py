"""Results in the card of a model, as the Hub's own library reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from cli import copied
from hub import Hub
from huggingface_hub import EvalResult, ModelCard
from labelled import add_dataset

import hf_tsv
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.evaluation import model_index
from hf_tsv.evaluation.model_index import Card, eval_result, open_card, with_results
from hf_tsv.reports.results import with_table
from hf_tsv.system.errors import HfTsvError, OutputError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")

DATE = "2026-01-02T03:04:05Z"
FULL = {
    "dataset": "org/data",
    "config": None,
    "split": "test",
    "revision": "a" * 40,
    "images": 12,
    "total": 12,
    "accuracy": 0.25,
}
OTHERS = """\
model-index:
- name: my model
  results:
  - task: {type: text-classification}
    dataset: {name: Other, type: org/other, split: dev}
    metrics:
    - {type: f1, value: 0.5, name: F1}
    - {type: accuracy, value: 0.75}
  - task: {type: zero-shot-image-classification}
    dataset: {name: old name, type: org/data, split: test, revision: old}
    metrics:
    - {type: accuracy, value: 0.125, name: Accuracy}
"""
HEAD = "# Made by hand\nlicense: mit   # as its base\ntags: [b, a]\n"
BODY = "---\n\n# Ä model\r\n---\nmodel-index: not here\n"


def read(text: str) -> dict[tuple[str, str, float], EvalResult]:
    """The results of a card by dataset, metric and value."""
    found = ModelCard(text).data.eval_results or []
    return {(r.dataset_type, str(r.metric_name), r.metric_value): r for r in found}


@pytest.mark.parametrize("tail", ["", "base_model: org/base\n", "# the end\nlanguage: en\n"])
def test_all_but_the_results_stays_byte_for_byte(tail: str) -> None:
    for before in ("", OTHERS):
        card = Card(f"---\n{HEAD}{before}{tail}{BODY}", "model")
        text = with_results(card, [eval_result("data", FULL)])
        start, end = f"---\n{HEAD}", f"{tail}{BODY}"
        if before:
            assert text.startswith(start) and text.endswith(end)
        else:
            assert text.startswith(f"{start}{tail}model-index:") and text.endswith(BODY)
        assert read(text)["org/data", "Accuracy", 0.25].dataset_name == "data"
        assert with_results(Card(text, "model"), [eval_result("data", FULL)]) == text


def test_results_of_others_stay_and_the_same_are_replaced() -> None:
    text = with_results(Card(f"---\n{OTHERS}{BODY}", "model"), [eval_result("data", FULL)])
    found = read(text)
    assert set(found) == {
        ("org/other", "F1", 0.5), ("org/other", "None", 0.75), ("org/data", "Accuracy", 0.25)
    }  # fmt: skip
    ours = found["org/data", "Accuracy", 0.25]
    assert ModelCard(text).data.model_name == "my model"
    assert (ours.task_type, ours.dataset_split, ours.dataset_revision, ours.metric_args) == (
        "zero-shot-image-classification", "test", "a" * 40, None,
    )  # fmt: skip


def test_a_quick_look_says_so_and_replaces_no_other() -> None:
    few: dict[str, Any] = {**FULL, "images": 5, "accuracy": 0.5}
    results = [eval_result("data", FULL), eval_result("data", few)]
    found = read(with_results(Card("", "model"), results))
    name = "Accuracy on 5 of 12 images, drawn at random"
    assert set(found) == {("org/data", "Accuracy", 0.25), ("org/data", name, 0.5)}
    assert found["org/data", name, 0.5].metric_args == {"images": 5, "total": 12}


def test_paths_of_this_machine_are_not_told(tmp_path: Path) -> None:
    first, second = ({**FULL, "dataset": str(tmp_path), "revision": None} for _ in range(2))
    text = with_results(Card("", "m"), [eval_result("a", first), eval_result("b", second)])
    assert str(tmp_path) not in text
    found = ModelCard(text).data.eval_results or []
    assert [(r.dataset_type, r.dataset_name) for r in found] == [
        ("imagefolder", "a"), ("imagefolder", "b")
    ]  # fmt: skip


@pytest.mark.parametrize(
    "front",
    ["- a list\n", "a: [\n", "{license: mit}\n", "model-index: 3\n", "model-index:\n- name: x\n"],
)
def test_a_card_that_cannot_take_results_is_refused(front: str) -> None:
    with pytest.raises(OutputError, match=r"front matter of .* cannot take results"):
        with_results(Card(f"---\n{front}---\n", "m", path=Path("README.md")), [])


def test_the_table_in_the_card_says_what_was_compared_and_is_replaced() -> None:
    reference = {"ref": "org/fine-tune", "accuracy": 0.5}
    found = {**FULL, "accuracy": 1 / 3, "templates": ["a photo of a {}."], "reference": reference}
    card = Card("---\nlicense: mit\n---\n\n# Mine\n\n## License\n\nMIT.\n", "m")
    text = with_table(with_results(card, [eval_result("a|b", found)]))
    sha = "a" * 40
    data = f"[`org/data`](https://huggingface.co/datasets/org/data/tree/{sha}) at `{sha[:12]}`"
    row = f"| `a\\|b` | {data} | `test` | all | 33.3% | `org/fine-tune` | 50.0% | 66.7% |\n"
    assert row in text and "with `a photo of a {}.`, measured by" in text
    assert "value: 0.3333\n" in text and read(text)["org/data", "Accuracy", 0.3333]
    assert text.index("# Mine") < text.index("## Evaluation results") < text.index("## License")
    few = {"dataset": "org/other", "revision": None, "config": "x", "images": 5}
    few |= {"templates": ["a {}.", "the {}.", "{}"]}
    again = with_table(with_results(Card(text, "m"), [eval_result("c", {**FULL, **few})]))
    first, second = row.partition(" 33.3%")[0], row.partition("all |")[2]
    assert f"{first} `a photo of a {{}}.` |{second}" in again
    assert again.count("## Evaluation results") == 1
    prompts = "`a {}.`, 2 more"
    row = f"| `c` | `org/other:x` | `test` | 5 of 12 | {prompts} | 25.0% | – | – | – |\n"
    assert row in again
    assert again.endswith("## License\n\nMIT.\n")
    worse = with_table(with_results(Card(again, "m"), [eval_result("a|b", FULL)]))
    assert (
        "org/fine-tune" not in worse
        and f"| `a\\|b` | {data} | `test` | all | – | 25.0% |\n" in worse
    )


def test_the_table_names_no_folder_of_this_machine(tmp_path: Path) -> None:
    reference = {"ref": str(tmp_path), "accuracy": 0.5}
    found = {**FULL, "dataset": str(tmp_path), "revision": None, "reference": reference}
    text = with_table(with_results(Card("", "m"), [eval_result("a", found)]))
    assert str(tmp_path) not in text and f"`{tmp_path.name}`" in text


def test_carriage_returns_stay() -> None:
    text = with_results(Card("---\r\nlicense: mit\r\n---\r\nHi\r\n", "m"), [eval_result("d", FULL)])
    assert "\n" not in with_table(text).replace("\r\n", "") and read(text)


def test_the_card_of_a_folder(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    sha = add_dataset(hub, "org/data", tmp_path)
    folder = copied(zoo / "base", tmp_path / "clip")
    with pytest.raises(OutputError, match=r"clip has no README.md"):
        hf_tsv.evaluate(folder, {"data": "org/data"}, card=True)
    (folder / "README.md").write_bytes(f"---\n{HEAD}{BODY}".encode())
    (folder / "README.md").chmod(0o640)
    before = {path.name for path in folder.iterdir()} | {".eval_results"}
    report = hf_tsv.evaluate(folder, {"data": "org/data", "gone": "org/gone"}, card=True, limit=5)
    assert report.card == str(folder / "README.md") and list(report.errors) == ["gone"]
    text = (folder / "README.md").read_bytes().decode()
    ((kind, name, value),) = read(text)
    assert (kind, value) == ("org/data", report.accuracy) and "5 of 12 images" in name
    assert text.startswith(f"---\n{HEAD}model-index:\n- name: clip\n")
    assert f"{BODY}\n<!-- results of hf-tsv evaluate -->\n## Evaluation results\n" in text
    assert f" at `{sha[:12]}` | `test` | 5 of 12 | {value:.1%} |\n" in text
    assert {path.name for path in folder.iterdir()} == before
    assert (folder / "README.md").stat().st_mode & 0o777 == 0o640


def test_the_card_of_a_repository(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    add_dataset(hub, "org/data", tmp_path)
    sha = hub.add_repo("org/clip", zoo / "base")
    hub.commit("org/clip", {"README.md": f"---\n{HEAD}{BODY}"})
    report = hf_tsv.evaluate("org/clip", {"data": "org/data"}, card=True)
    text = hub.files("org/clip")["README.md"].decode()
    assert read(text) and text.startswith(f"---\n{HEAD}") and BODY.rstrip() in text
    assert report.card and "/org/clip/commit/" in report.card
    assert len(hub.files("org/clip")) == len(list((zoo / "base").iterdir())) + 2
    report = hf_tsv.evaluate("org/clip", {"other": "org/data"}, card=True, create_pr=True, limit=3)
    assert report.card and report.card.endswith("/discussions/1")
    assert hub.files("org/clip")["README.md"].decode() == text
    assert len(read(hub.files("org/clip", "refs/pr/1")["README.md"].decode())) == 2
    with pytest.raises(OutputError, match="is a commit, and results are added to the card"):
        hf_tsv.evaluate(f"org/clip@{sha}", {"data": "org/data"}, card=True)
    json.dumps(report.to_dict())


def test_a_branch_that_moved_on_is_not_overwritten(
    hub: Hub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_repo("org/clip", zoo / "base")
    add_dataset(hub, "org/data", tmp_path)
    card = open_card(pin(parse("org/clip")), ["data"], token=None, create_pr=False)
    hub.commit("org/clip", {"README.md": "---\nlicense: mit\n---\n"})
    with pytest.raises(HfTsvError, match="org/clip received another commit in the meantime"):
        model_index.write(card, {"data": {**FULL, "revision": None}}, DATE, token=None)
    assert hub.files("org/clip")["README.md"] == b"---\nlicense: mit\n---\n"
    assert not any(name.startswith(".eval_results") for name in hub.files("org/clip"))


def test_rights_are_checked_before_the_work(hub: Hub, zoo: Path) -> None:
    hub.add_repo("org/clip", zoo / "base")
    with pytest.raises(HfTsvError, match="can only read"):
        hf_tsv.evaluate("org/clip", {"data": "org/data"}, card=True, token="hf_read")
    assert not any("datasets" in request.path for request in hub.requests)
    with pytest.raises(HfTsvError, match="`create_pr=True` applies to a repository"):
        hf_tsv.evaluate(zoo / "base", {"d": "org/data"}, card=True, create_pr=True)
    with pytest.raises(HfTsvError, match="Add `card=True`"):
        hf_tsv.evaluate("org/clip", {"data": "org/data"}, create_pr=True)
