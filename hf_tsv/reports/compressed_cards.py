"""Cards of a compressed task: factors, an adapter, and the checkpoint made from them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from huggingface_hub import ModelCardData

from hf_tsv.checkpoints.layout import MODEL_CLASSES
from hf_tsv.reports.cards import FEATURES, ZERO_SHOT, Card, CardInput, family
from hf_tsv.reports.kept import stored_text
from hf_tsv.reports.templates import command

if TYPE_CHECKING:
    from hf_tsv.checkpoints.formats.description import FactorsConfig, StoredWeight
    from hf_tsv.checkpoints.names import Format
    from hf_tsv.reports.kept import KeptSection

LARGEST_SHOWN = 10  # weights that a card of factors lists; all are in its configuration file


@dataclass(frozen=True, kw_only=True)
class CompressedCard(Card):
    """Card of a compressed task, or of its reconstruction.

    `full_model`: its base model has both towers of CLIP; `datasets` are those of the fine-tune,
    `kept` is a section on what is kept.
    """

    config: FactorsConfig
    full_model: bool
    datasets: Sequence[str] = ()
    kept: KeptSection | None = None

    @property
    def base(self) -> CardInput:
        return CardInput.of(self.config.base_model)

    @property
    def source(self) -> CardInput:
        return CardInput.of(self.config.source)

    @property
    def license(self) -> str | None:
        return self.source.license

    @property
    def energy(self) -> float:
        """Share of the squared norm of the update that is kept."""
        return max(0.0, 1 - self.config.update_error**2)

    @property
    def dtype(self) -> str:
        return self.config.factor_dtype.in_torch

    @property
    def family(self) -> str:
        return family(str(self.config.model_config.get("model_type", "clip")))

    @property
    def clip(self) -> bool:
        return self.family == "clip"

    @property
    def pipeline_tag(self) -> str:
        head = bool(self.config.task_head)
        return "image-classification" if head else (FEATURES, ZERO_SHOT)[self.full_model]

    def _data(
        self, relation: str, library: str, tags: list[str], parents: Sequence[CardInput]
    ) -> ModelCardData:
        """Metadata with the models it descends from, if they are on the Hub."""
        names = dict.fromkeys(parent.repo_id for parent in parents if parent.revision)
        several: Any = list(names) if len(names) > 1 else next(iter(names), None)
        return ModelCardData(
            base_model=several,
            base_model_relation=relation if names else None,
            datasets=list(self.datasets) or None,
            library_name=library,
            pipeline_tag=self.pipeline_tag,
            tags=tags,
            license=self.license,
        )

    def _compress_command(self, *options: str) -> str:
        """Command that makes the same files again."""
        config = self.config
        words: list[str] = []
        for key, value in config.rank_rule.items():
            words += [f"--{key.replace('_', '-')}", str(value)]
        words += ["--compress-conv"] if config.compress_conv else []
        words += ["--dtype", self.dtype, *options, "-o", "compressed"]
        return command("compress", self.source.public, self.base.public, words)


@dataclass(frozen=True, kw_only=True)
class FactorsCard(CompressedCard):
    """Card of task factors."""

    template: ClassVar[str] = "factors.md.jinja"

    @property
    def front_matter(self) -> ModelCardData:
        """Metadata for the Hub: an adapter of its base model, and made from the fine-tune.

        The Hub has one relation for all names. `adapter` is what the factors are to the base model,
        which they are added to, so that they are listed there; `quantized` would suit the fine-tune
        alone, `finetune` and `merge` are for whole checkpoints. The fine-tune is named second, as
        adapters extracted by other tools do, so that its page leads here too; never alone, because
        the factors are no adapter of it.
        """
        tags = ["task-singular-vectors", "task-factors", "hf-tsv", self.family]
        parents = [self.base, self.source] if self.base.revision else []
        return self._data("adapter", "hf-tsv", tags, parents)

    @property
    def stored(self) -> str:
        """Number of weights by how they are stored."""
        return stored_text(weight.stored for weight in self.config.weights.values())

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

    @property
    def front_matter(self) -> ModelCardData:
        """Metadata for the Hub: an adapter of its base model alone.

        Other tools take the name in the card of an adapter for the model to load it on.
        """
        tags = ["lora", "task-singular-vectors", "hf-tsv", "clip"]
        return self._data("adapter", "peft", tags, [self.base])

    @property
    def pipeline_tag(self) -> str:
        return (FEATURES, ZERO_SHOT)[self.model_class == "CLIPModel"]

    @property
    def unfit_classes(self) -> list[str]:
        """Classes of other names, which apply nothing of it, without an error."""
        flat = MODEL_CLASSES[self.model_class].flat_prefix
        return ["CLIPModel", "AutoModel"] if flat else ["CLIPVisionModel"]

    @property
    def command(self) -> str:
        dense = [] if self.dense else ["--no-dense"]
        return self._compress_command(
            "--out-format", "peft", "--model-class", self.model_class, *dense
        )


@dataclass(frozen=True, kw_only=True)
class ReconstructedCard(CompressedCard):
    """Card of a checkpoint made from task factors."""

    template: ClassVar[str] = "reconstructed.md.jinja"
    factors: CardInput
    out_format: Format

    @property
    def front_matter(self) -> ModelCardData:
        """Metadata for the Hub: a fine-tune of its base model, by way of the one it approximates.

        It is no `quantized` copy, since its weights have full size and another value each.
        """
        tags = ["task-singular-vectors", "hf-tsv", self.family]
        return self._data("finetune", self.out_format, tags, [self.base, self.source])

    @property
    def model_class(self) -> str:
        if self.config.task_head:
            return "CLIPForImageClassification"
        return "CLIPModel" if self.full_model and self.clip else "AutoModel"

    @property
    def command(self) -> str:
        words = ["-o", "reconstructed"]
        return command("reconstruct", self.factors.public, self.base.public, words)
