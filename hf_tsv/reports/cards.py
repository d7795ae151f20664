"""Model cards of what is written, from the templates in `model_cards/`."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Template

from hf_tsv.checkpoints.layout import block_and_kind, is_clip, kind_order
from hf_tsv.checkpoints.reference import at_revision, repo_id_of
from hf_tsv.recipes.recipe import Recipe
from hf_tsv.reports.templates import cell, code, fence, plain, templates
from hf_tsv.system.text import human_bytes

if TYPE_CHECKING:
    from hf_tsv.checkpoints.formats.description import FactorsConfig, StoredWeight
    from hf_tsv.checkpoints.names import Format
    from hf_tsv.recipes.learning import AlphaSearch
    from hf_tsv.reports.drawing import Picture
    from hf_tsv.reports.interference import InterferenceReport


LARGEST_SHOWN = 10
"""Weights that a card of factors lists; all are in its configuration file."""


@dataclass(frozen=True)
class CardInput:
    """What a card says of one checkpoint.

    Args:
        ref (`str`): repository id, with its subfolder if there is one, or folder.
        revision (`str`, *optional*): commit sha; None for a folder.
        license (`str`, *optional*): as its own card says.
        weight (`float`): factor of its update.
    """

    ref: str
    revision: str | None
    license: str | None = None
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Short name: the last part of the repository id or path."""
        return Path(self.ref).name or self.ref

    @property
    def repo_id(self) -> str:
        """The repository it lies in."""
        return repo_id_of(self.ref)

    @property
    def subfolder(self) -> str:
        """Where it lies in the repository; empty for all of it."""
        return self.ref[len(self.repo_id) + 1 :]

    @property
    def link(self) -> str:
        """Markdown for a table: a link to the commit, or the folder's name as code."""
        if self.revision is None:
            return cell(self.name) + " (a local folder)"
        subfolder = f"/{quote(self.subfolder)}" if self.subfolder else ""
        revision = quote(self.revision, safe="")
        url = f"https://huggingface.co/{quote(self.repo_id)}/tree/{revision}{subfolder}"
        return f"[{cell(self.ref)}]({url}) at {cell(self.revision[:12])}"


def merge_card(
    recipe: Recipe,
    base: CardInput,
    inputs: Sequence[CardInput],
    *,
    model_type: str,
    full_model: bool,
    out_format: Format,
    repo_id: str | None,
    counts: Mapping[str, int],
    left_out: Mapping[str, Sequence[str]],
    heads: Sequence[str] = (),
    masks: Sequence[str] = (),
    tuning: AlphaSearch | None = None,
    warnings: Sequence[str],
    interference: InterferenceReport | None = None,
    picture: Picture | None = None,
) -> str:
    """Card of a merged checkpoint.

    Args:
        recipe ([`Recipe`]): how it was made.
        base ([`CardInput`]): W0.
        inputs (`Sequence[CardInput]`): the tasks.
        model_type (`str`): of the base model's config.json.
        full_model (`bool`): both towers of it, not one.
        out_format (`str`): whose files its weights are.
        repo_id (`str`, *optional*): where it will be pushed.
        counts (`Mapping[str, int]`): tensors per treatment.
        left_out (`Mapping[str, Sequence[str]]`): task heads not kept, by checkpoint.
        heads (`Sequence[str]`): tasks whose heads are kept.
        masks (`Sequence[str]`): folders of TALL-masks.
        tuning ([`AlphaSearch`], *optional*): how α was chosen.
        warnings (`Sequence[str]`): of the run.
        interference ([`InterferenceReport`], *optional*): who disturbs whom.
        picture ([`Picture`], *optional*): of it, in a file beside the card.

    Returns:
        `str`: Markdown with YAML front matter, ending in a newline.
    """
    on_hub = [item.repo_id for item in (base, *inputs) if item.revision is not None]
    data = ModelCardData(
        base_model=list(dict.fromkeys(on_hub)) or None,
        base_model_relation="merge" if on_hub else None,
        library_name=out_format,
        pipeline_tag="zero-shot-image-classification" if full_model else "image-feature-extraction",
        tags=["merge", "task-singular-vectors", "hf-tsv", _family(model_type)],
        license=common_license(inputs),
    )
    shown = recipe.to_yaml(coefficients=False)
    return _rendered(
        "merge.md.jinja",
        data,
        title=_title([item.name for item in inputs]),
        base=base,
        inputs=inputs,
        settings=recipe.settings,
        adaptation=recipe.adaptation,
        coefficients=len(recipe.coefficients),
        recipe=shown,
        fence=fence(shown),
        repo_id=repo_id,
        clip=_family(model_type) == "clip",
        full_model=full_model,
        out_format=out_format,
        counts=counts,
        left_out=left_out,
        heads=heads,
        masks=masks,
        tuning=tuning,
        quoted=json.dumps,
        warnings=warnings,
        interference=interference,
        picture=picture,
    )


@dataclass(frozen=True)
class Kept:
    """What a card says of the changed weights of one kind.

    Args:
        kind (`str`): such as `mlp.fc1`.
        weights (`int`): how many.
        rank (`str`): triplets of one, least to most, and how many are stored otherwise.
        energy (`float`): share of their squared norm.
        bytes (`int`): of what is stored of them.
    """

    kind: str
    weights: int
    rank: str
    energy: float
    bytes: int

    @classmethod
    def of(cls, kind: str, weights: Sequence[StoredWeight]) -> Kept:
        """The sum of several weights."""
        stored = Counter(weight.stored for weight in weights)
        ranks = [weight.rank for weight in weights if weight.stored == "factors"]
        said = [str(min(ranks))] if ranks else []
        if ranks and max(ranks) > min(ranks):
            said = [f"{min(ranks)} to {max(ranks)}"]
        said += [f"{stored['dense']} whole"] if stored["dense"] else []
        said += [f"{stored['none']} not kept"] if stored["none"] else []
        total = sum(weight.norm**2 for weight in weights) or 1.0
        return cls(
            kind,
            len(weights),
            ", ".join(said),
            sum(weight.energy * weight.norm**2 for weight in weights) / total,
            sum(weight.bytes for weight in weights),
        )


def kept_section(config: FactorsConfig, picture: str | None) -> str:
    """The part of a card on what is kept of which kind of layer.

    Args:
        config ([`FactorsConfig`]): what is stored.
        picture (`str`, *optional*): file beside the card that shows it.
    """
    kinds: dict[str, list[StoredWeight]] = {}
    others: list[StoredWeight] = []
    for name, weight in config.weights.items():
        if weight.norm:
            matrix = len(weight.shape) == 2 or weight.stored == "factors"
            (kinds.setdefault(block_and_kind(name)[1], []) if matrix else others).append(weight)
    template = Template((templates() / "kept.md.jinja").read_text(encoding="utf-8"))
    section: str = template.render(
        rows=[Kept.of(kind, kinds[kind]) for kind in sorted(kinds, key=kind_order)],
        others=Kept.of("", others) if others else None,
        picture=picture,
        cell=cell,
        human_bytes=human_bytes,
    )
    return f"{section.strip()}\n\n"


def factors_card(config: FactorsConfig, repo_id: str | None, kept: str = "") -> str:
    """Card of task factors.

    Args:
        config ([`FactorsConfig`]): what they are.
        repo_id (`str`, *optional*): where they will be pushed.
        kept (`str`): see [`kept_section`].
    """
    base = CardInput(config.base_model.ref, config.base_model.revision)
    source = CardInput(config.source.ref, config.source.revision)
    data = ModelCardData(
        base_model=base.repo_id if base.revision else None,
        base_model_relation="adapter" if base.revision else None,
        library_name="hf-tsv",
        tags=["task-singular-vectors", "task-factors", "hf-tsv", _family_of(config)],
        license=config.source.license,
    )
    command = _compress_command(config)
    kinds = Counter(weight.stored for weight in config.weights.values())
    return _rendered(
        "factors.md.jinja",
        data,
        config=config,
        base=base,
        source=source,
        repo_id=repo_id,
        kinds=kinds,
        largest=sorted(config.weights.items(), key=lambda item: -item[1].norm)[:LARGEST_SHOWN],
        command=command,
        fence=fence(command),
        dtype=str(config.factor_dtype).removeprefix("torch."),
        kept=kept,
    )


def adapter_card(
    config: FactorsConfig, repo_id: str | None, model_class: str, *, dense: bool, kept: str = ""
) -> str:
    """Card of a LoRA adapter made from a compressed task.

    Args:
        config ([`FactorsConfig`]): what is in it.
        repo_id (`str`, *optional*): where it will be pushed.
        model_class (`str`): the transformers class it fits.
        dense (`bool`): it holds more than matrices.
        kept (`str`): see [`kept_section`].
    """
    base = CardInput(config.base_model.ref, config.base_model.revision)
    data = ModelCardData(
        base_model=base.repo_id if base.revision else None,
        base_model_relation="adapter" if base.revision else None,
        library_name="peft",
        tags=["lora", "task-singular-vectors", "hf-tsv", "clip"],
        license=config.source.license,
    )
    flags = ["--format", "peft", "--model-class", model_class, *([] if dense else ["--no-dense"])]
    command = _compress_command(config, *flags)
    return _rendered(
        "adapter.md.jinja",
        data,
        config=config,
        base=base,
        source=CardInput(config.source.ref, config.source.revision),
        repo_id=repo_id,
        model_class=model_class,
        dense=dense,
        ranks=[weight.rank for weight in config.weights.values() if weight.rank],
        command=command,
        fence=fence(command),
        quoted=json.dumps,
        kept=kept,
    )


def _compress_command(config: FactorsConfig, *options: str) -> str:
    """The command that makes the same files again."""
    made_from = [
        at_revision(item.ref, item.revision) for item in (config.source, config.base_model)
    ]
    words = ["hf-tsv", "compress", made_from[0], "--base-model", made_from[1]]
    for key, value in config.rank_rule.items():
        words += [f"--{key.replace('_', '-')}", str(value)]
    dtype = str(config.factor_dtype).removeprefix("torch.")
    words += ["--compress-conv"] if config.compress_conv else []
    return shlex.join([*words, "--factor-dtype", dtype, *options, "-o", "compressed"])


def reconstructed_card(
    config: FactorsConfig,
    factors: CardInput,
    repo_id: str | None,
    *,
    full_model: bool,
    out_format: Format,
) -> str:
    """Card of a checkpoint made from task factors.

    Args:
        config ([`FactorsConfig`]): of the factors.
        factors ([`CardInput`]): the factors it was made from.
        repo_id (`str`, *optional*): where it will be pushed.
        full_model (`bool`): a whole `CLIPModel`, not one tower.
        out_format (`str`): whose files its weights are.
    """
    zero_shot = "zero-shot-image-classification" if full_model else "image-feature-extraction"
    base = CardInput(config.base_model.ref, config.base_model.revision)
    data = ModelCardData(
        base_model=base.repo_id if base.revision else None,
        base_model_relation="finetune" if base.revision else None,
        library_name=out_format,
        pipeline_tag="image-classification" if config.task_head else zero_shot,
        tags=["task-singular-vectors", "hf-tsv", _family_of(config)],
        license=config.source.license,
    )
    return _rendered(
        "reconstructed.md.jinja",
        data,
        config=config,
        base=base,
        source=CardInput(config.source.ref, config.source.revision),
        factors=factors,
        repo_id=repo_id,
        out_format=out_format,
    )


def _family(model_type: str) -> str:
    """Tag of an architecture: the towers of a CLIP are CLIP too."""
    return "clip" if is_clip({"model_type": model_type}) else model_type


def _family_of(config: FactorsConfig) -> str:
    return _family(str(config.model_config.get("model_type", "clip")))


def _rendered(template: str, data: ModelCardData, **variables: Any) -> str:
    card = ModelCard.from_template(
        data,
        template_path=str(templates() / template),
        code=code,
        cell=cell,
        plain=plain,
        human_bytes=human_bytes,
        **variables,
    )
    return str(card).rstrip("\n") + "\n"


def common_license(inputs: Sequence[CardInput]) -> str | None:
    """The licence, only if every input names one and all are the same."""
    licenses = {item.license for item in inputs}
    return next(iter(licenses)) if len(licenses) == 1 else None


def _title(names: Sequence[str]) -> str:
    shown = [plain(name) for name in names]
    if len(shown) == 1:
        return f"Merge of {shown[0]} alone"
    if len(shown) > 4:
        return f"Merge of {', '.join(shown[:3])} and {len(shown) - 3} more"
    return f"Merge of {', '.join(shown[:-1])} and {shown[-1]}"
