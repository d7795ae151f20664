"""The Hub: rights checked early, downloads that resume, pushes that are one commit, retries."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub import Hub, Request, User
from huggingface_hub import HfApi

from hf_tsv import hub as hub_
from hf_tsv.checkpoints.names import MARKERS, OLD_WEIGHTS
from hf_tsv.hub import (
    RepoSnapshot,
    Wanted,
    download,
    downloads,
    ranges,
    read_range,
    uncached,
    uploads,
    writable_repo_id,
)
from hf_tsv.hub import client as client_module
from hf_tsv.hub.client import RETRY_WAITS, first_line
from hf_tsv.system.errors import RepoError

WEIGHTS = bytes(range(256)) * 40
FILES = {"config.json": "{}", "model.safetensors": WEIGHTS}
AT_ONCE = {"Retry-After": "0"}

push = partial(hub_.push, names=hub_.Names(MARKERS, OLD_WEIGHTS))


def snapshot(repo_id: str = "org/model", **kwargs: Any) -> RepoSnapshot:
    return hub_.snapshot(repo_id, kwargs.pop("revision", None), **kwargs)


def fetch(repo: RepoSnapshot, *names: str) -> Path:
    (folder,) = download([Wanted(repo, None, tuple(names))], visible=False)
    return folder


def asked(hub: Hub, pattern: str, method: str = "GET") -> list[Request]:
    return [r for r in hub.requests if pattern in r.path and r.method == method]


@pytest.fixture
def result(tmp_path: Path) -> Path:
    """A folder to push."""
    folder = tmp_path / "result"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Result\n")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / MARKERS[0]).write_text("hf_tsv_recipe: 1\n")
    return folder


# Who may write where


def test_a_bare_name_belongs_to_the_token_s_user(hub: Hub) -> None:
    assert writable_repo_id("merged") == "me/merged"


@pytest.mark.parametrize("repo_id", ["me/new", "org/new", "me/there", "org/there"])
def test_the_namespaces_of_the_token_can_be_written(hub: Hub, repo_id: str) -> None:
    hub.add_repo("me/there", FILES)
    hub.add_repo("org/there", FILES, private=True)
    assert writable_repo_id(repo_id) == repo_id
    assert asked(hub, "", "POST") == []


def test_without_a_token_nothing_is_asked(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "get_token", lambda: None)
    with pytest.raises(RepoError, match=r"Pushing to me/new needs a token.*hf auth login"):
        writable_repo_id("me/new")
    assert hub.requests == []


@pytest.mark.parametrize("create_pr", [False, True])
def test_a_read_token_is_refused(hub: Hub, create_pr: bool) -> None:
    hub.add_repo("reader/model", FILES)
    with pytest.raises(RepoError, match=r"reader/model needs a token that can write"):
        writable_repo_id("reader/model", token="hf_read", create_pr=create_pr)


def test_a_wrong_token_is_refused(hub: Hub) -> None:
    with pytest.raises(RepoError, match="does not accept this token") as error:
        writable_repo_id("me/new", token="hf_wrong")
    assert "hf_wrong" not in str(error.value)


@pytest.mark.parametrize("private", [False, True])
def test_a_foreign_namespace_is_refused(hub: Hub, private: bool) -> None:
    with pytest.raises(RepoError, match=r"cannot create other/new: it writes to me, org"):
        writable_repo_id("other/new")
    hub.add_repo("other/there", FILES, private=private)
    with pytest.raises(RepoError, match="other/there"):
        writable_repo_id("other/there")


@pytest.mark.parametrize("repo_id", ["", "a/b/c", "me/a b", "me/-a", "hf://me/a", "me/a.git"])
def test_what_is_no_repository_id_is_refused(hub: Hub, repo_id: str) -> None:
    with pytest.raises(RepoError, match="is not a repository id"):
        writable_repo_id(repo_id)


def scope(name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"_id": "1", "type": "org", "name": name}, "permissions": list(permissions)}


def test_a_fine_grained_token_writes_where_it_says(hub: Hub) -> None:
    hub.add_repo("me/there", FILES)
    hub.add_repo("org/there", FILES)
    scopes = [scope("org", "repo.content.read", "repo.write"), scope("me", "repo.content.read")]
    hub.users["hf_fine"] = User("me", orgs=["org"], role="fineGrained", scoped=scopes)
    for repo_id in ("org/new", "org/there"):
        assert writable_repo_id(repo_id, token="hf_fine") == repo_id
    for repo_id in ("me/new", "new", "me/there"):
        with pytest.raises(RepoError, match="This token"):
            writable_repo_id(repo_id, token="hf_fine")


def test_a_pull_request_needs_no_right_on_the_repository(hub: Hub) -> None:
    hub.add_repo("other/there", FILES)
    assert writable_repo_id("other/there", create_pr=True) == "other/there"


def test_a_pull_request_needs_a_repository(hub: Hub) -> None:
    with pytest.raises(RepoError, match=r"`create_pr=True` needs an existing repository.*me/new"):
        writable_repo_id("me/new", create_pr=True)


# Push


def test_a_push_is_one_commit(hub: Hub, result: Path) -> None:
    url = push(result, "me/new", commit_message="Merge two").url
    commits = HfApi().list_repo_commits("me/new")
    assert [commit.title for commit in commits] == ["Merge two", "initial commit"]
    assert url == f"{hub.endpoint}/me/new/commit/{commits[0].commit_id}"
    found = hub.files("me/new")
    assert {n: found[n] for n in found if n != ".gitattributes"} == {
        path.name: path.read_bytes() for path in result.iterdir()
    }


def test_a_push_replaces_the_weights_of_an_earlier_one_in_the_same_commit(
    hub: Hub, result: Path
) -> None:
    stale = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    hub.add_repo("me/there", {**dict.fromkeys([*stale, index], "old"), "notes.txt": "kept"})
    push(result, "me/there")
    found = hub.files("me/there")
    assert set(found) == {path.name for path in result.iterdir()} | {"notes.txt"}
    assert found["model.safetensors"] == WEIGHTS
    assert len(HfApi().list_repo_commits("me/there")) == 2


@pytest.mark.parametrize("private", [None, False, True])
def test_a_new_repository_is_as_private_as_asked(
    hub: Hub, result: Path, private: bool | None
) -> None:
    push(result, "me/new", private=private)
    assert hub.repos["me/new"].private is bool(private)


def test_a_branch_is_made_for_a_push_and_main_stays(hub: Hub, result: Path) -> None:
    main = hub.add_repo("me/there", {"file.txt": "text"})
    for _ in range(2):
        push(result, "me/there", revision="exp/one")
    assert hub.files("me/there", "exp/one")["model.safetensors"] == WEIGHTS
    assert hub.repos["me/there"].branches["main"] == main
    assert set(hub.repos["me/there"].branches) == {"main", "exp/one"}


def test_a_pull_request_leaves_main_alone(hub: Hub, result: Path) -> None:
    main = hub.add_repo("other/there", {"model-00001-of-00002.safetensors": "old"})
    url = push(result, "other/there", create_pr=True).url
    assert url == f"{hub.endpoint}/other/there/discussions/1"
    assert hub.repos["other/there"].branches == {"main": main}
    proposed = hub.files("other/there", "refs/pr/1")
    assert "model-00001-of-00002.safetensors" not in proposed
    assert proposed["model.safetensors"] == WEIGHTS


def test_a_push_to_a_pull_request_adds_to_it(hub: Hub, result: Path) -> None:
    hub.add_repo("me/there", {"file.txt": "text"})
    HfApi().create_pull_request("me/there", "Draft")
    push(result, "me/there", revision="refs/pr/1")
    assert hub.files("me/there", "refs/pr/1")["model.safetensors"] == WEIGHTS
    assert set(hub.repos["me/there"].branches) == {"main"}


def test_a_push_without_rights_is_refused(hub: Hub, result: Path) -> None:
    hub.add_repo("other/there", {})
    for repo_id in ("other/there", "other/new"):
        with pytest.raises(RepoError, match=f"This token may not write to {repo_id}"):
            push(result, repo_id)


BROKEN_CARD = "---\nignore_metadata_errors: true\n---\n"
"""Metadata that the client trips over."""


@pytest.mark.parametrize("private", [None, False])
def test_a_card_that_the_client_cannot_read_is_no_obstacle(
    hub: Hub, result: Path, private: bool | None
) -> None:
    hub.add_repo("me/there", {"README.md": BROKEN_CARD})
    with pytest.raises(TypeError):
        HfApi().model_info("me/there")
    assert writable_repo_id("me/there", private=private) == "me/there"
    push(result, "me/there")
    assert hub.files("me/there")["model.safetensors"] == WEIGHTS


def test_a_card_that_the_hub_refuses_is_a_repo_error(hub: Hub, result: Path) -> None:
    (result / "README.md").write_text("---\nlicense: My own\n---\n")
    with pytest.raises(RepoError, match=r"me/new.*metadata"):
        push(result, "me/new")


def test_the_same_push_twice_adds_no_commit(hub: Hub, result: Path) -> None:
    push(result, "me/new")
    head = hub.repos["me/new"].refs["refs/heads/main"]
    push(result, "me/new")
    assert hub.repos["me/new"].refs["refs/heads/main"] == head


def test_a_failed_push_changes_nothing(hub: Hub, result: Path, sleeps: list[float]) -> None:
    head = hub.add_repo("me/there", {"model-00001-of-00002.safetensors": "old"})
    hub.fail("/commit/", times=math.inf)
    with pytest.raises(RepoError, match="the Hub answered 503"):
        push(result, "me/there")
    assert hub.repos["me/there"].branches == {"main": head}
    assert len(sleeps) == len(RETRY_WAITS)


# Download


def test_what_is_missing_is_downloaded_and_what_is_cached_is_not(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES)
    repo = snapshot(cache_dir=str(tmp_path))
    assert uncached(repo, list(FILES)) == list(FILES)
    fetch(repo, "config.json")
    assert uncached(repo, list(FILES)) == ["model.safetensors"]
    folder = fetch(repo, *FILES)
    assert uncached(repo, list(FILES)) == []
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.sent("config.json") == 2
    hub.requests.clear()
    fetch(repo, *FILES)
    assert hub.sent("model.safetensors") == 0


def test_the_cache_is_the_client_s(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add_repo("org/model", {**FILES, "sub/file.txt": "text"})
    theirs = HfApi().snapshot_download("org/model", cache_dir=tmp_path)
    repo = snapshot(cache_dir=str(tmp_path))
    assert uncached(repo, ["sub/file.txt", *FILES]) == []
    ours = fetch(repo, "sub/file.txt", *FILES)
    assert ours == Path(theirs) and ours.name == sha


def test_another_commit_is_another_copy(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES)
    old = snapshot(cache_dir=str(tmp_path))
    fetch(old, *FILES)
    hub.commit("org/model", {"config.json": "new"})
    new = snapshot(cache_dir=str(tmp_path))
    assert uncached(old, list(FILES)) == []
    assert uncached(new, list(FILES)) == list(FILES)
    assert (fetch(new, "config.json") / "config.json").read_text() == "new"
    assert (fetch(old, "config.json") / "config.json").read_text() == "{}"


def test_a_download_is_of_the_commit_that_was_pinned(hub: Hub, tmp_path: Path) -> None:
    sha = hub.add_repo("org/model", FILES)
    repo = snapshot(cache_dir=str(tmp_path))
    hub.commit("org/model", {"config.json": "new"})
    folder = fetch(repo, *FILES)
    assert folder.name == sha
    assert (folder / "config.json").read_text() == "{}"


def test_several_repositories_are_downloaded_together(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/a", {"config.json": "a"})
    hub.add_repo("org/b", {"config.json": "b"})
    repos = [snapshot(name, cache_dir=str(tmp_path)) for name in ("org/a", "org/b")]
    folders = download([Wanted(repo, None, ("config.json",)) for repo in repos], visible=False)
    assert [(folder / "config.json").read_text() for folder in folders] == ["a", "b"]


def test_the_bytes_of_a_download_are_counted_once(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import contextmanager

    counted: list[int] = []
    totals: list[int] = []

    @contextmanager
    def counting(_: str, total: int, **__: Any) -> Any:
        totals.append(total)
        yield counted.append

    monkeypatch.setattr(downloads, "bar", counting)
    hub.add_repo("org/model", FILES)
    fetch(snapshot(cache_dir=str(tmp_path)), *FILES)
    assert totals == [sum(counted)] == [len(WEIGHTS) + 2]


def test_a_file_that_is_gone_is_a_repo_error(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES)
    repo = snapshot(cache_dir=str(tmp_path))
    del hub.repos["org/model"]
    with pytest.raises(RepoError, match="org/model"):
        fetch(repo, "config.json")


# Ranges


def test_a_range_is_read_without_the_rest(hub: Hub) -> None:
    hub.add_repo("org/model", FILES)
    repo = snapshot()
    assert read_range(repo, "model.safetensors", 10, 300) == WEIGHTS[10:300]
    assert read_range(repo, "config.json", 1, 2) == b"}"
    assert hub.sent("model.safetensors") == 290
    hub.requests.clear()
    assert read_range(repo, "model.safetensors", 5, 5) == b""
    assert hub.requests == []


def test_a_range_beyond_the_end_is_an_error(hub: Hub, sleeps: list[float]) -> None:
    hub.add_repo("org/model", FILES)
    size = len(WEIGHTS)
    for start, stop in ((size - 1, size + 1), (size, size + 1)):
        with pytest.raises(RepoError, match="org/model"):
            read_range(snapshot(), "model.safetensors", start, stop)


def test_a_file_that_is_not_there_is_an_error(hub: Hub) -> None:
    hub.add_repo("org/model", FILES)
    with pytest.raises(RepoError, match=r"org/model.*Check the files"):
        read_range(snapshot(), "absent", 0, 1)


def test_a_server_that_ignores_ranges_gives_the_same_bytes(hub: Hub) -> None:
    hub.add_repo("org/model", FILES)
    hub.fail("model.safetensors", ignore_range=True)
    assert read_range(snapshot(), "model.safetensors", 10, 300) == WEIGHTS[10:300]


def test_an_answer_that_is_too_short_is_asked_for_again(hub: Hub, sleeps: list[float]) -> None:
    hub.add_repo("org/model", FILES)
    hub.fail("model.safetensors", truncate=100, times=2)
    assert read_range(snapshot(), "model.safetensors", 10, 300) == WEIGHTS[10:300]
    assert sleeps == [1, 2]


def test_answers_that_stay_too_short_are_an_error(hub: Hub, sleeps: list[float]) -> None:
    hub.add_repo("org/model", FILES)
    hub.fail("model.safetensors", truncate=100, times=9)
    with pytest.raises(RepoError, match=r"sent 100 bytes instead of 290 of model\.safetensors"):
        read_range(snapshot(), "model.safetensors", 10, 300)
    assert len(sleeps) == 4


def test_another_range_than_asked_for_is_an_error(hub: Hub, sleeps: list[float]) -> None:
    hub.add_repo("org/model", FILES)
    other = {"Content-Range": f"bytes 0-289/{len(WEIGHTS)}"}
    hub.fail("model.safetensors", truncate=10**6, headers=other, times=9)
    said = rf"bytes 0-289/{len(WEIGHTS)} instead of bytes 10-299 of model\.safetensors"
    with pytest.raises(RepoError, match=said):
        read_range(snapshot(), "model.safetensors", 10, 300)
    assert len(sleeps) == 4


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"truncate": 10**6, "headers": {"Content-Range": "bytes 10-299/999999"}}, "999999"),
        ({"truncate": 10**6, "headers": {"Content-Encoding": "gzip"}}, "gzip instead of bytes"),
        ({"ignore_range": True, "headers": {"Content-Encoding": "br"}}, "br instead of bytes"),
        ({"ignore_range": True, "truncate": 2000}, "2000 bytes instead of 290"),
        ({"status": 403, "method": "GET"}, "403 from its storage"),
    ],
)
def test_answers_that_are_of_another_file_are_errors(
    hub: Hub, sleeps: list[float], fault: dict[str, Any], said: str
) -> None:
    hub.add_repo("org/model", FILES)
    hub.fail("/[0-9a-f]{64}/", times=99, **fault)
    with pytest.raises(RepoError, match=f"{said}.*of model.safetensors") as error:
        read_range(snapshot(), "model.safetensors", 10, 300)
    assert "hf auth" not in str(error.value)
    assert len(sleeps) == 4


def test_all_of_a_large_file_is_not_taken_for_a_part(
    hub: Hub, sleeps: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranges, "SMALL_FILE", 5000)
    hub.add_repo("org/model", FILES)
    hub.fail("model.safetensors", ignore_range=True, times=99)
    with pytest.raises(RepoError, match="serves no ranges"):
        read_range(snapshot(), "model.safetensors", 10, 300)


def test_a_refused_connection_to_the_storage_is_tried_again(hub: Hub, sleeps: list[float]) -> None:
    hub.add_repo("org/model", FILES)
    repo = snapshot()
    repo.locations["model.safetensors"] = "http://127.0.0.1:9/gone"
    assert read_range(repo, "model.safetensors", 10, 300) == WEIGHTS[10:300]
    assert sleeps == [1]


def test_no_signature_of_an_address_is_told() -> None:
    error = RuntimeError("404 for url 'https://s3.aws/a/b?X-Signature=SECRET&Expires=1' (x)")
    assert first_line(error) == "404 for url 'https://s3.aws/a/b' (x)"


def test_the_storage_is_asked_directly_until_it_refuses(hub: Hub) -> None:
    hub.add_repo("org/model", FILES)
    repo = snapshot()
    hub.requests.clear()
    for start in (0, 100, 200):
        assert read_range(repo, "model.safetensors", start, start + 9)
    assert [r.origin for r in hub.requests] == ["api", "cdn", "cdn", "cdn"]
    hub.requests.clear()
    hub.fail("/[0-9a-f]{64}/", status=403)  # as of an address that was signed an hour ago
    for start in (0, 100):
        assert read_range(repo, "model.safetensors", start, start + 9)
    assert [r.origin for r in hub.requests] == ["cdn", "api", "cdn", "cdn"]


# Tokens


def test_the_token_never_reaches_the_cdn(hub: Hub, tmp_path: Path, result: Path) -> None:
    hub.add_repo("org/secret", FILES, private=True)
    repo = snapshot("org/secret", token="hf_write", cache_dir=str(tmp_path))
    read_range(repo, "model.safetensors", 0, 8)
    fetch(repo, *FILES)
    (result / "model.safetensors").write_bytes(WEIGHTS + b"more")
    push(result, "me/new", token="hf_write")
    cdn = [request for request in hub.requests if request.origin == "cdn"]
    assert {request.method for request in cdn} == {"GET", "PUT"}
    assert {request.status for request in cdn} <= {200, 206}
    assert not any("authorization" in request.headers for request in cdn)
    assert not any("hf_write" in f"{request.path}{request.query}" for request in hub.requests)


def test_a_token_given_is_used_instead_of_the_one_logged_in(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("reader/secret", FILES, private=True)
    repo = snapshot("reader/secret", token="hf_read", cache_dir=str(tmp_path))
    fetch(repo, *FILES)
    read_range(repo, "config.json", 0, 1)
    sent = {r.headers.get("authorization") for r in hub.requests if r.origin == "api"}
    assert sent == {"Bearer hf_read"}


def test_every_request_says_who_asks(hub: Hub, tmp_path: Path) -> None:
    hub.add_repo("org/model", FILES)
    repo = snapshot(cache_dir=str(tmp_path))
    read_range(repo, "config.json", 0, 1)
    fetch(repo, *FILES)
    assert all("hf-tsv/" in r.headers["user-agent"] for r in hub.requests if r.origin == "api")


# Faults that pass


def pin_it(tmp_path: Path) -> None:
    snapshot(cache_dir=str(tmp_path))


def range_it(tmp_path: Path) -> None:
    repo = RepoSnapshot("org/model", "main", {}, {})
    assert read_range(repo, "model.safetensors", 0, 9) == WEIGHTS[:9]


def fetch_it(tmp_path: Path) -> None:
    folder = fetch(snapshot(cache_dir=str(tmp_path)), *FILES)
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS


def check_it(tmp_path: Path) -> None:
    writable_repo_id("me/there")


def push_it(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / MARKERS[0]).write_text("hf_tsv_recipe: 1\n")
    push(tmp_path, "me/there", revision="dev")


@pytest.mark.parametrize(
    ("act", "pattern", "method", "status"),
    [
        (pin_it, "/api/models/org/model", "GET", 503),
        (pin_it, "/api/models/org/model", "GET", 429),
        (range_it, r"/[0-9a-f]{64}/", "GET", 503),
        (fetch_it, "/resolve/.*json", "HEAD", 503),
        (fetch_it, r"/[0-9a-f]{64}/", "GET", 503),
        (check_it, "whoami", "GET", 503),
        (check_it, "/api/models/me/there$", "GET", 503),
        (check_it, "auth-check", "GET", 503),
        (push_it, "/repos/create", "POST", 503),
        (push_it, "/branch/", "POST", 503),
        (push_it, "/commit/", "POST", 503),
        (push_it, "/commit/", "POST", 429),
    ],
)
def test_an_error_that_passes_is_waited_out(
    hub: Hub, tmp_path: Path, act: Callable[[Path], None], pattern: str, method: str, status: int
) -> None:
    hub.add_repo("org/model", FILES)
    hub.add_repo("me/there", {"file.txt": "text"})
    hub.fail(pattern, status=status, method=method, headers=AT_ONCE)
    act(tmp_path)
    answered = [request.status for request in hub.requests]
    assert answered.count(status) == 1
    assert len(hub.repos["me/there"].commits) == (2 if act is push_it else 1)


@pytest.mark.parametrize(
    ("act", "pattern"),
    [(pin_it, "/api/models/org/model"), (range_it, r"/[0-9a-f]{64}/"), (push_it, "/commit/")],
)
def test_a_connection_that_breaks_is_tried_again(
    hub: Hub,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    act: Callable[[Path], None],
    pattern: str,
) -> None:
    monkeypatch.setattr(client_module, "RETRY_WAITS", (0.01,) * 4)
    hub.add_repo("org/model", FILES)
    hub.add_repo("me/there", {"file.txt": "text"})
    hub.fail(pattern, drop_after=1 if act is not push_it else 0)
    act(tmp_path)
    assert len(hub.repos["me/there"].commits) == (2 if act is push_it else 1)


def test_a_lost_answer_opens_no_second_pull_request(
    hub: Hub, result: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "RETRY_WAITS", (0.01,) * 4)
    hub.add_repo("other/there", {"file.txt": "text"})
    hub.fail("/commit/", drop_after=0)
    try:
        push(result, "other/there", create_pr=True)
    except RepoError as error:
        assert "other/there" in error.message
    assert len(hub.repos["other/there"].pull_requests) == 1


def test_the_waits_grow_and_end(hub: Hub, sleeps: list[float]) -> None:
    hub.fail("/api/models/", status=503, times=math.inf)
    with pytest.raises(RepoError, match=r"org/model: the Hub answered 503.*Try again later"):
        snapshot()
    assert sleeps == [1, 2, 4, 8]
    assert len(hub.requests) == 5


@pytest.mark.parametrize(
    ("said", "waited"), [("3", 3), ("3600", 60), ("Wed, 21 Oct 2015 07:28:00 GMT", 1)]
)
def test_the_hub_may_say_how_long_to_wait_up_to_a_minute(
    hub: Hub, sleeps: list[float], said: str, waited: float
) -> None:
    hub.add_repo("org/model", FILES)
    hub.fail("/api/models/", status=429, headers={"Retry-After": said})
    snapshot()
    assert sleeps == [waited]


@pytest.mark.parametrize("said", ["-1", "nan", "inf", "-inf"])
def test_a_senseless_wait_is_no_crash(hub: Hub, monkeypatch: pytest.MonkeyPatch, said: str) -> None:
    def sleep(seconds: float) -> None:
        assert 0 <= seconds <= 60

    monkeypatch.setattr(client_module, "time", SimpleNamespace(sleep=sleep))
    hub.add_repo("org/model", FILES)
    hub.fail("/api/models/", status=429, headers={"Retry-After": said})
    assert snapshot().repo_id == "org/model"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 501])
def test_an_error_that_stays_is_not_repeated(hub: Hub, sleeps: list[float], status: int) -> None:
    hub.add_repo("org/model", FILES)
    hub.fail("/api/models/", status=status)
    with pytest.raises(RepoError, match="org/model"):
        snapshot()
    assert sleeps == [] and len(hub.requests) == 1


def test_a_hub_that_is_down_is_noticed_at_once(hub: Hub, sleeps: list[float], result: Path) -> None:
    hub.stop()
    try:
        for act in (lambda: writable_repo_id("me/a"), lambda: push(result, "me/a")):
            with pytest.raises(RepoError, match="the Hub cannot be reached"):
                act()
    finally:
        hub.start()
    assert sleeps == []
