"""Model cards of what is written, from the templates in `model_cards/`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from hf_tsv.recipe import Recipe


@dataclass(frozen=True)
class CardInput:
    """What a card says of one checkpoint.

    Args:
        ref (`str`): repository id, or folder.
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
    def link(self) -> str:
        """Markdown for a table: a link to the commit, or the folder's name as code."""
        if self.revision is None:  # a table ends its cells at a bar even inside code
            return code(self.name).replace("|", r"\|") + " (a local folder)"
        url = f"https://huggingface.co/{self.ref}/tree/{self.revision}"
        return f"[{code(self.ref)}]({url}) at {code(self.revision[:12])}"


def templates() -> Path:
    """Folder of the card templates: inside the installed package, or beside it in the source."""
    package = Path(__file__).parent
    installed = package / "model_cards"
    return installed if installed.is_dir() else package.parent / "model_cards"


def merge_card(
    recipe: Recipe,
    base: CardInput,
    inputs: Sequence[CardInput],
    *,
    full_model: bool,
    repo_id: str | None,
    counts: Mapping[str, int],
    left_out: Mapping[str, Sequence[str]],
    warnings: Sequence[str],
) -> str:
    """Card of a merged checkpoint.

    Args:
        recipe ([`Recipe`]): how it was made.
        base ([`CardInput`]): W0.
        inputs (`Sequence[CardInput]`): the tasks.
        full_model (`bool`): a whole `CLIPModel`, not one tower.
        repo_id (`str`, *optional*): where it will be pushed.
        counts (`Mapping[str, int]`): tensors per treatment.
        left_out (`Mapping[str, Sequence[str]]`): task heads not merged, by checkpoint.
        warnings (`Sequence[str]`): of the run.

    Returns:
        `str`: Markdown with YAML front matter, ending in a newline.
    """
    on_hub = [item.ref for item in (base, *inputs) if item.revision is not None]
    data = ModelCardData(
        base_model=list(dict.fromkeys(on_hub)) or None,
        base_model_relation="merge" if on_hub else None,
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification" if full_model else "image-feature-extraction",
        tags=["merge", "task-singular-vectors", "hf-tsv", "clip"],
        license=common_license(inputs),
    )
    card = ModelCard.from_template(
        data,
        template_path=str(templates() / "merge.md.jinja"),
        title=_title([item.name for item in inputs]),
        base=base,
        inputs=inputs,
        settings=recipe.settings,
        recipe=recipe.to_yaml(),
        fence=_fence(recipe.to_yaml()),
        repo_id=repo_id,
        full_model=full_model,
        counts=counts,
        left_out=left_out,
        warnings=warnings,
        code=code,
        plain=plain,
    )
    return str(card).rstrip("\n") + "\n"


def common_license(inputs: Sequence[CardInput]) -> str | None:
    """The licence, only if every input names one and all are the same."""
    licenses = {item.license for item in inputs}
    return next(iter(licenses)) if len(licenses) == 1 else None


def card_license(card: Mapping[str, Any]) -> str | None:
    """Licence in the front matter of a card, if it is one identifier."""
    value = card.get("license")
    return value if isinstance(value, str) else None


def plain(text: object) -> str:
    """Text from elsewhere as it reads, with nothing Markdown or HTML would act on."""
    line = " ".join(str(text).split())
    return re.sub(r"([\\`*_{}\[\]<>()#+!|~&])", r"\\\1", line)


def code(text: object) -> str:
    """Text from elsewhere as inline code, whatever it contains."""
    line = " ".join(str(text).split())
    fence = "`" * (max(map(len, re.findall("`+", line)), default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{pad}{line}{pad}{fence}"


def _fence(text: str) -> str:
    return "`" * max(3, max(map(len, re.findall("`+", text)), default=0) + 1)


def _title(names: Sequence[str]) -> str:
    shown = [plain(name) for name in names]
    if len(shown) == 1:
        return f"Merge of {shown[0]} alone"
    if len(shown) > 4:
        return f"Merge of {', '.join(shown[:3])} and {len(shown) - 3} more"
    return f"Merge of {', '.join(shown[:-1])} and {shown[-1]}"
