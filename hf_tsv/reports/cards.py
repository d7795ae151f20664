"""Model cards of what is written: one frozen dataclass a card, rendered by its template.

Fields and properties of a card are the variables of its template in `model_cards/`. A new field
changes three places: the card, the verb that makes it, and the template.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from hf_tsv.checkpoints.layout import is_clip
from hf_tsv.checkpoints.reference import at_revision, repo_id_of
from hf_tsv.reports.templates import cell, environment, plain

if TYPE_CHECKING:
    from hf_tsv.checkpoints.formats.description import FactorsConfig, Origin, StoredWeight
    from hf_tsv.checkpoints.names import Format
    from hf_tsv.recipes.learning import AlphaSearch
    from hf_tsv.recipes.recipe import Recipe
    from hf_tsv.reports.drawing import Picture
    from hf_tsv.reports.interference import InterferenceReport
    from hf_tsv.reports.kept import KeptSection

LARGEST_SHOWN = 10  # weights that a card of factors lists; all are in its configuration file


@dataclass(frozen=True)
class CardInput:
    """Checkpoint that a card names, see [`Origin`], with the factor of its update."""

    ref: str
    revision: str | None
    license: str | None = None
    weight: float = 1.0

    @classmethod
    def of(cls, origin: Origin, weight: float = 1.0) -> CardInput:
        """Checkpoint that an origin names."""
        return cls(origin.ref, origin.revision, origin.license, weight)

    @property
    def name(self) -> str:
        return Path(self.ref).name or self.ref

    @property
    def repo_id(self) -> str:
        return repo_id_of(self.ref)

    @property
    def subfolder(self) -> str:
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


@dataclass(frozen=True, kw_only=True)
class Card:
    """Card of something that will be pushed to a repository, or stay in a folder.

    Every kind has `front_matter`, metadata for the Hub that as text is YAML.
    """

    template: ClassVar[str]
    repo_id: str | None

    @property
    def place(self) -> str:
        """Place to load from, as Python and the shell name it: the repository or this folder."""
        return self.repo_id or "."

    @property
    def place_note(self) -> str:
        return "" if self.repo_id else '  # "." is this folder'


def render(card: Card) -> str:
    """Text of a card: Markdown with YAML front matter, ending in a newline."""
    names = [name for name in dir(card) if not name.startswith("_")]
    template = environment().get_template(card.template)
    text = template.render({name: getattr(card, name) for name in names})
    return str(ModelCard(text)).rstrip("\n") + "\n"


@dataclass(frozen=True, kw_only=True)
class MergeCard(Card):
    """Card of a merged checkpoint; `full_model`: with both towers of CLIP.

    `counts` has the number of tensors by treatment, `left_out` the task heads not kept by
    checkpoint, `heads` the tasks whose heads are kept, `masks` the folders of TALL-masks.
    """

    template: ClassVar[str] = "merge.md.jinja"
    recipe: Recipe
    base: CardInput
    inputs: Sequence[CardInput]
    model_type: str
    full_model: bool
    out_format: Format
    counts: Mapping[str, int]
    left_out: Mapping[str, Sequence[str]]
    heads: Sequence[str] = ()
    masks: Sequence[str] = ()
    tuning: AlphaSearch | None = None
    warnings: Sequence[str] = ()
    interference: InterferenceReport | None = None
    picture: Picture | None = None

    @property
    def front_matter(self) -> ModelCardData:
        """Metadata for the Hub: the merge goes back to all checkpoints that lie there."""
        on_hub = [item.repo_id for item in (self.base, *self.inputs) if item.revision is not None]
        return ModelCardData(
            base_model=list(dict.fromkeys(on_hub)) or None,
            base_model_relation="merge" if on_hub else None,
            library_name=self.out_format,
            pipeline_tag=_pipeline_tag(self.full_model),
            tags=["merge", "task-singular-vectors", "hf-tsv", _family(self.model_type)],
            license=common_license(self.inputs),
        )

    @property
    def title(self) -> str:
        """Heading: the names of the inputs, of many the first three."""
        names = [plain(item.name) for item in self.inputs]
        if len(names) == 1:
            return f"Merge of {names[0]} alone"
        if len(names) > 4:
            return f"Merge of {', '.join(names[:3])} and {len(names) - 3} more"
        return f"Merge of {', '.join(names[:-1])} and {names[-1]}"

    @property
    def clip(self) -> bool:
        return _family(self.model_type) == "clip"

    @property
    def model_class(self) -> str:
        return "CLIPModel" if self.full_model and self.clip else "AutoModel"


@dataclass(frozen=True, kw_only=True)
class CompressedCard(Card):
    """Card of a compressed task, or of its reconstruction."""

    config: FactorsConfig

    @property
    def base(self) -> CardInput:
        return CardInput.of(self.config.base_model)

    @property
    def source(self) -> CardInput:
        return CardInput.of(self.config.source)

    @property
    def dtype(self) -> str:
        return str(self.config.factor_dtype).removeprefix("torch.")

    @property
    def family(self) -> str:
        return _family(str(self.config.model_config.get("model_type", "clip")))

    def _data(
        self, relation: str, library: str, tags: list[str], pipeline_tag: str | None = None
    ) -> ModelCardData:
        """Metadata with the base model, if it lies on the Hub, and the licence of the source."""
        on_hub = bool(self.base.revision)
        return ModelCardData(
            base_model=self.base.repo_id if on_hub else None,
            base_model_relation=relation if on_hub else None,
            library_name=library,
            pipeline_tag=pipeline_tag,
            tags=tags,
            license=self.source.license,
        )

    def _compress_command(self, *options: str) -> str:
        """Command that makes the same files again."""
        config = self.config
        source, base = (at_revision(item.ref, item.revision) for item in (self.source, self.base))
        words = ["hf-tsv", "compress", source, "--base-model", base]
        for key, value in config.rank_rule.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        words += ["--compress-conv"] if config.compress_conv else []
        words += ["--dtype", self.dtype]
        return shlex.join([*words, *options, "-o", "compressed"])


@dataclass(frozen=True, kw_only=True)
class FactorsCard(CompressedCard):
    """Card of task factors."""

    template: ClassVar[str] = "factors.md.jinja"
    kept: KeptSection | None = None

    @property
    def front_matter(self) -> ModelCardData:
        tags = ["task-singular-vectors", "task-factors", "hf-tsv", self.family]
        return self._data("adapter", "hf-tsv", tags)

    @property
    def kinds(self) -> Counter[str]:
        """Number of weights by how they are stored."""
        return Counter(weight.stored for weight in self.config.weights.values())

    @property
    def largest(self) -> list[tuple[str, StoredWeight]]:
        """Weights with the largest updates, and their names."""
        return sorted(self.config.weights.items(), key=lambda w: -w[1].norm)[:LARGEST_SHOWN]

    @property
    def command(self) -> str:
        return self._compress_command()


@dataclass(frozen=True, kw_only=True)
class AdapterCard(CompressedCard):
    """Card of a LoRA adapter made from a compressed task; `dense`: of more than its matrices."""

    template: ClassVar[str] = "adapter.md.jinja"
    model_class: str
    dense: bool
    kept: KeptSection | None = None

    @property
    def front_matter(self) -> ModelCardData:
        return self._data("adapter", "peft", ["lora", "task-singular-vectors", "hf-tsv", "clip"])

    @property
    def command(self) -> str:
        dense = [] if self.dense else ["--no-dense"]
        return self._compress_command(
            "--out-format", "peft", "--model-class", self.model_class, *dense
        )


@dataclass(frozen=True, kw_only=True)
class ReconstructedCard(CompressedCard):
    """Card of a checkpoint made from task factors; `full_model`: with both towers of CLIP."""

    template: ClassVar[str] = "reconstructed.md.jinja"
    factors: CardInput
    full_model: bool
    out_format: Format

    @property
    def front_matter(self) -> ModelCardData:
        tags = ["task-singular-vectors", "hf-tsv", self.family]
        kind = "image-classification" if self.config.task_head else _pipeline_tag(self.full_model)
        return self._data("finetune", self.out_format, tags, kind)

    @property
    def model_class(self) -> str:
        return "CLIPForImageClassification" if self.config.task_head else "AutoModel"


def common_license(inputs: Sequence[CardInput]) -> str | None:
    """Licence, only if every input names one and all are the same."""
    licenses = {item.license for item in inputs}
    return next(iter(licenses)) if len(licenses) == 1 else None


def _family(model_type: str) -> str:
    """Tag of an architecture; the towers of a CLIP are CLIP too."""
    return "clip" if is_clip({"model_type": model_type}) else model_type


def _pipeline_tag(full_model: bool) -> str:
    return "zero-shot-image-classification" if full_model else "image-feature-extraction"
