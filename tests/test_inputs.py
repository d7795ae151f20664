"""Where users keep checkpoints: in other precisions, under other names, in pull requests."""

from __future__ import annotations

import shutil
from pathlib import Path

import clips
import pytest
import torch
from cli import copied
from cli import hf_tsv as run
from hub import Hub
from safetensors.torch import load_file, save_file

import hf_tsv


def test_a_variant_is_read_where_it_is_all_there_is(zoo: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    model = clips.load(CLIPVisionModel, zoo / "vision")
    clips.save(model.half(), tmp_path / "half", variant="fp16")
    assert (tmp_path / "half" / "model.fp16.safetensors").exists()
    found = hf_tsv.inspect(tmp_path / "half")
    assert found.kind == "checkpoint" and set(found.dtypes) == {"F16"}
    done = run("merge", tmp_path / "half", zoo / "flat", "--base-model", zoo / "base", "-o",
               tmp_path / "m")  # fmt: skip
    assert done.code == 0, done.err


def test_a_checkpoint_in_a_pull_request(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    """As the Hub's own conversions to safetensors come."""
    hub.add_repo("org/base", zoo / "base")
    folder = copied(zoo / "vision", tmp_path / "pickled")
    weights = (folder / "model.safetensors").read_bytes()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    hub.add_repo("org/vision", folder)
    sha = hub.commit("org/vision", {"model.safetensors": weights}, branch="conversion")
    repo = hub.repos["org/vision"]
    repo.refs["refs/pr/3"] = sha
    for name in ("org/vision@refs/pr/3", "org/vision"):
        found = hf_tsv.inspect(name, cache_dir=tmp_path / "cache")
        assert ("model.safetensors" in found.files) == name.endswith("3")
        done = run("merge", name, "--base-model", "org/base", "-o", tmp_path / name[-1],
                   cwd=tmp_path)  # fmt: skip
        assert done.code == 0, done.err
    first, second = (tmp_path / end / "model.safetensors" for end in ("3", "n"))
    assert first.read_bytes() == second.read_bytes()
    assert "refs/pr/3" not in (tmp_path / "3" / "hf_tsv_recipe.yaml").read_text()  # a commit


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_quantised_weights_are_refused_with_a_hint(
    zoo: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    folder = copied(zoo / "vision", tmp_path / "q")
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in state.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    done = run("merge", folder, "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "cannot be merged" in done.err and "Dequantise" in done.err
    assert not (tmp_path / "m").exists()


def test_what_is_preferred_where_there_is_much(zoo: Path, tmp_path: Path) -> None:
    folder = copied(zoo / "vision", tmp_path / "much")
    shutil.copy(folder / "model.safetensors", folder / "model.fp16.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"damaged")
    (folder / "model.fp16.safetensors").write_bytes(b"damaged")
    assert hf_tsv.inspect(folder).kind == "checkpoint"
