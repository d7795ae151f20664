"""The tiny CLIP: its architecture, its tokenizer and its image processor."""

from __future__ import annotations

import json
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, CLIPTokenizer

from .rendering import SIDE

MAX_TOKENS = 48
POSITION_STD = 0.2
TOKEN_STD = 0.5
END_OF_WORD = "</w>"
START, END = "<|startoftext|>", "<|endoftext|>"


def build_processor(corpus: Iterable[str]) -> CLIPProcessor:
    """A processor for 32 x 32 pixels, with CLIP's tokenizer and merges learnt from the corpus."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    return CLIPProcessor(image_processor=images, tokenizer=_build_tokenizer(corpus))


def _build_tokenizer(corpus: Iterable[str]) -> CLIPTokenizer:
    """Byte-level BPE: all 256 bytes are in the vocabulary, so every string has an encoding."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        end_of_word_suffix=END_OF_WORD,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(character + END_OF_WORD for character in alphabet)]
    tokens += [left + right for left, right in merges]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, START, END]))}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def build_model(tokenizer: CLIPTokenizer, width: int, layers: int, mlp_ratio: int) -> CLIPModel:
    """A random CLIPModel: text tower 2 x 64, projections to 64.

    Args:
        tokenizer: of the texts.
        width: of the vision tower.
        layers: of the vision tower.
        mlp_ratio: width of its MLPs over its own.
    """
    special = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    shared = {"num_attention_heads": 4, "hidden_act": "gelu", "projection_dim": 64}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "max_position_embeddings": MAX_TOKENS,
    }
    vision = {
        "hidden_size": width,
        "intermediate_size": mlp_ratio * width,
        "num_hidden_layers": layers,
        "image_size": SIDE,
        "patch_size": 8,
    }
    config = CLIPConfig(
        text_config=text | shared | special,
        vision_config=vision | shared,
        projection_dim=64,
        **special,
    )
    model = CLIPModel(config)
    # The library's 0.02 suits long training; in a short one words and places must differ at once.
    torch.nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=POSITION_STD)
    torch.nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=TOKEN_STD)
    return model
