"""The README's table of inputs, row by row: each is inspected, compressed and merged, and mixed.

Every file is made by the library that users make it with. OpenCLIP's are in test_open_clip.py,
other encoders in test_generic.py, adapters of every kind in test_lora.py.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from adapters import trained
from cli import hf_tsv as run
from safetensors.torch import load_file

import hf_tsv


def of_class(zoo: Path, folder: Path, name: str, source: str = "full", **options: Any) -> None:
    """What `save_pretrained` of a class writes."""
    import transformers

    model = clips.load(getattr(transformers, name), zoo / source, dtype="auto")
    dtype = options.pop("dtype", None)
    clips.save(model if dtype is None else model.to(dtype), folder, **options)


def pickled(zoo: Path, folder: Path, file: str, wrap: str | None = None) -> None:
    """A state dict as `torch.save` writes it."""
    state = load_file(zoo / "vision" / "model.safetensors")
    folder.mkdir()
    shutil.copy(zoo / "vision" / "config.json", folder)
    torch.save(state if wrap is None else {wrap: state, "epoch": 3}, folder / file)


def mixed_types(zoo: Path, folder: Path) -> None:
    """Norms in float32 and everything else in half precision, as mixed-precision training does."""
    from transformers import CLIPVisionModel

    model = clips.load(CLIPVisionModel, zoo / "vision").bfloat16()
    for name, module in model.named_modules():
        if "layernorm" in name or "layer_norm" in name or "layrnorm" in name:
            module.float()
    clips.save(model, folder)


def pickled_shards(zoo: Path, folder: Path) -> None:
    """As older versions of transformers sharded; the index is written as they did."""
    from huggingface_hub import save_torch_state_dict

    state = load_file(zoo / "vision" / "model.safetensors")
    folder.mkdir()
    shutil.copy(zoo / "vision" / "config.json", folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles
        save_torch_state_dict(state, folder, max_shard_size="40KB", safe_serialization=False)
    assert (folder / "pytorch_model.bin.index.json").exists()


ROWS: dict[str, Callable[[Path, Path], Any]] = {
    "CLIPModel": lambda zoo, f: of_class(zoo, f, "CLIPModel"),
    "CLIPVisionModel": lambda zoo, f: of_class(zoo, f, "CLIPVisionModel"),
    "CLIPVisionModel, flat": lambda zoo, f: shutil.copytree(zoo / "flat", f),
    "CLIPVisionModelWithProjection": lambda z, f: of_class(z, f, "CLIPVisionModelWithProjection"),
    "CLIPTextModel": lambda zoo, f: of_class(zoo, f, "CLIPTextModel"),
    "CLIPTextModelWithProjection": lambda zoo, f: of_class(zoo, f, "CLIPTextModelWithProjection"),
    "CLIPForImageClassification": lambda z, f: shutil.copytree(z / "classifier", f),
    "shards": lambda z, f: of_class(z, f, "CLIPVisionModel", "vision", max_shard_size="40KB"),
    "variant": lambda z, f: of_class(
        z, f, "CLIPVisionModel", "vision", variant="fp16", dtype=torch.float16
    ),
    "pytorch_model.bin": lambda zoo, f: pickled(zoo, f, "pytorch_model.bin"),
    "pytorch_model.bin in shards": pickled_shards,
    ".pt": lambda zoo, f: pickled(zoo, f, "epoch3.pt", wrap="state_dict"),
    "float16": lambda z, f: of_class(z, f, "CLIPVisionModel", "vision", dtype=torch.float16),
    "bfloat16": lambda z, f: of_class(z, f, "CLIPVisionModel", "vision", dtype=torch.bfloat16),
    "mixed types": mixed_types,
    "LoRA": lambda zoo, f: trained(zoo, f, "plain"),
    "DoRA": lambda zoo, f: trained(zoo, f, "dora"),
    "task factors": lambda zoo, f: hf_tsv.compress(
        zoo / "vision", base_model=zoo / "base", rank_fraction=1.0, output=f
    ),
}
SAME_WEIGHTS = {"shards", "pytorch_model.bin", "pytorch_model.bin in shards", ".pt"}
"""Those that hold exactly what the fine-tune `vision` holds."""


@pytest.fixture(scope="module")
def rows(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for every row."""
    folder = tmp_path_factory.mktemp("rows")
    for number, make in enumerate(ROWS.values()):
        make(zoo, folder / str(number))
    return folder


@pytest.fixture(scope="module")
def plain(zoo: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A merge of the fine-tunes `vision` and `full`."""
    folder = tmp_path_factory.mktemp("plain") / "m"
    hf_tsv.merge([zoo / "vision", zoo / "full"], base_model=zoo / "base", output=folder)
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("row", ROWS)
def test_each_row(zoo: Path, rows: Path, plain: bytes, tmp_path: Path, row: str) -> None:
    folder = rows / str(list(ROWS).index(row))
    found = hf_tsv.inspect(folder)
    adapter, factors = "adapter_config.json", "tsv_config.json"
    kind = {adapter: "adapter", factors: "factors"}
    expected = next((k for file, k in kind.items() if (folder / file).exists()), "checkpoint")
    assert found.kind == expected and found.parameters > 0
    base = zoo / "base"
    alone = hf_tsv.merge([folder], base_model=base, output=tmp_path / "alone")
    assert alone.weights["decomposed"] > 0
    moved(base, tmp_path / "alone")
    if row in SAME_WEIGHTS:  # all others are mixed below
        hf_tsv.merge([folder, zoo / "full"], base_model=base, output=tmp_path / "mixed")
        assert (tmp_path / "mixed" / "model.safetensors").read_bytes() == plain
    if row != "task factors":
        report = hf_tsv.compress(folder, base_model=base, output=tmp_path / "factors").report
        assert report is not None and report.update_error is not None
        assert 0 < report.update_error < 1 or row == "LoRA"


def moved(base: Path, merged: Path) -> None:
    """The output is a whole model that transformers loads, and not the base."""
    from transformers import CLIPModel

    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys()
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())
    clips.load(CLIPModel, merged)


def test_all_rows_at_once(zoo: Path, rows: Path, tmp_path: Path) -> None:
    folders = [rows / str(i) for i in range(len(ROWS))]
    words = ["merge", *folders, "--base-model", zoo / "base", "--method", "task-arithmetic",
             "--exclude", ""]  # fmt: skip
    done = run(*words, "-o", tmp_path / "sum", "--json")
    assert done.code == 0, done.err
    assert len(done.json["inputs"]) == len(ROWS)
    before, after = (
        load_file(p / "model.safetensors") for p in (zoo / "base", tmp_path / "sum")
    )  # the sum of what each one adds alone
    total: dict[str, torch.Tensor] = {}
    for folder in folders:
        out = tmp_path / f"alone-{folder.name}"
        hf_tsv.merge([folder], base_model=zoo / "base", output=out, method="task-arithmetic",
                     exclude=[])  # fmt: skip
        for name, tensor in load_file(out / "model.safetensors").items():
            delta = tensor.double() - before[name].double()
            total[name] = total.get(name, torch.zeros(())) + delta
    for name, delta in total.items():
        expected = before[name].double() + delta
        if before[name].is_floating_point() and before[name].dim() == 2:
            assert torch.allclose(after[name].double(), expected, atol=1e-5), name


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq", 3])
@pytest.mark.parametrize("damaged", ["vision", "base"])
def test_a_quantised_model_is_refused(
    zoo: Path, tmp_path: Path, damaged: str, method: object
) -> None:
    folder = shutil.copytree(zoo / damaged, tmp_path / "q")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (folder / "config.json").write_text(json.dumps(config))
    task = folder if damaged == "vision" else zoo / "vision"
    base = zoo / "base" if damaged == "vision" else folder
    done = run("merge", task, "--base-model", base, "-o", tmp_path / "m")
    assert done.code == 1 and f"q is quantised ({method})" in done.err and "Dequantise" in done.err
    assert not (tmp_path / "m").exists()
