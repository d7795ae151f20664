"""State dicts as torch.save writes them: read in place, and never run."""

from __future__ import annotations

import argparse
import datetime
import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import hf_tsv as run
from cli import hf_tsv_process as run_process
from hub import Hub
from safetensors.torch import load_file

import hf_tsv
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.checkpoints.storage.pickles import read_pickle
from hf_tsv.checkpoints.storage.tensors import read_tensor
from hf_tsv.system.errors import CheckpointError


def pickled(folder: Path, target: Path, name: str = "pytorch_model.bin", **options: Any) -> Path:
    """A copy of a checkpoint whose weights torch.save wrote."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, target / file.name)
    torch.save(load_file(folder / "model.safetensors"), target / name, **options)
    return target


def read_all(folder: Path, name: str) -> dict[str, torch.Tensor]:
    files = LocalFiles(folder)
    return {
        key: read_tensor(files, info, key, str(folder))
        for key, info in read_pickle(files, name, str(folder)).items()
    }


def test_tensors_are_read_where_they_lie(tmp_path: Path) -> None:
    whole = torch.randn(5, 4)
    state = {
        "plain": torch.randn(3, 4), "half": torch.randn(7).half(), "scalar": torch.tensor(1.5),
        "bfloat": torch.randn(2, 3).bfloat16(), "counts": torch.arange(4),
        "empty": torch.empty(0, 3),
        "turned": torch.randn(2, 5).T, "part": whole[2:], "whole": whole,
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
    }  # fmt: skip
    torch.save(state, tmp_path / "x.pt")
    found = read_all(tmp_path, "x.pt")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor.detach()), name


@pytest.mark.parametrize("wrap", ["state_dict", "model_state_dict", "model", "module"])
def test_training_checkpoints_are_unwrapped(tmp_path: Path, wrap: str) -> None:
    state = {"a.weight": torch.randn(2, 2), "b.bias": torch.randn(2)}
    torch.save({"epoch": 3, wrap: state, "optimizer": {}}, tmp_path / "x.pt")
    assert read_all(tmp_path, "x.pt").keys() == state.keys()


class Settings:
    """A class of a training script, which is not here when the file is read."""

    def __init__(self) -> None:
        self.rate, self.where = 1e-5, Path("runs")


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_is_beside_the_weights_is_skipped(tmp_path: Path, protocol: int) -> None:
    state = {"a.weight": torch.randn(2, 2), "b.bias": torch.randn(2)}
    beside = {
        "args": argparse.Namespace(lr=1e-5, seed=1), "best": np.float64(0.9), "folder": tmp_path,
        "when": datetime.datetime(2026, 1, 1), "settings": Settings(), "order": np.arange(3),
        "tags": frozenset({"a", "b"}), "pair": (np.int64(3), b"bytes" * 100),
    }  # fmt: skip
    torch.save({**beside, "state_dict": {**state, "version": np.int64(2)}}, tmp_path / "x.pt",
               pickle_protocol=protocol)  # fmt: skip
    found = read_all(tmp_path, "x.pt")
    assert found.keys() == state.keys() and all(torch.equal(found[n], state[n]) for n in state)


@pytest.mark.parametrize("shape", [(4, 3, 2, 2), (4, 1, 5, 5), (2, 3, 4, 5, 6)])
def test_channels_last_is_read_as_it_is(tmp_path: Path, shape: tuple[int, ...]) -> None:
    form = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    tensor = torch.randn(shape).contiguous(memory_format=form)
    torch.save({"a": tensor, "b": tensor.permute(1, 0, *range(2, len(shape)))}, tmp_path / "x.pt")
    found = read_all(tmp_path, "x.pt")
    assert torch.equal(found["a"], tensor) and found["a"].is_contiguous()
    assert torch.equal(found["b"], tensor.transpose(0, 1)) and found["b"].is_contiguous()


def test_a_merge_of_pickles_is_that_of_safetensors(zoo: Path, tmp_path: Path) -> None:
    base = pickled(zoo / "base", tmp_path / "base")
    one = pickled(zoo / "vision", tmp_path / "one")
    other = pickled(zoo / "flat", tmp_path / "other", "finetuned.pt")
    expected = hf_tsv.merge(
        [zoo / "vision", zoo / "flat"], base_model=zoo / "base", output=tmp_path / "expected",
        progress=False,
    )  # fmt: skip
    done = run("merge", one, other, "--base-model", base, "-o", tmp_path / "found", "--json")
    assert done.code == 0, done.err
    found, wanted = (load_file(tmp_path / n / "model.safetensors") for n in ("found", "expected"))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert done.json["weights"] == expected.weights


def test_shards_of_pickles(zoo: Path, tmp_path: Path) -> None:
    state = load_file(zoo / "vision" / "model.safetensors")
    folder = pickled(zoo / "vision", tmp_path / "sharded")
    (folder / "pytorch_model.bin").unlink()
    names = sorted(state)
    halves = {"a.bin": names[::2], "b.bin": names[1::2]}
    for file, part in halves.items():
        torch.save({name: state[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    hf_tsv.compress(
        folder, base_model=zoo / "base", output=tmp_path / "out", rank=3, progress=False
    )
    hf_tsv.compress(
        zoo / "vision", base_model=zoo / "base", output=tmp_path / "same", rank=3, progress=False
    )
    files = (tmp_path / name / "task_factors.safetensors" for name in ("out", "same"))
    first, second = (file.read_bytes() for file in files)
    assert first == second


def test_safetensors_are_preferred(zoo: Path, tmp_path: Path) -> None:
    folder = pickled(zoo / "vision", tmp_path / "both")
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    shutil.copy(zoo / "vision" / "model.safetensors", folder)
    assert hf_tsv.inspect(folder).kind == "checkpoint"


def test_of_a_pickle_on_the_hub_only_the_index_is_read(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    folder = pickled(zoo / "vision", tmp_path / "one")
    state = torch.load(folder / "pytorch_model.bin")
    state["visual_projection.weight"] = torch.zeros(24, 32)
    big = {"model_state_dict": {**state, "vision_model.junk": torch.zeros(3_000_000)}}
    torch.save(big, folder / "pytorch_model.bin")
    hub.add_repo("org/pickled", folder)
    before = hub.sent()
    found = hf_tsv.inspect("org/pickled", cache_dir=tmp_path / "cache")
    assert found.tensors["vision_model.junk"]["bytes"] == 12_000_000
    assert hub.sent() - before < 500_000 and not (tmp_path / "cache").exists()


def test_it_is_downloaded_and_merged(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    hub.add_repo("org/base", zoo / "base")
    hub.add_repo("org/pickled", pickled(zoo / "vision", tmp_path / "one"))
    done = run("merge", "org/pickled", "--base-model", "org/base", "-o", tmp_path / "m",
               cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    words = ["merge", "org/pickled", "--base-model", "org/base", "-o", tmp_path / "n"]
    again = run_process(*words, cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert again.code == 0, again.err


class Bomb:
    """Unpickling it would write a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_code_is_never_run(zoo: Path, tmp_path: Path) -> None:
    folder = pickled(zoo / "vision", tmp_path / "evil")
    state = load_file(zoo / "vision" / "model.safetensors")
    torch.save({**state, "x": Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    done = run("merge", folder, "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "would run code" in done.err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "m").exists()
    assert "would run code" in run("inspect", folder).out


def damaged(file: Path, how: str) -> None:
    """Make a file of torch.save something else."""
    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[: len(content) // 2])
    elif how == "text":
        file.write_bytes(b"hello")
    elif how == "module":
        torch.save(torch.nn.Linear(2, 2), file)
    elif how == "list":
        torch.save([torch.zeros(2)], file)
    elif how == "legacy":
        torch.save({"a": torch.zeros(2)}, file, _use_new_zipfile_serialization=False)
    elif how == "compressed":
        with zipfile.ZipFile(file) as old:
            entries = {name: old.read(name) for name in old.namelist()}
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
            for name, data in entries.items():
                new.writestr(name, data)
    elif how == "plain pickle":
        file.write_bytes(pickle.dumps({"a": 1}))
    elif how == "strided":
        torch.save({"a": torch.randn(4, 4, 4)[:, ::2, ::2]}, file)
    elif how == "negated":
        torch.save({"a": torch._neg_view(torch.ones(3))}, file)
    elif how == "quantised":
        torch.save({"a": torch.zeros(2, dtype=torch.float8_e4m3fn)}, file)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cut", "torch.save"), ("text", "torch.save"), ("module", "whole model"),
        ("list", "no state dict"), ("legacy", "torch.save"), ("compressed", "torch.save"),
        ("plain pickle", "torch.save"), ("strided", "not contiguous"),
        ("negated", "not contiguous"),
        ("quantised", "cannot be merged"),
    ],
)  # fmt: skip
def test_what_is_no_state_dict_is_refused(zoo: Path, tmp_path: Path, how: str, said: str) -> None:
    folder = pickled(zoo / "vision", tmp_path / "odd")
    damaged(folder / "pytorch_model.bin", how)
    with pytest.raises(CheckpointError, match=said) as error:
        read_pickle(LocalFiles(folder), "pytorch_model.bin", "odd")
    assert error.value.hint
    done = run("merge", folder, "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "Traceback" not in done.err and not (tmp_path / "m").exists()
