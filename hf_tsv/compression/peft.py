"""Export of a compressed task as a LoRA adapter that stock PEFT loads.

A LoRA adapter holds low-rank updates of Linear layers, changes of their biases, and whole modules
that replace those of the base. The task singular vectors of the attention and MLP weights become
pairs (A, B). Tensors without a low-rank form (embeddings, LayerNorms, projections) are stored as
the fine-tuned value. PEFT is not needed: an adapter is two files with the right names in them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_tsv.checkpoints import layout
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.system.errors import CheckpointError, RecipeError

STORED_PREFIX = "base_model.model."
TARGET = re.compile(
    r"(vision|text)_model\.encoder\.layers\.\d+"
    r"\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])\.weight"
)
EMBEDDINGS = re.compile(r"(.*\bembeddings)\.")


@dataclass(frozen=True)
class Adapter:
    """Content of an adapter: its config, and the stored key of every tensor, by canonical name.

    Of each target weight `pairs` has the module; A and B are stored under the keys of
    [`pair_keys`]. `biases` are those of all targets or none, and store their *change*, zeros where
    there is none. `values` are tensors stored as fine-tuned *value*, with unchanged ones of modules
    in which another one changed. `left_out` are changes that the adapter does not hold.
    """

    config: dict[str, Any]
    pairs: dict[str, str]
    biases: dict[str, str]
    values: dict[str, str]
    left_out: tuple[str, ...]


def plan_adapter(
    ranks: Mapping[str, int],
    changed: Collection[str],
    names: Collection[str],
    model_class: str,
    *,
    dense: bool = True,
    base_model: str,
    revision: str | None,
) -> Adapter:
    """Plan the adapter that turns the base into the compressed task, of exactly what changed.

    All names are canonical: `ranks` has the triplets kept of target weights (see [`is_target`]), 0,
    or none, where there are none; `changed` are all tensors that differ from the base, `names` all
    of the base. Without `dense`, tensors that have no low-rank form are left out: the adapter then
    holds weights only, and PEFT can add it to others (`add_weighted_adapter`).

    The adapter has the names of `model_class`. Changes of parts that the class does not have, and
    of `logit_scale`, are in `left_out`. An unknown class is refused, and a task that changed no
    weight that a LoRA can hold.
    """
    if model_class not in layout.MODEL_CLASSES:
        raise RecipeError(
            f"No adapter can be made for the model class {model_class!r}.",
            f"Choose one of {', '.join(layout.MODEL_CLASSES)}.",
        )
    # logit_scale is a bare parameter of CLIPModel, which PEFT has no place for.
    own_names = {name: layout.name_in_class(name, model_class) for name in names if "." in name}
    in_class = {name: own for name, own in sorted(own_names.items()) if own is not None}
    targets = [
        name
        for name in in_class
        if is_target(name) and (ranks.get(name, 0) or (dense and bias_of(name) in changed))
    ]
    if not targets:
        raise CheckpointError(
            f"Nothing in this task can be a LoRA adapter for {model_class}: no update of its "
            "attention or MLP weights was kept.",
            "Choose the class of the tower that was fine-tuned "
            f"({', '.join(layout.MODEL_CLASSES)}), or keep the task as factors.",
        )
    biased = dense and any(bias_of(name) in changed for name in targets)
    others = [name for name in in_class if dense and not (is_target(name) or is_bias(name))]
    replaced = {_saved_module(name) for name in others if name in changed}
    values = [name for name in others if _saved_module(name) in replaced]

    pairs = {name: in_class[name].removesuffix(".weight") for name in targets}
    stored_ranks = {pairs[name]: max(1, ranks.get(name, 0)) for name in targets}
    keys = {bias_of(n): f"{STORED_PREFIX}{module}.lora_B.bias" for n, module in pairs.items()}
    biases = keys if biased else {}
    kept = {*(name for name in targets if ranks.get(name, 0)), *biases, *values}
    return Adapter(
        config=_config(
            stored_ranks,
            sorted({_saved_module(in_class[name]) for name in values}),
            lora_bias=biased,
            model_class=model_class,
            base_model=base_model,
            revision=revision,
        ),
        pairs=pairs,
        biases=biases,
        values={name: STORED_PREFIX + in_class[name] for name in values},
        left_out=tuple(sorted({*changed, *(name for name in ranks if ranks[name])} - kept)),
    )


def is_target(name: str) -> bool:
    """Tell whether a canonical name is a weight that a pair can update: Linear, and with a bias.

    Example:
        >>> is_target("vision_model.encoder.layers.0.self_attn.q_proj.weight")
        True
        >>> is_target("visual_projection.weight")
        False
    """
    return TARGET.fullmatch(name) is not None


def is_bias(name: str) -> bool:
    """Tell whether a canonical name is the bias of such a weight."""
    return name.endswith(".bias") and is_target(name.removesuffix("bias") + "weight")


def bias_of(weight: str) -> str:
    """Canonical name of a weight's bias."""
    return weight.removesuffix("weight") + "bias"


def pair_keys(module: str) -> tuple[str, str]:
    """Keys under which A and B of a module are stored."""
    return (f"{STORED_PREFIX}{module}.lora_A.weight", f"{STORED_PREFIX}{module}.lora_B.weight")


def lora_pair(vectors: TaskSingularVectors) -> tuple[Tensor, Tensor]:
    """Task singular vectors as a LoRA pair, B A = U diag(S) Vh: A (r, d_in) and B (d_out, r).

    Each factor takes √S, so that both have the same size and neither overflows a narrow dtype.
    Where r is 0 they are zeros of rank 1, because PEFT refuses rank 0.
    """
    if vectors.rank == 0:
        d_out, d_in = vectors.U.shape[0], vectors.Vh.shape[1]
        return vectors.Vh.new_zeros(1, d_in), vectors.U.new_zeros(d_out, 1)
    root = torch.sqrt(vectors.S)
    return root[:, None] * vectors.Vh, vectors.U * root


def _saved_module(name: str) -> str:
    """Module that is stored whole for one of its tensors, by canonical name.

    Embeddings are one module: the class embedding belongs to no smaller one, and two adapters of
    which one replaces a module and one a part of it cannot be loaded together.
    """
    embeddings = EMBEDDINGS.match(name)
    return embeddings[1] if embeddings else name.rpartition(".")[0]


def _config(
    ranks: Mapping[str, int],
    modules_to_save: list[str],
    *,
    lora_bias: bool,
    model_class: str,
    base_model: str,
    revision: str | None,
) -> dict[str, Any]:
    """Content of adapter_config.json, with full module names, as PEFT matches any name's suffix."""
    rank = max(ranks.values())
    pattern = {module: r for module, r in ranks.items() if r != rank}
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {  # the class that AutoPeftModel builds
            "base_model_class": model_class,
            "parent_library": "transformers.models.clip.modeling_clip",
        },
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # alpha / r scales the update
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": sorted(ranks),
        "modules_to_save": modules_to_save or None,
        "lora_bias": lora_bias,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
