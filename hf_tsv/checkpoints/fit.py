"""Whether fine-tunes fit their base: names, shapes, and what configs disagree about."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.storage.tensors import TensorInfo
from hf_tsv.system.errors import CheckpointError, debugging
from hf_tsv.system.text import counted

OTHER_BASE = 0.5
"""‖Δ‖ / ‖W0‖ from which an input is refused as a fine-tune of another model. Fine-tunes have 0.005
to 0.05, and two models that have nothing in common 1 or more.
"""

DEFAULTS: dict[str, dict[str, Any]] = {
    layout.VISION: {"hidden_act": "quick_gelu", "num_attention_heads": 12, "layer_norm_eps": 1e-5,
                    "patch_size": 32},
    layout.TEXT: {"hidden_act": "quick_gelu", "num_attention_heads": 8, "layer_norm_eps": 1e-5},
}  # fmt: skip
"""Settings that change what the same weights compute, with the values of a CLIP's config.json that
does not say them."""

SHOWN = 3  # tensors that do not fit which an error lists
LOOKS = 4  # matrices of an input that are measured before the work


def other_base(item: object, base: object, ratio: float) -> CheckpointError:
    """The error for an update of `ratio` times the norm of the base model."""
    return CheckpointError(
        f"{item} is {ratio:.2g} of the base model's norm away from {base}: it is probably a"
        " fine-tune of another model.",
        "Name the model it was fine-tuned from with `base_model=REF`. If you mean it, add"
        " `allow_other_base=True`.",
    )


def refuse_other_base(base: Checkpoint, inputs: Sequence[Task]) -> None:
    """Look at the smallest matrices of inputs that are stored whole, before the work.

    Only what is far from the base in all of them is refused here; the norms of all weights are
    compared when they have been read. Updates that are stored as such do not depend on the base.
    """
    from hf_tsv.linalg.updates import norm_of

    matrices = [name for name, info in base.tensors.items() if _is_matrix(info)]
    matrices.sort(key=lambda name: base.tensors[name].nbytes)
    for item in inputs if matrices else ():
        norm = base_norm = 0.0
        for name in [name for name in matrices if item.is_whole and name in item.tensors][:LOOKS]:
            w0 = base.original([name])
            change, own = item.change(w0), norm_of(w0.tensor)
            if change is None or change.norm < OTHER_BASE * own:
                break
            norm, base_norm = math.hypot(norm, change.norm), math.hypot(base_norm, own)
        else:
            if base_norm:
                raise other_base(item, base, norm / base_norm)


def _is_matrix(info: TensorInfo) -> bool:
    return info.dtype.is_floating_point and len(info.shape) == 2 and info.nbytes > 0


def check_whole_clip(base: Checkpoint, what: str) -> None:
    """Refuse to classify images, for a feature named in the error, with a base that cannot."""
    if not layout.is_clip(base.model_config) or not layout.is_full_model(base.tensors):
        problem = f"{what} classifies images, and the base model {base} is not a CLIPModel."
        raise CheckpointError(problem, "Name a whole CLIPModel with `base_model=REF`.")


def check_fit(base: Checkpoint, inputs: Sequence[Task]) -> None:
    """Refuse inputs that miss weights, or have extra ones or another shape; all are listed."""
    if base.head and layout.is_clip(base.model_config):
        head = next(iter(base.head))
        raise CheckpointError(
            f"The base model {base} has a task head ({head}), so it is a fine-tune.",
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
    found = [(item, problems) for item in inputs if (problems := _misfits(base, item))]
    problems = [problem for _, own in found for problem in own]
    if problems:
        more = len(problems) - SHOWN
        if more > 1 and not debugging():
            problems = [*problems[:SHOWN], f"… and {more} more (HF_DEBUG=1 lists all)"]
        total = SHOWN + more
        lines = [
            *filter(None, (_other_sizes(base, item) for item, _ in found)),
            f"{counted(total, 'weight does', 'weights do')} not fit the base model {base}:",
            *(f"  {line}" for line in problems),
        ]
        hint = (
            f"If these were not fine-tuned from {base}, name the right one with `base_model=REF`."
        )
        raise CheckpointError("\n".join(lines), hint)


def _other_sizes(base: Checkpoint, item: Task) -> str:
    """Sentence about the first tower of another size than the base's; empty if there is none."""
    for tower in ("vision", "text"):
        ours, theirs = _sizes(base, tower), _sizes(item, tower)
        if ours and theirs and ours != theirs:
            told = ", ".join(f"{name} {value}" for name, value in theirs.items())
            own = ", ".join(map(str, ours.values()))
            return f"{item} has a {tower} tower with {told}; {base} has {own}."
    return ""


def _sizes(item: Task, tower: str) -> dict[str, int]:
    """Sizes of a tower, from its tensors: a config.json leaves out what is the default."""
    layer = re.compile(rf"{tower}_model\.encoder\.layers\.(\d+)\.")
    depth = len({found[1] for name in item.tensors if (found := layer.match(name))})
    part = {"vision": "patch", "text": "token"}[tower]
    table = item.tensors.get(f"{tower}_model.embeddings.{part}_embedding.weight")
    if table is None or len(table.shape) != {"vision": 4, "text": 2}[tower]:
        return {}
    if tower == "text":
        return {"hidden size": table.shape[1], "layers": depth}
    return {"hidden size": table.shape[0], "layers": depth, "patch size": table.shape[-1]}


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
        if name.endswith(layout.BUFFER):  # copied
            continue
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
            for key, usual in DEFAULTS[tower].items() if tower in reference else ():
                default = usual if layout.is_clip(item.model_config) else None
                ours, theirs = (one.get(key, default) for one in (reference[tower], config))
                said = isinstance(ours, str | int | float) and isinstance(theirs, str | int | float)
                if said and ours != theirs:
                    warnings.append(
                        f"{item} has {tower}.{key} = {theirs}, the base {ours}: it is probably not"
                        " a fine-tune of this base."
                    )
    return warnings
