"""The console script as a user meets it: against the loopback Hub, with good and bad input."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from cli import copied, ended, hf_tsv, hf_tsv_process, hf_tsv_script, refused
from clips import CARD
from forks import fork
from hub import Hub, User
from PIL import Image
from safetensors.torch import load_file, save_file

from hf_tsv.cli import COMMANDS
from hf_tsv.cli.output import table


def edited(folder: Path, target: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    copied(folder, target)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_merge_from_the_hub_into_a_folder(world: Path, hub: Hub, zoo: Path) -> None:
    hub.tag("org/flat", "v1", hub.repos["org/flat"].branches["main"])
    local = copied(zoo / "projection", world / "local")
    done = hf_tsv_process(
        "merge", "org/vision", "org/flat@v1", f"./{local.name}", "-o", "merged", cwd=world
    )
    assert done.code == 0, done.err
    assert done.out == f"{world / 'merged'}\n"
    assert "Base model: org/base, named by org/vision, org/flat@v1." in done.err
    assert (world / "merged" / "hf_tsv_recipe.yaml").is_file()
    assert not any("authorization" in r.headers for r in hub.requests if r.origin == "cdn")
    again = hf_tsv("merge", "--recipe", "merged/hf_tsv_recipe.yaml", "-o", "again", cwd=world)
    assert again.code == 0, again.err
    for file in (world / "merged").iterdir():
        assert file.read_bytes() == (world / "again" / file.name).read_bytes(), file.name


def test_merge_from_the_hub_to_the_hub(world: Path, hub: Hub) -> None:
    refs = ["org/vision", "org/flat", "org/full"]
    done = hf_tsv("merge", *refs, "--push-to", "abc", "--private", "--json", cwd=world)
    assert done.code == 0, done.err
    report = done.json
    shas = {ref: hub.repos[ref].branches["main"] for ref in [*refs, "org/base"]}
    assert report["base_model"] == {"ref": "org/base", "revision": shas["org/base"]}
    assert report["inputs"] == [{"ref": ref, "revision": shas[ref]} for ref in refs]
    assert report["weights"] == {"decomposed": 28, "averaged": 50, "copied": 0}
    assert report["warnings"] == [] and report["output"] is None and report["seconds"] > 0
    files = hub.files("me/abc")
    assert report["output_bytes"] == len(files["model.safetensors"])
    assert hub.repos["me/abc"].private
    assert report["url"].startswith(f"{hub.endpoint}/me/abc/commit/")
    commits = [r for r in hub.requests if "/commit/" in r.path and r.method == "POST"]
    assert len(commits) == 1
    assert list(world.iterdir()) == []


def test_the_snippet_of_the_card_loads_the_pushed_model_without_hf_tsv(
    world: Path, hub: Hub
) -> None:
    done = hf_tsv("merge", "org/vision", "org/flat", "--push-to", "me/abc", cwd=world)
    assert done.code == 0, done.err
    card = hub.files("me/abc")["README.md"].decode()
    snippet = card.split("```python\n")[1].split("```")[0]
    assert 'CLIPModel.from_pretrained("me/abc")' in snippet
    code = f"""
import sys
sys.modules["hf_tsv"] = None
{snippet}
"""
    Image.new("RGB", (50, 40)).save(world / "photo.jpg")
    done = ended(fork("-c", code, cwd=world, freezing=True))
    assert done.code == 0, done.err
    assert "'score'" in done.out and "a dog" in done.out


def test_push_to_a_branch_as_a_pull_request_with_a_message(world: Path, hub: Hub) -> None:
    old = {"model-00001-of-00002.safetensors": b"x", "lora/adapter_model.safetensors": b"y"}
    hub.add_repo("me/abc", {"README.md": "---\nlicense: mit\n---\n", **old})
    merge = ["merge", "org/vision", "--push-to", "me/abc"]
    assert hf_tsv(*merge, "--revision", "tsv", cwd=world).code == 0
    assert "model.safetensors" in hub.files("me/abc", "tsv")
    assert "model-00001-of-00002.safetensors" not in hub.files("me/abc", "tsv")
    assert "lora/adapter_model.safetensors" in hub.files("me/abc", "tsv")
    assert "model.safetensors" not in hub.files("me/abc")
    assert hf_tsv(*merge, "--create-pr", "--commit-message", "Merge!", cwd=world).code == 0
    assert "model.safetensors" in hub.files("me/abc", "refs/pr/1")
    assert "model.safetensors" not in hub.files("me/abc")


def test_offline_with_a_warm_cache(world: Path, hub: Hub) -> None:
    first = hf_tsv("merge", "org/vision", "org/flat", "-o", "online", cwd=world)
    assert first.code == 0, first.err
    seen = len(hub.requests)
    words = ["merge", "org/vision", "org/flat", "-o", "off"]
    done = hf_tsv_process(*words, cwd=world, HF_HUB_OFFLINE="1")
    assert done.code == 0, done.err
    assert len(hub.requests) == seen
    for file in (world / "online").iterdir():
        assert file.read_bytes() == (world / "off" / file.name).read_bytes(), file.name


def test_private_and_gated_repositories_open_with_the_right_token(
    world: Path, hub: Hub, zoo: Path
) -> None:
    hub.repos["org/vision"].private = True
    files = {file.name: file for file in (zoo / "flat").iterdir()}
    hub.add_repo("acme/flat", {**files, "README.md": CARD}, gated="auto")
    hub.repos["acme/flat"].allowed = {"me"}
    assert hf_tsv("merge", "org/vision", "acme/flat", "-o", "merged", cwd=world).code == 0


def test_dry_run_as_text_writes_nothing(world: Path, hub: Hub) -> None:
    done = hf_tsv("merge", "org/vision", "org/flat", "--dry-run", cwd=world)
    assert done.code == 0, done.err
    sha = hub.repos["org/vision"].branches["main"]
    assert f"task 1       org/vision@{sha}" in done.out
    assert "weights      13 weight matrices merged with tsv\n" in done.out
    assert "weights      39 copied from the base model\n" in done.out
    assert "tsv, α = 1" in done.out and "push to" not in done.out
    assert list(world.iterdir()) == []
    assert not (Path(os.environ["HF_HOME"]) / "hub").exists()


def test_quiet_prints_the_result_and_warnings_only(world: Path) -> None:
    done = hf_tsv_script("merge", "org/vision", "-o", "merged", "--quiet", cwd=world)
    assert (done.code, done.out, done.err) == (0, f"{world / 'merged'}\n", "")
    words = ["merge", "org/vision", "-o", "merged", "--quiet", "--force"]
    for other in (hf_tsv, hf_tsv_process):  # the tests' own ways to run it say no more either
        assert other(*words, cwd=world) == done


def test_the_same_checkpoint_twice_is_refused(world: Path, hub: Hub) -> None:
    done = hf_tsv("merge", "org/vision", "org/flat", "org/vision", "-o", "merged", cwd=world)
    assert done.code == 2 and "org/vision is given twice" in done.err and not hub.requests
    again = hf_tsv("merge", "org/vision", "org/vision@main", "-o", "merged", cwd=world)
    assert again.code == 2 and "org/vision@main is given twice" in again.err, again.err
    assert not (world / "merged").exists()


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["org/nope"], ["org/nope does not exist"]),
        (["org/vision@nope"], ["org/vision has no revision 'nope'"]),
        (["org/base", "--base-model", "org/base"], ["org/base equals the base model"]),
        (["--recipe", "nope.yaml"], ["nope.yaml cannot be read"]),
    ],
    ids=lambda value: "-".join(value)[:40] if isinstance(value, list) else str(value),
)
def test_bad_arguments(world: Path, hub: Hub, args: list[str], parts: list[str]) -> None:
    refused(hf_tsv("merge", *args, "-o", "merged", cwd=world), world, hub, *parts)


def test_a_gated_repository(world: Path, hub: Hub, zoo: Path) -> None:
    files = {file.name: file for file in (zoo / "flat").iterdir()}
    hub.add_repo("acme/clip", {**files, "README.md": CARD}, gated="auto")
    done = hf_tsv_process("merge", "org/vision", "acme/clip", "-o", "merged", cwd=world)
    refused(done, world, hub, "acme/clip is gated", f"{hub.endpoint}/acme/clip")
    assert hf_tsv("merge", "org/vision", "acme/clip", "-o", "merged", cwd=world) == done


def test_pushing_without_a_token(world: Path, hub: Hub) -> None:
    done = hf_tsv("merge", "org/vision", "--push-to", "me/abc", cwd=world, HF_TOKEN=None)
    refused(done, world, hub, "needs a token", "hf auth login")
    assert hub.sent("safetensors") == 0


def test_pushing_with_a_token_that_can_only_read(world: Path, hub: Hub) -> None:
    hub.users["hf_look"] = User("me", orgs=["org"], role="read")
    done = hf_tsv("merge", "org/vision", "--push-to", "me/abc", cwd=world, HF_TOKEN="hf_look")
    refused(done, world, hub, "can only read")
    assert "hf_look" not in done.err and hub.sent("safetensors") == 0


def test_no_base_model_anywhere(world: Path, hub: Hub, zoo: Path) -> None:
    done = hf_tsv("merge", zoo / "vision", "-o", "merged", cwd=world)
    refused(done, world, hub, "No checkpoint says which base model", "--base-model")


def test_inputs_that_disagree_about_the_base(world: Path, hub: Hub) -> None:
    hub.add_repo("org/flat", {"README.md": CARD.replace("org/base", "org/other")})
    done = hf_tsv("merge", "org/vision", "org/flat", "-o", "merged", cwd=world)
    refused(done, world, hub, "org/vision: org/base; org/flat: org/other", "--base-model")


def test_another_architecture(world: Path, hub: Hub, zoo: Path) -> None:
    other = copied(zoo / "vision", world / "siglip")
    (other / "config.json").write_text(json.dumps({"model_type": "siglip"}))
    done = hf_tsv("merge", other, "--base-model", "org/base", "-o", "merged", cwd=world)
    refused(done, world, hub, "siglip is of another architecture", "'siglip' and 'clip'")


def test_shapes_and_names_that_do_not_fit_are_all_listed(world: Path, hub: Hub, zoo: Path) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["vision_model.post_layernorm.bias"] = torch.zeros(33)
        del tensors["vision_model.encoder.layers.1.mlp.fc1.weight"]
        tensors["vision_model.encoder.layers.2.mlp.fc1.bias"] = torch.zeros(64)

    bad = edited(zoo / "vision", world / "bad", damage)
    done = hf_tsv("merge", bad, "--base-model", "org/base", "-o", "merged", cwd=world)
    refused(
        done, world, hub, "3 weights do not fit",
        "post_layernorm.bias has shape [33], the base [32]",
        "layers.1.mlp.fc1.weight is missing", "layers.2.mlp.fc1.bias is not in the base",
    )  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(world: Path, hub: Hub, zoo: Path, value: float) -> None:
    name = "vision_model.encoder.layers.1.mlp.fc2.weight"

    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name][3, :5] = value

    bad = edited(zoo / "vision", world / "bad", damage)
    done = hf_tsv("merge", bad, "org/flat", "-o", "merged", cwd=world)
    refused(done, world, hub, f"bad: 5 of 2048 values of {name} are NaN or Inf")


def test_a_truncated_file(world: Path, hub: Hub, zoo: Path) -> None:
    bad = copied(zoo / "vision", world / "bad")
    file = bad / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    done = hf_tsv("merge", bad, "org/flat", "-o", "merged", cwd=world)
    refused(done, world, hub, "bad: model.safetensors is truncated")


def test_an_index_that_points_outside_its_folder(world: Path, hub: Hub, zoo: Path) -> None:
    bad = copied(zoo / "vision", world / "bad")
    (bad / "model.safetensors").rename(world / "stolen.safetensors")
    index = {"weight_map": {"vision_model.post_layernorm.bias": "../stolen.safetensors"}}
    (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    done = hf_tsv("merge", bad, "org/flat", "-o", "merged", cwd=world)
    refused(done, world, hub, "points outside its folder: '../stolen.safetensors'")


def test_an_input_with_the_weights_of_the_base(world: Path, hub: Hub, zoo: Path) -> None:
    same = copied(zoo / "base", world / "same")
    done = hf_tsv("merge", "org/vision", same, "-o", "merged", cwd=world)
    refused(done, world, hub, f"{same} equals the base model org/base")


def test_an_output_folder_that_exists(world: Path, hub: Hub) -> None:
    (world / "taken").mkdir()
    (world / "taken" / "file").touch()
    done = hf_tsv("merge", "org/vision", "-o", "taken", cwd=world)
    refused(done, world, hub, "taken exists", "--force")
    assert hub.requests == []


def test_no_space_on_the_disk(world: Path, hub: Hub, zoo: Path) -> None:
    """A limit on file sizes stands in for a full disk: reserving the shard fails as it would."""
    words = ["merge", zoo / "vision", "--base-model", zoo / "base", "-o", "merged"]
    done = ended(fork(*words, cwd=world, file_size=50_000))
    refused(done, world, hub, "Cannot write to", "merged", "Free some space")


def test_no_space_for_the_download(world: Path, hub: Hub) -> None:
    done = ended(fork("merge", "org/vision", "-o", "merged", cwd=world, file_size=50_000))
    refused(done, world, hub, "org/vision", "cache cannot be written", "--cache-dir")


def test_private_does_not_publish_into_a_public_repository(world: Path, hub: Hub) -> None:
    hub.add_repo("me/abc", {"README.md": "---\nlicense: mit\n---\n"})
    done = hf_tsv("merge", "org/vision", "--push-to", "me/abc", "--private", cwd=world)
    refused(done, world, hub, "me/abc exists and is public", "--private")


def test_options_of_an_upload_without_an_upload(world: Path, hub: Hub) -> None:
    done = hf_tsv("merge", "org/vision", "--revision", "v1", "-o", "merged", cwd=world)
    refused(done, world, hub, "--push-to REPO_ID", code=2)


def test_a_failed_upload_keeps_the_finished_folder(world: Path, hub: Hub) -> None:
    hub.fail("/api/models/me/abc/commit/", 403, times=99)
    done = hf_tsv("merge", "org/vision", "--push-to", "me/abc", "--private", cwd=world)
    assert done.code == 1
    command = done.err.split("`")[1]
    assert command.startswith("hf-tsv push ") and command.endswith(" me/abc --private")
    folder = Path(command.split()[2])
    assert (folder / "model.safetensors").is_file()
    shutil.rmtree(folder.parent)


def test_an_output_that_is_there_already_can_be_pushed(world: Path, hub: Hub) -> None:
    words = ["merge", "org/vision", "-o", "merged"]
    assert hf_tsv(*words, cwd=world).code == 0
    done = hf_tsv(*words, "--push-to", "me/abc", "--create-pr", cwd=world)
    assert done.code == 1 and "or add --force" in done.err
    command = f"`hf-tsv push {world / 'merged'} me/abc --create-pr`"
    assert f"To upload what is there: {command}" in done.err
    assert "hf-tsv push" not in hf_tsv(*words, cwd=world).err


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """A merge that takes a moment, and what it makes when nothing disturbs it."""
    from deep import deep_checkpoints

    folder = tmp_path_factory.mktemp("deep")
    deep_checkpoints(folder, 6)
    command = ["merge", *(str(folder / t) for t in ("t1", "t2"))]
    command += ["--base-model", str(folder / "base")]
    done = hf_tsv(*command, "-o", "whole", cwd=folder)
    assert done.code == 0, done.err
    return command, folder / "whole"


@pytest.mark.parametrize(
    ("sent", "code", "said"),
    [
        (signal.SIGINT, 130, "Interrupted."),
        (signal.SIGTERM, 143, "Terminated."),
        (signal.SIGKILL, -9, ""),
    ],
)
def test_an_interrupted_merge_goes_on_where_it_stopped(
    deep: tuple[list[str], Path], tmp_path: Path, sent: signal.Signals, code: int, said: str
) -> None:
    """Ctrl-C, the end of a batch job and a kill, while weights are being decomposed."""
    command, whole = deep
    process = fork(*command, "-o", "merged", cwd=tmp_path)
    journal = tmp_path / ".merged.hf-tsv" / "done.0.jsonl"
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (journal.exists() and journal.stat().st_size):
        time.sleep(0.005)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == "" and said in err and "Traceback" not in err
    assert said == "" or "Run the same command again to resume" in err
    assert not (tmp_path / "merged").exists()
    again = hf_tsv(*command, "-o", "merged", cwd=tmp_path)
    assert again.code == 0, again.err
    found = re.search(r"(\d+) of 37 weights are done", again.err)
    assert found is not None and 0 < int(found[1]) < 37, again.err
    for name in ("model.safetensors", "hf_tsv_recipe.yaml", "config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (whole / name).read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_columns_are_aligned_whatever_characters_are_in_them() -> None:
    rows = [("a", "5"), ("\N{CJK UNIFIED IDEOGRAPH-732B}\n\x1b", "12.5")]
    assert table(rows) == "a        5\n\N{CJK UNIFIED IDEOGRAPH-732B} \\x1b  12.5"
    assert table(rows, ("task", "n"), ("mean", "8")) == (
        "task        n\n─────────────\na           5\n\N{CJK UNIFIED IDEOGRAPH-732B} \\x1b  12.5\n"
        "─────────────\nmean        8"
    )


def test_an_unknown_option_is_a_usage_error(world: Path) -> None:
    assert hf_tsv_script("merge", "--frobnicate", cwd=world).code == 2


def test_debug_shows_the_traceback_without_the_token(world: Path) -> None:
    done = hf_tsv_process("merge", "org/nope", "-o", "merged", cwd=world, HF_DEBUG="1")
    assert done.code == 1 and "Traceback" in done.err and "hf_write" not in done.err


def test_a_run_in_this_process_leaves_it_as_it_was(world: Path) -> None:
    def state() -> list[Any]:
        loggers = [logging.getLogger(name) for name in (None, "hf_tsv", "transformers")]
        return [
            [(log.handlers, log.level, log.propagate) for log in loggers],
            list(warnings.filters), warnings.showwarning, signal.getsignal(signal.SIGTERM),
            Path.cwd(), dict(os.environ), sys.argv, sys.stdin, sys.stdout, sys.stderr,
            torch.get_num_threads(), torch.get_rng_state().tolist(),
            {thread.name for thread in threading.enumerate() if "hf-tsv" in thread.name},
        ]  # fmt: skip

    before = state()
    done = hf_tsv("merge", "org/vision", "--stream", "-o", "m", cwd=world, HF_TOKEN=None)
    assert done.code == 0, done.err
    assert hf_tsv("merge", "org/nope", "-o", "n", cwd=world).code == 1
    assert state() == before


def test_help_and_version_import_no_torch(world: Path) -> None:
    code = """
import sys
from hf_tsv.cli import app
try:
    app(["--help"])
except SystemExit:
    pass
assert not {"torch", "transformers", "huggingface_hub"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert hf_tsv_script("--version").out.strip()[0].isdigit()


def test_the_list_of_commands_says_what_their_help_begins_with() -> None:
    """The list is a table, so that it is shown without importing the commands."""
    for name, line in COMMANDS.items():
        docstring = inspect.getdoc(getattr(import_module(f"hf_tsv.cli.{name}"), name))
        assert docstring and docstring.splitlines()[0] == line


def test_only_the_called_command_is_imported() -> None:
    code = """
import sys
from hf_tsv.cli import app
try:
    app(["push", "--help"])
except SystemExit:
    pass
assert "hf_tsv.cli.push" in sys.modules and "hf_tsv.cli.merge" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_merge_does_not_wait_for_transformers(zoo: Path, tmp_path: Path) -> None:
    """Which takes a second to import."""
    code = (
        "import sys; from hf_tsv import cli; cli.app(standalone_mode=False); "
        "assert 'transformers' not in sys.modules"
    )
    words = ["merge", zoo / "vision", "--base-model", zoo / "base", "-o", tmp_path / "m"]
    done = ended(fork("-c", code, *words))
    assert done.code == 0 and (tmp_path / "m").exists(), done.err
