"""Heads that are kept: made once for a text tower, and never another one's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import clips
import pytest
import torch
from labelled import CLASSES
from transformers import AutoTokenizer, CLIPModel

from hf_tsv.evaluation import prompt_heads, zero_shot

TEMPLATES = ("a {}.", "the {}.")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home of the Hub client."""
    monkeypatch.setattr(prompt_heads.constants, "HF_HOME", str(tmp_path))
    return tmp_path / "hf-tsv" / "heads"


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Classes of the heads that are really made."""
    calls: list[Any] = []
    make = zero_shot.head

    def counting(model: Any, tokenizer: Any, classes: Any, templates: Any) -> Any:
        calls.append(classes)
        return make(model, tokenizer, classes, templates)

    monkeypatch.setattr(zero_shot, "head", counting)
    yield calls


def model_of(folder: Path) -> Any:
    return clips.load(CLIPModel, folder).eval()


def head_of(model: Any, tokenizer: Any, classes: Any = CLASSES, templates: Any = TEMPLATES) -> Any:
    text = prompt_heads.text_identity(model)
    key = prompt_heads.key_of(text, model, tokenizer, classes, templates)
    return prompt_heads.head(model, tokenizer, classes, templates, key)


def test_a_head_is_made_once_for_a_text_tower(zoo: Path, home: Path, made: list[Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    model = model_of(zoo / "base")
    first = head_of(model, tokenizer)
    with torch.no_grad():  # another vision tower, as of a merge or a fine-tune
        model.vision_model.post_layernorm.weight.mul_(2)
    assert torch.equal(head_of(model, tokenizer), first) and len(made) == 1
    assert torch.equal(first, zero_shot.head(model, tokenizer, CLASSES, TEMPLATES))
    assert [file.suffix for file in home.iterdir()] == [".safetensors"]


def test_whatever_decides_about_a_head_makes_another(
    zoo: Path, home: Path, made: list[Any]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    model = model_of(zoo / "base")
    head_of(model, tokenizer)
    head_of(model, tokenizer, classes=CLASSES[::-1])
    head_of(model, tokenizer, templates=TEMPLATES[:1])
    head_of(model, tokenizer, classes=("a cat", "a dog", "emu"), templates=("{}.",))
    head_of(model_of(zoo / "full"), tokenizer)
    with torch.no_grad():
        model.text_projection.weight[0, 0] += 1
    head_of(model, tokenizer)
    shorter = AutoTokenizer.from_pretrained(zoo / "base")
    shorter.model_max_length = 3
    head_of(model, shorter)
    assert len(made) == len(list(home.iterdir())) == 7


@pytest.mark.parametrize("damage", [b"", b"no tensors", None])
def test_a_damaged_file_is_made_again(
    zoo: Path, home: Path, made: list[Any], damage: bytes | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    model = model_of(zoo / "base")
    first = head_of(model, tokenizer)
    (file,) = home.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-8] if damage is None else damage)
    assert torch.equal(head_of(model, tokenizer), first) and len(made) == 2
    assert file.read_bytes() == whole


def test_a_home_that_cannot_be_written_costs_only_time(
    zoo: Path, home: Path, made: list[Any]
) -> None:
    home.parent.mkdir(parents=True)
    home.write_text("a file in the way")
    tokenizer = AutoTokenizer.from_pretrained(zoo / "base")
    model = model_of(zoo / "base")
    assert torch.equal(head_of(model, tokenizer), head_of(model, tokenizer)) and len(made) == 2
