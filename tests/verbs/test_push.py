"""Uploading a finished folder: whole outputs of ours only, one commit, nothing sent twice."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import time
from pathlib import Path

import pytest
from cli import copied, hf_tsv, refused
from forks import fork
from hub import Hub, User
from pushes import contents, published, pushed, sent

import hf_tsv as api
from hf_tsv.checkpoints.names import MARKERS, OLD_WEIGHTS, RECIPE_FILE
from hf_tsv.hub import Names, push
from hf_tsv.system.errors import CheckpointError, OutputError, RepoError

KINDS = ("merge", "shards", "masks", "factors", "adapter", "reconstruction")


@pytest.fixture(scope="module")
def outputs(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that hf-tsv writes and that can be pushed, each in a folder."""
    folder = tmp_path_factory.mktemp("outputs")
    tasks, base = [zoo / "vision", zoo / "flat"], {"base_model": zoo / "base"}
    api.merge(tasks, **base, output=folder / "merge")
    api.merge(tasks, **base, output=folder / "shards", max_shard_size="40KB")
    api.merge(tasks, **base, output=folder / "masks", method="tall-mask")
    api.compress(zoo / "vision", **base, output=folder / "factors")
    api.export_peft(zoo / "vision", **base, output=folder / "adapter")
    api.reconstruct(folder / "factors", **base, output=folder / "reconstruction")
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_what_hf_tsv_writes_can_be_pushed(hub: Hub, outputs: Path, zoo: Path, kind: str) -> None:
    """As it is, but for the card, which names the repository, and without a path from here."""
    local = (outputs / kind / "README.md").read_text()
    done = hf_tsv("push", outputs / kind, "me/new")
    assert done.code == 0, done.err
    there = pushed(hub)
    assert there == published(outputs / kind)
    repo = hub.repos["me/new"]
    assert done.out == f"{hub.endpoint}/me/new\n"
    assert len(repo.commits) == 2  # the first makes the repository
    assert "Uploading to me/new.\n" in done.err
    assert f"\nUploaded {len(contents(outputs / kind))} files (" in done.err

    card = there["README.md"].decode()
    assert local.count('# "." is this folder') == card.count("me/new") > 0
    assert not re.search(r'"\.["/]|local-dir| \. |this folder', card.partition("<details>")[0])
    assert (outputs / kind / "README.md").read_text() == local

    for name, content in there.items():
        if name != RECIPE_FILE:
            assert str(zoo.parent).encode() not in content.partition(b"<details>")[0], name
            assert str(outputs).encode() not in content, name
    if kind == "factors":
        config = json.loads(there["tsv_config.json"])
        assert config["base_model"]["ref"] == "base" and config["source"]["ref"] == "vision"


def test_every_way_to_the_hub_names_the_repository(hub: Hub, world: Path) -> None:
    api.compress("org/vision", push_to="me/at-once").push_to_hub("me/later")
    api.merge(["org/vision", "org/flat"], push_to="me/merged")
    for repo in ("me/at-once", "me/later", "me/merged"):
        card = pushed(hub, repo)["README.md"].decode()
        assert f'"{repo}"' in card and '"."' not in card


def test_what_the_user_wrote_into_the_card_is_pushed_as_it_is(
    hub: Hub, outputs: Path, tmp_path: Path
) -> None:
    folder = copied(outputs / "factors", tmp_path / "edited")
    own = b'# Mine\r\n\r\n`open(".")` lists "." and ./a\r\n```python\r\nx = "."\r\n'
    line = b'model = load(".")  # "." is this folder\r\n```\r\n'
    (folder / "README.md").write_bytes(own + line)
    assert hf_tsv("push", folder, "me/new").code == 0
    assert pushed(hub)["README.md"] == own + b'model = load("me/new")\r\n```\r\n'


@pytest.mark.parametrize("file", [RECIPE_FILE, "README.md"])
def test_a_path_that_an_older_folder_holds_is_named_before_it_is_published(
    hub: Hub, outputs: Path, tmp_path: Path, file: str
) -> None:
    folder = copied(outputs / "merge", tmp_path / "old")
    text = (folder / file).read_text()
    (folder / file).write_text(f"{text}# made from /home/me/client-x/clip-a\n")
    for more in (["--dry-run"], []):
        done = hf_tsv("push", folder, "me/new", *more)
        said = rf"Warning: .*/{file} names a folder of this machine: /"
        assert done.code == 0 and re.search(said, done.err), done.err


def test_what_a_card_lacks_is_told(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    said = (
        "The card has no base_model and no license: add them to the lines at the top of README.md."
    )
    assert said in hf_tsv("push", outputs / "merge", "me/new", "--dry-run").err
    folder = copied(outputs / "merge", tmp_path / "edited")
    card = (folder / "README.md").read_text()
    (folder / "README.md").write_text(card.replace("---\n", "---\nlicense: mit\n", 1))
    assert "The card has no base_model: add" in hf_tsv("push", folder, "me/new").err
    (folder / "README.md").unlink()
    done = hf_tsv("push", folder, "me/bare")
    assert "The folder has no README.md, so me/bare gets no model card." in done.err


def test_factors_can_be_counted_and_listed(hub: Hub, outputs: Path) -> None:
    from transformers import AutoConfig

    api.push(outputs / "factors", "me/new")
    assert type(AutoConfig.from_pretrained("me/new")).__name__ == "CLIPVisionConfig"
    card = pushed(hub)["README.md"].decode()
    assert "pipeline_tag: zero-shot-image-classification" in card


def test_a_push_that_changes_nothing_says_so(hub: Hub, outputs: Path) -> None:
    words = ["push", outputs / "factors", "me/new"]
    assert hf_tsv(*words).code == 0
    commits = len(hub.repos["me/new"].commits)
    again = hf_tsv(*words)
    assert again.code == 0 and len(hub.repos["me/new"].commits) == commits
    count = len(contents(outputs / "factors"))
    assert f"Nothing was uploaded: me/new has all {count} files already.\n" in again.err
    assert "Uploaded" not in again.err and "No files have been modified" not in again.err
    assert not hf_tsv(*words, "--json").json["changed"]


def test_a_push_is_what_push_to_does(hub: Hub, outputs: Path, zoo: Path) -> None:
    words = ["merge", zoo / "vision", zoo / "flat", "--base-model", zoo / "base"]
    assert hf_tsv(*words, "--push-to", "me/direct", "-o", outputs / "again").code == 0
    assert hf_tsv("push", outputs / "again", "me/later").code == 0
    shutil.rmtree(outputs / "again")
    later, direct = pushed(hub, "me/later"), pushed(hub, "me/direct")
    card = direct.pop("README.md").replace(b"me/direct", b"me/later")
    assert later.pop("README.md") == card and later == direct


def test_options_of_an_upload(hub: Hub, outputs: Path) -> None:
    words = ["push", outputs / "factors", "me/new"]
    assert hf_tsv(*words, "--private", "--revision", "tsv").code == 0
    assert hub.repos["me/new"].private and not pushed(hub)
    assert pushed(hub, revision="tsv") == published(outputs / "factors")
    done = hf_tsv(*words, "--create-pr", "--commit-message", "Look!")
    assert done.out == f"{hub.endpoint}/me/new/discussions/1\n"
    assert hub.repos["me/new"].pull_requests[1].title == "Look!" and not pushed(hub)


def test_the_order_of_hf_upload_is_understood(hub: Hub, outputs: Path) -> None:
    done = hf_tsv("push", "me/new", outputs / "factors")
    assert done.code == 0 and "the repository me/new" in done.err, done.err
    assert pushed(hub) == published(outputs / "factors")


def test_a_push_of_another_kind_replaces_the_one_before(hub: Hub, outputs: Path) -> None:
    for kind in KINDS:
        assert hf_tsv("push", outputs / kind, "me/new", "-q").code == 0
        there, folder = pushed(hub), published(outputs / kind)
        assert {name: there.get(name) for name in folder} == folder
        weights = {name for name in there if name.endswith(".safetensors") or name in MARKERS}
        assert weights <= set(folder)


def test_a_dry_run_checks_folder_and_rights_and_sends_nothing(hub: Hub, outputs: Path) -> None:
    done = hf_tsv("push", outputs / "merge", "new", "--dry-run")
    assert done.code == 0, done.err
    assert "repository  me/new" in done.out and "model.safetensors  " in done.out
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"} and not hub.repos


def test_the_report_says_what_was_uploaded(hub: Hub, outputs: Path) -> None:
    found = hf_tsv("push", outputs / "merge", "me/new", "--json").json
    files = {name: len(content) for name, content in contents(outputs / "merge").items()}
    assert found.pop("seconds") >= 0
    assert found == {
        "schema_version": 1, "folder": str(outputs / "merge"), "repo_id": "me/new", "files": files,
        "bytes": sum(files.values()), "changed": True, "dry_run": False,
        "url": f"{hub.endpoint}/me/new/commit/{hub.repos['me/new'].branches['main']}",
    }  # fmt: skip
    assert api.push(outputs / "merge", "me/new").url == found["url"]


# What is refused


def test_a_folder_that_is_not_ours(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    done = hf_tsv("push", zoo / "vision", "me/new")
    refused(done, tmp_path, hub, "vision was not written by hf-tsv", "Name the output of a merge")
    assert hub.requests == []


def test_a_report_on_interference_is_no_model(hub: Hub, zoo: Path, tmp_path: Path) -> None:
    tasks, base = [zoo / "vision", zoo / "flat"], zoo / "base"
    api.interference(tasks, base_model=base, output=tmp_path / "report")
    refused(hf_tsv("push", tmp_path / "report", "me/new"), tmp_path, hub, "was not written by")


@pytest.mark.parametrize("name", ["nothing", "nothing/in/it", ""])
def test_no_folder(hub: Hub, tmp_path: Path, name: str) -> None:
    (tmp_path / "work").mkdir()
    done = hf_tsv("push", name, "me/new", cwd=tmp_path / "work")
    refused(done, tmp_path, hub, name)
    assert hub.requests == []


def test_a_file(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    file = outputs / "merge" / "config.json"
    refused(hf_tsv("push", file, "me/new"), tmp_path, hub, f"There is no folder {file}")


def test_a_folder_under_construction(hub: Hub, outputs: Path, tmp_path: Path) -> None:
    work = tmp_path / "w"
    copied(outputs / "merge", work / ".merged.hf-tsv" / "files")
    copied(outputs / "factors", work / ".factors.hf-tsv-0123abcd")
    for name in (".merged.hf-tsv", ".merged.hf-tsv/files", ".factors.hf-tsv-0123abcd"):
        done = hf_tsv("push", work / name, "me/new")
        refused(done, tmp_path, hub, f"{work / name} is not finished")
    done = hf_tsv("push", work / "merged", "me/new")
    refused(done, tmp_path, hub, f"{work / 'merged'} is not finished", "to resume")


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("merge", "model.safetensors"),
        ("shards", "model-00002-of-00004.safetensors"),
        ("masks", "masks/vision/mask.safetensors"),
        ("factors", "task_factors.safetensors"),
        ("adapter", "adapter_model.safetensors"),
        ("reconstruction", "model.safetensors"),
    ],
)
def test_a_weight_file_that_is_cut_short(
    hub: Hub, outputs: Path, tmp_path: Path, kind: str, file: str
) -> None:
    folder = copied(outputs / kind, tmp_path / "cut")
    (folder / file).write_bytes((folder / file).read_bytes()[:-1])
    done = hf_tsv("push", folder, "me/new")
    refused(
        done, tmp_path, hub, f"{folder}: {file} is truncated", "the command that wrote the folder"
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("kind", "file", "said"),
    [
        ("merge", "model.safetensors", "has no model.safetensors"),
        ("merge", "config.json", "has no config.json"),
        ("shards", "model-00002-of-00004.safetensors", "its index names"),
        ("shards", "model.safetensors.index.json", "has no model.safetensors"),
        ("factors", "task_factors.safetensors", "has no task_factors.safetensors"),
        ("adapter", "adapter_model.safetensors", "has no adapter_model.safetensors"),
    ],
)
def test_a_file_that_is_not_there(
    hub: Hub, outputs: Path, tmp_path: Path, kind: str, file: str, said: str
) -> None:
    folder = copied(outputs / kind, tmp_path / "lost")
    (folder / file).unlink()
    refused(
        hf_tsv("push", folder, "me/new"), tmp_path, hub, said, "the command that wrote the folder"
    )
    assert hub.requests == []


@pytest.mark.parametrize(
    ("kind", "file"),
    [("merge", "hf_tsv_recipe.yaml"), ("factors", "tsv_config.json"),
     ("adapter", "tsv_config.json"), ("reconstruction", "hf_tsv_reconstruction.json")],
)  # fmt: skip
def test_a_description_that_cannot_be_read(
    hub: Hub, outputs: Path, tmp_path: Path, kind: str, file: str
) -> None:
    folder = copied(outputs / kind, tmp_path / "strange")
    (folder / file).write_bytes(b"\xff{")
    refused(hf_tsv("push", folder, "me/new"), tmp_path, hub, file)
    assert hub.requests == []


def test_a_token_that_cannot_write_is_noticed_before_anything_is_sent(
    hub: Hub, outputs: Path, tmp_path: Path
) -> None:
    hub.users["hf_look"] = User("me", role="read")
    done = hf_tsv("push", outputs / "merge", "me/new", HF_TOKEN="hf_look")
    refused(done, tmp_path, hub, "needs a token that can write")
    done = hf_tsv("push", outputs / "merge", "me/new", HF_TOKEN=None)
    refused(done, tmp_path, hub, "needs a token and none is set")


def test_an_input_is_not_replaced(world: Path, hub: Hub) -> None:
    hub.repos["me/vision"] = hub.repos["org/vision"]
    words = ["merge", "me/vision", "org/flat", "-o", "merged"]
    assert hf_tsv(*words, cwd=world).code == 0
    hub.requests.clear()
    done = hf_tsv("push", "merged", "me/vision", cwd=world)
    assert done.code == 1 and "would replace the input me/vision" in done.err
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}


# Uploads that fail


def test_a_failed_upload_keeps_the_folder_and_says_how_to_push_it(hub: Hub, outputs: Path) -> None:
    words = ["push", outputs / "merge", "me/new", "--private", "--commit-message", "It's mine"]
    hub.fail("/commit/", 403)
    done = hf_tsv(*words)
    assert done.code == 1 and "Traceback" not in done.err
    assert f"The result is complete in {outputs / 'merge'}. Upload it with `" in done.err
    assert len(hub.repos["me/new"].commits) == 1
    line = shlex.split(done.err.split("`")[1])
    assert line[0] == "hf-tsv"
    again = hf_tsv(*line[1:])
    assert again.code == 0, again.err
    assert pushed(hub) == published(outputs / "merge")
    head = hub.repos["me/new"].resolve("main")
    assert hub.repos["me/new"].private and head.message == "It's mine"


def test_what_the_hub_has_is_not_sent_again(hub: Hub, outputs: Path) -> None:
    hub.fail("/commit/", 403)
    with pytest.raises(RepoError):
        api.push(outputs / "shards", "me/new")
    shards = {path.name for path in (outputs / "shards").glob("*.safetensors")}
    assert len(sent(hub)) == len(shards) > 2
    hub.requests.clear()
    api.push(outputs / "shards", "me/new")
    assert sent(hub) == [] and pushed(hub) == published(outputs / "shards")


def test_only_what_failed_is_sent_again(hub: Hub, outputs: Path) -> None:
    every = len(list((outputs / "shards").glob("*.safetensors")))
    hub.fail("/upload/", 403, method="PUT", after=2, times=math.inf)
    with pytest.raises(RepoError, match=r"upload to me/new failed: the storage answered 403"):
        api.push(outputs / "shards", "me/new")
    assert len(hub.repos["me/new"].commits) == 1
    there = len(hub.repos["me/new"].lfs)
    hub.heal()
    hub.requests.clear()
    api.push(outputs / "shards", "me/new")
    assert there == 2 and len(sent(hub)) == every - there
    assert pushed(hub) == published(outputs / "shards")


def test_a_push_that_is_killed_leaves_no_commit_and_goes_on(hub: Hub, outputs: Path) -> None:
    hub.add_repo("me/new", {"notes.txt": "kept"})
    before = hub.repos["me/new"].branches["main"]
    hub.fail("/upload/", delay=60, method="PUT", after=2)
    process = fork("push", outputs / "shards", "me/new")
    deadline = time.monotonic() + 120
    while len(hub.repos["me/new"].lfs) < 2 and process.poll() is None:
        assert time.monotonic() < deadline, [(r.method, r.path, r.status) for r in hub.requests]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, err
    assert hub.repos["me/new"].branches["main"] == before
    there = set(hub.repos["me/new"].lfs)
    hub.requests.clear()
    assert hf_tsv("push", outputs / "shards", "me/new").code == 0
    assert not any(oid in request.path for oid in there for request in sent(hub))
    assert pushed(hub) == {**published(outputs / "shards"), "notes.txt": b"kept"}


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [(signal.SIGINT, 130, "Interrupted."), (signal.SIGTERM, 143, "Terminated.")],
)
def test_a_push_that_is_stopped_says_how_to_go_on(
    hub: Hub, outputs: Path, sent: signal.Signals, code: int, said: str
) -> None:
    hub.fail("/commit/", 503, action=lambda: os.kill(os.getpid(), sent))
    done = hf_tsv("push", outputs / "merge", "me/new", "--private")
    assert (done.code, done.out) == (code, "") and said in done.err, done.err
    command = f"`hf-tsv push {outputs / 'merge'} me/new --private`"
    assert f"The result is complete in {outputs / 'merge'}. Upload it with {command}" in done.err
    assert len(hub.repos["me/new"].commits) == 1


def test_unknown_folders_of_the_api_are_errors_too(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="There is no folder"):
        api.push(tmp_path / "nothing", "me/new")


def test_links_out_of_the_folder_are_refused_and_hidden_files_stay(
    hub: Hub, outputs: Path, tmp_path: Path
) -> None:
    folder = copied(outputs / "merge", tmp_path / "merge")
    (tmp_path / "token").write_text("hf_secret")
    (folder / ".env").write_text("TOKEN=hf_secret")
    (folder / ".ssh").mkdir()
    (folder / ".ssh" / "id").write_text("hf_secret")
    (folder / "licence.txt").symlink_to("README.md")
    assert api.push(folder, "me/new").files.keys() == contents(outputs / "merge").keys() | {
        "licence.txt"
    }
    assert pushed(hub).keys() == contents(outputs / "merge").keys() | {"licence.txt"}
    (folder / "notes.txt").symlink_to(tmp_path / "token")
    with pytest.raises(OutputError, match=r"notes\.txt is a link to a file outside"):
        api.push(folder, "me/other")
    assert "me/other" not in hub.repos


@pytest.mark.parametrize("name", [b"a\xff", b"a\nb"])
def test_a_name_that_is_no_text_is_refused(
    hub: Hub, outputs: Path, tmp_path: Path, name: bytes
) -> None:
    folder = copied(outputs / "merge", tmp_path / "merge")
    Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).touch()
    with pytest.raises(OutputError, match="of the name"):
        api.push(folder, "me/new")


def test_a_folder_that_is_gone_removes_nothing_from_its_repository(
    hub: Hub, outputs: Path, tmp_path: Path
) -> None:
    folder = copied(outputs / "merge", tmp_path / "merge")
    api.push(folder, "me/new")
    shutil.rmtree(folder)
    with pytest.raises(OutputError, match="not a finished output"):
        push(folder, "me/new", Names(MARKERS, OLD_WEIGHTS), commit_message="again")
    assert pushed(hub) == published(outputs / "merge")


@pytest.mark.parametrize(("kind", "lost"), [("heads", "heads"), ("masks", "masks/vision")])
def test_a_merge_that_lacks_what_belongs_beside_it_is_refused(
    hub: Hub, zoo: Path, outputs: Path, tmp_path: Path, kind: str, lost: str
) -> None:
    if kind == "heads":
        tasks = [zoo / "classifier", zoo / "vision"]
        api.merge(tasks, base_model=zoo / "base", output=tmp_path / "m", keep_heads=True)
    else:
        copied(outputs / kind, tmp_path / "m")
    shutil.rmtree(tmp_path / "m" / lost)
    with pytest.raises(
        CheckpointError, match="task heads" if kind == "heads" else "masks of only 1 of 2 tasks"
    ):
        api.push(tmp_path / "m", "me/new")
