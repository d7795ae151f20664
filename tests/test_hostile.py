"""Repositories that somebody made to harm: small files for much memory, links, code, names."""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from test_reader import INDEX_FILE, folder_of, opened, safetensors

import hf_tsv
from benchmarks.fuzz import targets
from hf_tsv.checkpoints.files import LocalFiles
from hf_tsv.checkpoints.pickles import MAX_STEPS, read_pickle
from hf_tsv.checkpoints.reader import PICKLED_FILE, SINGLE_FILE
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.errors import CheckpointError
from hf_tsv.recipe import RECIPE_FILE, Recipe
from hf_tsv.untrusted import MAX_BYTES, MAX_DEPTH, MAX_JSON_VALUES, parse_json, parse_yaml

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
    "a large config": ({"config.json": b" " * (MAX_BYTES + 1)}, "says more than any config.json"),
    "a large index": (
        {INDEX_FILE: b'{"weight_map":{%b}}' % b",".join(b'"%d":"a"' % i for i in range(10**6))},
        "says more than any",
    ),
    "an index of very many files": (
        {INDEX_FILE: b'{"weight_map":{%b}}' % b",".join(b'"%d":"%d"' % (i, i) for i in range(9**6))},
        "has no 0, which its index names",
    ),
    "a large adapter": (
        {"adapter_config.json": b"[" * SIZE}, "says more than any adapter_config.json",
    ),
    "large factors": ({"tsv_config.json": b"{" * SIZE}, "says more than any tsv_config.json"),
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
        "holds no state dict",
    ),
    "a large pickle": ({PICKLED_FILE: archive(bytes(MAX_BYTES + 1))}, "not as torch.save"),
    "an archive of a million entries": ({PICKLED_FILE: directory(10**6)}, "no archive"),
    "an archive that says so": ({PICKLED_FILE: directory(1, 2**32 - 2)}, "no archive"),
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
        "pickled holes": "no archive",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("hostile.py")),
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


def test_what_hf_tsv_writes_has_no_aliases(zoo: Path, tmp_path: Path) -> None:
    hf_tsv.merge([zoo / "full", zoo / "vision"], base_model=zoo / "base", output=tmp_path / "m",
                 progress=False)  # fmt: skip
    assert Recipe.load(tmp_path / "m").inputs
    assert pin(parse(str(tmp_path / "m"))).card["library_name"] == "transformers"


@pytest.mark.parametrize("pattern", [".*.*.*.*!", "a+b*c?d{2}!", "(a|b)+"])
def test_a_pattern_that_may_take_for_ever_is_not_tried(tmp_path: Path, pattern: str) -> None:
    content = {"peft_type": "LORA", "alpha_pattern": {pattern: 3}}
    assert "may take for ever" in str(targets.run("adapter", json.dumps(content).encode()))


# Pickles: followed, never run


def pickled(folder: Path, content: bytes) -> dict[str, Any]:
    (folder / "x.pt").write_bytes(content)
    return dict(read_pickle(LocalFiles(folder), "x.pt", "here"))


@pytest.mark.parametrize(
    "name", ["os\nsystem", "builtins\neval", "builtins\ngetattr", "torch\nload", "torch.hub\nload",
             "torch\njit", "torch._utils\nos", "collections\nnamedtuple", "hf_tsv\nmerge"],
)  # fmt: skip
def test_a_name_that_no_state_dict_has_is_refused(tmp_path: Path, name: str) -> None:
    data = PROTOCOL + f"c{name}\nX\x04\0\0\0true\x85R.".encode("latin-1")
    with pytest.raises(CheckpointError, match="could run code"):
        pickled(tmp_path, archive(data))


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
        ({"size": "2 2", "step": "0 0"}, "do not lie together"),
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
    for offset in (3, len(content), 2**32 - 2):
        content[place : place + 4] = offset.to_bytes(4, "little")
        with pytest.raises(CheckpointError):
            pickled(tmp_path, bytes(content))
