"""Descent of what is pushed, as the Hub lists it, and as `inspect` follows it."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
from cli import hf_tsv as run
from hub import Hub
from huggingface_hub import HfApi, ModelCard

import hf_tsv
from hf_tsv.checkpoints.base_model import ABOVE, NOT_ASKED

CONFIG = '{"model_type": "clip", "architectures": ["CLIPModel"]}'


def listed(relation: str, base: str) -> list[str]:
    """Models that the Hub lists below another one."""
    found = HfApi().list_models(filter=f"base_model:{relation}:{base}")
    return sorted(model.id for model in found)


def parents(hub: Hub, repo_id: str) -> tuple[Any, Any]:
    data = ModelCard(hub.files(repo_id)["README.md"].decode()).data.to_dict()
    return data.get("base_model"), data.get("base_model_relation")


@pytest.fixture
def family(hub: Hub, world: Path) -> Path:
    """One of each kind that hf-tsv pushes, made of fine-tunes on the Hub; factors in a folder."""
    hf_tsv.merge(["org/vision", "org/flat"], push_to="me/merge")
    hf_tsv.compress("org/vision", push_to="me/factors", output=world / "factors")
    hf_tsv.export_peft("org/vision", push_to="me/adapter", output=world / "adapter")
    hf_tsv.reconstruct("me/factors", push_to="me/again")
    hf_tsv.route(["me/factors", "org/full"], push_to="me/routed")
    hf_tsv.merge([world / "factors", "org/flat"], push_to="me/local")
    return world


def test_cards_name_the_parents_of_each_kind(hub: Hub, family: Path) -> None:
    kinds = ("merge", "factors", "adapter", "again", "routed", "local")
    assert {kind: parents(hub, f"me/{kind}") for kind in kinds} == {
        "merge": (["org/base", "org/vision", "org/flat"], "merge"),
        "factors": (["org/base", "org/vision"], "adapter"),
        "adapter": ("org/base", "adapter"),
        "again": (["org/base", "org/vision"], "finetune"),
        "routed": (["org/base", "me/factors", "org/full"], "merge"),
        "local": (["org/base", "org/vision", "org/flat"], "merge"),
    }
    merges = {"org/base": ["me/local", "me/merge", "me/routed"], "me/factors": ["me/routed"],
              "org/flat": ["me/local", "me/merge"], "org/vision": ["me/local", "me/merge"],
              "org/full": ["me/routed"]}  # fmt: skip
    assert {base: listed("merge", base) for base in merges} == merges
    assert listed("adapter", "org/base") == ["me/adapter", "me/factors"]
    assert listed("adapter", "org/vision") == ["me/factors"]
    assert "me/again" in listed("finetune", "org/base")
    assert listed("finetune", "org/vision") == ["me/again"]
    found = hf_tsv.find("org/base", progress=False)
    assert {"me/merge", "me/factors", "me/again"} <= set(found.mergeable)


def test_a_reconstruction_is_merged_with_the_base_of_its_fine_tune(hub: Hub, family: Path) -> None:
    planned = hf_tsv.merge(["me/again"], output=family / "m", dry_run=True)
    assert planned.base_model["ref"] == "org/base"


def test_inspect_follows_the_tree(hub: Hub, family: Path) -> None:
    base = {"ref": "org/base", "parents": (), "reason": None}
    vision = {"ref": "org/vision", "parents": (base,), "reason": None}
    full = {"ref": "org/full", "parents": (base,), "reason": None}
    factors = {"ref": "me/factors", "parents": (base, vision), "reason": None}
    assert hf_tsv.inspect("me/routed").lineage == [base, factors, full]
    before = len(hub.requests)
    done = run("inspect", "me/routed", "--json")
    assert [one["ref"] for one in done.json["lineage"]] == ["org/base", "me/factors", "org/full"]
    assert done.json["lineage"][1]["parents"][1]["parents"][0]["ref"] == "org/base"
    asked = [r.path for r in hub.requests[before:] if "me/routed" not in r.path]
    assert sorted(asked) == sorted(
        [*(f"/api/models/{name}" for name in ("org/base", "me/factors", "org/full", "org/vision")),
         *(path for path in asked if path.startswith("/org/base/resolve/"))]
    ) and len(asked) == 5  # fmt: skip
    lines = run("inspect", "me/routed").out.splitlines()
    rows = [line for line in lines if line.startswith("descends from  ")]
    tree = [line[rows[0].index("org/base") :] for line in rows]
    assert tree == ["org/base", "me/factors", "  org/base", "  org/vision", "    org/base",
                    "org/full", "  org/base"]  # fmt: skip
    short = run("inspect", "org/vision").out
    assert re.search("base model +org/base\n", short) and "descends from" not in short


def named(*names: str) -> dict[str, str]:
    """Files of a repository whose card names some parents."""
    return {"README.md": f"---\nbase_model: [{', '.join(names)}]\n---\n", "config.json": CONFIG}


def test_circles_and_parents_that_cannot_be_read(hub: Hub, world: Path) -> None:
    hub.commit("org/vision", named("org/b", "org/gone", "org/hidden", "org/shut", "a b"))
    hub.add_repo("org/b", named("org/c", "org/vision"))
    hub.add_repo("org/c", named("org/b"))
    hub.add_repo("org/hidden", named("org/base"), private=True)
    hub.add_repo("org/shut", {"config.json": CONFIG}, gated=True)
    hub.users["hf_write"].orgs = ()
    found = hf_tsv.inspect("org/vision").lineage
    b, gone, hidden, shut, odd = found
    assert b["parents"] == (
        {"ref": "org/c", "parents": ({"ref": "org/b", "parents": (), "reason": ABOVE},),
         "reason": None},
        {"ref": "org/vision", "parents": (), "reason": ABOVE},
    )  # fmt: skip
    missing = "does not exist on the Hub, or is private and this token cannot read it."
    assert gone == {"ref": "org/gone", "parents": (), "reason": f"org/gone {missing}"}
    assert hidden["reason"] == f"org/hidden {missing}" and not hidden["parents"]
    assert shut["reason"] == "org/shut is gated and this token has no access."
    assert odd["reason"] and "is neither a folder nor a repository" in odd["reason"]
    text = run("inspect", "org/vision").out
    assert f"descends from  org/gone  ({missing[:-1]})\n" in text
    assert "descends from      org/b  (see above)\n" in text


def test_a_long_or_wide_tree_ends(hub: Hub, world: Path) -> None:
    hub.commit("org/vision", named("org/m0"))
    for i in range(20):
        hub.add_repo(f"org/m{i}", named(f"org/m{i + 1}"))
    one = hf_tsv.inspect("org/vision").lineage[0]
    depth = 1
    while one["parents"]:
        (one,), depth = one["parents"], depth + 1
    assert (depth, one["reason"]) == (9, NOT_ASKED)
    hub.commit("org/vision", named(*(f"org/w{i}" for i in range(100))))
    hub.add_repo("org/w0", named(*(f"org/v{i}" for i in range(100))))
    before = len(hub.requests)
    wide = hf_tsv.inspect("org/vision").lineage
    assert len(wide) == len(wide[0]["parents"]) == 40
    assert len(hub.requests) - before < 50


def test_a_folder_names_its_parents_and_asks_no_hub(hub: Hub, family: Path) -> None:
    hub.fail("", times=math.inf)
    found = hf_tsv.inspect(family / "factors").lineage
    names = [{"ref": r, "parents": (), "reason": NOT_ASKED} for r in ("org/base", "org/vision")]
    assert found == names
    text = run("inspect", family / "factors").out
    assert "base model     org/base\ndescends from  org/base  (not looked up)\n" in text
