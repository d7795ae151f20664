"""References: what a user may write, the commit it stands for, the base model it names."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hub import Hub
from huggingface_hub import HfApi

from hf_tsv.checkpoints.base_model import infer, named_by
from hf_tsv.checkpoints.reference import PinnedCheckpoint, Reference, at_revision, parse, pin
from hf_tsv.checkpoints.storage.files import HubFiles, LocalFiles
from hf_tsv.hub import Wanted, download
from hf_tsv.hub import client as client_module
from hf_tsv.system.errors import CheckpointError, HfTsvError, RepoError

FILES = {"config.json": "{}", "README.md": "---\nlicense: mit\n---\n", "model.safetensors": b"w"}


def pinned(text: str, **kwargs: Any) -> PinnedCheckpoint:
    return pin(parse(text), **kwargs)


# Spellings


@pytest.mark.parametrize(
    ("text", "repo_id", "revision"),
    [
        ("org/name", "org/name", None),
        ("Org-1/clip_vit.b-32", "Org-1/clip_vit.b-32", None),
        ("org/name@v1", "org/name", "v1"),
        ("org/name@" + "0" * 40, "org/name", "0" * 40),
        ("org/name@refs/pr/1", "org/name", "refs/pr/1"),
        ("org/name@feature%2Fa", "org/name", "feature/a"),
        ("hf://org/name", "org/name", None),
        ("hf://org/name@v1", "org/name", "v1"),
        ("hf://models/org/name@v1", "org/name", "v1"),
        ("https://huggingface.co/org/name", "org/name", None),
        ("https://huggingface.co/org/name/tree/v1", "org/name", "v1"),
    ],
)
def test_a_repository_can_be_written_in_several_ways(
    text: str, repo_id: str, revision: str | None
) -> None:
    assert parse(text) == Reference(repo_id, repo_id, revision)
    assert not parse(text).is_local
    assert parse(at_revision(repo_id, revision)) == parse(text)


@pytest.mark.parametrize(
    ("text", "revision", "subfolder"),
    [
        ("org/name/vision", None, "vision"),
        ("org/name/models/vision/", None, "models/vision"),
        ("org/name@v1/vision", "v1", "vision"),
        ("org/name@refs/pr/3/vision", "refs/pr/3", "vision"),
        ("org/name@feature%2Fa/vision", "feature/a", "vision"),
        ("hf://org/name@v1/vision", "v1", "vision"),
        ("https://huggingface.co/org/name/tree/v1/vision", "v1", "vision"),
    ],
)
def test_a_subfolder_of_a_repository(text: str, revision: str | None, subfolder: str) -> None:
    ref = f"org/name/{subfolder}"
    assert parse(text) == Reference(ref, "org/name", revision, subfolder)
    assert parse(at_revision(ref, revision)) == parse(text)
    assert parse(text.split("/" + subfolder, maxsplit=1)[0], subfolder) == parse(text)
    assert parse(text, "other") == parse(text)


@pytest.mark.parametrize(
    "subfolder", ["..", "a/../b", "/a", "a@b", "a\n", "a\\b", "n/" * 3000, "model.safetensors"]
)
def test_what_is_no_subfolder_is_refused(subfolder: str) -> None:
    with pytest.raises(RepoError, match="is not a subfolder"):
        parse("org/name", subfolder)
    with pytest.raises(HfTsvError):
        parse(f"org/name@v1/{subfolder}")


def test_ways_to_write_no_and_the_same_subfolder() -> None:
    assert parse("org/name", "") == parse("org/name")
    assert parse("org/name", "./a//b/") == parse("org/name/a/b")
    assert parse(at_revision("org/n/s", "refs/heads/a")).revision == "refs/heads/a"


@pytest.mark.parametrize("text", [".", "./org/name", "org/name", "{}/org", "~/org/name"])
def test_an_existing_folder_is_a_local_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    text = text.format(tmp_path)
    assert parse(text) == Reference(text)
    assert parse(text).is_local


def test_a_folder_wins_over_a_repository_unless_the_hub_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org" / "name@v1").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse("org/name@v1").is_local
    assert parse("hf://org/name@v1").repo_id == "org/name"
    assert parse("org/name").repo_id == "org/name"


@pytest.mark.parametrize(
    "text",
    [
        "name",
        "org//name",
        "org/na me",
        "org/name\n",
        "org/näme",
        "org/-name",
        "org/name.git",
        "org/" + "n" * 97,
        "n" * 300,
        "n/" * 3000,
        "org/name@",
        "@v1",
        "hf://",
        "hf://name",
        "datasets/org/name",
        "hf://datasets/org/name",
        "hf://spaces/org/name",
        "hf://org/name@v1/model.safetensors",
        "https://example.com/org/name",
        "http://huggingface.co/org/name",
        "C:\\models\\clip",
        "a\0b",
        "\ud800",
        "--help",
    ],
)
def test_what_is_neither_a_folder_nor_a_model_repository_is_refused(text: str) -> None:
    with pytest.raises(HfTsvError) as error:
        parse(text)
    assert repr(text) in error.value.message
    assert "Write org/name" in (error.value.hint or "")


@pytest.mark.parametrize(
    "text", ["", " ", "./absent", "../absent", "/absent", "~/absent", "~no-such-user/absent"]
)
def test_a_path_that_does_not_exist_is_refused_as_a_path(text: str) -> None:
    with pytest.raises(CheckpointError, match="There is no folder"):
        parse(text)


def test_a_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=rf"is a file\. Give its folder: {tmp_path}$"):
        parse(str(tmp_path / "model.safetensors"))


# Pins


@pytest.fixture
def shas(hub: Hub) -> dict[str, str]:
    """A repository whose refs all differ: what each revision stands for."""
    old = hub.add_repo("org/model", {**FILES, "step": "1"})
    hub.tag("org/model", "v1", old)
    branch = hub.add_repo("org/model", {"step": "branch"}, branch="feature/a")
    main = hub.commit("org/model", {"step": "2"})
    request = HfApi().upload_file(
        path_or_fileobj=b"pr",
        path_in_repo="step",
        repo_id="org/model",
        create_pr=True,
        commit_message="Propose",
    )
    found = {
        "": main,
        "@main": main,
        "@v1": old,
        f"@{old}": old,
        "@feature%2Fa": branch,
        "@refs/pr/1": str(request.oid),
    }
    assert len(set(found.values())) == 4
    return found


@pytest.mark.parametrize("kind", ["", "@main", "@v1", "sha", "@feature%2Fa", "@refs/pr/1"])
def test_a_revision_is_pinned_to_its_commit(shas: dict[str, str], kind: str) -> None:
    suffix = kind if kind != "sha" else next(key for key in shas if len(key) == 41)
    found = pinned("org/model" + suffix)
    assert (found.ref, found.revision) == ("org/model", shas[suffix])
    assert not found.is_local


def test_a_commit_after_the_pin_changes_nothing(hub: Hub) -> None:
    hub.add_repo("org/model", {**FILES, "config.json": "old"})
    found = pinned("org/model")
    hub.commit("org/model", {"config.json": "new!", "extra": "x"})
    assert found.files.read("config.json") == b"old"
    assert found.files.size("extra") is None


def test_a_pin_knows_files_and_card_after_one_request(hub: Hub) -> None:
    hub.add_repo("org/model", FILES)
    found = pinned("org/model")
    assert len(hub.requests) == 1
    assert found.card["license"] == "mit"
    assert {name: found.files.size(name) for name in (*FILES, "absent")} == {
        "config.json": 2,
        "README.md": 21,
        "model.safetensors": 1,
        "absent": None,
    }


def test_a_pin_writes_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES)
    pinned("org/model", cache_dir=str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_is_called_what_the_user_called_it(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES, branch="dev")
    hub.add_repo("org/model", FILES)
    names = ["org/model", "org/model@dev", str(tmp_path)]
    assert [str(pinned(name)) for name in names] == names


def test_a_folder_has_no_revision(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Title")
    found = pinned(str(tmp_path))
    assert (found.revision, found.is_local) == (None, True)
    assert found.card == {"license": "mit"}


HOSTILE_CARDS = [
    "",
    "no front matter",
    "---\n---\n",
    "---\n- a\n---\n",
    "---\ntext\n---\n",
    "---\n3: 4\n---\n",
    "---\nlicense: [mit\n---\n",
    "---\nlicense: !!python/object/apply:os.system [false]\n---\n",
    "---\nlicense: !!bool x\n---\n",
    "---\nlicense: !!int ''\n---\n",
    "---\nlicense: !!timestamp x\n---\n",
    "---\nlicense: 2020-99-99\n---\n",
    "---\n" + "[" * 1000 + "\n---\n",
    "---\ntags: 3\n---\n",
    "---\nself: 3\n---\n",
    "---\neval_results: x\n---\n",
    "---\neval_results: [3]\n---\n",
]


@pytest.mark.parametrize("card", [*HOSTILE_CARDS, b"\xff\xfe", b"---\nlicense: \xff\n---\n"])
def test_a_damaged_card_is_no_reason_not_to_merge(tmp_path: Path, card: str | bytes) -> None:
    content = card if isinstance(card, bytes) else card.encode()
    (tmp_path / "README.md").write_bytes(content)
    assert "base_model" not in pinned(str(tmp_path)).card


@pytest.mark.parametrize("metadata", ["eval_results: x", "eval_results: [3]", "model-index: x"])
def test_a_damaged_card_on_the_hub_is_no_reason_not_to_merge(hub: Hub, metadata: str) -> None:
    hub.add_repo("org/model", {**FILES, "README.md": f"---\n{metadata}\n---\n"})
    assert "base_model" not in pinned("org/model").card


def test_a_card_that_the_client_cannot_take_is_refused_by_the_name_of_its_repository(
    hub: Hub,
) -> None:
    hub.add_repo("org/model", {**FILES, "README.md": "---\nself: 1\n---\n"})
    with pytest.raises(RepoError, match="org/model"):
        pinned("org/model")


# Access


def test_an_unknown_repository_is_refused_with_the_way_out(hub: Hub) -> None:
    with pytest.raises(RepoError, match=r"org/absent does not exist.*for a local folder check"):
        pinned("org/absent")


def test_an_unknown_revision_is_refused(hub: Hub) -> None:
    hub.add_repo("org/model", FILES)
    with pytest.raises(RepoError, match=r"org/model has no revision 'absent'.*listed at"):
        pinned("org/model@absent")


def test_a_private_repository_needs_its_owner_s_token(hub: Hub) -> None:
    hub.add_repo("org/secret", FILES, private=True)
    assert pinned("org/secret").revision
    with pytest.raises(RepoError, match=r"is private and this token cannot read.*hf auth login"):
        pinned("org/secret", token="hf_read")


@pytest.mark.parametrize("with_token", [False, True])
def test_a_gated_repository_says_where_to_ask(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, with_token: bool
) -> None:
    hub.add_repo("other/gated", FILES, gated="manual")
    if not with_token:
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setenv("HF_TOKEN_PATH", os.devnull)
    found = pinned("other/gated")
    with pytest.raises(RepoError, match=r"other/gated is gated.*/other/gated"):
        found.files.read("config.json")


def test_a_gated_repository_is_read_by_those_let_in(hub: Hub) -> None:
    hub.add_repo("other/gated", FILES, gated="manual")
    hub.repos["other/gated"].allowed.add("reader")
    assert pinned("other/gated", token="hf_read").files.read("config.json") == b"{}"


@pytest.mark.parametrize("token", ["hf_wrong", "hf_wröng", "hf_wrong\n", " "])
def test_a_bad_token_is_refused_as_such_and_not_repeated(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setattr(client_module, "RETRY_WAITS", ())
    hub.add_repo("org/model", FILES)
    with pytest.raises(RepoError, match="token") as error:
        pinned("org/model", token=token)
    assert "wr" not in str(error.value)


def test_a_token_is_not_shown(hub: Hub) -> None:
    hub.add_repo("org/model", FILES)
    assert "hf_read" not in repr(pinned("org/model", token="hf_read"))
    files = pinned("org/model", token="hf_read").files
    assert isinstance(files, HubFiles) and "hf_read" not in repr(files.repo)


# The base model that fine-tunes name


def speaker(ref: str, card: dict[str, Any] | None = None, config: Any = None) -> PinnedCheckpoint:
    """A checkpoint that says this and nothing else."""
    text = json.dumps(config).encode()

    class Config:
        def size(self, name: str) -> int | None:
            return len(text) if name == "config.json" and config is not None else None

        def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
            return text[start:stop]

        def read_into(self, name: str, start: int, buffer: memoryview) -> None:
            raise NotImplementedError

    return PinnedCheckpoint(ref, "0" * 40, Config(), card or {})


@pytest.mark.parametrize(
    ("card", "config", "names"),
    [
        ({"base_model": "org/base"}, None, ["org/base"]),
        ({"base_model": ["org/base"]}, None, ["org/base"]),
        ({"base_model": ["org/a", "org/b"]}, None, ["org/a", "org/b"]),
        ({"base_model": "org/base"}, {"_name_or_path": "org/other"}, ["org/base"]),
        ({}, {"_name_or_path": "org/base"}, ["org/base"]),
        ({"base_model": []}, {"_name_or_path": "org/base"}, ["org/base"]),
        ({"base_model": ""}, {"_name_or_path": "org/base"}, ["org/base"]),
        ({"base_model": None}, {}, []),
        ({"base_model": {"a": "b"}}, {}, []),
        ({"base_model": [3, None]}, {}, []),
        ({}, {"_name_or_path": "me/tuned"}, []),
        ({}, {"_name_or_path": "./base"}, []),
        ({}, {"_name_or_path": "/data/base"}, []),
        ({}, {"_name_or_path": "~/base"}, []),
        ({}, {"_name_or_path": "data/clip/base"}, []),
        ({}, {"_name_or_path": "base"}, []),
        ({}, {"_name_or_path": ""}, []),
        ({}, {"_name_or_path": 3}, []),
        ({}, [], []),
        ({}, None, []),
    ],
)
def test_a_checkpoint_names_its_base_in_its_card_or_else_in_its_config(
    card: dict[str, Any], config: Any, names: list[str]
) -> None:
    assert named_by(speaker("me/tuned", card, config)) == names


def said(inputs: list[PinnedCheckpoint]) -> dict[str, list[str]]:
    return {str(item): named_by(item) for item in inputs}


def nothing(name: str) -> list[str]:
    """Parents of models that say nothing."""
    return []


def test_inputs_that_agree_settle_it_and_silent_ones_follow() -> None:
    first = speaker("me/first", {"base_model": "org/base"})
    silent = speaker("me/silent")
    last = speaker("me/last", config={"_name_or_path": "org/base"})
    asked: list[str] = []

    def parents(name: str) -> list[str]:
        asked.append(name)
        return ["org/older"]

    assert infer(said([first, silent, last]), parents) == ("org/base", ["me/first", "me/last"])
    assert asked == []  # where they agree nobody is asked


def test_a_disagreement_lists_who_says_what() -> None:
    first = speaker("me/first", {"base_model": "org/a"})
    second = speaker("me/second", {"base_model": ["org/b"]})
    with pytest.raises(CheckpointError) as error:
        infer(said([first, second, speaker("me/silent")]), nothing)
    assert "me/first: org/a; me/second: org/b; me/silent: nothing" in error.value.message
    assert "`base_model=REF`" in (error.value.hint or "")


def test_a_merge_of_two_bases_does_not_name_one() -> None:
    with pytest.raises(CheckpointError, match="me/merge: org/a, org/b"):
        infer(said([speaker("me/merge", {"base_model": ["org/a", "org/b"]})]), nothing)


def test_silence_asks_for_the_base_model() -> None:
    with pytest.raises(CheckpointError, match=r"No checkpoint says.*`base_model=REF`"):
        infer(said([speaker("me/first"), speaker("me/second")]), nothing)


def test_the_card_of_a_repository_is_heard(hub: Hub) -> None:
    card = "---\nbase_model:\n- org/base\n---\n"
    hub.add_repo("me/tuned", {"README.md": card, "config.json": "{}"})
    hub.add_repo("me/other", {"config.json": '{"_name_or_path": "org/base"}'})
    inputs = [pinned("me/tuned"), pinned("me/other")]
    assert infer(said(inputs), nothing) == ("org/base", ["me/tuned", "me/other"])


@pytest.mark.parametrize(
    ("names", "parents", "found"),
    [
        # a fine-tune of a fine-tune, and one of the base
        ([["org/x"], ["org/base"]], {"org/x": ["org/base"]}, "org/base"),
        ([["org/x"], [], ["org/base"]], {"org/x": ["org/base"]}, "org/base"),
        ([["org/x"], ["org/y"]], {"org/x": ["org/base"], "org/y": ["org/base"]}, "org/base"),
        # the nearest: what that one was made from is nearer to nobody
        (
            [["org/x"], ["org/y"]],
            {"org/x": ["org/base"], "org/y": ["org/base"], "org/base": ["org/older"]},
            "org/base",
        ),
        ([["org/x"], ["org/base"]], {"org/x": ["org/base"], "org/base": ["org/o"]}, "org/base"),
        # a merge names its base and its tasks
        ([["org/base", "org/x"]], {"org/x": ["org/base"]}, "org/base"),
        ([["org/x", "org/y"]], {"org/x": ["org/base"], "org/y": ["org/base"]}, "org/base"),
        # longer ways
        (
            [["org/x"], ["org/base"]],
            {"org/x": ["org/y"], "org/y": ["org/z"], "org/z": ["org/base"]},
            "org/base",
        ),
        # that lead nowhere, or in circles
        ([["org/x"], ["org/y"]], {}, None),
        ([["org/x"], ["org/y"]], {"org/x": ["org/a"], "org/y": ["org/b"]}, None),
        ([["org/x"], ["org/y"]], {"org/x": ["org/x"], "org/y": ["org/y"]}, None),
        ([["org/x"], ["org/y"]], {"org/x": ["org/y"], "org/y": ["org/x"]}, None),
        # two that are equally near
        ([["org/x"], ["org/y"]], {"org/x": ["org/a", "org/b"], "org/y": ["org/b", "org/a"]}, None),
    ],
)
def test_names_are_followed_to_what_they_have_in_common(
    names: list[list[str]], parents: dict[str, list[str]], found: str | None
) -> None:
    heard = {f"me/{i}": named for i, named in enumerate(names)}
    if found is not None:
        speakers = [item for item, named in heard.items() if named]
        assert infer(heard, lambda name: parents.get(name, [])) == (found, speakers)
        return
    with pytest.raises(CheckpointError, match="different base models"):
        infer(heard, lambda name: parents.get(name, []))


def test_a_disagreement_says_where_the_names_lead() -> None:
    parents = {"org/x": ["org/y"], "org/y": ["org/a"]}
    with pytest.raises(CheckpointError, match=r"me/1: org/x \(from org/y\); me/2: org/b\."):
        infer({"me/1": ["org/x"], "me/2": ["org/b"]}, lambda name: parents.get(name, []))


def test_only_so_many_models_are_looked_up() -> None:
    asked: list[str] = []

    def parents(name: str) -> list[str]:
        asked.append(name)
        return [f"{name}{letter}" for letter in "abcdefghij"]

    named = {"me/1": [f"org/a{i}" for i in range(30)], "me/2": ["org/b"]}
    with pytest.raises(CheckpointError, match="different base models") as error:
        infer(named, parents)
    assert len(asked) == 40 and len(error.value.message) < 1000


def test_what_a_card_names_is_no_folder_here(
    hub: Hub, zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hf_tsv

    card = "---\nbase_model: {}\n---\n"
    hub.add_repo("org/base", zoo / "base")
    for name, base in (("vision", "org/middle"), ("full", "org/base")):
        files = {file.name: file for file in (zoo / name).iterdir()}
        hub.add_repo(f"org/{name}", {**files, "README.md": card.format(base)})
    hub.add_repo("org/middle", {"README.md": card.format("org/base"), "config.json": "{}"})
    (tmp_path / "org" / "middle").mkdir(parents=True)
    (tmp_path / "org" / "middle" / "README.md").write_text(card.format("org/other"))
    monkeypatch.chdir(tmp_path)
    done = hf_tsv.merge(["hf://org/vision", "hf://org/full"], output="m")
    assert done.base_model["ref"] == "org/base"


def test_an_endless_chain_is_left(hub: Hub) -> None:
    asked: list[str] = []

    def parents(name: str) -> list[str]:
        asked.append(name)
        return [name + "x"]

    with pytest.raises(CheckpointError, match="different base models"):
        infer({"me/1": ["org/a"], "me/2": ["org/b"]}, parents)
    assert len(asked) == 16


# Without the Hub


def cached(hub: Hub, cache: Path, text: str) -> PinnedCheckpoint:
    """A repository pinned and downloaded, as a merge does it."""
    found = pinned(text, cache_dir=str(cache))
    assert isinstance(found.files, HubFiles)
    download([Wanted(found.files.repo, found.asked_revision, tuple(FILES))], visible=False)
    return found


@pytest.mark.parametrize("suffix", ["", "@dev", "@refs/pr/1", "sha"])
def test_a_hub_that_is_down_is_replaced_by_the_cache(hub: Hub, tmp_path: Path, suffix: str) -> None:
    sha = hub.add_repo("org/model", FILES)
    hub.add_repo("org/model", {**FILES, "config.json": "[]"}, branch="dev")
    HfApi().create_pull_request("org/model", "Nothing yet")
    text = f"org/model@{sha}" if suffix == "sha" else f"org/model{suffix}"
    online = cached(hub, tmp_path, text)
    hub.stop()
    try:
        offline = pinned(text, cache_dir=str(tmp_path))
    finally:
        hub.start()
    assert isinstance(offline.files, LocalFiles)
    assert (offline.ref, offline.revision) == (online.ref, online.revision)
    assert str(offline) == str(online) and offline.card == online.card
    for name in FILES:
        assert offline.files.read(name) == online.files.read(name)


def test_a_revision_that_was_never_cached_is_not_replaced_by_another(
    hub: Hub, tmp_path: Path
) -> None:
    hub.add_repo("org/model", FILES)
    hub.add_repo("org/model", {"config.json": "[]"}, branch="dev")
    cached(hub, tmp_path, "org/model")
    hub.stop()
    try:
        with pytest.raises(RepoError, match=r"not in the local cache.*Run once with a connection"):
            pinned("org/model@dev", cache_dir=str(tmp_path))
    finally:
        hub.start()


def test_a_hub_that_is_down_and_no_cache(hub: Hub, tmp_path: Path) -> None:
    hub.stop()
    try:
        with pytest.raises(RepoError, match=r"org/model is not in the local cache"):
            pinned("org/model", cache_dir=str(tmp_path))
    finally:
        hub.start()


def test_hf_hub_offline_is_honoured(hub: Hub, tmp_path: Path) -> None:
    online = cached(hub, tmp_path, "org/model") if hub.add_repo("org/model", FILES) else None
    assert online is not None
    hub.requests.clear()
    script = """
        import sys
        from hf_tsv.checkpoints.reference import parse, pin
        from hf_tsv.system.errors import RepoError

        found = pin(parse("org/model"), cache_dir=sys.argv[1])
        print(found.revision, found.card["license"], found.files.read("model.safetensors"))
        try:
            pin(parse("org/other"), cache_dir=sys.argv[1])
        except RepoError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second = done.stdout.splitlines()
    assert first == f"{online.revision} mit b'w'"
    assert second == (
        "org/other is not in the local cache and the Hub cannot be reached"
        " (OfflineModeIsEnabled). Run once with a connection, without HF_HUB_OFFLINE and"
        " `stream=True`."
    )
    assert hub.requests == []
