"""OpenCLIP repositories, against the real package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clips
import pytest
import reference
import torch
from cli import copied
from cli import hf_tsv as run
from cli import hf_tsv_process as run_process
from hub import Hub
from PIL import Image
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.checkpoints.formats import open_clip
from hf_tsv.checkpoints.formats.adapters import open_adapter
from hf_tsv.checkpoints.formats.whole import open_checkpoint
from hf_tsv.checkpoints.reference import parse, pin
from hf_tsv.checkpoints.storage.tensors import Part
from hf_tsv.system.errors import CheckpointError

ROOT = Path(__file__).parents[2]
PACKAGES = ("open_clip_torch", "torchvision", "timm", "ftfy", "wcwidth")
IN_PROJ = "visual.transformer.resblocks.0.attn.in_proj_weight"


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the real OpenCLIP, that only its own processes see."""
    folder = tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    where = ["--no-deps", "--target", folder, "-c", ROOT / "constraints.txt"]
    subprocess.run([*pip, *where, *PACKAGES], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="session")
def theirs(site: Path) -> Iterator[subprocess.Popen[str]]:
    """The real OpenCLIP at work: one process, which takes seconds to import it."""
    script = Path(__file__).parents[1] / "support" / "open_clip_models.py"
    with subprocess.Popen(
        [sys.executable, script], env={**os.environ, "PYTHONPATH": str(site)}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        yield process


def asked(theirs: subprocess.Popen[str], *words: Any) -> None:
    """Let OpenCLIP do something, and wait for it."""
    assert theirs.stdin is not None and theirs.stdout is not None
    print(json.dumps(words, default=str), file=theirs.stdin, flush=True)
    assert (answer := theirs.stdout.readline()) == '""\n', answer and json.loads(answer)


@pytest.fixture(scope="session")
def models(theirs: subprocess.Popen[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`base`, `t1`, `t2` made by OpenCLIP; pictures and prompts; all also converted, in `hf`."""
    folder = tmp_path_factory.mktemp("open-clip")
    options = {"tasks": 2, "quick_gelu": False, "pickled": False}
    asked(theirs, "make", folder, options)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.zeros(3, 24, dtype=torch.int64)
    tokens[:, 0] = 298
    tokens[:, 1:9] = torch.randint(1, 250, (3, 8), generator=generator)
    tokens[:, 9] = 299  # the largest number ends a prompt
    pixels = torch.randn(4, 3, 32, 32, generator=generator)
    save_file({"pixels": pixels, "tokens": tokens}, folder / "inputs.safetensors")
    for name in ("t1", "t2"):
        hf_tsv.merge(
            [folder / name], base_model=folder / "base", output=folder / "hf" / name,
            out_format="transformers", progress=False,
        )  # fmt: skip
    return folder


def features(
    theirs: subprocess.Popen[str], models: Path, folder: Path, work: Path
) -> dict[str, torch.Tensor]:
    """As OpenCLIP computes them."""
    asked(theirs, "features", folder, models / "inputs.safetensors", work / "found")
    return load_file(work / "found")


def features_of_transformers(models: Path, folder: Path) -> dict[str, torch.Tensor]:
    from transformers import CLIPModel

    model = clips.load(CLIPModel, folder).eval()
    given = load_file(models / "inputs.safetensors")
    with torch.inference_mode():
        image = model.get_image_features(pixel_values=given["pixels"])
        text = model.get_text_features(input_ids=given["tokens"])
    found = {"image": image, "text": text}
    found = {k: getattr(v, "pooler_output", v) for k, v in found.items()}
    return {**found, "logit_scale": model.logit_scale.detach().reshape(1)}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, atol=1e-5, rtol=1e-4), name


def test_a_converted_model_computes_the_same(
    theirs: subprocess.Popen[str], models: Path, tmp_path: Path
) -> None:
    expected = features(theirs, models, models / "t1", tmp_path)
    found = features_of_transformers(models, models / "hf" / "t1")
    same(found, expected)
    assert not torch.allclose(
        expected["image"], features(theirs, models, models / "t2", tmp_path)["image"], atol=1e-4
    )


def test_a_converted_model_goes_back_to_the_byte(
    theirs: subprocess.Popen[str], models: Path, tmp_path: Path
) -> None:
    done = run("merge", models / "hf" / "t1", "--base-model", models / "hf" / "t2", "-o",
               tmp_path / "back", "--out-format", "open_clip")  # fmt: skip
    assert done.code == 0, done.err
    found = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    expected = load_file(models / "t1" / "open_clip_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    same(features(theirs, models, tmp_path / "back", tmp_path),
         features(theirs, models, models / "t1", tmp_path))  # fmt: skip


@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-g-14"])
def test_the_published_architectures(
    theirs: subprocess.Popen[str], tmp_path: Path, name: str
) -> None:
    """Widths, heads, inner sizes, patches, activations as published; one layer a tower."""
    options = {"tasks": 1, "quick_gelu": False, "pickled": name == "ViT-B-32", "name": name}
    asked(theirs, "make", tmp_path, options)
    generator = torch.Generator().manual_seed(9)
    tokens = torch.zeros(2, 77, dtype=torch.int64)
    tokens[:, :9] = torch.randint(1, 250, (2, 9), generator=generator)
    tokens[:, 9] = 299
    pixels = torch.randn(2, 3, 224, 224, generator=generator)
    save_file({"pixels": pixels, "tokens": tokens}, tmp_path / "inputs.safetensors")
    expected = features(theirs, tmp_path, tmp_path / "t1", tmp_path)
    plain = {"method": "average", "exclude": [], "progress": False}  # of one: that one
    hf_tsv.merge([tmp_path / "t1"], base_model=tmp_path / "base", output=tmp_path / "hf",
                 out_format="transformers", **plain)  # fmt: skip
    same(features_of_transformers(tmp_path, tmp_path / "hf"), expected)
    hf_tsv.merge([tmp_path / "hf"], base_model=tmp_path / "base", output=tmp_path / "back",
                 **plain)  # fmt: skip
    back, own = (hf_tsv.inspect(tmp_path / n).tensors for n in ("back", "t1"))
    assert {n: t["shape"] for n, t in back.items()} == {n: t["shape"] for n, t in own.items()}
    if name == "ViT-g-14":  # whose inner size is no multiple
        same(features(theirs, tmp_path, tmp_path / "back", tmp_path), expected)


@pytest.mark.parametrize("flags", [[], ["--max-shard-size", "50KB"]], ids=["one file", "shards"])
def test_a_merge_is_in_the_format_of_its_base(
    theirs: subprocess.Popen[str], models: Path, tmp_path: Path, flags: list[str]
) -> None:
    tasks = [models / "t1", models / "t2"]
    done = run("merge", *tasks, "--base-model", models / "base", "-o", tmp_path / "m", *flags)
    assert done.code == 0, done.err
    files = {path.name for path in (tmp_path / "m").iterdir()}
    assert "open_clip_config.json" in files and "config.json" not in files
    stored: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "m").glob("*.safetensors"):
        stored |= load_file(file)
    base = load_file(models / "base" / "open_clip_model.safetensors")
    assert stored.keys() == base.keys()
    assert all(stored[name].shape == base[name].shape for name in base)
    if not flags:
        found = features(theirs, models, tmp_path / "m", tmp_path)
        assert found["image"].isfinite().all()
        again = run("merge", *tasks, "--base-model", models / "base", "-o", tmp_path / "hf",
                    "--out-format", "transformers")  # fmt: skip
        assert again.code == 0, again.err
        recipe = (tmp_path / "hf" / "hf_tsv_recipe.yaml").read_text()
        assert "qkv: fused" in recipe and "out_format: transformers" in recipe
        same(features_of_transformers(models, tmp_path / "hf"), found)


def test_attention_is_merged_as_it_is_stored(models: Path, tmp_path: Path) -> None:
    """Fused: against float64 written from the paper; split on demand is another merge."""
    tasks = [models / "t1", models / "t2"]
    states = [load_file(t / "open_clip_model.safetensors") for t in (models / "base", *tasks)]
    merged = {}
    for name, options in (("fused", {}), ("split", {"qkv": "split"})):
        hf_tsv.merge(
            tasks, base_model=models / "base", output=tmp_path / name, progress=False, **options
        )
        merged[name] = load_file(tmp_path / name / "open_clip_model.safetensors")[IN_PROJ]
    w0, *tuned = (state[IN_PROJ] for state in states)
    deltas = [(w - w0).double() for w in tuned]
    expected = w0.double() + reference.tsv(deltas, [min(w0.shape) // 2] * 2)
    assert float((merged["fused"].double() - expected).norm() / expected.norm()) < 1e-6
    assert float((merged["split"] - merged["fused"]).norm() / (merged["fused"] - w0).norm()) > 0.1


def test_both_formats_may_be_mixed(models: Path, tmp_path: Path) -> None:
    """An OpenCLIP task and a converted one are the same as two of a kind."""
    for name, second in (("plain", models / "t2"), ("mixed", models / "hf" / "t2")):
        report = hf_tsv.merge(
            [models / "t1", second], base_model=models / "base", output=tmp_path / name,
            progress=False,
        )  # fmt: skip
        assert report.warnings == [w for w in report.warnings if "tokenizer" in w], report.warnings
    plain, mixed = (
        load_file(tmp_path / name / "open_clip_model.safetensors") for name in ("plain", "mixed")
    )
    for name, tensor in plain.items():
        assert torch.allclose(mixed[name], tensor, atol=1e-6), name


def test_compressed_and_made_again(
    theirs: subprocess.Popen[str], models: Path, tmp_path: Path
) -> None:
    hf_tsv.compress(
        models / "t1", base_model=models / "base", output=tmp_path / "f", rank_fraction=1.0,
        compress_conv=True, progress=False,
    )  # fmt: skip
    hf_tsv.reconstruct(tmp_path / "f", output=tmp_path / "again", progress=False)
    found = load_file(tmp_path / "again" / "open_clip_model.safetensors")
    for name, tensor in load_file(models / "t1" / "open_clip_model.safetensors").items():
        assert torch.allclose(found[name], tensor, atol=1e-5), name


def test_inspect_says_what_it_is(models: Path) -> None:
    found = hf_tsv.inspect(models / "t1")
    assert (found.kind, found.layout, found.model_class) == ("checkpoint", "open_clip", "CLIPModel")
    assert found.tensors[
        "vision_model.encoder.layers.0.self_attn.{q,k,v}_proj.weight"
    ]["merge"] == "decomposed"  # fmt: skip
    state = load_file(models / "t1" / "open_clip_model.safetensors")
    assert found.parameters == sum(tensor.numel() for tensor in state.values())


def test_the_processor_does_what_open_clip_does(models: Path) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(models / "hf" / "t1")
    assert list(processor.image_mean) == [0.5, 0.4, 0.3]
    assert dict(processor.crop_size) == {"height": 32, "width": 32}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vision_cfg": {"timm_model_name": "vit"}}, "timm_model_name"),
        ({"text_cfg": {"hf_model_name": "roberta"}}, "hf_model_name"),
        ({"vision_cfg": {"layers": [2, 2]}}, "layers"),
        ({"vision_cfg": None}, "does not describe a model"),
        ({"vision_cfg": {"head_width": 6}}, "heads in a width"),
        ({"vision_cfg": {"head_width": 1000}}, "0 heads"),
        ({"text_cfg": {"heads": 3}}, "3 heads in a width of 16"),
        ({"vision_cfg": {"image_size": [32, 48]}}, "image_size"),
        ({"vision_cfg": {"image_size": []}}, "does not describe a model"),
        ({"vision_cfg": {"mlp_ratio": float("inf")}}, "does not describe a model"),
    ],
)
def test_another_architecture_is_refused_by_its_setting(
    models: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    content = json.loads((models / "t1" / "open_clip_config.json").read_text())
    for part, settings in change.items():
        model = content["model_cfg"]
        model[part] = settings and {**model[part], **settings}
    with pytest.raises(CheckpointError, match=said):
        open_clip.transformers_config(content, "x")


def test_every_canonical_name_has_one_place() -> None:
    names = [
        *open_clip.TOP.values(), *open_clip.PROJECTIONS.values(),
        *(
            f"{tower}_model.encoder.layers.11.{part}"
            for tower in ("vision", "text")
            for parts in open_clip.IN_BLOCK.values()
            for part in parts
        ),
    ]  # fmt: skip
    assert len(set(names)) == len(names) == 14 + 2 * 2 * 8
    for name, part in open_clip.placed(names).items():
        shape = (3, 3) if part.transposed or part.of > 1 else (4,)
        assert part in open_clip.parts_of(part.stored, shape, "x") and part.name == name
    with pytest.raises(CheckpointError, match="no place"):
        open_clip.placed(["vision_model.encoder.layers.0.gate.weight"])


def test_the_card_says_how_to_load_it(
    theirs: subprocess.Popen[str], models: Path, tmp_path: Path
) -> None:
    """By running what it says."""
    hf_tsv.merge(
        [models / "t1", models / "t2"], base_model=models / "base", output=tmp_path / "m",
        progress=False,
    )  # fmt: skip
    card = (tmp_path / "m" / "README.md").read_text()
    assert "library_name: open_clip" in card
    code = card.split("```python\n")[1].split("```")[0]
    Image.new("RGB", (50, 40)).save(tmp_path / "m" / "photo.jpg")
    line = next(line for line in code.splitlines() if "get_tokenizer" in line)
    tokens = "lambda labels: torch.ones(len(labels), model.context_length, dtype=torch.int64)"
    code = code.replace(line, f"tokenizer = {tokens}")  # the real one is on the Hub
    asked(theirs, "run", tmp_path / "m", f"{code}\nassert model.visual")


def test_it_is_a_transformers_model_too(
    theirs: subprocess.Popen[str], models: Path, tmp_path: Path
) -> None:
    model = hf_tsv.load_model(models / "t1", progress=False)
    given = load_file(models / "inputs.safetensors")
    with torch.inference_mode():
        image = model.get_image_features(pixel_values=given["pixels"])
    found = getattr(image, "pooler_output", image)
    expected = features(theirs, models, models / "t1", tmp_path)["image"]
    assert torch.allclose(found, expected, atol=1e-5)


def test_from_the_hub_and_back(hub: Hub, models: Path, tmp_path: Path) -> None:
    """Headers by range, then one download; pushed with its own config."""
    for name in ("base", "t1", "t2"):
        hub.add_repo(f"org/oc-{name}", models / name)
    found = hf_tsv.inspect("org/oc-t1", cache_dir=tmp_path / "cache")
    assert found.layout == "open_clip" and not (tmp_path / "cache").exists()
    done = run("merge", "org/oc-t1", "org/oc-t2", "--base-model", "org/oc-base", "--push-to",
               "me/oc-merged", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    files = hub.files("me/oc-merged")
    assert {"open_clip_model.safetensors", "open_clip_config.json", "README.md"} <= set(files)
    assert "hf-hub:me/oc-merged" in files["README.md"].decode()
    words = ["merge", "org/oc-t1", "org/oc-t2", "--base-model", "org/oc-base", "-o", "m"]
    offline = run_process(*words, HF_HUB_OFFLINE="1", cwd=tmp_path)
    assert offline.code == 0, offline.err
    assert (tmp_path / "m" / "open_clip_model.safetensors").read_bytes() == files[
        "open_clip_model.safetensors"
    ]


def test_an_adapter_for_open_clip_is_refused(models: Path, tmp_path: Path) -> None:
    done = run("compress", models / "t1", "--base-model", models / "base", "--out-format", "peft",
               "-o", tmp_path / "lora")  # fmt: skip
    assert done.code == 1 and "OpenCLIP" in done.err and not (tmp_path / "lora").exists()


@pytest.mark.parametrize(
    "images", [{"mean": 5}, {"std": None}, {"size": {"a": 1}}, {"size": [32]}], ids=str
)
def test_odd_processors_are_refused_before_the_work(
    models: Path, tmp_path: Path, images: dict[str, Any]
) -> None:
    odd = copied(models / "base", tmp_path / "odd")
    content = json.loads((odd / "open_clip_config.json").read_text())
    content["preprocess_cfg"] |= images
    (odd / "open_clip_config.json").write_text(json.dumps(content))
    done = run("merge", models / "t1", "--base-model", odd, "-o", tmp_path / "out" / "m",
               "--out-format", "transformers")  # fmt: skip
    assert done.code == 1 and "does not describe a model" in done.err
    assert not (tmp_path / "out").exists()


def test_weights_and_config_must_agree(models: Path, tmp_path: Path) -> None:
    for change, said in (({"layers": 9}, "says 9 layers"), ({"width": 64}, "of width 64")):
        odd = copied(models / "t1", tmp_path / said.replace(" ", "-"))
        content = json.loads((odd / "open_clip_config.json").read_text())
        content["model_cfg"]["vision_cfg"] |= change
        (odd / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=said):
            hf_tsv.merge([odd], base_model=models / "base", output=tmp_path / "m", progress=False)


def test_a_tensor_under_two_names_is_refused(models: Path, tmp_path: Path) -> None:
    odd = copied(models / "t1", tmp_path / "odd")
    state = load_file(odd / "open_clip_model.safetensors")
    state["text.token_embedding.weight"] = state["token_embedding.weight"] + 1
    save_file(state, odd / "open_clip_model.safetensors")
    with pytest.raises(CheckpointError, match="stored twice"):
        hf_tsv.merge([odd], base_model=models / "base", output=tmp_path / "m", progress=False)


@pytest.mark.parametrize(
    ("inner", "width"), [(1920, 1408), (6144, 1408), (3840, 1664), (8064, 1664)]
)
def test_the_inner_size_survives_its_ratio(inner: int, width: int) -> None:
    assert int(width * open_clip._ratio(inner, width)) == inner


ADAPTED = """
import json, sys, warnings
from pathlib import Path
import open_clip, peft, torch
from safetensors.torch import load_file, save_file
warnings.simplefilter("ignore")
config = json.loads(Path("base/open_clip_config.json").read_text())["model_cfg"]
def model():
    result = open_clip.CLIP(**config)
    result.load_state_dict(load_file("base/open_clip_model.safetensors"))
    return result
for kind, (part, options) in json.loads(Path("kinds.json").read_text()).items():
    torch.manual_seed(0)
    whole = model()
    adapted = peft.get_peft_model(whole.visual if part else whole, peft.LoraConfig(**options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    adapted.save_pretrained(kind)
    fresh = model()
    loaded = peft.PeftModel.from_pretrained(fresh.visual if part else fresh, kind)
    state = loaded.merge_and_unload().state_dict()
    prefix = "visual." if part else ""
    save_file({prefix + n: t.contiguous() for n, t in state.items()}, f"{kind}/merged.safetensors")
"""
LORAS = {
    "attention": (False, {"r": 4, "target_modules": ["attn"], "alpha_pattern": {"attn": 6}}),
    "mlp": (False, {"r": 4, "target_modules": ["c_fc", "c_proj"], "use_rslora": True}),
    "all": (False, {"r": 4, "target_modules": ["attn", "c_fc", "token_embedding", "conv1"],
                    "modules_to_save": ["ln_post", "ln_2"], "bias": "all"}),
    "pissa": (False, {"r": 4, "target_modules": ["c_fc"], "init_lora_weights": "pissa"}),
    "visual": (True, {"r": 4, "target_modules": ["attn", "c_fc"]}),
}  # fmt: skip


def test_adapters_of_open_clip_models(
    theirs: subprocess.Popen[str], models: Path, tmp_path: Path
) -> None:
    """LoRA on its names and on its stacked attention, as PEFT merges it in OpenCLIP's own model."""
    copied(models / "base", tmp_path / "base")
    (tmp_path / "kinds.json").write_text(json.dumps(LORAS))
    asked(theirs, "run", tmp_path, ADAPTED)
    base = open_checkpoint(pin(parse(str(tmp_path / "base"))))
    for kind in LORAS:
        said = load_file(tmp_path / kind / "merged.safetensors")
        expected = {
            part.name: _canonical(said[name], part)
            for name in said
            for part in open_clip.parts_of(name, tuple(said[name].shape), "")
        }
        task = open_adapter(pin(parse(str(tmp_path / kind))), lambda: base)
        changed = set()
        for name, tensor in expected.items():
            w0 = base.original([name])
            error, norm = (task.weight(w0) - tensor).norm(), tensor.norm()
            assert float(error) <= 1e-6 * float(norm), (kind, name, float(error / norm))
            changed |= set() if torch.equal(tensor, w0.tensor) else {name}
        assert changed and changed <= {name for name in task.tensors if task.parts(name)}
    edit = tmp_path / "visual" / "adapter_config.json"
    edit.write_text(json.dumps({**json.loads(edit.read_text()), "auto_mapping": None}))
    found = open_adapter(pin(parse(str(tmp_path / "visual"))), lambda: base)  # by its shapes
    assert all(name.startswith("vision_model.") for name in found.loras)
    done = run("merge", tmp_path / "all", models / "t1", "--base-model", tmp_path / "base", "-o",
               tmp_path / "m", "--allow-other-base")  # fmt: skip
    assert done.code == 0 and (tmp_path / "m" / "open_clip_model.safetensors").exists(), done.err


def _canonical(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    turned = tensor.mT if part.transposed else tensor
    return turned.chunk(part.of)[part.index] if part.of > 1 else turned
