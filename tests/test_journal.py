"""Outputs under construction: what is kept of a run that stopped, and what is made of it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hub import Hub
from safetensors.torch import load_file

import hf_tsv
from hf_tsv import construction, journal, stream
from hf_tsv.checkpoints.writer import TensorSpec, plan_shards
from hf_tsv.errors import CheckpointError, LostProcessError, OutputError, RepoError
from hf_tsv.findings import Finding, Findings, Seconds
from hf_tsv.recipe import Settings
from hf_tsv.tsv import Interference

WORK = ".out.hf-tsv"


@pytest.fixture
def merge(zoo: Path, tmp_path: Path) -> Callable[..., hf_tsv.MergeReport]:
    """A merge of two fine-tunes into `out`."""

    def run(**options: Any) -> hf_tsv.MergeReport:
        options = {"output": tmp_path / "out", "base_model": zoo / "base", **options}
        return hf_tsv.merge([zoo / "vision", zoo / "full"], **options)

    return run


@pytest.fixture
def stopped(
    merge: Callable[..., hf_tsv.MergeReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The same, stopped after five weights; the folder under construction."""
    add, count = journal.Journal.add, iter(range(100))

    def stopping(self: journal.Journal, entry: dict[str, Any]) -> None:
        if next(count) == 5:
            raise KeyboardInterrupt
        add(self, entry)

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            merge()
    assert not (tmp_path / "out").exists()
    return tmp_path / WORK


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Labels of the weights that are computed."""
    labels: list[str] = []
    merge_one = stream._merge_one

    def noting(loaded: stream.LoadedWeight, *rest: Any, **options: Any) -> Any:
        labels.append(loaded.weight.label)
        return merge_one(loaded, *rest, **options)

    monkeypatch.setattr(stream, "_merge_one", noting)
    return labels


def lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "done.0.jsonl").read_text().splitlines()]


def assert_whole(merge: Callable[..., hf_tsv.MergeReport], tmp_path: Path) -> None:
    """`out` is what an undisturbed run writes, and nothing else is left."""
    merge(output=tmp_path / "undisturbed")
    for path in (tmp_path / "undisturbed").iterdir():
        if path.name != "README.md":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_a_stopped_run_goes_on_with_the_weights_that_are_missing(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path, computed: list[str]
) -> None:
    finished = [line["label"] for line in lines(stopped)]
    assert len(finished) == 5
    report = merge()
    assert not set(computed) & set(finished)
    assert set(computed) | set(finished) == set(report.treatments)
    assert_whole(merge, tmp_path)


def test_a_report_does_not_tell_that_a_run_was_stopped(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path
) -> None:
    resumed, whole = merge().to_dict(), merge(output=tmp_path / "whole").to_dict()
    for report in (resumed, whole):
        for entry in report["treatments"].values():
            assert entry.pop("seconds").keys() == {"reading", "waiting", "computing", "writing"}
        assert report.pop("timings")["computing"] > 0
        del report["seconds"], report["output"]
    assert resumed == whole


def test_a_line_cut_off_counts_for_nothing(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path, computed: list[str]
) -> None:
    path = stopped / "done.0.jsonl"
    path.write_text(path.read_text()[:-10])
    last = json.loads(path.read_text().splitlines()[3])["label"]
    weights = len(merge().treatments)
    assert last not in computed
    assert len(computed) == weights - 4
    assert_whole(merge, tmp_path)


def test_bytes_that_did_not_reach_the_disk_are_computed_again(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path, computed: list[str]
) -> None:
    """After a power failure a line may stand in the journal whose tensor does not."""
    file = stopped / "files" / "model.safetensors"
    whole = load_file(file)
    label = next(line["label"] for line in lines(stopped) if whole[line["label"]].any())
    header = json.loads(file.read_bytes()[8 : 8 + int.from_bytes(file.read_bytes()[:8], "little")])
    with file.open("r+b") as handle:
        start = 8 + int.from_bytes(handle.read(8), "little") + header[label]["data_offsets"][0]
        handle.seek(start)
        handle.write(bytes(4))
    merge()
    assert label in computed
    assert_whole(merge, tmp_path)


@pytest.mark.parametrize("options", [{"alpha": 0.5}, {"rank": 1}, {"dtype": "float16"}])
def test_the_beginning_of_another_merge_is_not_gone_on_with(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    before = sorted(stopped.rglob("*"))
    with pytest.raises(OutputError, match="other inputs or settings") as error:
        merge(**options)
    assert "--force" in str(error.value) and str(stopped) in str(error.value)
    assert sorted(stopped.rglob("*")) == before
    merge(**options, force=True)
    assert not stopped.exists()
    merge(output=tmp_path / "whole", **options)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_an_input_that_changed_meanwhile_is_noticed(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, zoo: Path
) -> None:
    path = zoo / "vision" / "model.safetensors"
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    try:
        with pytest.raises(OutputError, match="other inputs or settings"):
            merge()
    finally:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_beginning_without_its_files_is_begun_anew(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path
) -> None:
    (stopped / "files" / "model.safetensors").unlink()
    merge()
    assert_whole(merge, tmp_path)


def test_a_job_of_which_only_half_was_noted_is_begun_anew(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path
) -> None:
    job = stopped / "job.json"
    job.write_text(job.read_text()[:100])
    merge()
    assert_whole(merge, tmp_path)


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (MemoryError(), MemoryError),
        (OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (RepoError("The Hub does not answer."), RepoError),
    ],
)
def test_what_may_go_well_next_time_costs_no_finished_weight(
    merge: Callable[..., hf_tsv.MergeReport],
    stopped: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    seen: type[Exception],
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(stream, "_merge_one", failing)
        with pytest.raises(seen):
            merge()
    assert len(lines(stopped)) == 5
    merge()
    assert_whole(merge, tmp_path)


def test_an_upload_that_is_stopped_leaves_nothing(
    hub: Hub,
    zoo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without an output folder nobody would find the beginning again."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def stopping(self: journal.Journal, entry: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "add", stopping)
        with pytest.raises(KeyboardInterrupt):
            hf_tsv.merge([zoo / "vision"], base_model=zoo / "base", push_to="me/x")
    assert list(tmp_path.iterdir()) == [] and "kept" not in caplog.text


def test_weights_of_other_processes_that_did_not_arrive_are_noticed(
    zoo: Path, stopped: Path
) -> None:
    tasks = [str(zoo / "vision"), str(zoo / "full")]
    job = construction.prepare(tasks, str(zoo / "base"), None, Settings())
    weights = len(job.plan.weights)
    with pytest.raises(LostProcessError, match=f"{weights - 5} weights .* have not arrived"):
        construction._all_noted(job, stopped, 2)
    file = stopped / "files" / "model.safetensors"
    os.truncate(file, 0)
    os.truncate(file, job.plan.shards.total_bytes)
    with pytest.raises(LostProcessError, match=f"{weights} weights .* have not arrived"):
        construction._all_noted(job, stopped, 2)
    job.sources.close()


def test_an_error_after_going_on_leaves_nothing(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise CheckpointError("The disk on which it lies is gone.")

    monkeypatch.setattr(stream, "_merge_one", failing)
    with pytest.raises(CheckpointError):
        merge()
    assert not stopped.exists()


def hold(work: str, ready: Any, end: Any) -> None:
    """Write an output in another process until told to end."""
    shards = plan_shards({"a": TensorSpec(torch.float32, (2,))}, "1GB")
    with journal.under_construction(Path(work), {"job": 1}, shards, force=False):
        ready.set()
        end.wait(60)


def test_two_processes_do_not_write_one_output(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    ready, end = context.Event(), context.Event()
    first = context.Process(target=hold, args=(str(tmp_path / "out"), ready, end))
    first.start()
    try:
        assert ready.wait(60)
        shards = plan_shards({"a": TensorSpec(torch.float32, (2,))}, "1GB")
        for force in (False, True):
            with (
                pytest.raises(OutputError, match="Another process is writing"),
                journal.under_construction(tmp_path / "out", {"job": 1}, shards, force=force),
            ):
                pytest.fail("both were let in")
    finally:
        end.set()
        first.join(60)
    assert first.exitcode == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_finished_is_nothing_kept(tmp_path: Path) -> None:
    shards = plan_shards({"a": TensorSpec(torch.float32, (2,))}, "1GB")
    with (
        pytest.raises(KeyboardInterrupt),
        journal.under_construction(tmp_path / "deep" / "out", {}, shards, force=False),
    ):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_findings_survive_the_journal(tmp_path: Path) -> None:
    finding = Finding(
        "a", ranks=(3, 2), null_directions=1, exact=2, tasks=(0, 2),
        norms=(0.25, 1 / 3), base_norm=7.5,
        interference=Interference(
            3.5, 1e-9, ((0.0, 1.5), (1.5, 0.0)), (0.1, 0.2), (4.0, 5.5),
            ((0.3, 0.0), (0.4, 0.0)), ((0.0, 0.1), (0.0, 0.2)),
        ),
        likeness=((0.1, 1 / 3), (1 / 3, 2.0)), digests={-1: {"a": "f"}}, written={"a": "e"},
        seconds=Seconds(0.1, 0.2, 0.3, 0.4),
    )  # fmt: skip
    for rank in (0, 3):
        with journal.Journal(tmp_path, rank) as notes:
            notes.add((finding if rank else Finding("b", frozen=True)).to_dict())
    found = journal.read(tmp_path, Finding.from_dict)
    assert found == {"a": finding, "b": Finding("b", frozen=True)}
    journal.rewrite(tmp_path, [item.to_dict() for item in found.values()])
    assert journal.read(tmp_path, Finding.from_dict) == found
    assert [p.name for p in tmp_path.iterdir()] == ["done.0.jsonl"]
    assert Findings(3, [finding, finding]).cosines()[0, 2] == pytest.approx(1 / 3 / 0.2**0.5)
