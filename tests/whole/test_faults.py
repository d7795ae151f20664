"""Whole commands while the Hub misbehaves: the same bytes, or one clear message and nothing half.

What single calls do is in test_hub; here a fault meets a merge, a compression, a reconstruction.
"""

from __future__ import annotations

import math
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cli import Result, hf_tsv, hf_tsv_process, refused
from home import HF_HOME, HUB
from hub import Hub, Request, User
from huggingface_hub import constants
from labelled import add_dataset
from pushes import contents, published, pushed, sent

import hf_tsv as api
from hf_tsv.hub import client as client_module
from hf_tsv.hub import commit_files
from hf_tsv.hub.client import translated
from hf_tsv.system.errors import HfTsvError

STORED = "/[0-9a-f]{64}/"
"""In the path of every file of the storage."""

HTML = b"<html><body>Bad gateway</body></html>"
WHOLE = {"truncate": 10**9}  # no damage but the headers
OTHER_RANGE = {"headers": {"Content-Range": "bytes 0-7/99"}, **WHOLE}
NOWHERE = {"status": 302, "headers": {"Location": f"{HUB.cdn}/a/b/{'0' * 64}/c"}}

MERGE = ["merge", "org/vision", "org/flat", "-o", "merged"]
COMPRESS = ["compress", "org/vision", "-o", "out"]
RECONSTRUCT = ["reconstruct", "org/factors", "-o", "out"]
COMMANDS = {command[0]: command for command in (MERGE, COMPRESS, RECONSTRUCT)}


@pytest.fixture(scope="module")
def factors(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Files of task factors whose base model is on the Hub."""
    HUB.reset()
    shutil.rmtree(Path(HF_HOME, "hub"), ignore_errors=True)
    HUB.add_repo("org/base", zoo / "base")
    folder = tmp_path_factory.mktemp("factors") / "out"
    api.compress(zoo / "vision", base_model="org/base", output=folder, rank=3)
    return contents(folder)


@pytest.fixture
def world(world: Path, hub: Hub, factors: dict[str, bytes]) -> Path:
    """The same, with task factors."""
    hub.add_repo("org/factors", factors)
    return world


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, dict[str, bytes]]:
    """What each command makes when nothing goes wrong; filled where it is first needed."""
    return {}


@pytest.fixture
def expected(
    world: Path, hub: Hub, undisturbed: dict[str, dict[str, bytes]]
) -> Callable[[str], dict[str, bytes]]:
    """What a command makes when nothing goes wrong, with a cold cache before and after."""

    def made(verb: str) -> dict[str, bytes]:
        if verb not in undisturbed:
            done = hf_tsv(*COMMANDS[verb], cwd=world)
            assert done.code == 0, done.err
            folder = world / COMMANDS[verb][-1]
            undisturbed[verb] = contents(folder)
            shutil.rmtree(folder)
            shutil.rmtree(Path(HF_HOME, "hub"))
            hub.requests.clear()
        return undisturbed[verb]

    return made


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, sleeps: list[float]) -> list[float]:
    """A client that waits for answers for less than a second, and between tries not at all."""
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.4)
    return sleeps


# Faults that pass


PASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "429": ("/api/models/", {"status": 429, "headers": {"Retry-After": "3"}, "times": 3}),
    "5xx burst": ("", {"status": 503, "times": 4}),
    "502": (STORED, {"status": 502, "times": 4}),
    "cut mid-body": (STORED, {"drop_after": 1000, "times": 4}),
    "cut at once": (STORED, {"drop_after": 0, "times": 4}),
    "truncated": (STORED, {"truncate": 1000, "times": 4}),
    "other range": (STORED, {**OTHER_RANGE, "times": 4}),
    "old signature": (STORED, {"status": 403, "times": 3}),
    "web page": (STORED, {"status": 200, "body": HTML, "times": 4}),
    "no ranges": (STORED, {"ignore_range": True, "times": math.inf}),
}


@pytest.mark.parametrize(
    ("verb", "name", "after", "flags"),
    [
        *(("merge", name, after, flags) for name in PASSES
          for after, flags in ((0, ["--stream"]), (4, []), (4, ["--stream"]))),
        *((verb, "cut mid-body", 2, flags) for verb in ("compress", "reconstruct")
          for flags in ([], ["--stream"])),
    ],
)  # fmt: skip
def test_faults_that_pass_leave_no_trace(
    world: Path,
    hub: Hub,
    expected: Callable[[str], dict[str, bytes]],
    verb: str,
    name: str,
    after: int,
    flags: list[str],
) -> None:
    """While the headers are read, which is always in parts, and while the weights are."""
    whole = expected(verb)
    pattern, fault = PASSES[name]
    hub.fail(pattern, after=after, **fault)
    done = hf_tsv(*COMMANDS[verb], *flags, cwd=world)
    assert done.code == 0, done.err
    assert contents(world / COMMANDS[verb][-1]) == whole
    assert "\nError: " not in done.err and "Traceback" not in done.err


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["download", "stream"])
def test_a_server_that_is_slow_at_times(
    world: Path, hub: Hub, expected: Callable[[str], dict[str, bytes]], flags: list[str]
) -> None:
    whole = expected("merge")
    hub.fail(STORED, delay=0.6, after=4, times=2)
    assert hf_tsv(*MERGE, *flags, cwd=world).code == 0
    assert contents(world / "merged") == whole


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["download", "stream"])
def test_a_commit_in_the_middle_of_a_run_changes_nothing(
    world: Path, hub: Hub, expected: Callable[[str], dict[str, bytes]], flags: list[str]
) -> None:
    whole = expected("merge")
    new = {"model.safetensors": hub.files("org/flat")["model.safetensors"], "config.json": "{}"}
    hub.fail(STORED, after=2, action=lambda: hub.commit("org/vision", new))
    assert hf_tsv(*MERGE, *flags, cwd=world).code == 0
    assert contents(world / "merged") == whole


def test_a_wait_that_the_hub_asks_for_is_kept(
    world: Path, hub: Hub, expected: Callable[[str], dict[str, bytes]], sleeps: list[float]
) -> None:
    expected("merge")
    sleeps.clear()
    hub.fail("/api/models/org/vision", 429, headers={"Retry-After": "17"})
    done = hf_tsv(*MERGE, cwd=world)
    assert done.code == 0 and sleeps == [17]
    assert "The Hub did not answer; trying again in 17 s." in done.err


# Faults that stay


def lie(hub: Hub, difference: int) -> None:
    """Let the Hub tell another size than the storage has."""
    commit = hub.repos["org/vision"].resolve("main")
    told = commit.files["model.safetensors"]
    commit.files["model.safetensors"] = replace(told, size=told.size + difference)


def gone(hub: Hub) -> Callable[[], object]:
    return lambda: hub.repos.pop("org/vision", None)


def expired(hub: Hub) -> Callable[[], object]:
    return hub.users.clear


STAYS: dict[str, tuple[Callable[[Hub], object], str, str]] = {
    "429": (lambda hub: hub.fail("/api/", 429, times=math.inf), "the Hub answered 429", "later"),
    "503": (lambda hub: hub.fail("", 503, times=math.inf), "the Hub answered 503", "later"),
    "503 of the storage": (
        lambda hub: hub.fail(STORED, 503, times=math.inf, after=3), "answered 503", "later"
    ),
    "cut mid-body": (
        lambda hub: hub.fail(STORED, drop_after=1000, times=math.inf, after=3),
        "cannot be reached (RemoteProtocolError)", "Check the connection",
    ),
    "truncated": (
        lambda hub: hub.fail(STORED, truncate=10, times=math.inf, after=3),
        "bytes", "the file is damaged",
    ),
    "web page": (
        lambda hub: hub.fail(STORED, 200, body=HTML, times=math.inf, after=3),
        "bytes", "the file is damaged",
    ),
    "web page instead of the Hub": (
        lambda hub: hub.fail("", 200, body=HTML, times=math.inf),
        "the answer is not that of a Hub", "Check HF_ENDPOINT",
    ),
    "smaller than told": (lambda hub: lie(hub, 100), "org/vision: the Hub sent", "is damaged"),
    "larger than told": (lambda hub: lie(hub, -100), "org/vision: the Hub sent", "is damaged"),
    "in circles": (
        lambda hub: hub.fail(STORED, times=math.inf, after=3, **NOWHERE),
        "cannot be reached (TooManyRedirects)", "Check the connection",
    ),
    "forbidden": (
        lambda hub: hub.fail(STORED, 403, times=math.inf, after=3),
        "the Hub sent 403 from its storage", "Try again",
    ),
    "deleted at once": (
        lambda hub: hub.fail("/resolve/", after=2, action=gone(hub)),
        "org/vision does not exist on the Hub", "Check the name",
    ),
    "deleted before the weights": (
        lambda hub: hub.fail(STORED, after=3, action=gone(hub)),
        "org/vision", "",
    ),
    "expired at once": (
        lambda hub: hub.fail("/resolve/", after=2, action=expired(hub)),
        "the Hub does not accept this token", "hf auth login",
    ),
}  # fmt: skip


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["download", "stream"])
@pytest.mark.parametrize("name", STAYS)
def test_faults_that_stay_are_one_message(
    world: Path, hub: Hub, name: str, flags: list[str]
) -> None:
    disturb, said, hint = STAYS[name]
    disturb(hub)
    done = hf_tsv(*MERGE, *flags, cwd=world)
    kept = world / ".merged.hf-tsv"
    assert not kept.exists() or "Run the same command again to resume" in done.err
    shutil.rmtree(kept, ignore_errors=True)
    refused(done, world, hub, said, hint)
    assert "cache cannot be written" not in done.err


@pytest.mark.parametrize("verb", ["compress", "reconstruct"])
@pytest.mark.parametrize("name", ["503 of the storage", "truncated", "deleted before the weights"])
def test_faults_that_stay_are_one_message_of_other_verbs(
    world: Path, hub: Hub, verb: str, name: str
) -> None:
    pattern = {"compress": "org/vision", "reconstruct": "org/factors"}[verb] + STORED
    fault: dict[str, Any] = {
        "503 of the storage": {"status": 503, "times": math.inf},
        "truncated": {"truncate": 10, "times": math.inf},
        "deleted before the weights": {"action": hub.repos.clear},
    }[name]
    hub.fail(pattern, after=1, **fault)
    refused(hf_tsv(*COMMANDS[verb], cwd=world), world, hub, "org/")


@pytest.mark.parametrize(
    ("fault", "said"),
    [({"status": 503}, "the Hub answered 503"), ({"status": 200, "body": b""}, "is not that of")],
)
def test_what_is_wrong_with_the_hub_is_not_taken_for_being_offline(
    world: Path, hub: Hub, fault: dict[str, Any], said: str
) -> None:
    hub.fail("/resolve/", method="HEAD", times=math.inf, **fault)
    refused(hf_tsv(*MERGE, cwd=world), world, hub, said)


def test_a_token_that_expires_between_the_headers_and_the_weights(world: Path, hub: Hub) -> None:
    for repo in hub.repos.values():
        repo.private = True
    hub.fail("/resolve/", method="HEAD", action=expired(hub))
    done = hf_tsv(*MERGE, cwd=world)
    refused(done, world, hub, "the Hub does not accept this token", "hf auth login")
    assert "hf_write" not in done.err


@pytest.mark.parametrize("pattern", ["/api/models/org/vision", STORED])
def test_a_server_that_never_answers(
    world: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr(client_module, "SILENCE", 0.1)
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.fail(pattern, delay=60, times=math.inf)
    done = hf_tsv(*MERGE, "--stream", cwd=world)
    refused(done, world, hub, "the Hub cannot be reached (ReadTimeout)", "connection")


def test_a_hub_that_goes_away_is_noticed(world: Path, hub: Hub) -> None:
    hub.fail("/resolve/", method="HEAD", action=hub.cut, times=math.inf)
    try:
        refused(hf_tsv(*MERGE, cwd=world), world, hub, "cannot be reached", "Check the connection")
    finally:
        hub.heal()


# Evaluations

EVALUATE = ["evaluate", "org/base", "--task", "a=org/data", "-o", "eval"]


@pytest.fixture
def data(world: Path, hub: Hub, tmp_path: Path) -> None:
    """A dataset for the model."""
    (tmp_path / "rows").mkdir()
    add_dataset(hub, "org/data", tmp_path / "rows")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")
@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("", {"status": 503, "times": 4}),
        ("org/base" + STORED, {"truncate": 10, "times": 3, "after": 1}),
        ("datasets/org/data/resolve", {"status": 503, "method": "HEAD", "times": 2}),
    ],
)
def test_an_evaluation_waits_for_faults_to_pass(
    world: Path, hub: Hub, data: None, pattern: str, fault: dict[str, Any]
) -> None:
    words = [*EVALUATE, "--json"]
    hub.fail(pattern, **fault)
    disturbed = hf_tsv(*words, cwd=world)
    assert disturbed.code == 0, disturbed.err
    whole = hf_tsv(*words, "--force", cwd=world)
    assert disturbed.json["tasks"] == whole.json["tasks"] and disturbed.json["errors"] == {}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:(datasets|multiprocess|dill).*")
@pytest.mark.parametrize(
    ("pattern", "fault", "said"),
    [
        ("/datasets/", {"status": 503}, "a: the dataset org/data: the Hub answered 503"),
        ("parquet", {"truncate": 10}, "a: the dataset org/data cannot be read: Consistency"),
        ("parquet", {"status": 401}, "a: the dataset org/data cannot be read: "),
        ("org/base" + STORED, {"truncate": 10, "after": 1}, "org/base: the Hub sent a wrong"),
        ("org/base" + STORED, {"status": 503, "after": 1}, "org/base: the Hub answered 503"),
    ],
)
def test_an_evaluation_that_cannot_be_is_one_message(
    world: Path, hub: Hub, data: None, pattern: str, fault: dict[str, Any], said: str
) -> None:
    hub.fail(pattern, times=math.inf, **fault)
    refused(hf_tsv(*EVALUATE, cwd=world), world, hub, said)
    assert not (world / "eval").exists()


# The cache


def blob(name: str = "org--vision") -> Path:
    """The cached weights of a repository."""
    (found,) = Path(HF_HOME, "hub", f"models--{name}").glob("snapshots/*/model.safetensors")
    return found.resolve()


@pytest.mark.parametrize("flags", [[], ["--stream"]], ids=["download", "stream"])
@pytest.mark.parametrize("left", [0, 5, 50_000], ids=["empty", "no header", "half"])
def test_a_file_cut_short_in_the_cache_is_fetched_again(
    world: Path, hub: Hub, expected: Callable[[str], dict[str, bytes]], left: int, flags: list[str]
) -> None:
    whole = expected("merge")
    assert hf_tsv(*MERGE, cwd=world).code == 0
    shutil.rmtree(world / "merged")
    content = blob().read_bytes()
    blob().write_bytes(content[:left])
    hub.requests.clear()
    done = hf_tsv(*MERGE, *flags, cwd=world)
    assert done.code == 0, done.err
    assert contents(world / "merged") == whole
    if not flags:
        assert "Warning: model.safetensors of org/vision is damaged in the cache" in done.err
        assert blob().read_bytes() == content
    whole_files = [r for r in hub.requests if r.origin == "cdn" and "range" not in r.headers]
    assert {r.path.split("/")[2] for r in whole_files} <= {"vision"}


def test_a_file_cut_short_in_the_cache_without_a_connection(world: Path, hub: Hub) -> None:
    assert hf_tsv(*MERGE, cwd=world).code == 0
    shutil.rmtree(world / "merged")
    blob().write_bytes(blob().read_bytes()[:-1])
    hub.stop()
    try:
        done = hf_tsv(*MERGE, cwd=world)
    finally:
        hub.start()
    hub.requests.clear()
    refused(done, world, hub, "org/vision: model.safetensors is truncated", "Run once with a conn")


# Uploads

PUSHES = {
    "merge": ["merge", "org/vision", "org/flat", "--max-shard-size", "50KB"],
    "compress": ["compress", "org/vision"],
    "reconstruct": ["reconstruct", "org/factors"],
}


def complete(done: Result) -> tuple[Path, list[str]]:
    """The folder that a failed upload has kept, and the words that push it."""
    assert done.code == 1, done.err
    errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1 and "Traceback" not in done.err, done.err
    assert "The result is complete in " in done.err, done.err
    words = shlex.split(done.err.split("Upload it with `")[1].split("`")[0])
    assert words[:2] == ["hf-tsv", "push"]
    return Path(words[2]), words[1:]


FAILS: dict[str, tuple[Callable[[Hub], object], str]] = {
    "no rights after all": (lambda hub: hub.fail("/commit/", 403), "This token may not write"),
    "5xx": (lambda hub: hub.fail("/commit/", 500, times=math.inf), "the Hub answered 500"),
    "429": (lambda hub: hub.fail("/commit/", 429, times=math.inf), "the Hub answered 429"),
    "races": (
        lambda hub: hub.fail(
            "/commit/", action=lambda: hub.commit("me/new", {f"{len(hub.requests)}": "x"}),
            times=math.inf,
        ),
        "me/new received another commit in the meantime",
    ),
    "expired": (
        lambda hub: hub.fail("/commit/", action=hub.users.clear),
        "the Hub does not accept this token",
    ),
    "deleted": (
        lambda hub: hub.fail("/commit/", action=lambda: hub.repos.pop("me/new")),
        "me/new does not exist",
    ),
    "storage forbids": (
        lambda hub: hub.fail("/upload/", 403, method="PUT", after=1, times=math.inf),
        "The upload to me/new failed: the storage answered 403",
    ),
    "storage is down": (
        lambda hub: hub.fail("/upload/", 503, method="PUT", times=math.inf),
        "The upload to me/new failed: the storage answered 503",
    ),
    "storage cuts": (
        lambda hub: hub.fail("/upload/", drop_after=0, method="PUT", times=math.inf, after=1),
        "The upload to me/new failed: the storage cannot be reached",
    ),
    "last part": (
        lambda hub: hub.fail("/upload/.*/2$", 403, method="PUT", times=math.inf),
        "The upload to me/new failed: the storage answered 403",
    ),
    "not put together": (
        lambda hub: hub.fail("/complete/", 400, times=math.inf),
        "The upload to me/new failed: the storage answered 400",
    ),
    "no room": (
        lambda hub: hub.fail(
            "/objects/batch", 200, times=math.inf, body=b'{"objects": [{"oid": "a", "size": 1,'
            b' "error": {"code": 413, "message": "Storage quota exceeded"}}]}',
        ),
        "Storage quota exceeded",
    ),
    "batch refused": (lambda hub: hub.fail("/objects/batch", 403), "This token may not write"),
    "web page": (
        lambda hub: hub.fail("/preupload/", 200, body=HTML, times=math.inf),
        "the answer is not that of a Hub",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILS)
def test_an_upload_that_fails_keeps_the_result_and_its_push_line_works(
    world: Path, hub: Hub, name: str
) -> None:
    disturb, said = FAILS[name]
    before = hub.add_repo("me/new", {"notes.txt": "kept", "model.safetensors": b"old"})
    hub.multipart_above = 30_000
    disturb(hub)
    done = hf_tsv(*PUSHES["merge"], "--push-to", "me/new", cwd=world)
    folder, words = complete(done)
    assert said in done.err, done.err
    hub.heal()
    if name == "expired":
        assert "hf_write" not in done.err
        hub.users["hf_write"] = User("me", role="write")
    if name == "deleted":
        hub.add_repo("me/new", {"notes.txt": "kept"})
    elif name != "races":
        assert hub.repos["me/new"].branches == {"main": before}
    assert hub.files("me/new").get("config.json") is None  # nothing of ours is there
    kept = published(folder)
    again = hf_tsv(*words, cwd=world)
    assert again.code == 0, again.err
    there = pushed(hub)
    assert kept == {n: c for n, c in there.items() if n in kept}
    assert there["notes.txt"] == b"kept" and "model.safetensors" not in there
    assert not folder.parent.exists()


@pytest.mark.parametrize("verb", PUSHES)
@pytest.mark.parametrize("place", [[], ["-o", "out"]], ids=["temporary", "output"])
def test_every_verb_keeps_what_it_could_not_upload(
    world: Path, hub: Hub, verb: str, place: list[str]
) -> None:
    words = [*PUSHES[verb], "--push-to", "me/new", *place]
    hub.fail("/upload/", 403, method="PUT", times=math.inf)
    folder, later = complete(hf_tsv(*words, cwd=world))
    hub.heal()
    kept = published(folder)
    assert hf_tsv(*later).code == 0
    there = pushed(hub)
    assert there == kept and len(hub.repos["me/new"].commits) == 2
    del hub.repos["me/new"]
    assert folder.exists() == bool(place)  # nobody asked for the other one
    shutil.rmtree(folder, ignore_errors=True)
    done = hf_tsv(*words, cwd=world)
    assert done.code == 0, done.err
    assert pushed(hub) == there  # as if nothing had happened


@pytest.mark.parametrize(
    ("pattern", "fault"),
    [
        ("", {"status": 503, "times": 4}),
        ("/upload/", {"status": 503, "method": "PUT", "times": 4}),
        ("/upload/", {"drop_after": 0, "method": "PUT", "times": 4}),
        ("/preupload/", {"status": 429, "headers": {"Retry-After": "2"}, "times": 2}),
        ("/objects/batch", {"status": 502, "times": 2}),
        ("/complete/", {"drop_after": 0}),
        ("/verify", {"status": 404}),
        ("/commit/", {"status": 504, "times": 3}),
    ],
)
@pytest.mark.parametrize("multipart", [False, True], ids=["whole", "parts"])
def test_faults_that_pass_leave_one_commit(
    world: Path, hub: Hub, pattern: str, fault: dict[str, Any], multipart: bool
) -> None:
    hub.multipart_above = 30_000 if multipart else 10**9
    hub.add_repo("me/new", {"notes.txt": "kept"})
    assert hf_tsv(*MERGE, cwd=world).code == 0
    hub.fail(pattern, **fault)
    done = hf_tsv("push", "merged", "me/new", cwd=world)
    assert done.code == 0, done.err
    assert pushed(hub) == {**published(world / "merged"), "notes.txt": b"kept"}
    assert len(hub.repos["me/new"].commits) == 2


def test_an_upload_through_xet_that_fails_is_one_message_too(world: Path, hub: Hub) -> None:
    assert hf_tsv(*MERGE, cwd=world).code == 0
    hub.fail("/xet-write-token/", 403, times=math.inf)
    words = ["push", "merged", "me/new"]
    home = str(world / "home")  # which it writes a log into
    done = hf_tsv_process(*words, cwd=world, HF_HUB_DISABLE_XET=None, HF_HOME=home)
    assert complete(done)[1][1:] == [str(world / "merged"), "me/new"]
    assert "Error: The upload to me/new failed: " in done.err and "403" in done.err
    assert len(hub.repos["me/new"].commits) == 1


def commits(hub: Hub) -> list[Request]:
    return [r for r in hub.requests if "/commit/" in r.path and r.method == "POST"]


def test_a_commit_of_somebody_else_is_built_upon(
    world: Path, hub: Hub, sleeps: list[float]
) -> None:
    hub.add_repo("me/new", {"notes.txt": "kept", "model-00001-of-00002.safetensors": b"old"})
    assert hf_tsv(*MERGE, cwd=world).code == 0
    theirs = {"model-00002-of-00002.safetensors": b"new", "notes.txt": "changed"}
    hub.fail("/commit/", action=lambda: hub.commit("me/new", theirs, message="Theirs"))
    assert hf_tsv("push", "merged", "me/new", cwd=world).code == 0
    assert pushed(hub) == {**published(world / "merged"), "notes.txt": b"changed"}
    repo = hub.repos["me/new"]
    assert [c.message for c in repo.history(repo.resolve("main"))][1:] == ["Theirs", "Add files"]
    assert [r.status for r in commits(hub)] == [412, 200] and sleeps == [1]


def test_what_somebody_else_has_changed_back_is_not_taken_for_ours(world: Path, hub: Hub) -> None:
    """A file that was the same when it was looked at, and is another one when we commit."""
    assert hf_tsv(*MERGE, cwd=world).code == 0
    whole = published(world / "merged")
    hub.add_repo("me/new", {"config.json": whole["config.json"]})
    hub.fail("/commit/", action=lambda: hub.commit("me/new", {"config.json": "{}"}))
    assert hf_tsv("push", "merged", "me/new", cwd=world).code == 0
    assert pushed(hub) == whole


def test_a_commit_whose_answer_is_lost_is_made_once(world: Path, hub: Hub) -> None:
    hub.add_repo("me/new", {"model-00001-of-00002.safetensors": b"old"})
    assert hf_tsv(*MERGE, cwd=world).code == 0
    hub.fail("/commit/", drop_after=0)
    done = hf_tsv("push", "merged", "me/new", cwd=world)
    assert done.code == 0, done.err
    repo = hub.repos["me/new"]
    assert len(repo.commits) == 2 and pushed(hub) == published(world / "merged")
    assert done.out == f"{hub.endpoint}/me/new\n"


def test_a_lost_answer_sends_no_large_file_again(world: Path, hub: Hub) -> None:
    assert hf_tsv(*MERGE, cwd=world).code == 0
    hub.fail("/commit/", drop_after=0)
    assert hf_tsv("push", "merged", "me/new", cwd=world).code == 0
    assert len(sent(hub)) == 1


def test_a_card_whose_answer_is_lost_is_written_once(hub: Hub) -> None:
    new = b"---\nlicense: mit\n---\nnew"
    parent = hub.add_repo("me/new", {"README.md": "old"})
    words: dict[str, Any] = {
        "branch": "main", "parent": parent, "create_pr": False, "commit_message": "New"
    }  # fmt: skip
    hub.fail("/commit/", drop_after=0)
    hub.fail("/commit/", 503)
    url = commit_files("me/new", {"README.md": new, "a/b": b"c"}, **words)
    repo = hub.repos["me/new"]
    assert len(repo.commits) == 2 and url.endswith(repo.branches["main"])
    with pytest.raises(HfTsvError, match="received another commit in the meantime"):
        commit_files("me/new", {"README.md": new + b"er"}, **words)
    assert hub.files("me/new") == {"README.md": new, "a/b": b"c"}


@pytest.mark.parametrize("status", [429, 503])
def test_factors_that_could_not_be_pushed_are_not_said_to_lie_where_they_do_not(
    world: Path, hub: Hub, status: int
) -> None:
    found = api.TaskFactors.from_pretrained("org/factors")
    hub.fail("/commit/", status, times=math.inf)
    with pytest.raises(HfTsvError, match=f"the Hub answered {status}") as error:
        found.push_to_hub("me/new")
    assert "complete in" not in str(error.value)


def test_an_error_of_the_storage_s_own_protocol_is_one_of_the_repository() -> None:
    said = "org/a: the storage of the Hub failed: no shard at https://cas/x."
    with pytest.raises(HfTsvError, match=said) as error, translated("org/a", None):
        raise RuntimeError("no shard at https://cas/x?Signature=abc")
    assert "Signature" not in str(error.value)
