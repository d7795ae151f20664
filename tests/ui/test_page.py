"""The page in a real browser, against the loopback Hub: from sign-in to the pushed repository."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request as URLRequest
from urllib.request import urlopen

import pytest
import torch
from cli import hf_tsv_process
from home import HUB
from hub import Hub, User
from huggingface_hub import ModelCard, snapshot_download
from pages import FLAGS, Served, Window, chromium, served
from transformers import CLIPModel

pytestmark = pytest.mark.browser

TINY = Path(__file__).parents[2] / "examples" / "tiny"
TASKS = ("digits", "letters", "shapes")
CARD = "---\nbase_model: org/base\nlicense: mit\n---\n# A fine-tune\n"
TOKEN, OTHER, THIRD = "hf_oauth_me", "hf_oauth_you", "hf_oauth_they"
INF = float("inf")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
MARK = "hf-tsv-to-be-killed"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as started:
        yield started


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The Space's app; a token of its owner is among its secrets."""
    folder = tmp_path_factory.mktemp("space")
    with served(HUB.endpoint, folder, space=True, HF_TOKEN="hf_owner") as server:
        yield server


@pytest.fixture
def models(hub: Hub) -> Hub:
    """Three demo fine-tunes, one that cannot be merged, and two people who sign in."""
    hub.add_repo("org/base", TINY / "base")
    for task in TASKS:
        files = {file.name: file for file in (TINY / task).iterdir()}
        hub.add_repo(f"org/{task}", {**files, "README.md": CARD})
    broken = {"config.json": "{}", "model.safetensors": b"\0" * 100, "README.md": CARD}
    hub.add_repo("org/broken", broken)
    hub.users[TOKEN] = User("me", ["org"], kind="oauth")
    hub.users |= {OTHER: User("you", kind="oauth"), THIRD: User("they", kind="oauth")}
    hub.users["hf_owner"] = User("owner")
    hub.signing_in = TOKEN
    return hub


@pytest.fixture
def opened(browser: Any, space: Served) -> Iterator[Callable[..., Window]]:
    """Windows of different people; afterwards all are closed, and nothing is left of them."""
    contexts = []

    def window(**choices: Any) -> Window:
        contexts.append(browser.new_context(**choices))
        return Window(contexts[-1], space.address)

    yield window
    for context in contexts:
        context.close()
    HUB.heal()
    wait_until(lambda: not space.files())


def signed_in(opened: Callable[..., Window], models: Hub, token: str) -> Window:
    """A window of the one with this token."""
    models.signing_in = token
    window = opened()
    window.sign_in()
    return window


def wait_until(found: Callable[[], Any], seconds: float = 40) -> None:
    end = time.monotonic() + seconds
    while not found():
        assert time.monotonic() < end, "It did not happen in time."
        time.sleep(0.1)


def filled(window: Window) -> Window:
    """A window in which three models are chosen."""
    window.write("base", "org/base")
    window.write("pasted", " ".join(f"org/{task}" for task in TASKS))
    return window


def test_from_sign_in_to_the_pushed_model(
    models: Hub, opened: Callable[..., Window], space: Served, tmp_path: Path
) -> None:
    window = signed_in(opened, models, TOKEN)
    window.write("base", "org/base")
    window.press("find")
    assert window.said("found", holding="can be merged") == "3 of 4 models can be merged."
    window.page.get_by_text("Cannot be merged").click()
    window.page.get_by_role("cell", name="org/broken is not a model").wait_for()
    window.tick(*(f"org/{task}" for task in TASKS))
    window.press("plan")
    window.page.wait_for_selector("#planned table", timeout=60_000)
    rows = window.text("planned")
    assert all(word in rows for word in ("org/shapes", "Download", "Memory", "Time", "Result"))
    window.press("merge")
    shares = []
    while not window.page.locator("#state .hf-tsv-done").count():
        shares += window.page.locator("#state progress").evaluate_all(
            "all => all.map(p => p.value)"
        )
        time.sleep(0.02)
    assert shares  # a bar, whose shares tests/ui/test_ui.py looks at
    assert re.match(r"Merged 3 models in \d+ s: 1\.5 MB\.", window.said("state", kind="done"))
    window.page.get_by_text("Log", exact=True).click()
    assert "Merging" in window.page.input_value("#log textarea")

    window.page.set_input_files("#image input[type=file]", str(TINY / "images" / "digit 0.png"))
    window.page.wait_for_selector("#image img")
    window.write("labels", "the digit zero, a circle")
    window.press("classify")
    window.page.wait_for_selector("#answer", timeout=60_000)
    assert "%" in window.text("answer")

    window.write("repo", "me/three")
    window.page.click("#private input")
    window.press("push")
    assert f"{models.endpoint}/me/three" in window.said("pushed", kind="done")
    files = models.files("me/three")
    assert {"README.md", "hf_tsv_recipe.yaml", "model.safetensors"} <= files.keys()
    assert models.repos["me/three"].private
    folder = snapshot_download("me/three", token=TOKEN)
    model = CLIPModel.from_pretrained(folder)
    assert all(torch.isfinite(tensor).all() for tensor in model.state_dict().values())
    parents = ModelCard.load(Path(folder, "README.md")).data.base_model
    assert {f"org/{task}" for task in TASKS} <= set(parents)

    command = window.page.locator("#command .cm-content").inner_text().replace("\n", " ")
    assert command.endswith("-o merged --push-to me/three --private")
    words = command.partition(" --push-to")[0].split()[1:]
    done = hf_tsv_process(*words, cwd=tmp_path)
    assert done.code == 0, done.err
    assert (tmp_path / "merged" / "model.safetensors").read_bytes() == files["model.safetensors"]

    everywhere = [space.said.read_text(), window.page.content(), *map(str, files.values())]
    everywhere += [path.read_text(errors="replace") for path in space.files()]
    assert not any(secret in text for text in everywhere for secret in (TOKEN, "hf_owner"))
    # Nothing was asked with the token of the Space's owner.
    assert not any("hf_owner" in str(request.headers) for request in models.requests)


def test_a_second_user_waits_and_is_told(models: Hub, opened: Callable[..., Window]) -> None:
    first = signed_in(opened, models, TOKEN)
    again = Window(first.page.context, first.page.url)
    second = signed_in(opened, models, OTHER)
    slow_merge(filled(first), models)
    filled(second).press("merge")
    second.said("state", holding="Waiting: 1 merge is before yours.")
    filled(again).press("merge")
    error = again.said("state", kind="error")
    assert error.startswith("You have a merge that is running or waiting already.")
    models.heal()
    assert "Merged" in first.said("state", kind="done")
    assert "Merged" in second.said("state", kind="done")


def slow_merge(window: Window, models: Hub) -> None:
    """Begin a merge that gets no weights until the Hub heals."""
    window.press("merge")
    window.said("state", holding="Starting")
    models.fail(r"safetensors", delay=300, times=INF)


def commands(server: Served) -> list[int]:
    """Processes of commands that a page has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            words, place = (folder / "cmdline").read_bytes(), (folder / "cwd").readlink()
            if b"hf_tsv.cli.worker" in words and place.is_relative_to(server.temporary):
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize("how", ["window", "browser"])
def test_a_browser_that_stops_leaves_nothing(
    models: Hub, opened: Callable[..., Window], browser: Any, space: Served, how: str
) -> None:
    second = signed_in(opened, models, OTHER)
    if how == "window":
        window = signed_in(opened, models, TOKEN)
        third = signed_in(opened, models, THIRD)
        slow_merge(filled(window), models)
        filled(third).press("merge")
        third.said("state", holding="Waiting: 1 merge is before yours.")
        assert len(commands(space)) == 1
        third.page.close()
        window.page.close()
        wait_until(lambda: not commands(space))
    else:
        models.signing_in = TOKEN
        other = browser.browser_type.launch(
            executable_path=CHROMIUM, args=[*FLAGS, f"--class={MARK}"],
            chromium_sandbox=os.geteuid() != 0,
        )  # fmt: skip
        window = Window(other.new_context(), space.address)
        window.sign_in()
        slow_merge(filled(window), models)
        assert commands(space)
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if MARK.encode() in (folder / "cmdline").read_bytes():
                    os.kill(int(folder.name), signal.SIGKILL)
        wait_until(lambda: not commands(space))
    models.heal()
    filled(second).press("merge")  # whose turn it is
    assert "Merged" in second.said("state", kind="done")
    assert len({path.relative_to(space.temporary).parts[1] for path in space.files()}) == 1
    if how == "window":
        again = signed_in(opened, models, THIRD)
        filled(again).press("merge")  # who is not in the queue any more
        assert "Merged" in again.said("state", kind="done")


def test_a_merge_is_stopped(models: Hub, opened: Callable[..., Window], space: Served) -> None:
    window = signed_in(opened, models, TOKEN)
    slow_merge(filled(window), models)
    window.press("stop")
    assert window.said("state", kind="error") == "Stopped."
    models.heal()
    assert not commands(space)
    window.press("merge")
    assert "Merged" in window.said("state", kind="done")


def test_what_is_wrong_is_told(models: Hub, opened: Callable[..., Window], space: Served) -> None:
    window = opened()

    def refused(button: str, part: str, beginning: str) -> None:
        window.press(button)
        first = beginning.splitlines()[0]
        assert window.said(part, kind="error", holding=first).startswith(beginning)

    refused("plan", "planned", "No checkpoint is chosen.\nTick some, or paste their names.")
    refused("push", "pushed", "There is no merged model yet.\nMerge first.")
    refused("classify", "tried", "There is no merged model yet.")
    filled(window)
    refused("merge", "state", "You are not signed in.\nSign in at the top of the page.")
    refused("measure", "interference", "You are not signed in.")
    window.sign_in()
    for pasted, beginning in [
        ("org/nothing", "org/nothing does not exist on the Hub"),
        ("/etc", "/etc is no name of a checkpoint."),
        ("hf://../..", "'hf://../..' is"),
        ("--force", "--force is no name of a checkpoint."),
        ("org/broken", "org/broken is not a model of transformers"),
    ]:
        window.write("base", "org/base")
        window.write("pasted", pasted)
        refused("plan", "planned", beginning)
    filled(window).write("alpha", "much")
    refused("plan", "planned", "Invalid value for '--alpha': not a number.")
    window.write("alpha", "")
    window.write("base", "")
    refused("find", "found", "No base model is named.")
    window.write("base", "org/base")
    models.fail("/api/models", 500, times=INF)
    refused("find", "found", "org/base: the Hub answered 500")
    models.heal()
    window.press("merge")
    window.said("state", kind="done")
    refused("push", "pushed", "No repository is named.")
    window.write("repo", "elsewhere/model")
    refused("push", "pushed", "This token cannot create elsewhere/model")
    refused("classify", "tried", "There is no image.")
    assert "elsewhere/model" not in models.repos


def test_interference_is_shown(models: Hub, opened: Callable[..., Window]) -> None:
    window = signed_in(opened, models, TOKEN)
    filled(window).press("measure")
    frame = window.page.frame_locator("#interference iframe")
    frame.get_by_role("heading", name="Task interference").wait_for(timeout=60_000)
    assert frame.locator("table").count() >= 2
    assert window.page.get_attribute("#interference iframe", "sandbox") == "allow-scripts"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits(models: Hub, opened: Callable[..., Window], scheme: str) -> None:
    """Nothing is cut or scrolls sideways, all controls are named, and text stands out."""
    window = opened(viewport={"width": 400, "height": 900}, color_scheme=scheme)
    window.write("base", "org/base")
    window.press("find")
    window.said("found", holding="can be merged")
    window.tick("org/digits", "org/letters")
    window.press("plan")
    window.page.wait_for_selector("#planned table", timeout=60_000)
    for width in (400, 1200):
        window.page.set_viewport_size({"width": width, "height": 900})
        assert window.page.evaluate("document.documentElement.scrollWidth") <= width
    names = window.page.locator("input, textarea, button, [role=combobox]").evaluate_all(UNNAMED)
    assert names == []
    for part in ("#found .hf-tsv-state", "#planned td", "#planned th", "text=Author (optional)",
                 "text=Names between spaces", "text=org/name, org/name@revision"):  # fmt: skip
        text, behind = window.page.locator(part).first.evaluate(COLOURS)
        assert contrast(text, behind) > 4.5, (part, text, behind)


UNNAMED = """all => all.filter(e => e.offsetParent && !(e.labels?.length || e.innerText.trim()
  || e.getAttribute('aria-label') || e.title)).map(e => e.outerHTML.slice(0, 200))"""

COLOURS = """element => {
  const clear = colour => /rgba.*, 0\\)$/.test(colour);
  const solid = e => { const colour = getComputedStyle(e).backgroundColor;
    return !clear(colour) ? colour : e.parentElement ? solid(e.parentElement)
      : 'rgb(255, 255, 255)'; };
  return [getComputedStyle(element).color, solid(element)];
}"""


def contrast(one: str, other: str) -> float:
    """Contrast of two colours as WCAG defines it, 1 to 21."""
    light, dark = sorted(map(luminance, (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", colour)[:3]]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_the_page_asks_only_its_server(models: Hub, opened: Callable[..., Window]) -> None:
    """Whatever Gradio asks of other servers, such as fonts, is stopped in the browser."""
    window = opened()
    asked, stopped = [], {}
    window.page.on("request", lambda request: asked.append(request.url))
    window.page.on("requestfailed", lambda request: stopped.update({request.url: request.failure}))
    window.page.reload()
    window.page.wait_for_selector("#find")
    window.page.wait_for_timeout(1000)
    own = ("http://localhost:", "data:", "blob:")
    assert any(url.startswith(own) for url in asked)
    others = {url for url in asked if not url.startswith(own)}
    assert {stopped[url] for url in others} <= {"csp"}, stopped


def test_on_this_machine(models: Hub, browser: Any, zoo: Path, tmp_path: Path) -> None:
    """`hf-tsv ui` works with the machine's account and folders, for this machine alone."""
    models.users["hf_write"].orgs = ["org"]
    with served(HUB.endpoint, tmp_path, space=False) as server:
        window = Window(browser.new_context(), server.address)
        assert "Signed in as me." in window.text("account")
        window.write("base", str(zoo / "base"))
        window.write("pasted", f"{zoo / 'vision'}\n{zoo / 'full'}")
        window.press("merge")
        assert "Merged 2 models" in window.said("state", kind="done")
        window.write("repo", "local-merge")
        window.press("push")
        assert "me/local-merge" in window.said("pushed", kind="done")
        port = server.address.rpartition(":")[2]
        with pytest.raises(HTTPError, match="400"):
            asked = URLRequest(server.address, headers={"Host": f"evil.example:{port}"})
            urlopen(asked, timeout=10)
        with pytest.raises(OSError, match="refused"), socket.socket() as outside:
            outside.connect(("127.0.0.2", int(port)))  # which 0.0.0.0 would listen on too
        result = next(server.temporary.glob("hf-tsv-ui-*/*/merged/model.safetensors"))
        with pytest.raises(HTTPError, match="403"):
            urlopen(f"{server.address}/gradio_api/file={result}", timeout=10)
        for origin in ("http://evil.example", "null", f"http://localhost:{int(port) + 1}"):
            asked = URLRequest(f"{server.address}/gradio_api/queue/join", b"{}", {"Origin": origin})
            with pytest.raises(HTTPError, match="403"):
                urlopen(asked, timeout=10)
        taken = hf_tsv_process("ui", "--port", port)
        assert taken.code == 1
        assert taken.err == (
            f"Error: Port {port} cannot be used.\nHint: Give another one: --port 8000.\n"
        )
        window.page.close()
    assert "Open http://127.0.0.1:" in server.said.read_text()
    assert "Traceback" not in server.said.read_text()
    assert not list(server.temporary.glob("hf-tsv-ui-*"))
    assert "local-merge" in " ".join(models.repos)
