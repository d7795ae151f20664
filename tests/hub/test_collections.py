"""Collections that a pushed model is added to: checked before the work, one request after it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cli import hf_tsv
from hub import Hub, User
from pushes import pushed

import hf_tsv as api
from hf_tsv.hub import collection_slug
from hf_tsv.runs.target import UNPUSHED
from hf_tsv.system.errors import HfTsvError, UsageError

SLUG = "me/clip-64f9a55bb3115b4f513ec026"
MERGE = ["merge", "org/vision", "org/flat", "--push-to", "me/new", "--collection"]


def test_slugs_and_addresses(hub: Hub) -> None:
    ends = ("", "/", "?theme=dark")
    for page in ("https://huggingface.co/collections/", f"{hub.endpoint}/collections/", ""):
        assert {collection_slug(f"{page}{SLUG}{end}") for end in ends} == {SLUG}
    for wrong in ("clip", "a/b/c", "", "../x", "https://elsewhere/collections/a/b", "a/b c"):
        with pytest.raises(UsageError, match="is not a collection"):
            collection_slug(wrong)


VERBS: dict[str, Callable[..., Any]] = {
    "merge": lambda **more: api.merge(["org/vision", "org/flat"], **more),
    "compress": lambda **more: api.compress("org/vision", **more),
    "adapter": lambda **more: api.export_peft("org/vision", output="lora", **more),
    "route": lambda **more: api.route(["org/vision", "org/full"], **more),
    "reconstruct": lambda **more: api.reconstruct("org/factors", **more),
}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_that_pushes_adds_to_a_collection(
    hub: Hub, world: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(world)
    found = hub.add_collection(SLUG)
    if verb == "reconstruct":
        api.compress("org/vision", push_to="org/factors")
    VERBS[verb](push_to="new", collection=f"{hub.endpoint}/collections/{SLUG}")
    assert found.models == ["me/new"] and pushed(hub)
    assert not list(UNPUSHED.glob("*/*"))


def test_a_folder_is_pushed_into_a_collection_once(hub: Hub, world: Path) -> None:
    found = hub.add_collection("org/clip-1", private=True)
    factors = api.compress("org/vision", output=world / "factors")
    words = ["push", world / "factors", "me/new", "--collection", "org/clip-1"]
    for _ in range(2):
        done = hf_tsv(*words)
        assert done.code == 0 and "me/new is in the collection org/clip-1." in done.err
    assert found.models == ["me/new"]
    factors.push_to_hub("me/later", collection="org/clip-1")
    assert found.models == ["me/new", "me/later"]


def test_a_dry_run_only_checks(hub: Hub, world: Path) -> None:
    found = hub.add_collection(SLUG)
    assert hf_tsv(*MERGE, SLUG, "--dry-run").code == 0
    assert not found.models and "me/new" not in hub.repos
    done = hf_tsv(*MERGE, "me/none", "--dry-run")
    assert done.code == 1 and "There is no collection me/none" in done.err


@pytest.mark.parametrize(
    ("slug", "user", "said"),
    [
        ("me/none", User("me"), "There is no collection me/none, or it is private and this token"),
        ("you/hidden", User("me"), "There is no collection you/hidden, or it is private and"),
        ("you/open", User("me"), "you/open belongs to you, and this token writes to me."),
        ("org/clip", User("me"), "org/clip belongs to org, and this token writes to me."),
    ],
)
def test_what_cannot_be_written_is_refused_before_the_work(
    hub: Hub, world: Path, slug: str, user: User, said: str
) -> None:
    hub.users["hf_write"] = user
    hub.add_collection("you/hidden", private=True)
    hub.add_collection("you/open")
    hub.add_collection("org/clip")
    done = hf_tsv(*MERGE, slug, cwd=world)
    assert done.code == 1 and said in done.err, done.err
    assert done.err.count("Error: ") == 1 and "Traceback" not in done.err
    assert "me/new" not in hub.repos and hub.sent("safetensors") < 100_000


def test_an_organisation_that_may_only_be_read(hub: Hub, world: Path) -> None:
    reading = User("me", orgs=["org"])
    told = reading.whoami()
    told["orgs"][0]["roleInOrg"] = "read"
    reading.whoami = lambda: told  # type: ignore[method-assign]
    hub.users["hf_write"] = reading
    hub.add_collection("org/clip")
    done = hf_tsv(*MERGE, "org/clip", cwd=world)
    assert "belongs to org, and this token writes to me." in done.err


def test_without_an_upload_it_is_wrong_usage(hub: Hub, world: Path) -> None:
    done = hf_tsv("merge", "org/vision", "-o", world / "m", "--collection", SLUG)
    assert done.code == 2 and "--collection applies to an upload" in done.err
    done = hf_tsv(*MERGE, "clip")
    assert done.code == 2 and "clip is not a collection." in done.err
    assert not hub.requests


@pytest.mark.parametrize(
    "fault", [{"status": 403}, {"status": 200, "body": b"[]"}, {"status": 200, "body": b"no"}]
)
def test_an_upload_stays_when_it_cannot_be_added(
    hub: Hub, world: Path, fault: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add_collection(SLUG)
    hub.fail("/items", times=math.inf, method="POST", **fault)
    done = hf_tsv(*MERGE, SLUG, cwd=world)
    assert done.code == 1 and pushed(hub)
    head = hub.repos["me/new"].branches["main"]
    assert (
        f"The upload to me/new is complete ({hub.endpoint}/me/new/commit/{head}), but it is not in"
        f" the collection {SLUG}: " in done.err
    )
    assert f"Add it with `hf collections add-item {SLUG} me/new model`." in done.err
    assert "hf-tsv push" not in done.err and not list(UNPUSHED.glob("*/*"))
    (world / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(world / "temporary"))
    with pytest.raises(HfTsvError, match="The upload to me/factors is complete"):
        api.compress("org/vision", push_to="me/factors", collection=SLUG)
    assert not list((world / "temporary").glob("hf-tsv-*"))


def test_the_command_to_push_later_names_the_collection(hub: Hub, world: Path) -> None:
    hub.add_collection(SLUG)
    hub.fail("/commit/", 400, times=math.inf)
    done = hf_tsv(*MERGE, SLUG, cwd=world)
    assert done.code == 1 and f"me/new --collection {SLUG}`" in done.err


def test_an_answer_that_is_lost_adds_it_once(hub: Hub, world: Path, sleeps: list[float]) -> None:
    found = hub.add_collection(SLUG)
    hub.fail("/items", drop_after=0)
    api.merge(["org/vision", "org/flat"], push_to="me/new", collection=SLUG)
    assert found.models == ["me/new"]
