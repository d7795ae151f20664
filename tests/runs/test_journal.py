"""Outputs under construction: what is kept of a run that stopped, and what is made of it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import constants
from safetensors.torch import load_file

import hf_tsv
from hf_tsv.checkpoints.storage.dtypes import DTYPES
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.checkpoints.storage.tensors import TensorSpec
from hf_tsv.checkpoints.storage.writer import plan_shards
from hf_tsv.compression import candidates, measuring
from hf_tsv.merging import building, loading, pipeline
from hf_tsv.merging.findings import Finding, Findings
from hf_tsv.merging.work import prepare
from hf_tsv.methods.interference import Interference
from hf_tsv.recipes import compressing, settings
from hf_tsv.recipes.settings import Settings
from hf_tsv.runs import journal
from hf_tsv.runs import target as target_
from hf_tsv.runs.reading import Seconds
from hf_tsv.runs.target import Target
from hf_tsv.system.errors import (
    CheckpointError,
    LostFileError,
    LostProcessError,
    OutputError,
    RepoError,
)
from hf_tsv.verbs import compress as compress_

WORK = ".out.hf-tsv"


@pytest.fixture
def merge(zoo: Path, tmp_path: Path) -> Callable[..., hf_tsv.MergeReport]:
    """A merge of two fine-tunes into `out`."""

    def run(**options: Any) -> hf_tsv.MergeReport:
        options = {"output": tmp_path / "out", "base_model": zoo / "base", **options}
        return hf_tsv.merge([zoo / "vision", zoo / "full"], **options)

    return run


@contextmanager
def stopping(after: int = 5) -> Iterator[None]:
    """Stop a run after so many weights."""
    add, count = journal.Journal.add, iter(range(100))

    def stop(self: journal.Journal, entry: dict[str, Any]) -> None:
        if next(count) == after:
            raise KeyboardInterrupt
        add(self, entry)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(journal.Journal, "add", stop)
        yield


@pytest.fixture
def stopped(merge: Callable[..., hf_tsv.MergeReport], tmp_path: Path) -> Path:
    """The same, stopped after five weights; the folder under construction."""
    with stopping():
        merge()
    assert not (tmp_path / "out").exists()
    return tmp_path / WORK


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Labels of the weights that are computed."""
    labels: list[str] = []
    merge_one = pipeline.merge_one

    def noting(loaded: loading.LoadedWeight, *rest: Any, **options: Any) -> Any:
        labels.append(loaded.weight.label)
        return merge_one(loaded, *rest, **options)

    monkeypatch.setattr(pipeline, "merge_one", noting)
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


SCALED: dict[str, Any] = {
    "scale": {"*.layers.1.*": 0.5, "full:*.bias": 2}, "keep_base": ["*.mlp.*"],
}  # fmt: skip


def test_a_stopped_run_goes_on_with_its_factors(
    merge: Callable[..., hf_tsv.MergeReport], tmp_path: Path, computed: list[str]
) -> None:
    with stopping():
        merge(**SCALED)
    with pytest.raises(OutputError, match="other inputs or settings"):
        merge(**{**SCALED, "scale": {"*.layers.1.*": 0.5, "full:*.bias": 3}})
    computed.clear()
    weights = len(merge(**SCALED).treatments)
    assert len(computed) == weights - 5
    merge(output=tmp_path / "undisturbed", **SCALED)
    result, whole = (tmp_path / name / "model.safetensors" for name in ("out", "undisturbed"))
    assert result.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize(
    "options",
    [{"alpha": 0.5}, {"rank": 1}, {"dtype": "float16"}, {"keep_base": "*.bias"},
     {"scale": {"*": 2}}, {"scale": {"full:*": 2}}],
)  # fmt: skip
def test_the_beginning_of_another_merge_is_not_gone_on_with(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    before = sorted(stopped.rglob("*"))
    with pytest.raises(OutputError, match="other inputs or settings") as error:
        merge(**options)
    assert "`force=True`" in str(error.value) and str(stopped) in str(error.value)
    assert sorted(stopped.rglob("*")) == before
    merge(**options, force=True)
    assert not stopped.exists()
    merge(output=tmp_path / "whole", **options)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()


def test_an_input_that_changed_meanwhile_is_noticed(
    zoo: Path, tmp_path: Path, computed: list[str]
) -> None:
    """Also where size and time of modification are those of before, as with `cp -p`."""
    shutil.copytree(zoo / "vision", tmp_path / "task")
    file = tmp_path / "task" / "model.safetensors"

    def merge() -> None:
        tasks = [tmp_path / "task", zoo / "full"]
        hf_tsv.merge(tasks, base_model=zoo / "base", output=tmp_path / "out")

    with stopping():
        merge()
    stat, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(OutputError, match="other inputs or settings"):
        merge()


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
        patch.setattr(pipeline, "merge_one", failing)
        with pytest.raises(seen):
            merge()
    assert len(lines(stopped)) == 5
    merge()
    assert_whole(merge, tmp_path)


@pytest.fixture
def unpushed(hub: Hub) -> Iterator[Path]:
    """Where results wait that are only to be pushed; nothing is left there."""
    folder = Path(constants.HF_HOME) / "hf-tsv" / "unpushed"
    yield folder
    assert not list(folder.glob("*"))


def test_a_run_that_only_pushes_goes_on_too(
    hub: Hub, zoo: Path, tmp_path: Path, unpushed: Path, computed: list[str]
) -> None:
    def merge(**place: Any) -> hf_tsv.MergeReport:
        tasks = [zoo / "vision", zoo / "full"]
        return hf_tsv.merge(tasks, base_model=zoo / "base", **place)

    with stopping():
        merge(push_to="me/x")
    (work,) = unpushed.glob("*/.x.hf-tsv")
    finished = [line["label"] for line in lines(work)]
    computed.clear()
    report = merge(push_to="me/x")
    assert len(finished) == 5 and not set(computed) & set(finished)
    assert set(computed) | set(finished) == set(report.treatments)
    merge(output=tmp_path / "out")
    pushed = hub.repos["me/x"].resolve("main").files["model.safetensors"].read()
    assert pushed == (tmp_path / "out" / "model.safetensors").read_bytes()


def test_what_was_finished_and_not_pushed_is_only_pushed(
    hub: Hub, zoo: Path, unpushed: Path, computed: list[str]
) -> None:
    def merge() -> dict[str, Any]:
        tasks = [zoo / "vision", zoo / "full"]
        return hf_tsv.merge(tasks, base_model=zoo / "base", push_to="me/x").to_dict()

    hub.fail("/commit/", 403)
    with pytest.raises(RepoError, match="complete in"):
        merge()
    assert computed and "me/x" in hub.repos
    computed.clear()
    second = merge()
    assert not computed and second["url"]
    assert "model.safetensors" in hub.repos["me/x"].resolve("main").files
    del hub.repos["me/x"]
    whole = merge()
    for report in (second, whole):
        for entry in report["treatments"].values():
            del entry["seconds"]
        del report["timings"], report["seconds"], report["url"]
    assert second == whole


def test_of_two_runs_that_push_the_same_the_second_stops(
    hub: Hub, zoo: Path, unpushed: Path
) -> None:
    """Else it would find the folder gone, and remove from the repository what is not in it."""

    def merge() -> None:
        hf_tsv.merge([zoo / "vision"], base_model=zoo / "base", push_to="me/x")

    met: list[str] = []

    def second() -> None:
        for again in (merge, lambda: hf_tsv.push(next(unpushed.glob("*/x")), "me/x")):
            with pytest.raises(OutputError) as error:
                again()
            met.append(str(error.value))

    hub.fail("/commit/", action=second)
    merge()
    assert len(met) == 2 and all("Another process is writing" in text for text in met)
    assert "model.safetensors" in hub.repos["me/x"].resolve("main").files


def test_what_a_kill_leaves_of_a_pushed_folder_is_not_pushed(
    hub: Hub, zoo: Path, unpushed: Path, computed: list[str]
) -> None:
    def merge() -> None:
        hf_tsv.merge([zoo / "vision"], base_model=zoo / "base", push_to="me/x")

    def killed(folder: Path, **_: Any) -> None:
        (folder / "x" / "model.safetensors").unlink()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target_.shutil, "rmtree", killed)
        merge()
    assert list(unpushed.glob("*/x/hf_tsv_recipe.yaml"))
    merge()
    assert "model.safetensors" in hub.repos["me/x"].resolve("main").files


def test_an_unpushed_result_is_checked_like_a_beginning(
    hub: Hub, zoo: Path, tmp_path: Path, unpushed: Path, computed: list[str]
) -> None:
    """What is copied from the base model may have changed; so may bytes of the result."""
    base = tmp_path / "base"
    shutil.copytree(zoo / "base", base)

    def merge() -> None:
        hf_tsv.merge([zoo / "vision"], base_model=base, push_to="me/x")

    hub.fail("/commit/", 403)
    with pytest.raises(RepoError):
        merge()
    processor = base / "preprocessor_config.json"
    processor.write_text(processor.read_text().replace("{", '{"changed": true,', 1))
    (weights,) = unpushed.glob("*/x/model.safetensors")
    with weights.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(b"\x13\x37\x13\x37")
    computed.clear()
    merge()
    assert len(computed) == 1
    files = hub.repos["me/x"].resolve("main").files
    assert b"changed" in files["preprocessor_config.json"].read()
    assert files["model.safetensors"].read()[-4:] != b"\x13\x37\x13\x37"


def test_what_only_waited_for_its_upload_is_gone_after_it(
    hub: Hub, zoo: Path, tmp_path: Path, unpushed: Path
) -> None:
    hub.fail("/commit/", 403)
    with pytest.raises(RepoError, match="hf-tsv push"):
        hf_tsv.merge([zoo / "vision"], base_model=zoo / "base", push_to="me/x")
    (folder,) = unpushed.glob("*/x")
    assert hf_tsv.push(folder, "me/x").url
    assert "model.safetensors" in hub.repos["me/x"].resolve("main").files
    hf_tsv.merge([zoo / "vision"], base_model=zoo / "base", output=tmp_path / "out")
    hf_tsv.push(tmp_path / "out", "me/y")
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("kind", ["factors", "peft"])
def test_a_compression_that_was_finished_and_not_pushed_is_only_pushed(
    hub: Hub, zoo: Path, unpushed: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    def compress() -> dict[str, Any]:
        options = compressing.Options(out_format=kind)  # type: ignore[arg-type]
        target = Target(push_to="me/x")
        return compress_.run(str(zoo / "full"), str(zoo / "base"), options, target).to_dict()

    hub.fail("/commit/", 403)
    with pytest.raises(RepoError, match="complete in"):
        compress()
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_decompose", None)
        second = compress()
    assert "tsv_config.json" in hub.repos["me/x"].resolve("main").files
    del hub.repos["me/x"]
    whole = compress()
    for report in (second, whole):
        del report["timings"], report["seconds"], report["url"]
    assert second == whole


@pytest.fixture
def compress(zoo: Path, tmp_path: Path) -> Callable[..., candidates.Measured]:
    """A compression of a fine-tune into `out`, as factors or `format` says."""

    def run(output: str = "out", **options: Any) -> Any:
        target = Target(tmp_path / output, force=options.pop("force", False))
        wanted = compressing.Options(**options)
        return compress_.run(str(zoo / "full"), str(zoo / "base"), wanted, target)

    return run


@pytest.mark.parametrize("kind", ["factors", "peft"])
def test_a_compression_goes_on_with_the_weights_that_are_missing(
    compress: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    decomposed = []
    decompose = measuring._decompose

    def noting(loaded: Any, *rest: Any) -> Any:
        decomposed.append(loaded.candidate.name)
        return decompose(loaded, *rest)

    with stopping(20):
        compress(out_format=kind)
    finished = {line["label"] for line in lines(tmp_path / WORK)}
    assert len(finished) == 20 and not (tmp_path / "out").exists()
    monkeypatch.setattr(measuring, "_decompose", noting)
    compress(out_format=kind)
    assert decomposed and not finished & set(decomposed)
    compress("undisturbed", out_format=kind)
    for path in (tmp_path / "undisturbed").iterdir():
        if path.name != "README.md":  # which names its folder
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "undisturbed"]


def test_singular_vectors_that_did_not_reach_the_disk_are_computed_again(
    compress: Callable[..., Any], tmp_path: Path
) -> None:
    with stopping(20):
        compress()
    spool = tmp_path / WORK / journal.SPOOL
    with spool.open("r+b") as file:
        file.write(bytes(64))
        file.truncate(spool.stat().st_size - 4)
    held = len(lines(tmp_path / WORK))
    with stopping(0):
        compress()
    assert len(lines(tmp_path / WORK)) == held - 2
    compress()
    compress("undisturbed")
    weights = [
        (tmp_path / f / "task_factors.safetensors").read_bytes() for f in ("out", "undisturbed")
    ]
    assert weights[0] == weights[1]


def test_the_beginning_of_another_compression_is_not_gone_on_with(
    compress: Callable[..., Any], tmp_path: Path
) -> None:
    with stopping():
        compress()
    with pytest.raises(OutputError, match="other inputs or settings"):
        compress(dtype="bfloat16")
    compress(dtype="bfloat16", force=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("library", ["hf_tsv", "torch"])
def test_another_version_does_not_go_on(
    merge: Callable[..., hf_tsv.MergeReport],
    stopped: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: str,
) -> None:
    known = settings.current_versions()
    versions = {**known, library: known[library] + ".1"}
    monkeypatch.setattr(settings, "current_versions", lambda: versions)
    with pytest.raises(OutputError, match="other inputs or settings"):
        merge()


def test_what_a_stopped_run_wrote_beside_the_weights_is_written_anew(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, tmp_path: Path
) -> None:
    """It may be cut short, and a config would make unfinished weights loadable."""
    (stopped / "files" / "config.json").write_text("{")
    (stopped / "files" / "masks").mkdir()
    (stopped / "files" / "masks" / "of another run").touch()
    with stopping(0):
        merge()
    assert [p.name for p in (stopped / "files").iterdir()] == ["model.safetensors"]
    merge()
    assert_whole(merge, tmp_path)


def test_a_file_that_is_gone_costs_no_finished_weight(
    hub: Hub, zoo: Path, tmp_path: Path, computed: list[str]
) -> None:
    """As when somebody clears the cache during the run."""
    for name in ("base", "vision", "full"):
        hub.add_repo(f"org/{name}", zoo / name)
    cache = Path(constants.HF_HUB_CACHE)
    loaded = iter(range(100))
    read_into = LocalFiles.read_into

    def vanishing(self: LocalFiles, *arguments: Any) -> None:
        if next(loaded) == 12:
            shutil.rmtree(cache)
            self.close()
        read_into(self, *arguments)

    def merge() -> hf_tsv.MergeReport:
        tasks = ["org/vision", "org/full"]
        return hf_tsv.merge(tasks, base_model="org/base", output=tmp_path / "out")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFiles, "read_into", vanishing)
        with pytest.raises(LostFileError, match="cannot be read") as error:
            merge()
    assert "same command" in str(error.value)
    finished = [line["label"] for line in lines(tmp_path / WORK)]
    computed.clear()
    merge()
    assert finished and not set(finished) & set(computed)


def test_weights_of_other_processes_that_did_not_arrive_are_noticed(
    zoo: Path, stopped: Path
) -> None:
    tasks = [str(zoo / "vision"), str(zoo / "full")]
    merge, sources = prepare(tasks, str(zoo / "base"), None, Settings())
    weights = len(merge.plan.weights)
    with pytest.raises(
        LostProcessError, match=f"Weights of other processes are missing: {weights - 5}, "
    ):
        building._all_noted(merge.plan, stopped, 2)
    file = stopped / "files" / "model.safetensors"
    os.truncate(file, 0)
    os.truncate(file, merge.plan.shards.total_bytes)
    with pytest.raises(
        LostProcessError, match=f"Weights of other processes are missing: {weights}, "
    ):
        building._all_noted(merge.plan, stopped, 2)
    sources.close()


def test_an_error_after_going_on_leaves_nothing(
    merge: Callable[..., hf_tsv.MergeReport], stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise CheckpointError("The disk on which it lies is gone.")

    monkeypatch.setattr(pipeline, "merge_one", failing)
    with pytest.raises(CheckpointError):
        merge()
    assert not stopped.exists()


def hold(work: str, ready: Any, end: Any) -> None:
    """Write an output in another process until told to end."""
    shards = plan_shards({"a": TensorSpec(DTYPES["F32"], (2,))}, "1GB")
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
        shards = plan_shards({"a": TensorSpec(DTYPES["F32"], (2,))}, "1GB")
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


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_a_folder_that_is_in_the_way_stays_as_it_is(
    merge: Callable[..., hf_tsv.MergeReport], tmp_path: Path, kind: str
) -> None:
    mine = tmp_path / ("mine" if kind == "link" else WORK)
    mine.mkdir()
    (mine / "thesis.txt").touch()
    if kind == "link":
        (tmp_path / WORK).symlink_to(mine)
    for force in (False, True):
        with pytest.raises(OutputError, match="in the way"):
            merge(force=force)
    assert [path.name for path in mine.iterdir()] == ["thesis.txt"]


def test_what_appears_before_the_work_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").touch()
    shards = plan_shards({"a": TensorSpec(DTYPES["F32"], (2,))}, "1GB")
    with (
        pytest.raises(OutputError, match="in the meantime"),
        journal.under_construction(tmp_path / "out", {}, shards, force=False),
    ):
        pytest.fail("the work began")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_damaged_companion_is_found_before_the_work(
    zoo: Path, tmp_path: Path, computed: list[str]
) -> None:
    shutil.copytree(zoo / "base", tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="preprocessor_config"):
        hf_tsv.merge([zoo / "vision"], base_model=tmp_path / "base", output=tmp_path / "out")
    assert not computed


def test_nothing_finished_is_nothing_kept(tmp_path: Path) -> None:
    shards = plan_shards({"a": TensorSpec(DTYPES["F32"], (2,))}, "1GB")
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
            notes.add(asdict(finding if rank else Finding("b", frozen=True)))
    found = journal.read(tmp_path, Finding.from_dict)
    assert found == {"a": finding, "b": Finding("b", frozen=True)}
    journal.rewrite(tmp_path, [asdict(item) for item in found.values()])
    assert journal.read(tmp_path, Finding.from_dict) == found
    assert [p.name for p in tmp_path.iterdir()] == ["done.0.jsonl"]
    assert Findings(3, [finding, finding]).cosines()[0, 2] == pytest.approx(1 / 3 / 0.2**0.5)
