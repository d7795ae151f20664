"""Whether fine-tunes fit their base: names, shapes, and what configs disagree about."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import counted


def check_whole_clip(base: Checkpoint, what: str) -> None:
    """Refuse to classify images, for a feature named in the error, with a base that cannot."""
    if not layout.is_clip(base.model_config) or not layout.is_full_model(base.tensors):
        problem = f"{what} classifies images, and the base model {base} is not a CLIPModel."
        raise CheckpointError(problem, "Name a whole CLIPModel with `base_model=REF`.")


def check_fit(base: Checkpoint, inputs: Sequence[Task]) -> None:
    """Refuse inputs that miss weights, or have extra ones or another shape; all are listed."""
    if base.left_out:
        raise CheckpointError(
            f"The base model {base} has a task head ({base.left_out[0]}), so it is a fine-tune.",
            "Name the CLIPModel it was fine-tuned from with `base_model=REF`.",
        )
    for item in inputs:
        theirs, ours = (str(one.model_config.get("model_type")) for one in (item, base))
        if layout.is_clip(base.model_config) != layout.is_clip(item.model_config):
            raise CheckpointError(
                f"{item} is of another architecture than the base model {base}: {theirs!r} and"
                f" {ours!r}.",
                "Name the model it was fine-tuned from with `base_model=REF`.",
            )
    problems = [problem for item in inputs for problem in _misfits(base, item)]
    if problems:
        raise CheckpointError(
            f"{counted(len(problems), 'weight does', 'weights do')} not fit the base model"
            f" {base}:\n  " + "\n  ".join(problems),
            "Are these fine-tunes of this base model? Name another one with `base_model=REF`.",
        )


def _misfits(base: Checkpoint, item: Task) -> list[str]:
    """One line for each weight of `item` that the base has not, or has in another shape."""
    problems = []
    base_parts = layout.towers(base.tensors)
    encoders, whole_model = layout.towers(item.tensors) & base_parts, False
    if layout.is_clip(base.model_config):
        encoders &= {"vision_model", "text_model"}
        whole_model = layout.is_full_model(item.tensors)
    if not encoders:
        return [f"{item}: it has no encoder in common with the base"]
    for name, info in base.tensors.items():
        found = item.tensors.get(name)
        required = whole_model or name.split(".")[0] in encoders
        if found is None:
            if required and info.dtype.is_floating_point:
                problems.append(f"{item}: {name} is missing")
        elif found.shape != info.shape:
            own = f"has shape {list(found.shape)}"
            problems.append(f"{item}: {name} {own}, the base {list(info.shape)}")
        elif found.dtype.is_floating_point != info.dtype.is_floating_point:
            problems.append(f"{item}: {name} is {found.dtype}, in the base {info.dtype}")
    extra = {
        name: name.split(".")[0]
        for name, info in item.tensors.items()
        if name not in base.tensors and info.dtype.is_floating_point
    }
    for part, count in sorted(Counter(extra.values()).items()):
        if part not in base_parts:
            problems.append(f"{item}: the base has no {part} ({counted(count, 'weight')})")
    mine = [name for name, part in extra.items() if part in base_parts]
    return problems + [f"{item}: {name} is not in the base" for name in mine]


def config_warnings(base: Checkpoint, inputs: Sequence[Task]) -> list[str]:
    """Settings that change what the same weights compute, and that shapes do not show."""
    warnings = []
    if not layout.is_clip(base.model_config):
        warnings.append(
            f"The base model {base} is not CLIP but {base.model_config['model_type']!r}: generic"
            " layout, weights are matched by name and shape alone."
        )
    reference = layout.tower_configs(base.model_config)
    for item in inputs:
        for tower, config in layout.tower_configs(item.model_config).items():
            for key in ("hidden_act", "num_attention_heads", "layer_norm_eps", "patch_size"):
                ours, theirs = reference.get(tower, {}).get(key), config.get(key)
                if None not in (ours, theirs) and ours != theirs:
                    warnings.append(
                        f"{item} has {tower}.{key} = {theirs}, the base {ours}: it is probably not"
                        " a fine-tune of this base."
                    )
    return warnings
