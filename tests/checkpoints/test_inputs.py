"""Where users keep checkpoints: in other precisions, under other names, in pull requests."""

from __future__ import annotations

import shutil
from pathlib import Path

import clips
import pytest
import torch
from cli import copied
from cli import hf_tsv as run
from cli import hf_tsv_process as run_process
from hub import Hub, User
from huggingface_hub import CommitOperationAdd, HfApi
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


def test_a_variant_in_shards(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    hub.add_repo("org/base", zoo / "base")
    model = clips.load(CLIPVisionModel, zoo / "vision").half()
    clips.save(model, tmp_path / "half", variant="fp16", max_shard_size="20KB")
    clips.save(model, tmp_path / "whole")
    assert (tmp_path / "half" / "model.safetensors.index.fp16.json").exists()
    hub.add_repo("org/half", tmp_path / "half")
    found = hf_tsv.inspect("org/half")
    assert (found.kind, set(found.dtypes), len(found.files)) == ("checkpoint", {"F16"}, 3)
    written = []
    for name in ("org/half", tmp_path / "whole"):
        out = tmp_path / f"m{len(written)}"
        done = run("merge", name, zoo / "flat", "--base-model", "org/base", "-o", out)
        assert done.code == 0, done.err
        written.append((out / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_several_variants_are_a_question(zoo: Path, tmp_path: Path) -> None:
    from transformers import CLIPVisionModel

    model = clips.load(CLIPVisionModel, zoo / "vision")
    clips.save(model.half(), tmp_path / "many", variant="fp16")
    clips.save(model.bfloat16(), tmp_path / "many", variant="bf16", max_shard_size="50KB")
    done = run("merge", tmp_path / "many", "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1 and "several: bf16, fp16" in done.err and "Hint: " in done.err
    assert not (tmp_path / "m").exists()


# Subfolders


def in_subfolder(folder: Path, subfolder: str, **others: str) -> dict[str, Path | str]:
    """Files of a repository that holds a checkpoint in a subfolder."""
    return {**{f"{subfolder}/{file.name}": file for file in folder.iterdir()}, **others}


@pytest.fixture
def nested(hub: Hub, zoo: Path) -> Hub:
    """A repository with two fine-tunes in subfolders, and a base in one of another."""
    hub.add_repo("org/bases", in_subfolder(zoo / "base", "clip/tiny"))
    files = in_subfolder(zoo / "vision", "vision") | in_subfolder(zoo / "full", "full")
    hub.add_repo("org/tasks", {**files, "README.md": "---\nlicense: mit\n---\n"})
    return hub


def test_checkpoints_in_subfolders_merge_like_others(
    nested: Hub, zoo: Path, tmp_path: Path
) -> None:
    plain = tmp_path / "plain"
    done = run("merge", zoo / "vision", zoo / "full", "--base-model", zoo / "base", "-o", plain)
    assert done.code == 0, done.err
    out = tmp_path / "merged"
    command = ["merge", "org/tasks/vision", "org/tasks@main/full", "--base-model",
               "org/bases/clip/tiny", "--cache-dir", tmp_path / "cache"]  # fmt: skip
    done = run(*command, "-o", out, "--json")
    assert done.code == 0, done.err
    assert {p.name for p in out.iterdir()} == {p.name for p in plain.iterdir()}
    weights = (plain / "model.safetensors").read_bytes()
    assert (out / "model.safetensors").read_bytes() == weights
    assert [entry["ref"] for entry in done.json["inputs"]] == ["org/tasks/vision", "org/tasks/full"]
    # what was written says where it came from
    card = (out / "README.md").read_text()
    sha = nested.repos["org/tasks"].refs["refs/heads/main"]
    assert f"[`org/tasks/vision`](https://huggingface.co/org/tasks/tree/{sha}/vision)" in card
    assert "base_model:\n- org/bases\n- org/tasks\n" in card
    assert "license: mit" in card  # of the repository
    # and is made again from that, and without the Hub
    again = tmp_path / "again"
    done = run("merge", "--recipe", out, "-o", again, "--cache-dir", tmp_path / "cache")
    assert done.code == 0, done.err
    assert (again / "model.safetensors").read_bytes() == weights
    done = run_process(*command, "-o", tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert done.code == 0, done.err
    assert (tmp_path / "offline" / "model.safetensors").read_bytes() == weights


def test_one_subfolder_for_all(nested: Hub, zoo: Path, tmp_path: Path) -> None:
    nested.add_repo("org/more", in_subfolder(zoo / "flat", "vision"))
    shutil.copytree(zoo / "projection", tmp_path / "local" / "vision")
    outs = []
    for names in (
        ["org/tasks", "org/more", tmp_path / "local", "--subfolder", "vision"],
        ["org/tasks/vision", "org/more/vision", tmp_path / "local" / "vision"],
    ):
        out = tmp_path / f"m{len(outs)}"
        done = run("merge", *names, "--base-model", zoo / "base", "-o", out)
        assert done.code == 0, done.err
        outs.append((out / "model.safetensors").read_bytes())
    assert outs[0] == outs[1]


def test_other_verbs_know_subfolders(nested: Hub, zoo: Path, tmp_path: Path) -> None:
    base = ("--base-model", "org/bases/clip/tiny")
    assert run("inspect", "org/tasks", "--subfolder", "vision", "--json").json["ref"] == (
        "org/tasks/vision"
    )
    done = run("compress", "org/tasks", "--subfolder", "vision", *base, "-o", tmp_path / "f")
    assert done.code == 0, done.err
    nested.add_repo("me/factors", in_subfolder(tmp_path / "f", "tsv"))
    done = run("reconstruct", "me/factors", "--subfolder", "tsv", "-o", tmp_path / "full")
    assert done.code == 0, done.err  # the base is found where it was
    done = run("interference", "org/tasks/vision", "org/tasks/full", *base, "--json")
    assert [task["name"] for task in done.json["tasks"]] == ["vision", "full"]
    model = hf_tsv.load_model("org/tasks", subfolder="vision")
    assert type(model).__name__ == "CLIPVisionModel"
    factors = hf_tsv.TaskFactors.from_pretrained("me/factors/tsv")
    assert factors.config.source.ref == "org/tasks/vision"


@pytest.mark.parametrize(
    "words", [("org/tasks/absent",), ("org/tasks", "--subfolder", "absent"), ("org/tasks",)]
)
def test_a_subfolder_that_is_not_there(nested: Hub, tmp_path: Path, words: tuple[str, ...]) -> None:
    done = run("merge", *words, "--base-model", "org/bases/clip/tiny", "-o", tmp_path / "m")
    assert done.code == 1 and "Hint: " in done.err and "org/tasks" in done.err
    assert ("absent" in done.err) == ("absent" in "".join(words))
    assert not (tmp_path / "m").exists()


# Pull requests


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


CONVERSION = "Adding `safetensors` variant of this model"


def legacy(zoo: Path, folder: Path) -> bytes:
    """A checkpoint as torch saved it before 1.6; returns what it is as safetensors."""
    copied(zoo / "vision", folder)
    weights = (folder / "model.safetensors").read_bytes()
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()
    return weights


def offered(
    hub: Hub, weights: bytes, author: str = "SFconvertbot", title: str = CONVERSION
) -> None:
    """A pull request that adds a conversion to org/old."""
    hub.users["hf_bot"] = User(author)
    HfApi(token="hf_bot").create_commit(
        "org/old",
        [CommitOperationAdd("model.safetensors", weights)],
        commit_message=title,
        create_pr=True,
    )


def test_a_conversion_that_exists_only_as_a_pull_request_is_found(
    hub: Hub, zoo: Path, tmp_path: Path
) -> None:
    hub.add_repo("org/base", zoo / "base")
    weights = legacy(zoo, tmp_path / "old")
    hub.add_repo("org/old", tmp_path / "old")
    words = ["merge", "org/old", "--base-model", "org/base", "-o", tmp_path / "m"]
    done = run(*words)
    assert done.code == 1 and "since version 1.6" in done.err
    offered(hub, b"anything", author="somebody")
    offered(hub, b"anything", title="Something else")
    assert run(*words).code == 1
    offered(hub, weights)
    done = run(*words)
    assert done.code == 0, done.err
    assert "Its conversion org/old@refs/pr/3 is read." in done.err
    sha = hub.repos["org/old"].refs["refs/pr/3"]
    assert sha in (tmp_path / "m" / "hf_tsv_recipe.yaml").read_text()
    plain = run("merge", zoo / "vision", "--base-model", zoo / "base", "-o", tmp_path / "p")
    assert plain.code == 0
    merged, expected = (tmp_path / n / "model.safetensors" for n in "mp")
    assert merged.read_bytes() == expected.read_bytes()


def test_a_conversion_of_an_earlier_commit_is_not_taken(
    hub: Hub, zoo: Path, tmp_path: Path
) -> None:
    hub.add_repo("org/base", zoo / "base")
    weights = legacy(zoo, tmp_path / "old")
    hub.add_repo("org/old", tmp_path / "old")
    offered(hub, weights)
    hub.commit("org/old", {"README.md": "# New weights"})
    done = run("merge", "org/old", "--base-model", "org/base", "-o", tmp_path / "m")
    assert done.code == 1 and "since version 1.6" in done.err


# What is refused, what is preferred


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
