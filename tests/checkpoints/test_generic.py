"""Encoders that are not CLIP: nothing in the method is CLIP's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import adapters
import clips
import pytest
import reference
import torch
import transformers
from cli import copied
from cli import hf_tsv as run
from safetensors.torch import load_file, save_file

import hf_tsv
from hf_tsv.system.errors import CheckpointError

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "vocab_size": 99, "max_position_embeddings": 12, "projection_size": 32,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def model_of(kind: str) -> Any:
    """A tiny model of a real class."""
    import transformers as t

    t.logging.set_verbosity_error()
    if kind in ("Siglip", "Siglip2"):
        vision = {**SIZES, **({"num_patches": 4} if kind == "Siglip2" else {})}
        config = getattr(t, f"{kind}Config")(vision_config=vision, text_config=TEXT)
        return getattr(t, f"{kind}Model")(config)
    if kind == "Dinov2":
        sizes = {k: v for k, v in SIZES.items() if k != "intermediate_size"}
        return t.Dinov2Model(t.Dinov2Config(**sizes, mlp_ratio=2))
    return t.ViTModel(t.ViTConfig(**SIZES))


KINDS = ("Siglip", "Siglip2", "ViT", "Dinov2")


@pytest.fixture(scope="module", params=KINDS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two fine-tunes of every parameter."""
    folder = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = model_of(request.param)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for i, name in enumerate(("base", "a", "b")):
        generator = torch.Generator().manual_seed(i)
        model.load_state_dict({
            key: value + (i > 0) * 2e-3 * torch.randn(value.shape, generator=generator)
            if value.is_floating_point() else value
            for key, value in base.items()
        })  # fmt: skip
        clips.save(model, folder / name)
    return folder


def test_they_merge_by_name_and_shape(family: Path, tmp_path: Path) -> None:
    done = run("merge", family / "a", family / "b", "--base-model", family / "base", "-o",
               tmp_path / "m", "--report")  # fmt: skip
    assert done.code == 0, done.err
    assert "is not CLIP but" in done.err and "generic layout" in done.err
    base, a, b, merged = (
        load_file(folder / "model.safetensors")
        for folder in (family / "base", family / "a", family / "b", tmp_path / "m")
    )
    assert merged.keys() == base.keys()
    decomposed = 0
    for name, w0 in base.items():
        if w0.dim() == 2 and min(w0.shape) > 1:
            deltas = [(w[name] - w0).double() for w in (a, b)]
            expected = w0.double() + reference.tsv(deltas, [min(w0.shape) // 2] * 2)
            decomposed += 1
        else:
            expected = w0.double() + ((a[name] - w0).double() + (b[name] - w0).double()) / 2
        if name != "text_projection.weight":
            assert torch.allclose(merged[name].double(), expected, atol=1e-6), name
    assert decomposed > 10
    from transformers import AutoModel

    clips.load(AutoModel, tmp_path / "m")
    card = (tmp_path / "m" / "README.md").read_text()
    assert "AutoModel" in card and "CLIP checkpoint" not in card and "- clip\n" not in card


def test_what_they_need_to_load_comes_along(family: Path, tmp_path: Path) -> None:
    """The image processor, and the vocabulary of a SentencePiece tokenizer."""
    from transformers import AutoImageProcessor, SiglipImageProcessor

    base = copied(family / "base", tmp_path / "base")
    SiglipImageProcessor(size={"height": 16, "width": 16}).save_pretrained(base)
    (base / "spiece.model").write_bytes(b"words")
    hf_tsv.merge([family / "a"], base_model=base, output=tmp_path / "m", progress=False)
    found, own = (AutoImageProcessor.from_pretrained(p).to_dict() for p in (tmp_path / "m", base))
    assert found == own and found["size"]["height"] == 16
    assert (tmp_path / "m" / "spiece.model").read_bytes() == b"words"


def test_they_are_compressed_and_made_again(family: Path, tmp_path: Path) -> None:
    hf_tsv.compress(
        family / "a", base_model=family / "base", output=tmp_path / "f", rank_fraction=1.0,
        progress=False,
    )  # fmt: skip
    hf_tsv.reconstruct(tmp_path / "f", output=tmp_path / "again", progress=False)
    found, wanted = (load_file(p / "model.safetensors") for p in (tmp_path / "again", family / "a"))
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, atol=1e-6), name
    with pytest.raises(CheckpointError, match="is not CLIP but"):
        hf_tsv.load_model(tmp_path / "f", progress=False)


def test_they_are_inspected_and_measured(family: Path) -> None:
    found = hf_tsv.inspect(family / "a")
    assert found.kind == "checkpoint" and found.model_class and "Model" in found.model_class
    assert any("generic layout" in text for text in found.unknown)
    report = hf_tsv.interference(
        [family / "a", family / "b"], base_model=family / "base", progress=False
    )
    assert report.total > 0 and any(block[-1].isdigit() for block in report.blocks)


def test_what_does_not_agree_is_listed(family: Path, zoo: Path, tmp_path: Path) -> None:
    done = run("merge", family / "a", zoo / "vision", "--base-model", family / "base", "-o",
               tmp_path / "m")  # fmt: skip
    assert done.code == 1 and "another architecture" in done.err and not (tmp_path / "m").exists()
    adapter = run("compress", family / "a", "--base-model", family / "base", "--out-format", "peft",
                  "-o", tmp_path / "l")  # fmt: skip
    assert adapter.code == 1 and "not CLIP" in adapter.err and not (tmp_path / "l").exists()


def test_a_weight_that_is_ill_conditioned_by_chance_has_nothing_in_common(tmp_path: Path) -> None:
    """Eight random tasks fill a square matrix; one direction is nearly that of the others."""
    g = reference.generator(3937)
    deltas = [3e-4 * reference.gaussian(48, 48, g).float() for _ in range(8)]
    _, _, Vh = reference.concatenation(deltas, [6] * 8)
    values = torch.linalg.svdvals(Vh)
    assert 1e-10 < float(values[-1] / values[0]) < 1e-6
    folders = [tmp_path / str(i) for i in range(9)]
    for folder, weight in zip(folders, [torch.zeros(48, 48), *deltas], strict=True):
        folder.mkdir()
        save_file({"layer.weight": weight}, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text('{"model_type": "vit"}')
    report = hf_tsv.merge(
        folders[1:], base_model=folders[0], output=tmp_path / "m", alpha=1.0, progress=False
    )
    assert not any("in common" in text or "merged once" in text for text in report.warnings)
    merged = load_file(tmp_path / "m" / "model.safetensors")["layer.weight"]
    expected = reference.tsv(deltas, [6] * 8)
    assert reference.relative_error(merged, expected) < 1e-6


WORDS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
         "intermediate_size": 64, "vocab_size": 100}  # fmt: skip


def moved(model: Any, seed: int) -> Any:
    """A model with every parameter that is trained a little off."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1e-3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertModel"])
@pytest.mark.parametrize("tuned", ["BertForSequenceClassification", "BertModel"])
def test_a_base_with_parts_that_its_fine_tunes_lack(tmp_path: Path, kind: str, tuned: str) -> None:
    """The encoder has a word in front of its names in some classes and not in others."""
    base = getattr(transformers, kind)(transformers.BertConfig(**WORDS))
    clips.save(base, tmp_path / "base")
    for seed in (1, 2):
        model = clips.load(getattr(transformers, tuned), tmp_path / "base")
        clips.save(moved(model, seed), tmp_path / str(seed))
    inputs = [tmp_path / "1", tmp_path / "2"]
    hf_tsv.merge(inputs, base_model=tmp_path / "base", output=tmp_path / "m", method="average",
                 progress=False)  # fmt: skip
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "m"))
    assert before.keys() == after.keys()
    one, two, merged = (
        clips.load(transformers.BertModel, tmp_path / name).state_dict() for name in ("1", "2", "m")
    )
    for name, tensor in merged.items():
        assert torch.allclose(tensor, (one[name] + two[name]) / 2, atol=1e-6), name


@pytest.mark.parametrize(("kind", "tuned"), [
    ("Qwen2ForCausalLM", "Qwen2ForCausalLM"), ("BertModel", "BertForSequenceClassification"),
    ("BertForPreTraining", "BertForSequenceClassification"),
])  # fmt: skip
def test_an_adapter_of_a_class_with_a_word_in_front(tmp_path: Path, kind: str, tuned: str) -> None:
    cls = getattr(transformers, kind)
    extra = {"num_key_value_heads": 2, "tie_word_embeddings": True} if "Qwen" in kind else {}
    clips.save(cls(cls.config_class(**WORDS, **extra)), tmp_path / "base")
    targets = ["q_proj"] if "Qwen" in kind else ["query"]
    model = clips.load(getattr(transformers, tuned), tmp_path / "base")
    adapters.saved(model, "LoraConfig", {"r": 2, "target_modules": targets}, tmp_path / "a")
    model = clips.load(getattr(transformers, tuned), tmp_path / "base")
    wanted = adapters.merged(model, tmp_path / "a")
    hf_tsv.merge([tmp_path / "a"], base_model=tmp_path / "base", output=tmp_path / "m",
                 method="average", allow_other_base=True, progress=False)  # fmt: skip
    found = clips.load(getattr(transformers, tuned), tmp_path / "m").state_dict()
    before = clips.load(getattr(transformers, tuned), tmp_path / "base").state_dict()
    changed = [name for name in wanted if targets[0] in name and "weight" in name]
    assert len(changed) == 2
    for name in changed:
        assert not torch.equal(wanted[name], before[name])
        assert torch.allclose(found[name], wanted[name], atol=1e-6), name
