"""Fuzzing targets: each reads bytes as one file of a checkpoint whose other files are valid."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_tsv.checkpoints import base_model, companions
from hf_tsv.checkpoints.formats import heads
from hf_tsv.checkpoints.formats.adapters import CONFIG_FILE as ADAPTER_CONFIG
from hf_tsv.checkpoints.formats.adapters import open_adapter
from hf_tsv.checkpoints.formats.factors import open_factors
from hf_tsv.checkpoints.formats.masks import CONFIG_FILE as MASK_CONFIG
from hf_tsv.checkpoints.formats.masks import open_masked
from hf_tsv.checkpoints.formats.open_clip import CONFIG_FILE as OPEN_CLIP_CONFIG
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint, open_checkpoint
from hf_tsv.checkpoints.names import FACTORS_CONFIG
from hf_tsv.checkpoints.reference import PinnedCheckpoint, card_license, parse, pin
from hf_tsv.checkpoints.storage.files import LocalFiles
from hf_tsv.checkpoints.storage.pickles import read_pickle
from hf_tsv.evaluation.model_index import Card, eval_result, with_results
from hf_tsv.merging.findings import Finding
from hf_tsv.recipes.recipe import PinnedInput, Recipe
from hf_tsv.recipes.settings import Settings
from hf_tsv.runs import journal
from hf_tsv.system.errors import CheckpointError, HfTsvError

CORPUS = Path(__file__).with_name("corpus")
WEIGHT = "vision_model.encoder.layers.0.mlp.fc1.weight"
CONFIG = json.dumps({"model_type": "clip"}).encode()
RESULT = {"dataset": "org/data", "config": None, "split": "test", "revision": None, "images": 2,
          "total": 2, "accuracy": 0.5}  # fmt: skip


class MemoryFiles(LocalFiles):
    """Folder that exists only in memory."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        super().__init__(Path("fuzzed"))
        self._files = files

    def within(self, subfolder: str) -> MemoryFiles:
        start = f"{subfolder}/"
        return MemoryFiles(
            {name.removeprefix(start): raw for name, raw in self._files.items() if start in name}
        )

    def names(self) -> list[str]:
        return sorted(self._files)

    def size(self, name: str) -> int | None:
        return len(self._files[name]) if name in self._files else None

    def is_elsewhere(self, name: str) -> bool:
        return False

    def read_into(self, name: str, start: int, buffer: memoryview) -> None:
        part = self._files[name][start : start + len(buffer)]
        if start < 0 or len(part) != len(buffer):
            raise CheckpointError(f"{name} is truncated.")
        buffer[:] = part


def pinned(files: Mapping[str, bytes]) -> PinnedCheckpoint:
    return PinnedCheckpoint("fuzzed", None, MemoryFiles(files), {})


def weights(**shapes: tuple[int, ...]) -> bytes:
    """Make a safetensors file of zeros."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4
        for length in shape:
            size *= length
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(at)


BASE = {"config.json": CONFIG, "model.safetensors": weights(**{WEIGHT: (4, 2)})}


def read_all(found: Task, base: Checkpoint) -> None:
    for name in found.tensors:
        if sum(part.nbytes for part in found.parts(name)) < 1_000_000:
            found.weight(base.original([name]))


def header(raw: bytes) -> None:
    """Read model.safetensors."""
    found = open_checkpoint(pinned({"config.json": CONFIG, "model.safetensors": raw}))
    read_all(found, found)


def index(raw: bytes) -> None:
    """Read the index of a checkpoint in shards."""
    files = {"a": weights(first=(2,), second=(1,)), "b": weights(third=(2, 2))}
    name = "model.safetensors.index.json"
    found = open_checkpoint(pinned({"config.json": CONFIG, name: raw, **files}))
    read_all(found, found)


def config(raw: bytes) -> None:
    """Read config.json, and derive an output's config from it."""
    found = open_checkpoint(pinned({**BASE, "config.json": raw}))
    json.dumps(companions.output_config(found, {info.dtype for info in found.tensors.values()}))
    companions.head_config(found.model_config, found.tensors)
    base_model.named_by(found.pinned)


def open_clip(raw: bytes) -> None:
    """Read open_clip_config.json."""
    files = {OPEN_CLIP_CONFIG: raw, "open_clip_model.safetensors": weights(logit_scale=())}
    open_checkpoint(pinned(files))


def pickle(raw: bytes) -> None:
    """Read data.pkl of a file of torch.save."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", raw)
        archive.writestr("archive/data/0", bytes(64))
    read_pickle(MemoryFiles({"x.bin": out.getvalue()}), "x.bin", "fuzzed")


def archive(raw: bytes) -> None:
    """Read a file of torch.save."""
    read_pickle(MemoryFiles({"x.bin": raw}), "x.bin", "fuzzed")


def recipe(raw: bytes) -> None:
    """Read hf_tsv_recipe.yaml."""
    found = Recipe.from_yaml(raw.decode(errors="replace"))
    assert Recipe.from_yaml(found.to_yaml()) == found


def factors(raw: bytes) -> None:
    """Read tsv_config.json."""
    stored = {f"{WEIGHT}.U": (4, 1), f"{WEIGHT}.S": (1,), f"{WEIGHT}.Vh": (1, 2)}
    files = {FACTORS_CONFIG: raw, "task_factors.safetensors": weights(**stored)}
    found = open_factors(pinned(files))
    for name in found.tensors:
        found.update(name)
    found.config.to_json()


def adapter(raw: bytes) -> None:
    """Read adapter_config.json."""
    module = f"base_model.model.{WEIGHT.removesuffix('.weight')}"
    stored = {f"{module}.lora_A.weight": (1, 2), f"{module}.lora_B.weight": (4, 1)}
    files = {ADAPTER_CONFIG: raw, "adapter_model.safetensors": weights(**stored)}
    base = open_checkpoint(pinned(BASE))
    found = open_adapter(pinned(files), lambda: base)
    read_all(found, base)
    found.triplets(WEIGHT)
    base_model.named_by(found.pinned)


def mask(raw: bytes) -> None:
    """Read hf_tsv_mask.json."""
    folder = Path(tempfile.mkdtemp(prefix="hf-tsv-fuzz-"))
    try:
        task = folder / "masks" / "task"
        task.mkdir(parents=True)
        for name, content in BASE.items():
            (folder / name).write_bytes(content)
        (task / "mask.safetensors").write_bytes(weights())
        (task / MASK_CONFIG).write_bytes(raw)
        found = open_masked(pin(parse(str(task))))
        read_all(found, open_checkpoint(pinned(BASE)))
    finally:
        found.pinned.files.close() if "found" in locals() else None
        shutil.rmtree(folder)


def head(raw: bytes) -> None:
    """Read the labels of a head beside a merge, which are text in the header of its file."""
    entries = {
        "__metadata__": {heads.CONFIG_KEY: raw.decode(errors="replace")},
        "classifier.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
    }
    header = json.dumps(entries).encode()
    file = len(header).to_bytes(8, "little") + header + bytes(4)
    merged = open_checkpoint(pinned({**BASE, "heads/task.safetensors": file}))
    found = heads.with_head(merged, "task")
    companions.head_config(found.model_config, found.head)


def journals(raw: bytes) -> None:
    """Read the journal of a stopped run."""
    folder = Path(tempfile.mkdtemp(prefix="hf-tsv-fuzz-"))
    try:
        (folder / journal.journal_file(0)).write_bytes(raw)
        for found in journal.read(folder, Finding.from_dict).values():
            json.dumps(asdict(found))
    finally:
        shutil.rmtree(folder)


def card(raw: bytes) -> None:
    """Read README.md of an input, and write results into one."""
    folder = Path(tempfile.mkdtemp(prefix="hf-tsv-fuzz-"))
    try:
        (folder / "README.md").write_bytes(raw)
        found = pin(parse(str(folder)))
        base_model.named_by(found)
        card_license(found.card)
        with_results(Card(raw.decode(errors="replace"), "name"), [eval_result("task", RESULT)])
    finally:
        shutil.rmtree(folder)


def processor(raw: bytes) -> None:
    """Copy preprocessor_config.json."""
    folder = Path(tempfile.mkdtemp(prefix="hf-tsv-fuzz-"))
    try:
        base = open_checkpoint(pinned({**BASE, "preprocessor_config.json": raw}))
        companions.warnings(base)
        companions.write(base, folder, {}, "transformers")
        assert "auto_map" not in json.loads((folder / "preprocessor_config.json").read_text())
    finally:
        shutil.rmtree(folder)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function
    for function in (header, index, config, open_clip, pickle, archive, recipe, factors, adapter,
                     mask, head, journals, card, processor)
}  # fmt: skip


def run(name: str, raw: bytes) -> str | None:
    """Read bytes as a target does.

    Args:
        name: name of the target.
        raw: content of the file.

    Returns:
        Message of the refusal, or None if the bytes are read; any other error is raised.
    """
    try:
        TARGETS[name](raw)
    except HfTsvError as error:
        return str(error)
    return None


def seeds() -> dict[str, list[Any]]:
    """Small valid files for each target."""
    entry = {
        "stored": "factors", "shape": [4, 2], "dtype": "F32", "rank": 1, "numerical_rank": 2,
        "energy": 0.5, "norm": 1.5, "bytes": 28, "base_sha256": "0" * 64,
    }  # fmt: skip
    from hf_tsv.checkpoints.storage.tensors import fingerprint

    described = {
        "format": "hf-tsv task factors", "format_version": 1, "hf_tsv_version": "0.1.0",
        "base_model": {
            "ref": "org/base", "revision": None, "fingerprint": fingerprint({WEIGHT: "0" * 64})
        },
        "source": {"ref": "org/a", "revision": "0" * 40, "license": "mit"},
        "rank_rule": {"rank": 1}, "factor_dtype": "F32", "compress_conv": False,
        "checkpoint_bytes": 32, "base_bytes": 32, "factors_bytes": 28, "update_error": 0.5,
        "task_head": [], "left_out": ["x"], "model_config": {"model_type": "clip"},
        "weights": {WEIGHT: entry},
    }  # fmt: skip
    two = (PinnedInput("org/a", "0" * 40), PinnedInput("./b", None, "1" * 64, 0.5))
    finding = {
        "label": WEIGHT, "ranks": [1, 2], "null_directions": 0, "exact": 0, "frozen": False,
        "tasks": [0, 1], "norms": [1.0, 0.5], "base_norm": 1.0, "interference": None,
        "likeness": [[1.0]], "digests": {"-1": {"a": "0"}}, "written": {"a": "0"},
        "seconds": {"reading": 0.1},
    }  # fmt: skip
    vision = {"image_size": 8, "layers": 1, "width": 64, "patch_size": 4}
    text = {"context_length": 8, "vocab_size": 9, "width": 64, "heads": 1, "layers": 1}
    clip = {"model_type": "clip_vision_model", "hidden_size": 2, "dtype": "float32",
            "id2label": {"0": "a"}, "_name_or_path": "org/base", "auto_map": {"AutoModel": "m.M"},
            "architectures": ["CLIPVisionModel"]}  # fmt: skip
    front = "---\nlicense: mit\nbase_model:\n- org/base\nmodel-index:\n- name: a\n  results: []\n"
    result = (
        "---\nmodel-index:\n- name: a\n  results:\n  - task: {type: image-classification}\n    "
        "dataset: {type: org/data, name: d}\n    metrics: [{type: accuracy, value: 0.5}]\n---\n"
    )
    return {
        "header": [weights(**{WEIGHT: (2, 1)}, empty=(0, 3), scalar=())],
        "index": [{"weight_map": {"first": "a", "second": "a", "third": "b"}}],
        "config": [clip, {"model_type": "clip", "vision_config": {"torch_dtype": "float16"}}],
        "open_clip": [{
            "model_cfg": {"embed_dim": 4, "vision_cfg": vision, "text_cfg": text},
            "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "size": [8, 8], "resize_mode": "squash"},
        }],
        "pickle": [_pickled("archive/data.pkl")],
        "archive": [_pickled(None)],
        "recipe": [Recipe(PinnedInput("org/base"), two, Settings()).to_yaml().encode()],
        "factors": [described],
        "adapter": [{
            "peft_type": "LORA", "lora_alpha": 2, "r": 1, "base_model_name_or_path": "org/base",
            "alpha_pattern": {"layers.*fc1": 4}, "use_rslora": True,
            "auto_mapping": {"base_model_class": "CLIPVisionModel"},
        }],
        "mask": [{
            "hf_tsv_mask": 1, "task": "a", "base_model": {"ref": "org/base", "revision": None},
            "mask_scale": 0.4, "base_digests": {},
        }],
        "head": [{"id2label": {"0": "a"}, "label2id": {"a": 0}, "num_labels": 1}],
        "journals": [json.dumps(finding).encode() + b"\n{\n"],
        "card": [f"{front}---\n# Title\n".encode(), result.encode()],
        "processor": [{"image_processor": {"auto_map": {"A": "p.P"}, "size": 8}, "do_resize": 1}],
    }  # fmt: skip


def _pickled(entry: str | None) -> bytes:
    import torch

    out = io.BytesIO()
    values = torch.arange(4.0).reshape(2, 2)
    state = {"a": values, "b": values.T, "c": torch.nn.Parameter(values[1])}
    torch.save({"epoch": 3, "state_dict": state}, out)
    if entry is None:
        return out.getvalue()
    with zipfile.ZipFile(out) as whole:
        return whole.read(entry)
