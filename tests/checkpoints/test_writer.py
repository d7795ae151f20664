"""Writing checkpoints: byte for byte as the safetensors library, and all of it or nothing."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from clips import clip_config, load, save
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_tsv.checkpoints.names import SINGLE_FILE
from hf_tsv.checkpoints.storage.dtypes import DTYPES, dtype_of
from hf_tsv.checkpoints.storage.headers import index_of
from hf_tsv.checkpoints.storage.tensors import TensorSpec
from hf_tsv.checkpoints.storage.writer import ShardWriter, plan_shards
from hf_tsv.system.errors import OutputError
from hf_tsv.system.folders import check_free_space, check_output_folder, whole_folder

INDEX_FILE = index_of(SINGLE_FILE)

MARKER = "hf_tsv_recipe.yaml"

IN_TORCH = [dtype.torch for dtype in DTYPES.values()]


def specs_of(state: dict[str, Tensor]) -> dict[str, TensorSpec]:
    return {
        name: TensorSpec(dtype_of(tensor), tuple(tensor.shape)) for name, tensor in state.items()
    }


def write(folder: Path, state: dict[str, Tensor], max_shard_size: int | str = "5GB") -> None:
    """Write `state` in its own order."""
    folder.mkdir(exist_ok=True)
    writer = ShardWriter(folder, plan_shards(specs_of(state), max_shard_size))
    for name, tensor in state.items():
        writer.write(name, tensor)
    writer.close()


def clip_state() -> dict[str, Tensor]:
    from transformers import CLIPModel

    torch.manual_seed(0)
    state = CLIPModel(clip_config()).state_dict()
    return {**state, "vision_model.embeddings.position_ids": torch.arange(17)[None]}


# Byte for byte


def test_a_file_is_byte_for_byte_what_the_library_writes(tmp_path: Path) -> None:
    state = clip_state()
    write(tmp_path, state)
    save_file(state, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / SINGLE_FILE).read_bytes() == (tmp_path / "expected").read_bytes()


@settings(
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    layout=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
        st.tuples(st.sampled_from(IN_TORCH), st.lists(st.integers(0, 3), max_size=3)),
        min_size=1,
        max_size=12,
    ),
    shuffled=st.randoms(use_true_random=False),
)
@example(layout={f"{dtype}": (dtype, [2, 3]) for dtype in IN_TORCH}, shuffled=Random(0))
@example(
    layout={
        name: (torch.int8, [1])
        for name in ('"', "\\", "\n\x00\x1f\x7f", "/", "é", "層", "😀", "\uffff")
    },
    shuffled=Random(1),
)
def test_any_dtypes_names_and_shapes_in_any_order_give_the_library_s_bytes(
    tmp_path: Path, layout: dict[str, tuple[torch.dtype, list[int]]], shuffled: Random
) -> None:
    state = {name: torch.ones(shape).to(dtype) for name, (dtype, shape) in layout.items()}
    save_file(state, tmp_path / "expected", metadata={"format": "pt"})
    order = list(state)
    shuffled.shuffle(order)
    (tmp_path / SINGLE_FILE).unlink(missing_ok=True)
    write(tmp_path, {name: state[name] for name in order})
    assert (tmp_path / SINGLE_FILE).read_bytes() == (tmp_path / "expected").read_bytes()


def test_tensors_that_are_not_contiguous_are_written_as_they_look(tmp_path: Path) -> None:
    state = {"t": torch.arange(6.0).reshape(2, 3).T, "p": torch.nn.Parameter(torch.ones(4)[::2])}
    write(tmp_path, state)
    found = load_file(tmp_path / SINGLE_FILE)
    assert torch.equal(found["t"], state["t"]) and found["p"].tolist() == [1, 1]


def test_the_size_of_every_file_is_known_before_anything_is_written(tmp_path: Path) -> None:
    state = clip_state()
    plan = plan_shards(specs_of(state), 40_000)
    write(tmp_path, state, 40_000)
    found = {file.name: file.stat().st_size for file in tmp_path.glob("*.safetensors")}
    assert found == dict(plan.sizes)
    assert plan.total_bytes == sum(found.values())


# Shards


def test_shards_and_index_are_those_of_save_pretrained(tmp_path: Path) -> None:
    from transformers import CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(clip_config())
    expected = save(model, tmp_path / "expected", max_shard_size="40KB")
    state = load_state(expected)
    write(tmp_path / "found", state, "40KB")
    files = {file.name for file in (tmp_path / "found").iterdir()}
    assert files == {file.name for file in expected.glob("model*")} and len(files) > 4
    index = json.loads((tmp_path / "found" / INDEX_FILE).read_text())
    theirs = json.loads((expected / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    assert set(index["weight_map"]) == set(theirs["weight_map"])


def load_state(folder: Path) -> dict[str, Tensor]:
    """All tensors of a sharded checkpoint."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def test_the_split_is_the_library_s(tmp_path: Path) -> None:
    state = dict(sorted(clip_state().items()))
    split = split_torch_state_dict_into_shards(
        state, filename_pattern="model{suffix}.safetensors", max_shard_size=30_000
    )
    write(tmp_path, state, 30_000)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for file, names in split.filename_to_tensors.items():
        expected = tmp_path / "expected"
        save_file({n: state[n] for n in names}, expected, metadata={"format": "pt"})
        assert (tmp_path / file).read_bytes() == expected.read_bytes()


def test_the_split_does_not_depend_on_the_order_of_the_tensors() -> None:
    specs = specs_of(clip_state())
    assert plan_shards(dict(reversed(specs.items())), 30_000) == plan_shards(specs, 30_000)


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    from transformers import CLIPModel

    torch.manual_seed(3)
    model = CLIPModel(clip_config())
    model.config.save_pretrained(tmp_path)
    write(tmp_path, dict(reversed(model.state_dict().items())), 30_000)
    loaded = load(CLIPModel, tmp_path).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_a_tensor_larger_than_a_shard_gets_a_file_of_its_own(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.ones(2), "large": torch.ones(1000), "z": torch.ones(2)}, 100)
    index = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    assert index["large"] not in (index["a"], index["z"])


# Permissions


@pytest.fixture
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077, 0o000], indirect=True, ids=oct)
def test_files_and_folder_get_ordinary_permissions(tmp_path: Path, umask: int) -> None:
    with whole_folder(tmp_path / "out") as staging:
        write(staging, {"a": torch.ones(9), "b": torch.ones(9)}, 40)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert modes == dict.fromkeys(modes, 0o666 & ~umask) and len(modes) == 3
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


# All or nothing


def test_a_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    with whole_folder(tmp_path / "deep" / "out") as staging:
        (staging / "file").write_text("text")
        assert not (tmp_path / "deep" / "out").exists()
        assert staging.parent == tmp_path / "deep"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]
    assert (tmp_path / "deep" / "out" / "file").read_text() == "text"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_is_left_of_an_interrupted_run(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error), whole_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("text")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_run_leaves_the_earlier_output_as_it_was(tmp_path: Path) -> None:
    earlier_output(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("new")
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.rglob("*")} == {"out", MARKER, "old"}


def test_an_earlier_output_is_replaced_as_a_whole(tmp_path: Path) -> None:
    earlier_output(tmp_path / "out")
    check_output_folder(tmp_path / "out", [MARKER], force=True)
    with whole_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("new")
        assert (tmp_path / "out" / "old").exists()
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "file"}


def test_an_earlier_output_is_replaced_in_one_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "rename", None)  # two of them would leave nothing in between
    earlier_output(tmp_path / "out")
    with whole_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("new")
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "file"}


def test_a_file_system_that_cannot_exchange_folders_replaces_them_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_tsv.system.folders._exchange", lambda *_: False)
    earlier_output(tmp_path / "out")
    with whole_folder(tmp_path / "out") as staging:
        (staging / "file").write_text("new")
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "file"}


def test_a_rename_that_fails_leaves_the_earlier_output_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier_output(tmp_path / "out")
    monkeypatch.setattr("hf_tsv.system.folders._exchange", lambda *_: False)
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if (self / "file").exists():
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OutputError, match="Input/output"), whole_folder(tmp_path / "out") as s:
        (s / "file").write_text("new")
    assert {path.name for path in tmp_path.rglob("*")} == {"out", MARKER, "old"}


def earlier_output(folder: Path) -> Path:
    folder.mkdir()
    (folder / MARKER).write_text("hf_tsv_recipe: 1")
    (folder / "old").write_text("old")
    return folder


# What is not overwritten


def test_a_new_and_an_empty_folder_are_fine(tmp_path: Path) -> None:
    check_output_folder(tmp_path / "new" / "deeper", [MARKER], force=False)
    check_output_folder(tmp_path, [MARKER], force=False)
    (tmp_path / "empty").mkdir()
    with whole_folder(tmp_path / "empty") as staging:
        (staging / "file").write_text("text")
    assert {path.name for path in tmp_path.rglob("*")} == {"empty", "file"}


@pytest.mark.parametrize("name", [".out.hf-tsv", ".out.hf-tsv-0123abcd"])
def test_names_of_folders_that_runs_work_in_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match="unfinished runs"):
        check_output_folder(tmp_path / name, [MARKER], force=False)


def test_an_earlier_output_takes_force(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"out exists.*`force=True`"):
        check_output_folder(earlier_output(tmp_path / "out"), [MARKER], force=False)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("content", ["file", ".hidden", f"sub/{MARKER}"])
def test_a_folder_that_is_not_ours_is_refused_even_with_force(
    tmp_path: Path, content: str, force: bool
) -> None:
    (tmp_path / content).parent.mkdir(exist_ok=True)
    (tmp_path / content).write_text("precious")
    with pytest.raises(OutputError, match="not written by hf-tsv" if force else "exists"):
        check_output_folder(tmp_path, [MARKER], force=force)


@pytest.mark.parametrize("target", ["ours", "empty", "nowhere"])
def test_a_symlink_is_refused(tmp_path: Path, target: str) -> None:
    earlier_output(tmp_path / "ours")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(OutputError, match="link exists and is not a folder"):
        check_output_folder(tmp_path / "link", [MARKER], force=True)


@pytest.mark.parametrize("text", [".", "", "{}", "../here"])
def test_the_current_folder_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(OutputError, match="current"):
        check_output_folder(Path(text.format(Path.cwd())), [MARKER], force=True)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("precious")
    with pytest.raises(OutputError, match="not a folder"):
        check_output_folder(tmp_path / "file", [MARKER], force=True)


@pytest.mark.parametrize("force", [False, True])
def test_what_appears_in_the_meantime_is_not_overwritten(tmp_path: Path, force: bool) -> None:
    check_output_folder(tmp_path / "out", [MARKER], force=force)
    with pytest.raises(OutputError, match="out"), whole_folder(tmp_path / "out"):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "precious").write_text("text")
    assert {path.name for path in tmp_path.rglob("*")} == {"out", "precious"}


# Disks


def test_too_little_space_is_noticed_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    check_free_space(folder, 1)
    with pytest.raises(OutputError, match=rf"Not enough space for {folder}: 1000000\.0 TB needed"):
        check_free_space(folder, 10**18)
    assert list(tmp_path.iterdir()) == []


def test_a_relative_folder_is_checked_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_free_space(Path("out"), 1)
    check_output_folder(Path("out"), [MARKER], force=False)


@pytest.mark.parametrize("name", ["n" * 300, "n" * 250, "file/out", "n/" * 3000])
def test_an_impossible_folder_is_an_output_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / name
    with pytest.raises(OutputError, match="Cannot write to"):
        check_output_folder(folder, [MARKER], force=False)
        check_free_space(folder, 1)
        with whole_folder(folder):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_space_is_taken_before_the_first_tensor(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, plan_shards({"a": TensorSpec(DTYPES["F32"], (1_000_000,))}))
    assert (tmp_path / SINGLE_FILE).stat().st_blocks * 512 >= 4_000_000
    writer.abandon()


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_that_cannot_reserve_space_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def unsupported(*_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    write(tmp_path, {"a": torch.ones(3)})
    assert load_file(tmp_path / SINGLE_FILE)["a"].tolist() == [1, 1, 1]


def test_a_full_disk_is_an_output_error_and_nothing_is_left(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from hf_tsv.checkpoints.storage.dtypes import DTYPES
        from hf_tsv.checkpoints.storage.writer import ShardWriter, TensorSpec, plan_shards
        from hf_tsv.system.folders import whole_folder
        from hf_tsv.system.errors import OutputError

        specs = {name: TensorSpec(DTYPES["F32"], (30_000,)) for name in "abc"}
        try:
            with whole_folder(Path(sys.argv[1])) as staging:
                ShardWriter(staging, plan_shards(specs, 250_000))
        except OutputError as error:
            print(error)
    """

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path / "out")],
        preexec_fn=small_files,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(f"Cannot write to {tmp_path}")
    assert (
        "File too large. Free some space or choose another disk with `output=DIR`." in done.stdout
    )
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_while_writing_is_an_output_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    plan = plan_shards({"a": TensorSpec(DTYPES["F32"], (3,))})
    message = r"Cannot write to .*/out: No space left on device.*Free some space"
    with pytest.raises(OutputError, match=message), whole_folder(tmp_path / "out") as staging:
        writer = ShardWriter(staging, plan)
        monkeypatch.setattr(os, "pwrite", full)
        try:
            writer.write("a", torch.ones(3))
        finally:
            writer.abandon()
    assert list(tmp_path.iterdir()) == []


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:7], at))
    state = {"a": torch.arange(100.0), "b": torch.arange(9)}
    write(tmp_path, state)
    found = load_file(tmp_path / SINGLE_FILE)
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_a_file_that_is_there_already_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / SINGLE_FILE).write_text("precious")
    with pytest.raises(FileExistsError):
        write(tmp_path, {"a": torch.ones(1)})
    assert (tmp_path / SINGLE_FILE).read_text() == "precious"
