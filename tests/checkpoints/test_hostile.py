"""Repositories that somebody made to harm: small files for much memory, links, code, names."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli import hf_tsv as run
from headers import CONFIG, FLOAT, INDEX_FILE, folder_of, opened, refused, safetensors
from hub import Hub
from names import model_of_names, prose
from safetensors.torch import load_file

import hf_tsv
from benchmarks.fuzz import targets
from hf_tsv import TaskFactors
from hf_tsv.checkpoints.base_model import named_by
from hf_tsv.checkpoints.companions import without_code
from hf_tsv.checkpoints.names import PICKLED_FILE, RECIPE_FILE, SINGLE_FILE
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.checkpoints.storage.instructions import MAX_STEPS
from hf_tsv.checkpoints.storage.pickles import read_pickle
from hf_tsv.recipes.recipe import Recipe
from hf_tsv.system.checks import check_number
from hf_tsv.system.errors import CheckpointError, RecipeError
from hf_tsv.system.progress import bar
from hf_tsv.system.untrusted import MAX_BYTES, MAX_DEPTH, MAX_JSON_VALUES, parse_json, parse_yaml

ALLOWED = 300_000_000
"""Bytes that a process may grow by, whatever it reads."""

SIZE = 24_000_000


# Memory: whatever a file says, reading it takes no more than a bound


def entries(count: int) -> bytes:
    """The header of a file with this many tensors."""
    lines = (
        b'"t%d":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}' % (i, 4 * i, 4 * i + 4)
        for i in range(count)
    )
    return b"{" + b",".join(lines) + b"}"


def archive(data: bytes, *more: tuple[str, bytes]) -> bytes:
    """A file as torch.save writes it, with this pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as made:
        for name, content in (("data.pkl", data), ("data/0", bytes(64)), *more):
            made.writestr(f"archive/{name}", content)
    return out.getvalue()


def directory(count: int, length: int | None = None) -> bytes:
    """An archive that is nothing but a list of its entries."""
    entry = struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 6, *[0] * 3, 1, *[0] * 4, 0, 0) + b"a"
    listed = entry * count
    size = len(listed) if length is None else length
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, min(count, 65535), min(count, 65535), size, 0, 0)
    return listed + end


PROTOCOL = b"\x80\x02"
BOMBS: dict[str, tuple[dict[str, bytes], str]] = {
    "a million tensors": ({SINGLE_FILE: safetensors(entries(10**6))}, "more than any model has"),
    "lists in lists": ({SINGLE_FILE: safetensors(b"[" * SIZE)}, "more than any model has"),
    "lists beside lists": (
        {SINGLE_FILE: safetensors(b"[" + b"[]," * (SIZE // 3) + b"1]")}, "more than any model has",
    ),
    "as many keys as are read": (
        {"config.json": b"{%b}" % b",".join(b'"%d":0' % i for i in range(MAX_JSON_VALUES // 2))},
        "model_type",
    ),
    "wide characters": (
        {"config.json": b'{"a":"\xf0\x9f\x98\x80' + b"x" * (MAX_BYTES - 20) + b'"}'}, "model_type",
    ),
    "a large config": ({"config.json": b" " * (MAX_BYTES + 1)}, "larger than any config.json"),
    "a large index": (
        {INDEX_FILE: b'{"weight_map":{%b}}' % b",".join(b'"%d":"a"' % i for i in range(10**6))},
        "larger than any",
    ),
    "an index of very many files": (
        {INDEX_FILE: b'{"weight_map":{%b}}'
         % b",".join(b'"%d":"%d"' % (i, i) for i in range(400_000))},
        "has no 0, which its index names",
    ),
    "a large adapter": (
        {"adapter_config.json": b"[" * SIZE}, "is larger than any adapter_config.json",
    ),
    "large factors": ({"tsv_config.json": b"{" * SIZE}, "is larger than any tsv_config.json"),
    "a pickle of sets, all kept": (
        {PICKLED_FILE: archive(PROTOCOL + b"".join(b"\x8fr" + i.to_bytes(4, "little")
                                                   for i in range(MAX_STEPS // 2)))},
        "more than any model has",
    ),
    "a far place of a pickle's memo": (
        {PICKLED_FILE: archive(PROTOCOL + b"]r\xff\xff\xff\xff.")}, "holds no state dict",
    ),
    "a pickle of tuples in tuples": (
        {PICKLED_FILE: archive(PROTOCOL + b"}N" + b"\x85" * 300_000 + b"Ns.")},
        "holds no state dict",
    ),
    "a pickle that makes bytes": (
        {PICKLED_FILE: archive(PROTOCOL + b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R.")},
        "is a whole model",
    ),
    "a large pickle": ({PICKLED_FILE: archive(bytes(MAX_BYTES + 1))}, "not as torch.save"),
    "an archive of a million entries": ({PICKLED_FILE: directory(10**6)}, "not an archive"),
    "an archive that says so": ({PICKLED_FILE: directory(1, 2**32 - 2)}, "not an archive"),
    "aliases of a recipe": (
        {RECIPE_FILE: b"a0: &a0 [x, x]\n" + b"".join(
            b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 60))},
        "aliases, which are not read",
    ),
    "a recipe of very many values": ({RECIPE_FILE: b"[" + b"a," * 10**6}, "larger than any recipe"),
    "a large recipe": ({RECIPE_FILE: b"a" * (MAX_BYTES + 1)}, "larger than any recipe"),
    "aliases of a card": (
        {"README.md": b"---\na0: &a0 {x: y}\n" + b"".join(
            b"a%d: &a%d {<<: [*a%d, *a%d]}\n" % (n, n, n - 1, n - 1) for n in range(1, 60))
            + b"---\n"},
        "has no model.safetensors",
    ),
    "a card of line breaks": ({"README.md": b"---" + b"\n" * SIZE}, "has no model.safetensors"),
}  # fmt: skip


def test_no_file_takes_more_memory_than_the_bound(tmp_path: Path) -> None:
    for name, (files, _) in BOMBS.items():
        folder_of(tmp_path / name, files)
    holes = {"holes": SINGLE_FILE, "holes in a card": "README.md", "pickled holes": PICKLED_FILE}
    for name, file in holes.items():  # a terabyte that takes no room on the disk
        folder_of(tmp_path / name, {file: (2**39).to_bytes(8, "little")})
        os.truncate(tmp_path / name / file, 2**40)
    expected = {name: said for name, (_, said) in BOMBS.items()}
    expected |= {
        "holes": "more than any model has", "holes in a card": "has no model.safetensors",
        "pickled holes": "not an archive",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "hostile.py"),
         *(str(tmp_path / name) for name in expected)],
        capture_output=True, check=False, text=True, timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    for (name, said), found in zip(expected.items(), lines, strict=True):
        assert said in str(found["said"]), (name, found)
        assert len(found["said"]) < 1000, name
        assert found["grown"] < ALLOWED, (name, found)


def test_fifty_thousand_tensors_are_read(tmp_path: Path) -> None:
    count = 50_000
    saved = folder_of(tmp_path / "a", {SINGLE_FILE: safetensors(entries(count), bytes(4 * count))})
    assert len(opened(saved).tensors) == count
    state = dict.fromkeys(map(str, range(count // 10)), torch.zeros(2))
    folder = folder_of(tmp_path / "b", {})
    torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / PICKLED_FILE)
    assert opened(folder).tensors.keys() == state.keys()


@pytest.mark.parametrize("depth", [MAX_DEPTH, MAX_DEPTH + 1, 900])
def test_lists_in_lists_have_an_end(depth: int) -> None:
    raw = b"[" * depth + b"]" * depth
    if depth <= MAX_DEPTH:
        assert parse_json(raw)
    else:
        with pytest.raises(ValueError, match="nested"):
            parse_json(raw)


@pytest.mark.parametrize("text", ["a: &a 1\nb: *a", "&a [*a]", "a: &a {b: c}\nd: {<<: *a}"])
def test_aliases_are_not_read(text: str) -> None:
    with pytest.raises(ValueError, match="aliases"):
        parse_yaml(text)


@pytest.mark.parametrize("number", ["0x" + "f" * 5000, "1" + ":1" * 5000, "0b" + "1" * 5000])
def test_a_number_of_very_many_digits_is_one_line(tmp_path: Path, number: str) -> None:
    recipe = "hf_tsv_recipe: 1\nbase_model: {ref: a/b}\ninputs: [{ref: a/c}]\nalpha: "
    (tmp_path / "r.yaml").write_text(recipe + number)
    with pytest.raises(RecipeError):
        Recipe.load(tmp_path / "r.yaml")
    with pytest.raises(ValueError, match="not valid YAML"):
        parse_yaml(number)
    with pytest.raises(RecipeError, match="very many digits"):
        check_number("alpha", 10**5000)


def test_what_hf_tsv_writes_has_no_aliases(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.merge([zoo / "full", zoo / "vision"], base_model=zoo / "base", output=tmp_path / "m",
                 progress=False)  # fmt: skip
    assert Recipe.load(tmp_path / "m").inputs
    assert pin(parse(str(tmp_path / "m"))).card["library_name"] == "transformers"


SLOW = [".*.*.*.*!", "a+b*c?d{2}!", "(a|b)+", "(aa|a)" * 30 + "!", "(a|b|.)" * 20]


@pytest.mark.parametrize("pattern", SLOW)
def test_a_pattern_that_may_take_for_ever_is_not_tried(tmp_path: Path, pattern: str) -> None:
    content = {"peft_type": "LORA", "alpha_pattern": {pattern: 3}}
    assert "may take forever" in str(targets.run("adapter", json.dumps(content).encode()))


# Pickles: followed, never run


def pickled(folder: Path, content: bytes) -> dict[str, Any]:
    (folder / "x.pt").write_bytes(content)
    return dict(read_pickle(LocalFiles(folder), "x.pt", "here"))


@pytest.mark.parametrize(
    "name", ["os\nsystem", "builtins\neval", "builtins\ngetattr", "torch\nload", "torch.hub\nload",
             "torch\njit", "torch._utils\nos", "subprocess\nPopen", "a\nb.c", "pip.x\nmain"],
)  # fmt: skip
def test_a_pickle_that_attacks_is_refused(tmp_path: Path, name: str) -> None:
    data = PROTOCOL + f"c{name}\nX\x04\0\0\0true\x85R.".encode("latin-1")
    with pytest.raises(CheckpointError, match="would run code"):
        pickled(tmp_path, archive(data))


@pytest.mark.parametrize("name", ["collections\nnamedtuple", "hf_tsv\nmerge", "train\nConfig"])
def test_an_object_that_is_no_tensor_is_not_made(tmp_path: Path, name: str) -> None:
    data = PROTOCOL + f"c{name}\nX\x04\0\0\0true\x85R.".encode("latin-1")
    with pytest.raises(CheckpointError, match="is a whole model"):
        pickled(tmp_path, archive(data))


def test_names_of_torch_are_not_imported() -> None:
    """Some of torch's names import hundreds of modules when they are asked for."""
    data = PROTOCOL + b"ctorch\n_inductor\n."
    code = "import sys; from hf_tsv.checkpoints.storage.instructions import described"
    code += "\nbefore = set(sys.modules)\ntry: described(" + repr(data) + ")"
    code += "\nexcept Exception: print(len(set(sys.modules) - before))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "0\n"


def test_what_a_pickle_calls_is_not_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even what torch itself would call."""
    saved = io.BytesIO()
    torch.save({"a": torch.ones(2), "b": torch.nn.Parameter(torch.ones(3))}, saved)
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        monkeypatch.setattr(torch._utils, name, None)
    monkeypatch.setattr(torch, "load", None)
    monkeypatch.setattr(pickle, "Unpickler", None)
    found = pickled(tmp_path, saved.getvalue())
    assert {name: info.shape for name, info in found.items()} == {"a": (2,), "b": (3,)}


def tensor_of(storage: str = "FloatStorage", key: bytes = b"0", size: str = "", step: str = "",
              offset: int = 0) -> bytes:  # fmt: skip
    """A pickle of {"a": tensor}, written instruction by instruction."""

    def tuple_of(text: str) -> bytes:
        numbers = b"".join(b"\x8a\x09" + int(n).to_bytes(9, "little") for n in text.split())
        return b"(" + numbers + b"t"

    text = b"X" + len(key).to_bytes(4, "little") + key
    place = b"\x8a\x09" + offset.to_bytes(9, "little", signed=True)
    stored = f"(X\x07\0\0\0storagectorch\n{storage}\n".encode() + text + b"X\3\0\0\0cpuK\x10tQ"
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + place + tuple_of(size)
    return PROTOCOL + b"}X\1\0\0\0a" + call + tuple_of(step) + b"\x89}tRs."


def test_pairs_of_pairs_of_pairs_are_neither_compared_nor_written(tmp_path: Path) -> None:
    """Three hundred bytes would stand for more than a lifetime."""
    pairs = b"X\1\0\0\0a" + b"q\0h\0\x86" * 60
    for key in (b"(X\7\0\0\0storagectorch\nFloatStorage\n" + pairs + b"tQ.",
                b"(" + pairs + b"NNtQ."):  # fmt: skip
        with pytest.raises(CheckpointError, match="damaged"):
            pickled(tmp_path, archive(PROTOCOL + key))


def test_a_type_of_millions_of_letters_is_cut(tmp_path: Path) -> None:
    content = archive(tensor_of("\x1b[31m" + "A" * 3_000_000 + "Storage", size="2", step="1"))
    with pytest.raises(CheckpointError) as error:
        pickled(tmp_path, content)
    assert len(str(error.value)) < 500 and "\x1b" not in str(error.value)


def test_a_tensor_written_by_hand_is_read(tmp_path: Path) -> None:
    found = pickled(tmp_path, archive(tensor_of(size="2 3", step="3 1", offset=1)))
    assert (found["a"].shape, found["a"].nbytes) == ((2, 3), 24)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        ({"size": "17", "step": "1"}, "truncated"),
        ({"size": "2", "step": "1", "offset": 15}, "truncated"),
        ({"size": "2", "step": "1", "offset": -1}, "truncated"),
        ({"size": "2", "step": "1", "key": b"1"}, "are not in it"),
        ({"size": "2", "step": "1", "key": b"../version"}, "are not in it"),
        ({"size": f"{2**63}", "step": "1"}, "has no shape"),
        ({"size": f"{2**62} {2**62} {2**62} 0", "step": "1 1 1 1"}, "has no shape"),
        ({"size": " ".join("1" * 65), "step": " ".join("1" * 65)}, "has no shape"),
        ({"size": "2 2", "step": "1"}, "has no shape"),
        ({"size": "2 2", "step": "0 0"}, "are not contiguous"),
        ({"size": "2", "step": "1", "storage": "QInt8Storage"}, "dtype QInt8Storage"),
        ({"size": "2", "step": "1", "storage": "ComplexFloatStorage"}, "dtype Complex"),
    ],
)
def test_a_tensor_that_lies_about_itself_is_refused(
    tmp_path: Path, saved: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        pickled(tmp_path, archive(tensor_of(**saved)))


def test_bytes_of_a_large_machine_are_refused(tmp_path: Path) -> None:
    content = tensor_of(size="2", step="1")
    assert pickled(tmp_path, archive(content, ("byteorder", b"little")))
    with pytest.raises(CheckpointError, match="not as torch"):
        pickled(tmp_path, archive(content, ("byteorder", b"big")))


def test_an_entry_that_lies_elsewhere_is_refused(tmp_path: Path) -> None:
    """The list at the end of an archive says where entries begin, and may lie."""
    content = bytearray(archive(tensor_of(size="2", step="1")))
    place = content.rindex(b"archive/data/0") - 4
    for offset in (3, content.index(bytes(64)), len(content), 2**32 - 2):
        content[place : place + 4] = offset.to_bytes(4, "little")
        with pytest.raises(CheckpointError):
            pickled(tmp_path, bytes(content))


# Links: no file of the user is copied, or read for a shard


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A file of the user that is JSON, and so could pass for many files."""
    file = tmp_path / "elsewhere" / "token.json"
    file.parent.mkdir()
    file.write_text('{"model_type": "clip", "secret": "hf_abc"}')
    return file


def a_copy(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "preprocessor_config.json", "merges.txt",
             "generation_config.json", "spiece.model"],
)  # fmt: skip
def test_a_link_to_a_file_of_the_user_is_not_copied(
    zoo: Path, tmp_path: Path, secret: Path, name: str
) -> None:
    base = a_copy(zoo / "base", tmp_path / "base")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)
    done = run("merge", zoo / "vision", "--base-model", base, "-o", tmp_path / "m")
    assert done.code == 1 and f"{name} is a link to a file outside" in done.err, done.err
    assert "hf_abc" not in done.err and not (tmp_path / "m").exists()
    assert not list(tmp_path.glob(".*"))  # before any work


def test_a_link_in_a_folder_of_links_is_followed_too(
    zoo: Path, tmp_path: Path, secret: Path
) -> None:
    base = a_copy(zoo / "base", tmp_path / "base")
    (base / "deep").symlink_to(secret.parent)
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.json").symlink_to(Path("deep", "token.json"))
    with pytest.raises(CheckpointError, match="link to a file outside"):
        hf_tsv.merge([zoo / "vision"], base_model=base, output=tmp_path / "m", progress=False)


def test_a_module_of_sentence_transformers_that_is_a_link_is_not_followed(
    zoo: Path, tmp_path: Path
) -> None:
    """The files of a folder of the user would be copied."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "0_CLIPModel").symlink_to(zoo / "base")
    (tmp_path / "a" / "modules.json").write_text('[{"path": "0_CLIPModel"}]')
    with pytest.raises(CheckpointError, match="has no model itself"):
        opened(tmp_path / "a")


def test_links_inside_a_folder_are_followed(tmp_path: Path) -> None:
    file = safetensors({"weight": FLOAT}, bytes(4))
    folder = folder_of(tmp_path / "a", {"sub": b"", "x": file, "c": json.dumps(CONFIG).encode()})
    index = {"weight_map": {"weight": "y.safetensors"}}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "y.safetensors").symlink_to("x")
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(folder / "c")
    assert opened(folder).tensors.keys() == {"weight"}


def test_weights_and_their_config_may_lie_elsewhere(tmp_path: Path) -> None:
    """Users link them; of another file they cannot be read, and none is copied as it is."""
    (tmp_path / "large").write_bytes(safetensors({"weight": FLOAT}, bytes(4)))
    folder = folder_of(tmp_path / "a", {})
    (folder / SINGLE_FILE).symlink_to(tmp_path / "large")
    shutil.move(folder / "config.json", tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    assert opened(folder).read("weight").tolist() == [0.0]


def test_a_snapshot_in_the_cache_of_the_hub_client_is_a_folder(
    hub: Hub, zoo: Path, tmp_path: Path
) -> None:
    from huggingface_hub import snapshot_download

    hub.add_repo("org/base", zoo / "base")
    folder = Path(snapshot_download("org/base", cache_dir=tmp_path / "cache"))
    assert (folder / "config.json").is_symlink()
    hf_tsv.merge([zoo / "vision"], base_model=folder, output=tmp_path / "m", progress=False)
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == (
        zoo / "base" / "tokenizer.json"
    ).read_bytes()


def test_what_is_no_file_is_not_there(tmp_path: Path) -> None:
    """A pipe would never end, and neither would a device."""
    kinds: dict[str, Callable[[Path], object]] = {
        "pipe": os.mkfifo, "folder": Path.mkdir, "device": lambda p: p.symlink_to("/dev/zero"),
        "itself": lambda p: p.symlink_to(p), "nothing": lambda p: p.symlink_to("gone"),
    }  # fmt: skip
    for kind, make in kinds.items():
        folder = folder_of(tmp_path / kind, {})
        for name in (SINGLE_FILE, "README.md", "adapter_config.json", PICKLED_FILE):
            make(folder / name)
        assert f"has no {SINGLE_FILE}" in refused(folder), kind
        (folder / "config.json").unlink()
        make(folder / "config.json")
        assert "has no config.json" in refused(folder), kind


def test_a_picture_beside_factors_that_is_a_link_is_not_copied(
    zoo: Path, tmp_path: Path, secret: Path
) -> None:
    hf_tsv.compress(zoo / "vision", base_model=zoo / "base", output=tmp_path / "f", progress=False)
    (tmp_path / "f" / "compression.png").unlink(missing_ok=True)
    (tmp_path / "f" / "compression.png").symlink_to(secret)
    TaskFactors.from_pretrained(tmp_path / "f").save_pretrained(tmp_path / "copy")
    assert not (tmp_path / "copy" / "compression.png").exists()
    assert "compression.png" not in (tmp_path / "copy" / "README.md").read_text()


# Code: none of a repository is run, none is copied, none is asked for


MODULE = "my_code"


@pytest.fixture
def with_code(zoo: Path, tmp_path: Path) -> Path:
    """A base model that asks for its own code wherever it can; the code leaves a file."""
    base = a_copy(zoo / "base", tmp_path / "base")
    source = f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Mine: pass\n"
    (base / f"{MODULE}.py").write_text(source)
    asks = {
        "config.json": {"AutoConfig": f"{MODULE}.Mine", "AutoModel": f"{MODULE}.Mine"},
        "preprocessor_config.json": {"AutoImageProcessor": f"{MODULE}.Mine"},
        "tokenizer_config.json": {"AutoTokenizer": [f"{MODULE}.Mine", None]},
    }
    for name, auto_map in asks.items():
        content = json.loads((base / name).read_text()) if (base / name).exists() else {}
        content["auto_map"] = auto_map
        if name == "config.json":
            content["vision_config"]["auto_map"] = auto_map
            pipe = {"impl": f"{MODULE}.Mine", "pt": ["AutoModel"]}
            content["custom_pipelines"] = {"image-classification": pipe}
            content["_attn_implementation"] = "somebody/kernel"
        (base / name).write_text(json.dumps(content))
    nested = {"image_processor": {"auto_map": {"AutoImageProcessor": f"{MODULE}.Mine"}, "a": [1]}}
    (base / "processor_config.json").write_text(json.dumps(nested))
    return base


def test_no_code_is_run_or_copied(zoo: Path, tmp_path: Path, with_code: Path) -> None:
    out = tmp_path / "m"
    done = run("merge", zoo / "vision", zoo / "text", "--base-model", with_code, "-o", out)
    assert done.code == 0, done.err
    assert "asks for code in its tokenizer_config.json; no code is copied" in done.err
    for file in out.iterdir():
        content = file.read_bytes()
        assert MODULE.encode() not in content and b"auto_map" not in content, file.name
        assert b"kernel" not in content and file.suffix != ".py", file.name
    said = json.loads((out / "processor_config.json").read_text())
    assert said == {"image_processor": {"a": [1]}}
    merges = "merges.txt"
    if (with_code / merges).exists():
        assert (out / merges).read_bytes() == (with_code / merges).read_bytes()
    assert not (tmp_path / "ran").exists()


def test_no_code_is_run_by_loading(
    zoo: Path, tmp_path: Path, with_code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(with_code))  # it could even be imported
    (with_code / "processor_config.json").unlink()
    model = hf_tsv.load_model(with_code)
    assert type(model).__module__.startswith("transformers.models.clip.")
    pipe = hf_tsv.pipeline("zero-shot-image-classification", with_code)
    assert type(pipe.tokenizer).__module__.startswith("transformers.")
    hf_tsv.compress(zoo / "vision", base_model=with_code, output=tmp_path / "f", progress=False)
    tuned = a_copy(zoo / "full", tmp_path / "tuned")
    shutil.copy(with_code / "config.json", tuned)
    hf_tsv.compress(tuned, base_model=zoo / "base", output=tmp_path / "g", progress=False)
    assert "auto_map" not in (tmp_path / "g" / "tsv_config.json").read_text()
    hf_tsv.reconstruct(tmp_path / "f", output=tmp_path / "w", base_model=with_code, progress=False)
    assert not list(tmp_path.rglob("ran")) and MODULE not in sys.modules


def test_companions_that_ask_for_no_code_stay_byte_for_byte(zoo: Path, tmp_path: Path) -> None:
    base = a_copy(zoo / "base", tmp_path / "base")
    odd = b'{ "image_processor_type":"CLIPImageProcessor",\n\n "size": 1e0, "x":"\\u00e4" }'
    (base / "preprocessor_config.json").write_bytes(odd)
    hf_tsv.merge([zoo / "vision"], base_model=base, output=tmp_path / "m", progress=False)
    assert (tmp_path / "m" / "preprocessor_config.json").read_bytes() == odd


def test_a_label_may_be_called_as_what_asks_for_code() -> None:
    labels = {"label2id": {"auto_map": 0, "cat": 1}, "id2label": {"0": "auto_map"}}
    assert without_code({**labels, "auto_map": {"a": "b"}}) == labels


def test_a_processor_that_transformers_cannot_use_is_one_line(zoo: Path, tmp_path: Path) -> None:
    base = a_copy(zoo / "base", tmp_path / "base")
    (base / "preprocessor_config.json").write_text('{"image_processor_type": "os.system"}')
    with pytest.raises(CheckpointError, match="cannot be loaded with transformers"):
        hf_tsv.pipeline("image-feature-extraction", base)


@pytest.mark.parametrize(
    "change",
    [
        {"vision_config": {"num_hidden_layers": 10**9}},
        {"vision_config": {"image_size": 10**9}},
        {"text_config": {"max_position_embeddings": 10**12}},
        {"vision_config": {"patch_size": 0}},
        {"vision_config": {"hidden_size": "x"}},
        {"text_config": {"vocab_size": 10**12}},
    ],
)
def test_a_config_that_describes_another_model_is_refused(
    zoo: Path, tmp_path: Path, change: dict[str, dict[str, Any]]
) -> None:
    base = a_copy(zoo / "base", tmp_path / "base")
    content = json.loads((base / "config.json").read_text())
    for part, values in change.items():
        content[part] |= values
    (base / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError):
        hf_tsv.load_model(base)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_of_names(tmp_path_factory.mktemp("named"))


def checked(folder: Path, done: Any) -> str:
    """The card of an output, whose front matter and prose are what was meant."""
    assert done.code == 0 and "picture" not in done.err, done.err  # none failed
    assert all(c.isprintable() or c == "\n" for c in done.out + done.err)
    text = (folder / "README.md").read_text()
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    data = yaml.safe_load(head)
    assert data["license"] == "mit\nlicense: apache-2.0\n---\n<script>"
    assert set(data) <= {"license", "library_name", "pipeline_tag", "tags", "base_model",
                         "base_model_relation"}  # fmt: skip
    assert "49" not in re.sub(r"[0-9.]*49[0-9.]+|[0-9.]+49[0-9.]*", "", prose(body))
    ours = re.compile(r"<details><summary>The recipe</summary>|</details>")
    assert len(ours.findall(body)) in (0, 2)  # cards of factors have no recipe
    assert not re.search(r"<[a-z!/]", ours.sub("", prose(body)))
    links = re.findall(r"\]\(([^)]*)\)", prose(body))
    assert all(link.startswith("https://") or link.endswith(".png") for link in links), links
    return body


def test_names_change_nothing_but_themselves(named: Path, tmp_path: Path) -> None:
    one, two = (path for path in sorted(named.iterdir()) if path.name != "base")
    base = ("--base-model", named / "base")
    checked(tmp_path / "m", run("merge", one, two, *base, "-o", tmp_path / "m", "--report"))
    assert load_file(tmp_path / "m" / SINGLE_FILE).keys() == load_file(one / SINGLE_FILE).keys()
    recipe = yaml.safe_load((tmp_path / "m" / RECIPE_FILE).read_text())
    assert [item["ref"] for item in recipe["inputs"]] == [one.name, two.name]
    body = checked(
        tmp_path / "f", run("compress", one, *base, "-o", tmp_path / "f", "--rank", "2", "--report")
    )
    assert body.count("`layers.") > 5  # the largest, as code
    again = run("reconstruct", tmp_path / "f", *base, "-o", tmp_path / "w")
    checked(tmp_path / "w", again)
    for words in (["inspect", one], ["inspect", tmp_path / "f", "--json"],
                  ["interference", one, two, *base, "--json"]):  # fmt: skip
        done = run(*words)
        assert done.code == 0, done.err
        assert all(c.isprintable() or c == "\n" for c in done.out + done.err)


@pytest.mark.parametrize(
    "name", ["a\nb", "a\x1b[2J", "\u202eabc", "a\r", "\0", "x" * 2000, "\ud800"]
)
def test_a_tensor_whose_name_acts_on_a_terminal_is_refused(tmp_path: Path, name: str) -> None:
    message = refused(folder_of(tmp_path, {SINGLE_FILE: safetensors({name: FLOAT}, bytes(4))}))
    assert message.isprintable() and len(message) < 500


@pytest.mark.parametrize(
    "files",
    [
        {"config.json": {"model_type": "x\n\x1b[31m\u202e" + "y" * 10**6}},
        {"config.json": {**CONFIG, "quantization_config": {"quant_method": "a\nHint: b" * 10**5}}},
        {"adapter_config.json": {"peft_type": "a\nHint: b\x1b[2J" * 10**5}},
        {SINGLE_FILE: safetensors({"a": {**FLOAT, "dtype": "F\n\x1b[31m" * 10**5}}, bytes(4))},
        {INDEX_FILE: {"weight_map": {"a\n\x1b": "../b" * 10**5}}},
        {INDEX_FILE: {"weight_map": {"a\n" + "b" * 10**6: "x"}},
         "x": safetensors({"a": FLOAT}, bytes(4))},
    ],
)  # fmt: skip
def test_what_an_error_quotes_is_short_and_stays_on_its_line(
    zoo: Path, tmp_path: Path, files: Mapping[str, Any]
) -> None:
    folder = folder_of(tmp_path / "a", files)
    done = run("merge", folder, "--base-model", zoo / "base", "-o", tmp_path / "m")
    assert done.code == 1 and len(done.err) < 1000 + len(str(tmp_path)), done.err[:2000]
    assert [line.partition(":")[0] for line in done.err.splitlines()] == ["Error", "Hint"]
    assert all(c.isprintable() or c == "\n" for c in done.err)
    looked = run("inspect", folder)
    assert all(len(line) < 1000 + len(str(folder)) for line in looked.out.splitlines())
    assert all(c.isprintable() or c == "\n" for c in looked.out + looked.err)


def test_a_bar_shows_names_as_they_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with bar("[red]one\x1b[31m[/red]\nHint", 2) as advance:
        advance(1, "[link=http://x]two\u202e[/nothing]")
    shown = capsys.readouterr().err
    assert "[link=http://x]two\\u202e[/nothing]" in shown
    assert "\x1b[31m" not in shown and "\u202e" not in shown


def test_a_base_that_no_repository_is_called_is_not_looked_up(tmp_path: Path) -> None:
    for name in ("a\n\x1b[31m/b", "/etc", "../x", "x" * 10**6, "\u202ea/b", 3):
        folder = folder_of(tmp_path / "a", {"config.json": {**CONFIG, "_name_or_path": name}})
        assert named_by(pin(parse(str(folder)))) == []


# What the fuzzer found, and where it begins


@pytest.mark.parametrize("target", targets.TARGETS)
def test_the_corpus_of_the_fuzzer_is_read_or_refused(target: str) -> None:
    files = sorted((targets.CORPUS / target).iterdir())
    assert files
    for file in files:
        targets.run(target, file.read_bytes())
