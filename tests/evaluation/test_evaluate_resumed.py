"""Evaluations that stop go on with the next task; several processes find what one finds."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli import copied
from ends import ends, ranks
from labelled import CLASSES, make_folder, picture, with_an_odd_word

import hf_tsv
from hf_tsv.evaluation import classifying, zero_shot
from hf_tsv.evaluation.finished import finished_tasks
from hf_tsv.system.errors import OutputError
from hf_tsv.verbs import evaluate as evaluate_
from hf_tsv.verbs import evaluate as evaluate_module

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")

BATCH = 5


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Three folders of images."""
    folder = tmp_path_factory.mktemp("tasks")
    make_folder(folder / "a")
    return {"a": str(folder / "a")} | {
        name: str(copied(folder / "a", folder / name)) for name in "bc"
    }


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that are classified; the model gives up when `stop_after` are."""
    done: list[int] = []
    classify = zero_shot.classify

    def counting(model: Any, directions: Any, pixels: Any) -> Any:
        if len(done) == stop_after.get("batches"):
            raise KeyboardInterrupt
        done.append(len(pixels))
        return classify(model, directions, pixels)

    stop_after: dict[str, int] = {}
    monkeypatch.setattr(zero_shot, "classify", counting)
    monkeypatch.setattr(evaluate_module, "stop_after", stop_after, raising=False)
    return done


def evaluate(zoo: Path, tasks: dict[str, str], output: Path, stop: int | None = None, **more: Any):  # type: ignore[no-untyped-def]
    """Of three tasks and a fine-tune, stopped after so many batches."""
    evaluate_.stop_after.clear()  # type: ignore[attr-defined]
    if stop is not None:
        evaluate_.stop_after["batches"] = stop  # type: ignore[attr-defined]
    return hf_tsv.evaluate(zoo / "base", tasks, references={"b": zoo / "full"}, output=output,
                           base_model=zoo / "base", batch_size=BATCH, **more)  # fmt: skip


def same(report: Any, other: Any) -> bool:
    return bool((report.tasks, report.normalised) == (other.tasks, other.normalised))


def test_a_run_that_stopped_goes_on_with_the_next_task(
    zoo: Path, tasks: dict[str, str], tmp_path: Path, batches: list[int], caplog: Any
) -> None:
    whole = evaluate(zoo, tasks, tmp_path / "whole")
    assert sum(batches) == 4 * 24
    batches.clear()
    output, kept = tmp_path / "results", tmp_path / ".results.hf-tsv-tasks"
    for stop, finished in ((7, 1), (8, 2), (9, 3)):  # in the second task, the third, the fine-tune
        with pytest.raises(KeyboardInterrupt):
            evaluate(zoo, tasks, output, stop=stop)
        assert len(kept.read_text().splitlines()) == finished and not output.exists()
        assert f"Progress saved ({finished} result{'s' * (finished > 1)}) in {kept}" in caplog.text
        batches.clear()
    with kept.open("a") as file:
        file.write('{"key": "cut o')
    report = evaluate(zoo, tasks, output)
    assert sum(batches) == 24 and same(report, whole)  # the fine-tune alone
    assert not kept.exists() and (output / "evaluation.json").exists()


@pytest.mark.parametrize("change", ["limit", "template", "model", "images", "versions"])
def test_what_another_command_has_finished_is_not_used(
    zoo: Path,
    tasks: dict[str, str],
    tmp_path: Path,
    batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    model = copied(zoo / "base", tmp_path / "model")
    data = copied(Path(tasks["a"]), tmp_path / "data")
    task = [hf_tsv.EvaluationTask("a", str(data)), hf_tsv.EvaluationTask("b", tasks["b"])]
    output, more = tmp_path / "results", {"output": tmp_path / "results", "batch_size": BATCH}
    evaluate_.stop_after["batches"] = 6  # type: ignore[attr-defined]
    with pytest.raises(KeyboardInterrupt):
        hf_tsv.evaluate(model, task, **more)
    evaluate_.stop_after.clear()  # type: ignore[attr-defined]
    batches.clear()
    if change == "limit":
        more["limit"] = 23
    elif change == "template":
        task[0] = hf_tsv.EvaluationTask("a", str(data), templates=("the {}.",))
    elif change == "model":
        shutil.copy(zoo / "full" / "model.safetensors", model)
    elif change == "images":
        picture(CLASSES[0], 4711).save(data / "test" / CLASSES[1] / "0.png")
    else:
        monkeypatch.setattr(classifying, "current_versions", lambda: {"torch": "0"})
    report = hf_tsv.evaluate(model, task, **more)
    assert sum(batches) == 2 * report.tasks["a"]["images"]
    assert not (tmp_path / ".results.hf-tsv-tasks").exists() and output.exists()


def test_nothing_is_left_of_a_run_that_finished_nothing(
    zoo: Path, tasks: dict[str, str], tmp_path: Path, batches: list[int]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        evaluate(zoo, tasks, tmp_path / "deep" / "results", stop=2)
    assert not list(tmp_path.iterdir())


def test_two_runs_do_not_share_an_output(zoo: Path, tasks: dict[str, str], tmp_path: Path) -> None:
    with (
        finished_tasks(tmp_path / "r"),
        pytest.raises(OutputError, match="Another process is writing"),
    ):
        hf_tsv.evaluate(zoo / "base", tasks, output=tmp_path / "r")


# Several processes


def test_three_processes_find_what_one_finds(
    zoo: Path, tasks: dict[str, str], tmp_path: Path
) -> None:
    """With a task that one of them cannot read, and the image that it meets."""
    bad = copied(Path(tasks["a"]), tmp_path / "bad")
    (bad / "test" / "emu" / "7.png").write_bytes(b"no image")
    words = [zoo / "base", "--base-model", zoo / "base", "--reference", f"a={zoo / 'full'}",
             "--batch-size", str(BATCH), "--json"]  # fmt: skip
    for name, path in {"a": tasks["a"], "bad": bad, "c": tasks["c"]}.items():
        words += ["--task", f"{name}={path}"]
    words = ["evaluate", *words, "-o", tmp_path / "three"]
    first, *others = ends(ranks(*words, count=3, cwd=tmp_path, freezing=True))
    assert [first.code, *(other.code for other in others)] == [1, 0, 0], (first, others)
    assert not any(other.out for other in others)
    found = first.json
    assert found == json.loads((tmp_path / "three" / "evaluation.json").read_text())
    expected = hf_tsv.evaluate(
        zoo / "base",
        {"a": tasks["a"], "c": tasks["c"]},
        references={"a": zoo / "full"},
        base_model=zoo / "base",
    )
    assert found["tasks"] == expected.tasks and found["normalised"] == expected.normalised
    assert "bad: image" in found["errors"]["bad"]
    assert "".join(done.err for done in (first, *others)).count("bad: image") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"bad", "three"}


def test_what_nobody_expects_of_one_task_ends_no_process(
    zoo: Path, tasks: dict[str, str], tmp_path: Path
) -> None:
    """Before the images, where the first process alone makes a key, and in all of them."""
    base, odd = with_an_odd_word(zoo, Path(tasks["a"]), tmp_path)
    words = ["evaluate", base, "--task", f"odd={odd}", "--task", f"b={tasks['b']}", "--json"]
    for more in ([], ["-o", tmp_path / "r"]):
        first, second = ends(ranks(*words, *more, count=2, cwd=tmp_path, freezing=True))
        assert [first.code, second.code] == [1, 0], (first, second)
        assert list(first.json["tasks"]) == ["b"]
        assert first.json["errors"]["odd"].startswith("odd failed with IndexError: ")
        assert "Traceback" not in first.err + second.err


def test_bad_input_of_several_processes_is_said_once(zoo: Path, tmp_path: Path) -> None:
    words = ["evaluate", zoo / "base", "--task", "a=org/x", "--limit", "0", "-o", tmp_path / "r"]
    first, second = ends(ranks(*words, count=2, cwd=tmp_path, freezing=True))
    assert (first.code, second.code) == (2, 2) and first.out + second.out == ""
    assert (first.err + second.err).count("Error: --limit must be at least 1") == 1, (first, second)
    assert not list(tmp_path.iterdir())
