"""Fine-tunes of a base model on the Hub, and whether a merge takes them: what is said is done."""

from __future__ import annotations

import json
import math
import shlex
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import adapters
import clips
import pytest
import torch
from cli import SCRIPT, hf_tsv_process
from cli import hf_tsv as run
from forks import fork
from hub import Hub
from hub.hub import Content
from safetensors.torch import load_file, save

import hf_tsv
from hf_tsv import CheckpointError, HfTsvError, RepoError
from hf_tsv.system.errors import UsageError

Files = dict[str, Content]

CARD = clips.CARD
PAGE = 100
MOST_REQUESTS = 7  # for one model: a pickle; 4 for a checkpoint of safetensors
OF_BASE = 4  # files, config, and where a header is and its bytes
ALL = 300


def of_folder(folder: Path, card: str = CARD) -> Files:
    return {**{file.name: file for file in folder.iterdir() if file.is_file()}, "README.md": card}


@pytest.fixture(scope="module")
def forms(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """Files of a repository of every kind, good and bad."""
    made = tmp_path_factory.mktemp("forms")
    given: Any = {"base_model": zoo / "base", "progress": False}
    hf_tsv.compress(zoo / "vision", output=made / "factors", **given)
    hf_tsv.export_peft(zoo / "vision", output=made / "lora", **given)
    hf_tsv.merge([zoo / "vision", zoo / "full"], output=made / "merge", **given)
    for kind in ("plain", "dora"):
        adapters.trained(zoo, made / kind, kind)
    state = load_file(zoo / "vision" / "model.safetensors")
    whole = of_folder(zoo / "vision")
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    other = {n: t if n == name else t.clone() for n, t in state.items()}
    torch.save(state, made / "good.bin")
    config = json.loads((zoo / "vision" / "config.json").read_text())
    without = {name: content for name, content in whole.items() if name != "model.safetensors"}
    asked = {"factors": made / "factors", "lora": made / "lora", "merge": made / "merge",
             "plain": made / "plain", "dora": made / "dora"}  # fmt: skip
    merged = CARD.replace("license", "base_model_relation: merge\nlicense")
    adapted = CARD.replace("license", "base_model_relation: adapter\nlicense")
    cards = {"merge": merged, "lora": adapted, "plain": adapted, "dora": adapted}
    return {
        **{kind: of_folder(zoo / kind) for kind in clips.KINDS},
        **{kind: of_folder(folder, cards.get(kind, CARD)) for kind, folder in asked.items()},
        "half": {**whole, "model.safetensors": save({n: t.half() for n, t in state.items()})},
        "shape": {**whole, "model.safetensors": save({**other, name: torch.zeros(3, 4)})},
        "missing": {
            **whole, "model.safetensors": save({n: t for n, t in state.items() if n != name}),
        },
        "truncated": {
            **whole, "model.safetensors": (zoo / "vision/model.safetensors").read_bytes()[:-5],
        },
        "config": {**whole, "config.json": "["},
        "bert": {**whole, "config.json": json.dumps({**config, "model_type": "bert"})},
        "quantised": {
            **whole, "config.json": json.dumps(
                {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
            ),
        },
        "pickle": {**without, "pytorch_model.bin": made / "good.bin"},
        "evil": {**without, "pytorch_model.bin": b"cos\nsystem\n(S'true'\ntR."},
        "pointer": {
            **without, "model.safetensors": "version https://git-lfs.github.com/spec/v1\n",
        },
        "card alone": {"README.md": CARD},
        "terminal": {
            **without, "config.json": "[",
            "README.md": '---\nbase_model: org/base\nlicense: "\\e[31mmit\\n"\n'
            'pipeline_tag: "x\\a"\n---\n',
        },
        "gated": whole,
        "private": whole,
    }  # fmt: skip


REFUSED = {"shape", "missing", "truncated", "config", "bert", "quantised", "evil", "pointer",
           "card alone", "terminal", "gated"}  # fmt: skip


def named(kind: str, i: int) -> str:
    owner = {"gated": "else", "private": "me"}.get(kind, "org")
    return f"{owner}/{kind.replace(' ', '-')}-{i}"


def serve(hub: Hub, forms: Mapping[str, Files], zoo: Path, count: int) -> dict[str, str]:
    """Put so many repositories of all kinds on the Hub, the first most downloaded; their kinds."""
    hub.add_repo("org/base", zoo / "base")
    kinds = {}
    for i in range(count):
        kind = [*forms][i % len(forms)]
        name = named(kind, i)
        hub.add_repo(name, forms[kind], private=kind == "private", gated=kind == "gated")
        hub.repos[name].downloads = count - i
        kinds[name] = kind
    return kinds


def said_by_a_merge(ref: str) -> str | None:
    """The error of a merge of one checkpoint, if it ends with one."""
    try:
        hf_tsv.merge([ref], base_model="org/base", output="x", dry_run=True)
    except HfTsvError as error:
        return error.message
    return None


def of(hub: Hub, name: str) -> int:
    """Requests for one repository."""
    return sum(f"/{name}/" in f"{request.path}/" for request in hub.requests)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_three_hundred_models_of_all_kinds(hub: Hub, forms: dict[str, Files], zoo: Path) -> None:
    """With few requests for each, and as a merge of each judges it."""
    kinds = serve(hub, forms, zoo, ALL)
    hub.page_size = PAGE
    hub.add_repo("org/other", {**forms["vision"], "README.md": "---\nlicense: mit\n---\n"})
    hub.add_repo("else/hidden", forms["vision"], private=True)
    found = hf_tsv.find("org/base", limit=ALL, progress=False)
    relations = Counter(model["relation"] for model in found.models)
    pages = sum(math.ceil(relations[kind] / PAGE) for kind in ("finetune", "adapter", "merge"))
    counts = {name: of(hub, name) for name in kinds}
    listings = [request for request in hub.requests if request.path == "/api/models"]
    assert len(listings) == pages >= 5 and of(hub, "org/base") == OF_BASE
    assert max(counts.values()) <= MOST_REQUESTS
    assert len(hub.requests) == pages + OF_BASE + sum(counts.values())
    assert all(request.body_sent <= 100_000 for request in hub.requests if request.origin == "cdn")

    assert [model["ref"] for model in found.models] == [*kinds]  # by downloads, across relations
    judged = {model["ref"]: model for model in found.models}
    for name, kind in kinds.items():
        assert judged[name]["mergeable"] == (kind not in REFUSED), judged[name]
    for name in [*kinds][: len(forms)]:
        assert judged[name]["reason"] == said_by_a_merge(name)
    facts = {kinds[name]: model for name, model in judged.items()}
    assert facts["classifier"]["left_out"] == ["classifier.bias", "classifier.weight"]
    assert facts["half"]["dtypes"] == ["F16"] and facts["vision"]["dtypes"] == ["F32"]
    forms_said = {kind: model["form"] for kind, model in facts.items()}
    assert forms_said["factors"] == "factors" and forms_said["full"] == "checkpoint"
    assert {forms_said[kind] for kind in ("plain", "dora", "lora")} == {"adapter"}
    assert {facts[kind]["relation"] for kind in ("plain", "dora", "lora")} == {"adapter"}
    assert facts["merge"]["relation"] == "merge" and facts["private"]["private"] is True
    assert facts["gated"]["gated"] == "auto" and "is gated" in facts["gated"]["reason"]
    assert facts["vision"]["license"] == "mit" and facts["vision"]["revision"]


def test_the_sizes_are_those_of_a_merge(hub: Hub, forms: dict[str, Files], zoo: Path) -> None:
    kinds = serve(hub, {kind: forms[kind] for kind in ("vision", "full", "plain")}, zoo, 3)
    found = hf_tsv.find("org/base", progress=False)
    plan = hf_tsv.merge([*kinds], base_model="org/base", output="x", dry_run=True)
    base = hf_tsv.merge([zoo / "vision"], base_model="org/base", output="x", dry_run=True)
    sizes = [model["download_bytes"] for model in found.models]
    assert sum(sizes) == plan.download_bytes - base.download_bytes and min(sizes) > 0
    assert {model["form"] for model in found.models} == {"checkpoint", "adapter"}


@pytest.fixture
def few(hub: Hub, forms: dict[str, Files], zoo: Path, tmp_path: Path) -> Path:
    """A Hub with two fine-tunes, an adapter and a broken one; an empty folder."""
    serve(hub, {kind: forms[kind] for kind in ("vision", "full", "plain", "config")}, zoo, 4)
    return tmp_path


def refs(*words: str, cwd: Path) -> list[str]:
    done = run("find", "org/base", "-q", *words, cwd=cwd)
    assert done.code == 0 and done.err == "", done.err
    return done.out.split()


def test_filters(hub: Hub, few: Path, forms: dict[str, Files]) -> None:
    card = CARD.replace("license", "pipeline_tag: image-classification\nlicense")
    hub.add_repo("you/one", {**forms["vision"], "README.md": card})
    hub.repos["you/one"].likes = 5
    hub.repos["you/one"].created = "2026-01-01T00:00:00.000Z"
    four = ["org/vision-0", "org/full-1", "org/plain-2", "org/config-3"]
    assert refs(cwd=few) == [*four, "you/one"]
    assert refs("--mergeable", cwd=few) == [*four[:3], "you/one"]
    assert refs("--author", "you", cwd=few) == ["you/one"]
    assert refs("--task", "image-classification", cwd=few) == ["you/one"]
    assert refs("--search", "ULL", cwd=few) == ["org/full-1"]
    assert refs("--kinds", "adapter", cwd=few) == ["org/plain-2"]
    assert refs("--kinds", "adapter,finetune", "--limit", "3", cwd=few) == four[:3]
    assert refs("--sort", "likes", "--limit", "1", cwd=few) == ["you/one"]
    assert refs("--sort", "created", "--limit", "1", cwd=few) == ["you/one"]


def test_what_is_printed(few: Path) -> None:
    done = run("find", "org/base", cwd=few)
    assert done.code == 0, done.err
    assert "org/config-3: config.json is not valid JSON" in done.out
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[2][:2] == ["org/vision-0", "checkpoint"] and {"F32", "mit", "4"} <= {*rows[2]}
    assert "3 of 4 models can be merged; " in done.out
    command = done.out.split("$ ")[1].replace("\\\n", " ")
    assert shlex.split(command) == [
        "hf-tsv", "merge", "org/vision-0", "org/full-1", "org/plain-2", "--base-model", "org/base",
        "-o", "merged",
    ]  # fmt: skip
    merged = run(*shlex.split(command)[1:], cwd=few)
    assert merged.code == 0 and (few / "merged").is_dir(), merged.err


def test_json_has_all(few: Path) -> None:
    told = run("find", "org/base", "--json", "-q", "--limit", "3", cwd=few).json
    report = hf_tsv.find("org/base", limit=3, progress=False)
    assert told == json.loads(json.dumps(report.to_dict()))
    assert told["query"] == {
        "kinds": ["finetune", "adapter", "merge"], "author": None, "search": None, "task": None,
        "sort": "downloads", "limit": 3,
    }  # fmt: skip
    assert told["base_model"]["ref"] == "org/base" and len(told["base_model"]["revision"]) == 40
    assert {*told["models"][0]} == {
        "ref", "relation", "task", "license", "downloads", "likes", "created", "changed", "private",
        "gated", "revision", "form", "mergeable", "reason", "hint", "download_bytes", "dtypes",
        "left_out", "warnings",
    }  # fmt: skip
    assert repr(report) == "FindReport('org/base', 3 of 3 models can be merged)"
    assert report.mergeable == ["org/vision-0", "org/full-1", "org/plain-2"]


def test_references_are_piped_into_a_merge(few: Path) -> None:
    line = f"{SCRIPT} find org/base --mergeable -q | xargs {SCRIPT} merge -o merged"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=few,
        capture_output=True,
        check=False,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    recipe = (few / "merged" / "hf_tsv_recipe.yaml").read_text()
    assert all(name in recipe for name in ("org/vision-0", "org/full-1", "org/plain-2"))
    assert "org/config-3" not in recipe


def test_text_of_repositories_reaches_no_terminal(
    hub: Hub, forms: dict[str, Files], zoo: Path, tmp_path: Path
) -> None:
    serve(hub, {"terminal": forms["terminal"]}, zoo, 1)
    for words in ([], ["--json"], ["-q"]):
        done = run("find", "org/base", *words, cwd=tmp_path)
        assert done.code == 0 and all(c.isprintable() or c == "\n" for c in done.out), done.out
        assert "mit\n" not in done.out


@pytest.mark.parametrize(
    "name", ["-o", "../x", "a b/c", "$(id)/x", "org/full-1@main", "org/full-1/-o c", "", None, 3]
)
def test_a_name_that_is_none_is_never_a_word_of_the_command(
    hub: Hub, few: Path, name: object
) -> None:
    listed = {"id": name, "tags": 3, "likes": "many", "gated": 1, "createdAt": None}
    hub.fail("/api/models$", status=200, body=json.dumps([listed]).encode())
    found = hf_tsv.find("org/base", kinds="finetune", progress=False)
    (model,) = found.models
    assert not model["mergeable"] and model["reason"] and found.mergeable == []
    assert (model["likes"], model["gated"], model["created"]) == (0, False, "")


# What goes wrong meanwhile


def test_what_changes_meanwhile_is_a_row(
    hub: Hub, forms: dict[str, Files], zoo: Path, tmp_path: Path
) -> None:
    """Deleted, made private and gated after they were listed, each; the others are judged."""
    kinds = serve(hub, {kind: forms[kind] for kind in ("vision", "full")}, zoo, 8)
    names = [*kinds]

    def hidden() -> None:
        hub.repos["else/b"].private = True

    def closed() -> None:
        hub.repos["else/c"].gated = "manual"

    for name in ("else/a", "else/b", "else/c"):
        hub.add_repo(name, forms["vision"])
    actions: dict[str, Callable[[], object]] = {
        "else/a": lambda: hub.repos.pop("else/a"), "else/b": hidden, "else/c": closed,
    }  # fmt: skip
    for name, action in actions.items():
        hub.fail(f"/api/models/{name}", action=action)
    found = hf_tsv.find("org/base", progress=False)
    assert found.mergeable == names
    reasons = {m["ref"]: m["reason"] for m in found.models if not m["mergeable"]}
    assert reasons == {name: said_by_a_merge(name) for name in actions}
    assert "does not exist" in reasons["else/a"] and "is gated" in reasons["else/c"]


def test_a_busy_hub_is_obeyed(hub: Hub, few: Path, sleeps: list[float]) -> None:
    for pattern, seconds in (("/api/models$", 7), ("/api/models/org/full", 9), ("config.json", 11)):
        hub.fail(pattern, status=429, headers={"Retry-After": str(seconds)})
    found = hf_tsv.find("org/base", progress=False)
    assert sorted(sleeps) == [7, 9, 11] and len(found.mergeable) == 3


def test_a_model_that_stays_out_of_reach_is_a_row(hub: Hub, few: Path, sleeps: list[float]) -> None:
    hub.fail("/org/full-1/", status=503, times=math.inf)
    found = hf_tsv.find("org/base", progress=False)
    (reason,) = (m["reason"] for m in found.models if m["ref"] == "org/full-1")
    assert "the Hub answered 503" in reason and len(found.mergeable) == 2


def test_a_link_to_another_host_gets_no_token(hub: Hub, few: Path) -> None:
    query = "filter=base_model:finetune:org/base&cursor=0"
    link = f'<{hub.foreign}/api/models?{query}>; rel="next"'
    entry = json.dumps([{"id": "org/full-1"}]).encode()
    hub.fail("/api/models$", status=200, body=entry, headers={"Link": link})
    found = hf_tsv.find("org/base", kinds="finetune", progress=False)
    assert {model["ref"] for model in found.models} >= {"org/full-1", "org/vision-0"}
    assert not any(request.origin == "foreign" for request in hub.requests)


def test_a_hub_that_lists_nothing_sensible_is_one_line(hub: Hub, few: Path) -> None:
    for body in (b"<html>", b"{}", b"[3]"):
        hub.fail("/api/models$", status=200, body=body, times=3)
        with pytest.raises(RepoError, match="not that of a Hub"):
            hf_tsv.find("org/base", progress=False)
        hub.heal()


def test_without_a_network(few: Path) -> None:
    run("merge", "org/vision-0", "-o", "m", cwd=few)
    done = hf_tsv_process("find", "org/base", cwd=few, HF_HUB_OFFLINE="1")
    assert done.code == 1 and "cannot be reached" in done.err and "Traceback" not in done.err


def test_ctrl_c_ends_it_at_once(hub: Hub, few: Path) -> None:
    hub.fail("model.safetensors", delay=60, times=math.inf, after=2)
    process = fork("find", "org/base", cwd=few)
    limit = time.monotonic() + 60
    while sum(request.path.endswith("model.safetensors") for request in hub.requests) < 3:
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "") and "Interrupted." in err
    assert "Traceback" not in err


# What is refused


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [("org/absent", 1, "org/absent does not exist on the Hub"),
     ("org/vision-0", 1, "no fine-tune, adapter or merge of org/vision-0."),
     ("org/plain-2", 1, "The base model org/plain-2 is a"),
     ("org/base --kinds merge --author you --search x --task y", 1,
      "no merge of org/base by 'you' with 'x' for the task 'y'."),
     ("org/base --kinds finetune --search config --mergeable", 1,
      "1 model looked at, none of which can be merged with org/base."),
     ("org/base --sort size", 2, "'size'. Choose one of downloads, likes, created."),
     ("org/base --kinds copies", 2, "'copies'. Choose one of finetune, adapter, merge."),
     ("org/base --limit 0", 2, "--limit must be at least 1 (got 0)."),
     ("./absent", 2, "There is no folder './absent'."),
     (".", 2, "The base model . is a folder, and the Hub lists nothing under that.")],
)  # fmt: skip
def test_errors_are_one_line_and_a_hint(few: Path, words: str, code: int, said: str) -> None:
    done = run("find", *words.split(), cwd=few)
    assert said in done.err and "Hint: " in done.err, done.err
    assert done.err.count("Error: ") == 1 and done.out == "" and "Traceback" not in done.err
    assert done.code == code


def test_a_base_with_a_head_is_no_base(hub: Hub, forms: dict[str, Files]) -> None:
    hub.add_repo("org/classifier", forms["classifier"])
    with pytest.raises(CheckpointError, match="has a task head"):
        hf_tsv.find("org/classifier", progress=False)


@pytest.mark.parametrize("given", [{"sort": "size"}, {"kinds": []}, {"kinds": ["quantized"]},
                                   {"limit": 2.5}])  # fmt: skip
def test_wrong_arguments_in_python(hub: Hub, given: Any) -> None:
    with pytest.raises(UsageError):
        hf_tsv.find("org/base", **given)
    assert hub.requests == []
