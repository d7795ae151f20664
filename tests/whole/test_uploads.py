"""Uploads as a storage sees them, through LFS and Xet: every byte, sent once, in one commit.

Both storages of the loopback Hub compare what arrives with the sha256 and size that were announced.
Xet runs in processes of its own, as the client fixes the way of uploading when it is imported.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from cli import Result, copied, ended, hf_tsv, hf_tsv_process
from deep import deep_checkpoints
from forks import Fork, fork
from hub import Hub, Request, Storage
from huggingface_hub import snapshot_download
from pushes import contents, published, pushed, sent

import hf_tsv as api

LAYERS, TASKS = 50, 20
LARGE, FILES = 200_000_000, 10

BATCH = 256
"""Most files of a request about uploads."""

IMPATIENT = {"HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms", "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "3"}
"""What hf_xet waits between tries, and how many it makes."""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A merge of four shards, one of hundreds, and a routed model of twenty tasks."""
    folder = tmp_path_factory.mktemp("outputs")
    deep_checkpoints(folder / "deep", layers=LAYERS, width=16)
    deep_checkpoints(folder / "wide", layers=3, width=16, tasks=TASKS)
    tasks, base = [folder / "deep" / "t1", folder / "deep" / "t2"], folder / "deep" / "base"
    api.merge(tasks, base_model=base, output=folder / "merge", max_shard_size="200KB")
    api.merge(tasks, base_model=base, output=folder / "shards", max_shard_size="1KB")
    many = [folder / "wide" / f"t{n + 1}" for n in range(TASKS)]
    base = folder / "wide" / "base"
    api.route(many, base_model=base, output=folder / "routed", allow_other_base=True)
    return folder


@pytest.fixture(scope="module")
def large(outputs: Path) -> Iterator[Path]:
    """A merge with a large file beside it, which no compression makes smaller."""
    folder = copied(outputs / "merge", outputs / "large")
    (folder / "large.bin").write_bytes(os.urandom(LARGE))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def storage(hub: Hub) -> Storage:
    """The Xet storage of the Hub."""
    hub.xet = Storage()
    return hub.xet


def environment(folder: Path, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of a process that uses Xet, with caches of its own."""
    kept = {name: value for name, value in os.environ.items() if name != "HF_HUB_DISABLE_XET"}
    return {**kept, **IMPATIENT, "HF_HOME": str(folder), **(variables or {})}


def through_xet(
    *words: str | Path, home: Path, cwd: Path | None = None, **variables: str
) -> Result:
    """Run a command that uses Xet."""
    changed = {**IMPATIENT, "HF_HOME": str(home), **variables}
    return hf_tsv_process(*words, cwd=cwd, HF_HUB_DISABLE_XET=None, **changed)


def xorbs(hub: Hub) -> list[Request]:
    """Requests that carried chunks."""
    return [r for r in hub.requests if r.origin == "xet" and r.method == "PUT"]


def asked(hub: Hub, path: str) -> list[Request]:
    return [request for request in hub.requests if path in request.path]


def kill(process: Fork, hub: Hub, path: str, count: int) -> None:
    """End a process without a word once a path has been asked for so many times."""
    limit = time.monotonic() + 120
    while len(asked(hub, path)) < count and process.poll() is None:
        assert time.monotonic() < limit, [(r.method, r.path, r.status) for r in hub.requests]
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert ended(process).code == -signal.SIGKILL
    hub.heal()


# Every byte


@pytest.mark.parametrize("part", [10**9, 30_000], ids=["whole", "parts"])
def test_what_is_pushed_is_read_back_byte_for_byte(
    hub: Hub, outputs: Path, tmp_path: Path, part: int
) -> None:
    hub.multipart_above = part
    assert hf_tsv("push", outputs / "merge", "me/new").code == 0
    shards = list((outputs / "merge").glob("*.safetensors"))
    pieces = sorted(
        min(part, path.stat().st_size - at)
        for path in shards
        for at in range(0, path.stat().st_size, part)
    )
    assert len(shards) == 4 and sorted(r.body_received for r in sent(hub)) == pieces
    assert len(asked(hub, "/verify")) == len(shards)
    assert len(asked(hub, "/complete/")) == sum(path.stat().st_size > part for path in shards)
    there = snapshot_download("me/new", cache_dir=tmp_path)
    found = contents(Path(there))
    assert found.pop(".gitattributes") and found == published(outputs / "merge")


@pytest.mark.parametrize("part", [10**9, 30_000], ids=["whole", "parts"])
def test_a_file_that_changes_under_the_upload_is_refused(
    hub: Hub, outputs: Path, tmp_path: Path, part: int
) -> None:
    """One byte is another one after the file was hashed and announced."""
    hub.multipart_above = part
    folder = copied(outputs / "merge", tmp_path / "merge")
    shard = max(folder.glob("*.safetensors"))

    def change() -> None:
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)

    hub.fail("/objects/batch", action=change, times=math.inf)
    done = hf_tsv("push", folder, "me/new")
    assert done.code == 1 and "The upload to me/new failed: the storage answered 400" in done.err
    assert len(hub.repos["me/new"].commits) == 1 and pushed(hub) == {}
    assert len(hub.repos["me/new"].lfs) == 3  # the other shards
    hub.heal()
    assert hf_tsv("push", folder, "me/new").code == 0
    assert pushed(hub) == published(folder)


def test_a_merge_is_uploaded_and_read_back_through_xet(
    world: Path, hub: Hub, storage: Storage, tmp_path: Path
) -> None:
    words = ["merge", "org/vision", "org/flat", "--max-shard-size", "50KB", "-o", "merged"]
    done = through_xet(*words, "--push-to", "me/new", home=tmp_path / "home", cwd=world)
    assert done.code == 0, done.err
    there, repo = pushed(hub), hub.repos["me/new"]
    assert there == published(world / "merged")
    assert len(repo.commits) == 2 and len(repo.xet) == 4 and len(xorbs(hub)) == 1
    assert not [r for r in hub.requests if r.origin == "cdn" and r.method == "PUT"]

    hub.requests.clear()
    again = ["merge", "me/new", "org/flat", "--base-model", "org/base", "-o"]
    done = through_xet(*again, "remerged", home=tmp_path / "other", cwd=world)
    assert done.code == 0, done.err
    assert len(asked(hub, "/v1/reconstructions/")) == 4
    stored = [r for r in hub.requests if r.origin == "cdn" and r.path.startswith("/me/new/")]
    assert {r.status for r in stored} == {206}  # headers only
    done = through_xet("inspect", "me/new", "--json", home=tmp_path / "other")
    local = hf_tsv("inspect", world / "merged", "--json").json
    assert done.code == 0 and done.json["parameters"] == local["parameters"], done.err
    hub.xet = None
    assert hf_tsv(*again, "plain", cwd=world).code == 0  # without Xet
    plain, remerged = contents(world / "plain"), contents(world / "remerged")
    assert plain["model.safetensors"] == remerged["model.safetensors"]


def test_no_token_of_the_hub_reaches_the_storage_of_xet(
    hub: Hub, storage: Storage, outputs: Path, tmp_path: Path
) -> None:
    assert through_xet("push", outputs / "merge", "me/new", home=tmp_path / "home").code == 0
    there = [request for request in hub.requests if request.origin == "xet"]
    assert there and "hf_write" not in repr([(r.headers, r.query, r.body) for r in there])
    files = [path for path in (tmp_path / "home").rglob("*") if path.is_file()]
    assert files and not any(b"hf_write" in path.read_bytes() for path in files)  # its log


def test_a_wrong_byte_in_the_storage_of_xet_is_refused(
    hub: Hub, storage: Storage, outputs: Path, tmp_path: Path
) -> None:
    def damage() -> None:
        ((name, content),) = storage.xorbs.items()
        storage.xorbs[name] = content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]

    hub.fail("/commit/", action=damage, times=math.inf)
    done = through_xet("push", outputs / "merge", "me/new", home=tmp_path / "home")
    errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert done.code == 1 and len(errors) == 1 and "Xet" in errors[0], done.err
    assert pushed(hub) == {} and len(hub.repos["me/new"].commits) == 1


# Large folders


@pytest.mark.parametrize("kind", ["shards", "routed"])
@pytest.mark.parametrize("way", ["lfs", "xet"])
def test_a_folder_of_many_files_is_one_commit(
    hub: Hub, outputs: Path, tmp_path: Path, kind: str, way: str
) -> None:
    folder, words = outputs / kind, ["push", outputs / kind, "me/new"]
    files = contents(folder)
    if kind == "routed":
        assert sum(name.startswith("tasks/") for name in files) >= 3 * TASKS
    if way == "xet":
        hub.xet = Storage()
        done = through_xet(*words, home=tmp_path / "home")
    else:
        done = hf_tsv(*words)
    assert done.code == 0, done.err
    assert pushed(hub) == published(folder) and len(hub.repos["me/new"].commits) == 2
    large = {content for name, content in files.items() if name.endswith(".safetensors")}
    assert len(asked(hub, "/preupload/")) == -(-len(files) // BATCH)
    assert len(asked(hub, "/commit/")) == 1
    if way == "lfs":
        assert len(sent(hub)) == len(large)
        assert len(asked(hub, "/objects/batch")) == -(-len(large) // BATCH)
    if kind == "shards":
        assert len(large) == 6 * LAYERS + 1 > BATCH


PEAK = """
import resource, sys
from hf_tsv import cli
from hf_tsv.cli import output
from hf_tsv.hub import uploads
uploads.TOGETHER, output._leave = int(sys.argv.pop(1)), sys.exit
try:
    cli.main()
finally:
    print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def peak(*words: str | Path, together: int, **variables: dict[str, str]) -> int:
    """Most memory of a push that uploads so many bytes side by side."""
    done = ended(fork("-c", PEAK, str(together), *words, **variables))
    assert done.code == 0, done.err
    return int(done.out.split("peak ")[1])


@pytest.mark.parametrize(("way", "most"), [("lfs", 20_000_000), ("xet", LARGE)])
def test_memory_is_not_that_of_the_folder(
    hub: Hub, outputs: Path, large: Path, tmp_path: Path, way: str, most: int
) -> None:
    folder = copied(outputs / "merge", tmp_path / "many")
    content = (large / "large.bin").read_bytes()
    for n in range(FILES):
        (folder / f"{n}.bin").write_bytes(content[n::FILES])
    variables: dict[str, dict[str, str]] = {}
    if way == "xet":
        hub.xet, variables = Storage(), {"environment": environment(tmp_path / "home")}
    together = LARGE // FILES
    small = peak("push", outputs / "merge", "me/small", together=together, **variables)
    whole = peak("push", folder, "me/new", together=together, **variables)
    assert whole - small < most, (small, whole)
    assert len(asked(hub, "/api/models/me/new/commit/")) == 1
    assert pushed(hub) == published(folder)


# Again


def test_parts_of_an_upload_that_is_killed(hub: Hub, outputs: Path) -> None:
    """Whole files that arrived stay; one of which parts are missing is sent as a whole."""
    hub.multipart_above = 30_000
    hub.fail("/upload/.*/3$", delay=60, method="PUT", after=1, times=math.inf)
    process = fork("push", outputs / "merge", "me/new")
    kill(process, hub, "/complete/", 1)
    there = set(hub.repos["me/new"].lfs)
    assert 1 <= len(there) <= 2 and pushed(hub) == {}
    hub.requests.clear()
    assert hf_tsv("push", outputs / "merge", "me/new").code == 0
    assert not any(oid in request.path for oid in there for request in sent(hub))
    lfs = hub.repos["me/new"].lfs
    missing = sum(blob.size for oid, blob in lfs.items() if oid not in there)
    assert sum(request.body_received for request in sent(hub)) == missing
    assert pushed(hub) == published(outputs / "merge")


@pytest.mark.parametrize("way", ["lfs", "xet"])
def test_a_push_that_is_killed_before_its_commit_sends_nothing_again(
    hub: Hub, outputs: Path, tmp_path: Path, way: str
) -> None:
    home = tmp_path / "home"
    hub.xet = Storage() if way == "xet" else None
    hub.fail("/commit/", delay=60)
    words = ["push", outputs / "shards", "me/new"]
    kill(fork(*words, environment=environment(home) if way == "xet" else None), hub, "/commit/", 1)
    assert pushed(hub) == {} and (xorbs(hub) if way == "xet" else sent(hub))
    hub.requests.clear()
    home = tmp_path / "another machine"
    done = through_xet(*words, home=home) if way == "xet" else hf_tsv(*words)
    assert done.code == 0, done.err
    assert sent(hub) == [] and pushed(hub) == published(outputs / "shards")
    assert len(hub.repos["me/new"].commits) == 2


def test_an_upload_through_xet_that_is_killed_half_way(
    hub: Hub, storage: Storage, large: Path, tmp_path: Path
) -> None:
    """Blocks of chunks that arrived are not sent again."""
    hub.fail("/signed/", delay=60, method="PUT", after=2, times=math.inf)
    words = ["push", large, "me/new"]
    kill(fork(*words, environment=environment(tmp_path / "home")), hub, "/xorb-commits/", 2)
    there = set(storage.xorbs)
    assert len(there) == 2 and pushed(hub) == {}
    hub.requests.clear()
    done = through_xet(*words, home=tmp_path / "home")
    assert done.code == 0, done.err
    names = {request.path.rpartition("/")[2] for request in xorbs(hub)}
    assert names == storage.xorbs.keys() - there and names
    assert pushed(hub) == published(large)


@pytest.mark.parametrize(
    ("path", "fault"),
    [
        ("/xet-write-token/", {"status": 503}),
        ("/xorb-grants/", {"status": 503}),
        ("/signed/", {"status": 503, "method": "PUT"}),
        ("/signed/", {"drop_after": 0, "method": "PUT"}),
        ("/xorb-commits/", {"status": 502}),
        ("/v1/shards", {"drop_after": 0}),
        ("/commit/", {"status": 504}),
    ],
)
def test_faults_of_xet_that_pass_leave_one_commit(
    hub: Hub, storage: Storage, outputs: Path, tmp_path: Path, path: str, fault: dict[str, object]
) -> None:
    hub.fail(path, **fault)  # type: ignore[arg-type]
    done = through_xet("push", outputs / "merge", "me/new", home=tmp_path / "home")
    assert done.code == 0, done.err
    assert pushed(hub) == published(outputs / "merge") and len(hub.repos["me/new"].commits) == 2


@pytest.mark.parametrize(
    ("path", "status"), [("/signed/", 403), ("/xorb-grants/", 500), ("/v1/shards", 400)]
)
def test_faults_of_xet_that_stay_are_one_error_and_the_next_push_works(
    hub: Hub, storage: Storage, outputs: Path, tmp_path: Path, path: str, status: int
) -> None:
    hub.fail(path, status, times=math.inf, method="PUT" if path == "/signed/" else None)
    words = ["push", outputs / "merge", "me/new"]
    done = through_xet(*words, home=tmp_path / "home")
    errors = [line for line in done.err.splitlines() if line.startswith("Error: ")]
    assert done.code == 1 and len(errors) == 1 and "Traceback" not in done.err, done.err
    assert "The upload to me/new failed: " in errors[0] and "Signature" not in done.err
    assert "Upload it with `hf-tsv push" in done.err and pushed(hub) == {}
    hub.heal()
    done = through_xet(*words, home=tmp_path / "home")
    assert done.code == 0, done.err
    assert pushed(hub) == published(outputs / "merge")
