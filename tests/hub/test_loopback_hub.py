"""The loopback Hub, as the real client sees it: what other tests may rely on."""

from __future__ import annotations

import hashlib
import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hub import Hub, User
from huggingface_hub import HfApi, HfFileSystem, ModelCard, ModelCardData
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

# The client streams LFS files with a parameter that its HTTP library deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def api(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="hf_write")


@pytest.fixture
def reader(hub: Hub) -> HfApi:
    return HfApi(endpoint=hub.endpoint, token="hf_read")


def safetensors(size: int) -> bytes:
    """A file of one float32 vector, as safetensors lays it out."""
    tensor = {"dtype": "F32", "shape": [size], "data_offsets": [0, 4 * size]}
    header = json.dumps({"weight": tensor}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(4 * size)


def status(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


# Reading


def test_a_file_arrives_as_it_was_added(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("org/model", {"sub folder/ä.txt": "hello"})
    path = api.hf_hub_download("org/model", "sub folder/ä.txt", cache_dir=tmp_path)
    assert Path(path).read_text() == "hello"


def test_a_snapshot_of_a_folder_on_disk(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "model.safetensors").write_bytes(WEIGHTS)
    sha = hub.add_repo("org/model", folder)
    found = Path(api.snapshot_download("org/model", cache_dir=tmp_path / "cache"))
    assert found.name == sha
    assert (found / "sub" / "model.safetensors").read_bytes() == WEIGHTS
    assert hub.files("org/model") == {"config.json": b"{}", "sub/model.safetensors": WEIGHTS}


def test_lfs_files_come_from_the_cdn_which_never_sees_a_token(
    hub: Hub, api: HfApi, tmp_path: Path
) -> None:
    hub.add_repo("me/private", {"model.safetensors": WEIGHTS}, private=True)
    api.hf_hub_download("me/private", "model.safetensors", cache_dir=tmp_path)
    head, get = hub.requests
    assert (head.origin, head.method, head.status) == ("api", "HEAD", 302)
    assert head.headers["authorization"] == "Bearer hf_write"
    assert (get.origin, get.status, get.body_sent) == ("cdn", 200, len(WEIGHTS))
    assert "authorization" not in get.headers
    with_token = {"Authorization": "Bearer hf_write"}
    assert httpx2.get(f"{hub.cdn}{get.path}", headers=with_token).status_code == 400


@pytest.mark.parametrize("name", ["model.safetensors", "weights.txt"])
def test_ranges(hub: Hub, name: str) -> None:
    hub.add_repo("org/model", {name: WEIGHTS})
    url = f"{hub.endpoint}/org/model/resolve/main/{name}"

    def get(wanted: str) -> httpx2.Response:
        return httpx2.get(url, headers={"Range": wanted}, follow_redirects=True)

    assert get("bytes=10-19").content == WEIGHTS[10:20]
    assert get("bytes=-7").content == WEIGHTS[-7:]
    assert get("bytes=102390-").headers["Content-Range"] == "bytes 102390-102399/102400"
    assert get("bytes=10-19").status_code == 206
    assert get("bytes=102400-").status_code == 416


def test_reading_a_part_does_not_send_the_whole(hub: Hub, api: HfApi) -> None:
    weights = safetensors(1_000_000)
    hub.add_repo("org/model", {"model.safetensors": weights})
    assert api.get_safetensors_metadata("org/model").parameter_count == {"F32": 1_000_000}
    files = HfFileSystem(endpoint=hub.endpoint, token="hf_write", skip_instance_cache=True)
    with files.open("org/model/model.safetensors", cache_type="none") as file:
        file.seek(2_000_000)
        assert file.read(100) == weights[2_000_000:2_000_100]
    assert hub.sent(r"model\.safetensors") == 100_001 + 100


def test_model_info(hub: Hub, api: HfApi) -> None:
    card = "---\nlicense: mit\nbase_model: [a/b, a/c]\ntags: [clip]\n---\n# A model"
    files = {"README.md": card, "model.safetensors": safetensors(10)}
    sha = hub.add_repo("org/model", files, gated=True)
    info = api.model_info("org/model", files_metadata=True)
    assert (info.sha, info.private, info.gated) == (sha, False, "auto")
    assert info.card_data is not None and info.card_data.license == "mit"
    assert info.tags is not None
    assert {"clip", "safetensors", "license:mit", "base_model:merge:a/b"} <= set(info.tags)
    assert info.safetensors == {"parameters": {"F32": 10}, "total": 10}
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    assert sizes == {"README.md": len(card), "model.safetensors": len(files["model.safetensors"])}


def test_listings_come_in_pages(hub: Hub, api: HfApi) -> None:
    hub.add_repo("org/model", {f"{n}/file.txt": str(n) for n in range(5)})
    hub.page_size = 2
    paths = [entry.path for entry in api.list_repo_tree("org/model", recursive=True)]
    assert paths == [path for n in range(5) for path in (f"{n}", f"{n}/file.txt")]
    assert sum("/tree/" in request.path for request in hub.requests) == 5
    assert [entry.path for entry in api.list_repo_tree("org/model", "3")] == ["3/file.txt"]
    (info,) = api.get_paths_info("org/model", ["1/file.txt", "absent"], expand=True)
    assert info.size == 1 and info.last_commit is not None


@pytest.mark.parametrize("kind", ["branch", "tag", "sha", "short sha", "pull request"])
def test_revisions(hub: Hub, api: HfApi, tmp_path: Path, kind: str) -> None:
    sha = hub.add_repo("org/model", {"file.txt": "old"})
    hub.tag("org/model", "v1", sha)
    hub.add_repo("org/model", {"file.txt": "old"}, branch="a/b")
    api.create_pull_request("org/model", "Nothing yet")
    hub.commit("org/model", {"file.txt": "new"})
    names = {"branch": "a/b", "tag": "v1", "short sha": sha[:7], "pull request": "refs/pr/1"}
    revision = names.get(kind, sha)
    path = api.hf_hub_download("org/model", "file.txt", revision=revision, cache_dir=tmp_path)
    assert Path(path).read_text() == "old"
    assert api.model_info("org/model", revision=revision).sha == Path(path).parent.name
    assert hub.files("org/model") == {"file.txt": b"new"}


def test_what_is_missing_is_told_apart(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("org/model", {"file.txt": "text"})
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("org/absent")
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download("org/model", "file.txt", revision="absent", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download("org/model", "absent", cache_dir=tmp_path)
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree("org/model", "absent"))


def test_shas_depend_on_nothing_but_the_history(hub: Hub) -> None:
    first = hub.add_repo("org/one", {"file.txt": "text"})
    assert hub.add_repo("org/two", {"file.txt": "text"}) == first
    assert hub.commit("org/two", {"file.txt": "other"}) != first


# Access


def test_a_private_repository_does_not_exist_for_others(
    hub: Hub, api: HfApi, reader: HfApi
) -> None:
    hub.add_repo("org/secret", {"file.txt": "text"}, private=True)
    assert api.repo_exists("org/secret")
    assert not reader.repo_exists("org/secret")
    assert not reader.repo_exists("org/secret", token=False)
    assert [request.status for request in hub.requests] == [200, 404, 401]


def test_a_gated_repository_shows_its_info_but_not_its_files(
    hub: Hub, api: HfApi, reader: HfApi, tmp_path: Path
) -> None:
    hub.add_repo("org/gated", {"file.txt": "text"}, gated="manual")
    assert reader.model_info("org/gated").gated == "manual"
    for token, expected in ((False, 401), ("hf_read", 403)):
        with pytest.raises(GatedRepoError) as error:
            reader.auth_check("org/gated", token=token)
        assert status(error) == expected
    hub.repos["org/gated"].allowed.add("reader")
    reader.auth_check("org/gated")
    assert reader.hf_hub_download("org/gated", "file.txt", cache_dir=tmp_path)


def test_an_unknown_token_is_refused_even_for_public_things(hub: Hub, api: HfApi) -> None:
    hub.add_repo("org/model", {})
    with pytest.raises(HfHubHTTPError) as error:
        api.model_info("org/model", token="hf_wrong")
    assert status(error) == 401
    assert not isinstance(error.value, RepositoryNotFoundError)


def test_writing_takes_a_write_token_and_a_place_to_write(
    hub: Hub, api: HfApi, reader: HfApi
) -> None:
    hub.add_repo("other/model", {})
    for client, repo_id in ((reader, "reader/model"), (api, "other/new")):
        with pytest.raises(HfHubHTTPError) as error:
            client.create_repo(repo_id)
        assert status(error) == 403
    with pytest.raises(HfHubHTTPError) as error:
        api.auth_check("other/model", write=True)
    assert status(error) == 403


def test_a_fine_grained_token_writes_where_it_says(hub: Hub, api: HfApi) -> None:
    scope = {"entity": {"_id": "1", "type": "org", "name": "org"}, "permissions": ["repo.write"]}
    hub.users["hf_fine"] = User("me", orgs=["org"], role="fineGrained", scoped=[scope])
    token = api.whoami(token="hf_fine")["auth"]["accessToken"]
    assert (token["role"], token["fineGrained"]["scoped"]) == ("fineGrained", [scope])
    api.create_repo("org/model", token="hf_fine")
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("me/model", token="hf_fine")


# Writing


def test_a_repository_from_creation_to_deletion(hub: Hub, api: HfApi) -> None:
    assert api.create_repo("model", private=True) == f"{hub.endpoint}/me/model"
    assert hub.repos["me/model"].private
    assert api.create_repo("me/model", exist_ok=True).repo_id == "me/model"
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo("me/model")
    api.update_repo_settings("me/model", private=False, gated="auto")
    assert not hub.repos["me/model"].private
    api.delete_repo("me/model")
    assert hub.repos == {}


def test_uploading_a_folder(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("me/model", {"old.txt": "old", "kept.txt": "kept"})
    (tmp_path / "new.txt").write_text("new")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    commit = api.upload_folder(
        repo_id="me/model", folder_path=tmp_path, delete_patterns="old*", commit_message="Update"
    )
    assert hub.files("me/model") == {
        "kept.txt": b"kept",
        "model.safetensors": WEIGHTS,
        "new.txt": b"new",
    }
    assert [c.title for c in api.list_repo_commits("me/model")] == ["Update", "Add files"]
    assert hub.repos["me/model"].commits[commit.oid].message == "Update"


def test_lfs_content_that_is_there_is_not_sent_again(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/model")
    for path in ("model.safetensors", "copy.safetensors"):
        api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo=path, repo_id="me/model")
    (put,) = (request for request in hub.requests if request.method == "PUT")
    assert (put.origin, put.body_received) == ("cdn", len(WEIGHTS))
    assert "authorization" not in put.headers
    assert hub.files("me/model")["copy.safetensors"] == WEIGHTS


def test_large_files_are_uploaded_in_parts(hub: Hub, api: HfApi) -> None:
    hub.multipart_above = 50_000
    api.create_repo("me/model")
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="model.bin", repo_id="me/model")
    parts = [request.body_received for request in hub.requests if request.method == "PUT"]
    assert parts == [50_000, 50_000, 2_400]
    assert hub.files("me/model")["model.bin"] == WEIGHTS


def announced(hub: Hub) -> tuple[str, dict[str, Any]]:
    """The sha256 of WEIGHTS, and what the Hub says about its upload."""
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    answer = httpx2.post(
        f"{hub.endpoint}/me/model.git/info/lfs/objects/batch",
        json={"objects": [{"oid": oid, "size": len(WEIGHTS)}], "ref": {"name": "main"}},
        headers={"Authorization": "Bearer hf_write"},
    )
    return oid, answer.json()["objects"][0]["actions"]


def test_a_body_that_is_not_what_was_announced_is_refused(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/model")
    oid, actions = announced(hub)
    wrong = WEIGHTS[:-1] + b"\0"
    for body in (wrong, WEIGHTS[:-1], b""):
        assert httpx2.put(actions["upload"]["href"], content=body).status_code == 400
    verify = {"url": actions["verify"]["href"], "headers": {"Authorization": "Bearer hf_write"}}
    seen = {"oid": oid, "size": len(WEIGHTS)}
    assert httpx2.post(**verify, json=seen).status_code == 404
    assert httpx2.put(actions["upload"]["href"], content=WEIGHTS).status_code == 200
    assert httpx2.post(**verify, json=seen).status_code == 200
    assert httpx2.post(**verify, json={**seen, "size": 1}).status_code == 404


def test_parts_that_are_not_what_was_announced_are_refused(hub: Hub, api: HfApi) -> None:
    hub.multipart_above = 50_000
    api.create_repo("me/model")
    whole = [WEIGHTS[at : at + 50_000] for at in (0, 50_000, 100_000)]
    swapped, short = [whole[1], whole[0], whole[2]], whole[:2]
    for parts in ([*short, whole[2][:-1] + b"\0"], swapped, short, whole):
        oid, actions = announced(hub)
        header = actions["upload"]["header"]
        assert header.pop("chunk_size") == "50000"
        urls = list(header.values())[: len(parts)]
        puts = [httpx2.put(url, content=part) for url, part in zip(urls, parts, strict=True)]
        etags = [{"partNumber": n, "etag": put.headers["ETag"]} for n, put in enumerate(puts, 1)]
        done = httpx2.post(actions["upload"]["href"], json={"oid": oid, "parts": etags})
        assert done.status_code == (200 if parts is whole else 400)
    assert hub.repos["me/model"].lfs[oid].read() == WEIGHTS


def test_a_commit_that_names_a_file_of_another_size_is_refused(hub: Hub, api: HfApi) -> None:
    api.create_repo("me/model")
    oid, actions = announced(hub)
    assert httpx2.put(actions["upload"]["href"], content=WEIGHTS).status_code == 200
    for size, code in ((len(WEIGHTS) + 1, 400), (len(WEIGHTS), 200)):
        file = {"path": "model.bin", "algo": "sha256", "oid": oid, "size": size}
        lines = [{"key": "header", "value": {"summary": "Add"}}, {"key": "lfsFile", "value": file}]
        made = httpx2.post(
            f"{hub.endpoint}/api/models/me/model/commit/main",
            content="\n".join(map(json.dumps, lines)),
            headers={"Authorization": "Bearer hf_write"},
        )
        assert made.status_code == code


def test_a_pull_request_needs_no_right_to_write(hub: Hub, api: HfApi) -> None:
    base = hub.add_repo("other/model", {"file.txt": "theirs"})
    commit = api.upload_file(
        path_or_fileobj=WEIGHTS,
        path_in_repo="model.safetensors",
        repo_id="other/model",
        commit_message="Add weights",
        create_pr=True,
    )
    assert (commit.pr_num, commit.pr_revision) == (1, "refs/pr/1")
    assert "model.safetensors" not in hub.files("other/model")
    assert hub.files("other/model", "refs/pr/1")["model.safetensors"] == WEIGHTS
    assert hub.repos["other/model"].commits[commit.oid].parent == base
    hub.users["hf_write"].orgs = ["other"]
    api.merge_pull_request("other/model", 1)
    assert hub.files("other/model")["model.safetensors"] == WEIGHTS
    assert api.get_discussion_details("other/model", 1).status == "merged"


def test_a_commit_on_a_stale_parent_is_refused(hub: Hub, api: HfApi) -> None:
    stale = hub.add_repo("me/model", {"file.txt": "1"})
    hub.commit("me/model", {"file.txt": "2"})
    new = {"path_or_fileobj": b"3", "path_in_repo": "file.txt", "repo_id": "me/model"}
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_file(**new, parent_commit=stale)
    assert status(error) == 412
    assert hub.files("me/model") == {"file.txt": b"2"}


def test_branches_and_tags(hub: Hub, api: HfApi) -> None:
    sha = hub.add_repo("me/model", {"file.txt": "1"})
    api.create_branch("me/model", branch="experiment/a")
    api.create_branch("me/model", branch="experiment/a", exist_ok=True)
    api.create_tag("me/model", tag="v1", revision=sha)
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag("me/model", tag="v1")
    api.upload_file(
        path_or_fileobj=b"2", path_in_repo="file.txt", repo_id="me/model", revision="experiment/a"
    )
    refs = api.list_repo_refs("me/model", include_pull_requests=True)
    assert [ref.name for ref in refs.branches] == ["main", "experiment/a"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", sha)]
    assert hub.files("me/model") == {"file.txt": b"1"}
    api.delete_branch("me/model", branch="experiment/a")
    api.delete_tag("me/model", tag="v1")
    assert set(hub.repos["me/model"].refs) == {"refs/heads/main"}


@pytest.mark.parametrize("metadata", ["license: [mit", "license: my-own", "tags: [{a: b}]"])
def test_a_card_that_the_hub_cannot_read_is_refused(hub: Hub, api: HfApi, metadata: str) -> None:
    hub.add_repo("me/model", {})
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        api.upload_file(
            path_or_fileobj=f"---\n{metadata}\n---\n".encode(),
            path_in_repo="README.md",
            repo_id="me/model",
        )


def test_a_card_there_and_back(hub: Hub, api: HfApi) -> None:
    hub.add_repo("me/model", {})
    data = ModelCardData(license="apache-2.0", base_model=["a/b"], tags=["model-merging"])
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n# Title\n").push_to_hub("me/model")
    assert ModelCard.load("me/model").data.base_model == ["a/b"]
    assert "base_model:finetune:a/b" in (api.model_info("me/model").tags or [])


def test_a_commit_cannot_point_to_content_that_never_came(hub: Hub) -> None:
    hub.add_repo("me/model", {})
    lines = [
        {"key": "header", "value": {"summary": "Add"}},
        {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": "0" * 64}},
    ]
    response = httpx2.post(
        f"{hub.endpoint}/api/models/me/model/commit/main",
        content="\n".join(json.dumps(line) for line in lines),
        headers={"Authorization": "Bearer hf_write"},
    )
    assert response.status_code == 400


# Faults


def test_an_error_that_passes_is_retried_by_the_client(hub: Hub, api: HfApi) -> None:
    hub.add_repo("org/model", {"file.txt": "text"})
    hub.fail("/tree/", status=503, headers={"Retry-After": "0"})
    assert [entry.path for entry in api.list_repo_tree("org/model")] == ["file.txt"]
    assert [request.status for request in hub.requests] == [503, 200]


def test_an_error_leaves_the_repository_as_it_was(hub: Hub, api: HfApi) -> None:
    sha = hub.add_repo("me/model", {})
    hub.fail("/commit/", status=500, method="POST")
    with pytest.raises(HfHubHTTPError, match="500"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="file.txt", repo_id="me/model")
    assert hub.repos["me/model"].branches == {"main": sha}


def test_a_cut_download_is_resumed_where_it_broke(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    weights = WEIGHTS * 120  # the client keeps only whole pieces of 10 MiB
    hub.add_repo("org/model", {"model.safetensors": weights})
    hub.fail(r"model\.safetensors", drop_after=12_000_000)
    path = api.hf_hub_download("org/model", "model.safetensors", cache_dir=tmp_path)
    assert Path(path).read_bytes() == weights
    *_, first, second = hub.requests
    assert (first.status, first.body_sent) == (200, 12_000_000)
    assert second.headers["range"] == f"bytes={10 * 2**20}-"
    assert (second.status, second.body_sent) == (206, len(weights) - 10 * 2**20)


def test_a_response_can_be_lost_after_the_commit(hub: Hub, api: HfApi) -> None:
    hub.add_repo("me/model", {})
    hub.fail("/commit/", drop_after=0)
    with pytest.raises(httpx2.RemoteProtocolError):
        api.upload_file(path_or_fileobj=b"1", path_in_repo="file.txt", repo_id="me/model")
    assert hub.files("me/model") == {"file.txt": b"1"}


def test_a_short_but_well_formed_response(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    hub.add_repo("org/model", {"model.safetensors": WEIGHTS})
    hub.fail(r"model\.safetensors", truncate=1000)
    with pytest.raises(OSError, match="should be of size 102400 but has size 1000"):
        api.hf_hub_download("org/model", "model.safetensors", cache_dir=tmp_path)


def test_a_server_that_ignores_ranges(hub: Hub) -> None:
    hub.add_repo("org/model", {"file.txt": "0123456789"})
    url = f"{hub.endpoint}/org/model/resolve/main/file.txt"
    hub.fail("file.txt", ignore_range=True, delay=0.05)
    for expected in (200, 206):
        assert httpx2.get(url, headers={"Range": "bytes=2-4"}).status_code == expected


def test_a_listing_as_the_real_client_asks_for_it(hub: Hub, api: HfApi) -> None:
    card = "---\nbase_model: org/base\npipeline_tag: {}\nlicense: mit\n---\n"
    for i in range(5):
        hub.add_repo(f"org/clip-{i}", {"README.md": card.format("image-classification")})
        hub.repos[f"org/clip-{i}"].downloads = i
    hub.add_repo("you/other", {"README.md": card.format("feature-extraction")})
    hub.repos["you/other"].created = "2026-01-01T00:00:00.000Z"
    hub.add_repo("you/hidden", {"README.md": card.format("feature-extraction")}, private=True)
    hub.add_repo("me/mine", {"README.md": card.format("feature-extraction")}, private=True)
    hub.add_repo("org/data", {"README.md": card}, kind="datasets")
    hub.page_size = 2

    def ids(**asked: Any) -> list[str]:
        return [info.id for info in api.list_models(filter="base_model:finetune:org/base", **asked)]

    assert sorted(ids()) == sorted([*(f"org/clip-{i}" for i in range(5)), "you/other", "me/mine"])
    assert len(hub.requests) == 4  # pages
    assert ids(sort="downloads", limit=3) == ["org/clip-4", "org/clip-3", "org/clip-2"]
    assert len(hub.requests) == 6
    assert ids(sort="created_at", limit=1) == ["you/other"] == ids(author="You")
    assert ids(search="CLIP-3") == ["org/clip-3"]
    assert sorted(ids(pipeline_tag="feature-extraction")) == ["me/mine", "you/other"]
    assert list(api.list_models(filter="base_model:adapter:org/base")) == []
    asked: Any = ["downloads", "lastModified", "tags"]
    (info,) = api.list_models(filter=["license:mit"], search="clip-4", expand=asked)
    assert (info.downloads, info.likes, info.pipeline_tag) == (4, None, None)
    assert info.last_modified is not None and "base_model:finetune:org/base" in (info.tags or [])
    with pytest.raises(HfHubHTTPError) as error:
        ids(sort="size")
    assert status(error) == 400


def test_a_fault_may_wait_for_its_turn_and_ends_with_the_hub(hub: Hub) -> None:
    hub.add_repo("org/model", {"file.txt": "0123456789"})
    url = f"{hub.endpoint}/org/model/resolve/main/file.txt"
    hub.fail("file.txt", after=1)
    assert [httpx2.get(url).status_code for _ in range(3)] == [200, 503, 200]
    hub.fail("file.txt", delay=60)
    threading.Timer(0.2, hub.reset).start()
    began = time.monotonic()
    assert httpx2.get(url, timeout=30).status_code == 401  # it knows no such repository now
    assert time.monotonic() - began < 10


def test_a_hub_that_is_down_and_up_again(hub: Hub, api: HfApi) -> None:
    hub.add_repo("org/model", {})
    api.model_info("org/model")
    hub.stop()
    with pytest.raises(httpx2.ConnectError):
        api.model_info("org/model")
    hub.start()
    assert api.model_info("org/model").id == "org/model"


def test_an_unknown_endpoint_says_so(hub: Hub) -> None:
    assert httpx2.get(f"{hub.endpoint}/api/absent").json() == {
        "error": "No such endpoint: GET /api/absent"
    }
