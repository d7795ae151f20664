"""Model cards of what is written: one frozen dataclass a card, rendered by its template.

Fields and properties of a card are the variables of its template in `model_cards/`. A new field
changes three places: the card, the verb that makes it, and the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from huggingface_hub import ModelCard, ModelCardData

from hf_tsv.checkpoints.layout import is_clip
from hf_tsv.checkpoints.reference import at_revision, card_datasets, repo_id_of
from hf_tsv.recipes.settings import current_versions, steps_of
from hf_tsv.reports.templates import cell, counted, environment, plain

if TYPE_CHECKING:
    from hf_tsv.checkpoints.formats.description import Origin
    from hf_tsv.checkpoints.names import Format
    from hf_tsv.methods.catalogue import Method
    from hf_tsv.recipes.recipe import Recipe
    from hf_tsv.recipes.searching import Search
    from hf_tsv.reports.drawing import Picture
    from hf_tsv.reports.interference import InterferenceReport

FEATURES, ZERO_SHOT = "image-feature-extraction", "zero-shot-image-classification"
NO_CARD: Mapping[str, Any] = {}


@dataclass(frozen=True)
class CardInput:
    """Checkpoint that a card names, see [`Origin`], with the factor of its update.

    `datasets` are those that its own card names; `parents` repositories that it descends from, if
    it is a folder and says so.
    """

    ref: str
    revision: str | None
    license: str | None = None
    weight: float = 1.0
    datasets: Sequence[str] = ()
    parents: Sequence[str] = ()

    @classmethod
    def of(
        cls,
        origin: Origin,
        weight: float = 1.0,
        card: Mapping[str, Any] = NO_CARD,
        source: Origin | None = None,
    ) -> CardInput:
        """Checkpoint that an origin names, with the front matter of its card.

        `source` is the fine-tune of task factors, which stands for those in a folder.
        """
        own = cls(origin.ref, origin.revision, origin.license, weight, card_datasets(card))
        if origin.revision is not None or source is None or source.revision is None:
            return own
        return replace(own, parents=(repo_id_of(source.ref),))

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
    def public(self) -> str:
        """Reference to the commit, or the folder's name."""
        return self.name if self.revision is None else at_revision(self.ref, self.revision)

    @property
    def arguments(self) -> str:
        """Arguments of a `from_pretrained` that loads it, as Python."""
        if self.revision is None:
            return json.dumps(self.name)
        inside = f", subfolder={json.dumps(self.subfolder)}" if self.subfolder else ""
        return f"{json.dumps(self.repo_id)}{inside}, revision={json.dumps(self.revision)}"

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
    """Card of a folder: its code loads from ".", which a push replaces by the repository.

    Every kind has `front_matter`, metadata for the Hub that as text is YAML.
    """

    template: ClassVar[str]

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions of the libraries that it was made with."""
        return current_versions()


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
    checkpoint, `heads` the tasks whose heads are kept, `masks` the folders of TALL-masks, `dtype`
    the type of the weights, `selected` lines on the weights that are scaled or kept.
    """

    template: ClassVar[str] = "merge.md.jinja"
    recipe: Recipe
    base: CardInput
    inputs: Sequence[CardInput]
    model_type: str
    full_model: bool
    out_format: Format
    counts: Mapping[str, int]
    dtype: str
    left_out: Mapping[str, Sequence[str]]
    heads: Sequence[str] = ()
    masks: Sequence[str] = ()
    tuning: Search | None = None
    warnings: Sequence[str] = ()
    selected: Sequence[str] = ()
    interference: InterferenceReport | None = None
    picture: Picture | None = None

    @property
    def front_matter(self) -> ModelCardData:
        """Metadata for the Hub: the merge descends from all checkpoints that are there."""
        return ModelCardData(
            **descent(self.base, self.inputs),
            library_name=self.out_format,
            pipeline_tag=None if self.masks else (FEATURES, ZERO_SHOT)[self.full_model],
            tags=["merge", "task-singular-vectors", "hf-tsv", family(self.model_type)],
            license=self.license,
        )

    @property
    def license(self) -> str | None:
        return common_license(self.inputs)

    @property
    def method(self) -> Method:
        return self.recipe.settings.row

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions that the recipe names."""
        return self.recipe.versions

    @property
    def parameters(self) -> str:
        """Choices of the method, as a part of a sentence."""
        settings, row = self.recipe.settings, self.method
        said = [] if row.alpha is None else [f"α = {settings.alpha:g}"]
        said += steps_of(asdict(settings))
        if row.ranks in ("share", "free"):
            share = 100 * (settings.rank_fraction or 1 / len(self.inputs))
            kept = f"{share:.3g}% of the singular directions of each task"
            said.append(f"rank {settings.rank} for each task" if settings.rank else kept)
        return ", ".join([*said, f"weights in {self.dtype}"])

    @property
    def treated(self) -> str:
        """Sentence on how many tensors were merged in which way."""
        row, merged, copied = self.method, self.counts["decomposed"], self.counts["copied"]
        rest = sum(self.counts.values()) - merged - copied
        others = ("tensor was", "tensors were")
        if merged:
            others = ("other tensor (bias, norm, …) was", "other tensors (biases, norms, …) were")
        how = {"sum": "summed", "entries": "combined"}.get(row.of, "averaged")
        how = "summed" if self.masks else how
        name = "TSV-Merge" if row.ranks == "share" and row.vectors else f"`{row.name}`"
        matrices = counted(merged, "weight matrix was", "weight matrices were")
        unchanged = counted(copied, "unchanged tensor comes", "unchanged tensors come")
        said = [f"{matrices} merged with {name}"] if merged else []
        said += [f"{counted(rest, *others)} {how}"] if rest else []
        said += [f"{unchanged} from the base model"] if copied else []
        return f"{'; '.join(said)}."

    @property
    def recipe_text(self) -> str:
        """Recipe to be read: without coefficients, and what was not chosen."""
        return re.sub(r"(?m)^ *\w+: null\n", "", self.recipe.to_yaml(coefficients=False))

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
        return family(self.model_type) == "clip"

    @property
    def model_class(self) -> str:
        return "CLIPModel" if self.full_model and self.clip else "AutoModel"


def descent(base: CardInput, inputs: Sequence[CardInput]) -> dict[str, Any]:
    """Metadata of what is merged of checkpoints on the Hub: these, and their datasets.

    Task factors in a folder are represented by the fine-tune that they were made from.
    """
    parents = [[i.repo_id] if i.revision is not None else i.parents for i in (base, *inputs)]
    on_hub = [name for names in parents for name in names]
    return {
        "base_model": list(dict.fromkeys(on_hub)) or None,
        "base_model_relation": "merge" if on_hub else None,
        "datasets": list(dict.fromkeys(d for item in inputs for d in item.datasets)) or None,
    }


def common_license(inputs: Sequence[CardInput]) -> str | None:
    """Licence, only if every input names one and all are the same."""
    licenses = {item.license for item in inputs}
    return next(iter(licenses)) if len(licenses) == 1 else None


def family(model_type: str) -> str:
    """Tag of an architecture; the towers of a CLIP are CLIP too."""
    return "clip" if is_clip({"model_type": model_type}) else model_type
