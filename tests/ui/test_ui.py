"""Parts of the page without a browser: form, queue, visitors, commands; the Space's metadata."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from cli import hf_tsv
from hub import Hub
from huggingface_hub import SpaceCard
from PIL import Image

from hf_tsv.system.text import rough_time
from hf_tsv.ui import desk as desk_
from hf_tsv.ui.commands import TRYING, Command, CommandError, environment
from hf_tsv.ui.desk import FREE_SPACE, Desk, Limits
from hf_tsv.ui.form import Form
from hf_tsv.ui.page import _waited
from hf_tsv.ui.turns import Turns

ROOT = Path(__file__).parents[2]
PLAN = {"output_bytes": 9_000_000_000}


def test_a_form_is_a_command() -> None:
    form = Form(" org/base ", ("org/a",), "org/b, org/a\norg/c@v1", "iso-c", " 0.5 ")
    assert form.merge("out") == [
        "merge", "org/a", "org/b", "org/c@v1", "--base-model", "org/base",
        "--method", "iso-c", "--alpha=0.5", "-o", "out",
    ]  # fmt: skip
    assert form.shown("me/x", private=True) == (
        "hf-tsv merge org/a org/b org/c@v1 --base-model org/base --method iso-c --alpha=0.5"
        " -o merged --push-to me/x --private"
    )
    assert Form("org/base").shown("", private=False) == ""
    assert "--alpha" not in " ".join(Form("org/base", ("org/a",)).merge("out"))


def test_what_is_shown_can_be_pasted() -> None:
    form = Form("org/base", ("a b", "x;rm -rf $HOME"), "")
    assert shlex.split(form.shown("", private=False))[2:4] == ["a b", "x;rm -rf $HOME"]


def test_strangers_name_repositories_only() -> None:
    form = Form("org/base", ("org/a", "hf://org/b"), only_hub=True)
    assert form.merge("out")[1:4] == ["hf://org/a", "hf://org/b", "--base-model"]
    assert form.find("", "", 5)[1] == "hf://org/base"
    assert form.find("", "", 1e9)[3] == "100"
    for path in ("/etc", "./x", "../x", "~/x", "--recipe"):
        with pytest.raises(CommandError, match="is no name of a checkpoint"):
            Form("org/base", (path,), only_hub=True).merge("out")
        with pytest.raises(CommandError, match="is no name of a checkpoint"):
            Form(path, ("org/a",), only_hub=True).merge("out")
    # Otherwise factors name the base model, which may be a folder of the server.
    with pytest.raises(CommandError, match="No base model is named"):
        Form("", ("org/a",), only_hub=True).interference("out")
    assert Form("org/base", ("./x",)).merge("out")[1] == "./x"


def test_nobody_is_in_the_queue_twice() -> None:
    turns = Turns(2)
    with turns.entered("me") as mine, turns.entered("you") as yours:
        assert (mine(), yours()) == (0, 1)
        with pytest.raises(CommandError, match="running or waiting already"), turns.entered("me"):
            pass
        with pytest.raises(CommandError, match="2 people are waiting"), turns.entered("they"):
            pass
    with turns.entered("me") as mine:
        assert mine() == 0


def test_a_stranger_sees_nothing_of_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OAUTH_CLIENT_SECRET", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD"):
        monkeypatch.setenv(name, "of the server")
    monkeypatch.setenv("HF_HUB_CACHE", "/shared")
    found = environment(None, Path("/home/of/visitor"))
    assert "of the server" not in found.values()
    assert found["HF_HOME"] == "/home/of/visitor"
    assert "HF_HUB_CACHE" not in found
    assert environment("hf_mine", Path("/x"))["HF_TOKEN"] == "hf_mine"
    assert environment(None, None)["HF_TOKEN"] == "of the server"  # on one's own machine


def test_a_result_can_be_too_large() -> None:
    desk = Desk(FREE_SPACE)
    with pytest.raises(CommandError, match=r"has 9\.0 GB, and this page makes at most 4\.0 GB"):
        desk.check_size(PLAN)
    desk.close()
    own = Desk(Limits())
    own.check_size(PLAN)
    own.close()


def test_visitors_leave_nothing() -> None:
    desk = Desk(Limits(kept_seconds=0.05))
    first = desk.visitor("a")
    (first.folder / "merged").mkdir()
    assert desk.visitor("a") is first
    for window in ("x/../../y", "..", "b"):
        folder = desk.visitor(window).folder
        assert folder.parent == desk.root
    time.sleep(0.1)
    last = desk.visitor("c")  # the others have been idle for too long
    assert [path for path in desk.root.iterdir() if path.is_dir()] == [last.folder]
    image = desk.uploads / "hash" / "image.png"
    image.parent.mkdir(parents=True)
    image.touch()
    assert desk.upload_of(last, str(image)) == image
    for path in ("/etc/passwd", f"{desk.uploads}/../x/y", f"{desk.uploads}/hash", "None"):
        with pytest.raises(CommandError, match="no such image"):
            desk.upload_of(last, path)
    desk.upload_of(desk.visitor("d"), str(image))
    desk.leave("c")
    assert image.is_file()  # d has it too
    desk.leave("d")
    assert not image.parent.exists()
    with pytest.raises(CommandError, match="Stopped"), desk.running(last, ["env"], None):
        pass
    desk.close()
    assert not desk.root.exists()


def test_who_waits_is_not_idle() -> None:
    desk = Desk(Limits(kept_seconds=0.2))
    waiting = desk.visitor("a")
    before = iter([1, 0])
    states = _waited(waiting, lambda: next(before))
    waiting.seen -= 10
    assert "Waiting" in next(states)
    desk.visitor("b")
    assert not waiting.left
    desk.close()


def test_a_page_with_limits_has_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk_, "MOST_BYTES", 1000)
    desk = Desk(FREE_SPACE)
    desk.check_size({"output_bytes": 900})
    (desk.visitor("a").folder / "model").write_bytes(b"x" * 200)
    with pytest.raises(CommandError, match="no room"):
        desk.check_size({"output_bytes": 900})
    desk.close()


def test_a_model_or_image_that_is_too_much_is_one_message(zoo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(zoo / "base", folder)
    Image.new("1", (13_000, 13_000)).save(tmp_path / "large.png")
    Image.new("L", (40, 40)).save(tmp_path / "small.png")
    (tmp_path / "none.png").write_text("no image")

    def said(image: str, *labels: str, memory: int = 6_000_000_000) -> dict[str, float]:
        words = ["./model", str(tmp_path / image), str(memory), *labels]
        command = Command(words, tmp_path, environment(None, None), 60, module=TRYING)
        for _ in command.followed():
            pass
        return command.result()

    assert sum(said("small.png", "cat", "dog").values()) == pytest.approx(1)
    for image, problem in (("large.png", "too large"), ("none.png", "cannot be read")):
        with pytest.raises(CommandError, match=problem):
            said(image, "cat")
    with pytest.raises(CommandError, match="cannot classify"):
        said("small.png", "word " * 200)
    with pytest.raises(CommandError, match=r"cannot (classify|be loaded)|without a word|Stopped"):
        said("small.png", "cat", memory=1_000_000_000)


def test_folders_of_a_killed_server_go() -> None:
    code = (
        "from hf_tsv.ui.desk import *; d = Desk(Limits()); print(d.root, flush=True); os._exit(9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir()
    running = Desk(Limits())
    assert not left.exists()
    other = Desk(Limits())
    assert running.root.is_dir()
    other.close()
    running.close()


def test_a_command_that_takes_too_long(tmp_path: Path, hub: Hub) -> None:
    hub.fail(".*", delay=300, times=100)
    command = Command(
        ["find", "org/base", "--json"], tmp_path, environment(None, tmp_path / "h"), seconds=6
    )
    for _ in command.followed():
        pass
    with pytest.raises(CommandError, match="too long") as caught:
        command.result()
    assert "machine of your own" in caught.value.hint
    assert list(command.log) == ["Terminated."]  # it was stopped, and did not give up by itself


def test_a_command_ends_with_its_server(tmp_path: Path, hub: Hub) -> None:
    """Even where the server had no time to say so."""
    hub.fail(".*", delay=300, times=100)
    code = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from hf_tsv.ui.commands import *\n"
        "here = Path(sys.argv[1])\n"
        "c = Command(['find', 'org/base', '--json'], here, environment(None, here / 'h'))\n"
        "print(c._process.pid, flush=True)\n"
        "time.sleep(4)\n"
        "os._exit(9)\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    process = int(done.stdout)
    for _ in range(200):
        if not Path(f"/proc/{process}").exists():
            return
        time.sleep(0.1)
    os.kill(process, 9)
    raise AssertionError("It ran on.")


def test_times_are_rough() -> None:
    assert [rough_time(s) for s in (0.1, 9.9, 14, 42, 100, 3500, 9000)] == [
        "a few seconds", "a few seconds", "about 14 s", "about 40 s", "about 2 min",
        "about 58 min", "about 2.5 h",
    ]  # fmt: skip


def test_without_gradio_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    done = hf_tsv("ui")
    assert done.code == 1
    assert done.err == (
        'Error: The page needs gradio.\nHint: Install it: pip install "hf-tsv[ui]".\n'
    )


def test_the_space_is_described_as_the_hub_wants_it(hub: Hub) -> None:
    text = (ROOT / "space" / "README.md").read_text(encoding="utf-8")
    card = SpaceCard(text)
    card.validate()  # by the Hub
    data = card.data.to_dict()
    assert (ROOT / "space" / data["app_file"]).is_file()
    assert (data["sdk"], data["hf_oauth"]) == ("gradio", True)
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"gradio=={data['sdk_version']}" in pinned  # the one that is tested
    assert {"read-repos", "manage-repos"} == set(data["hf_oauth_scopes"])
    assert len(data["short_description"]) <= 60
    assert "hf-tsv[ui]" in (ROOT / "space" / "requirements.txt").read_text(encoding="utf-8")
    assert yaml.safe_load(text.split("---")[1])["license"] == "apache-2.0"
