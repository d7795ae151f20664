"""Section of a card on how much a compression keeps of each kind of layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hf_tsv.checkpoints.layout import block_and_kind, kind_order
from hf_tsv.system.text import counted

if TYPE_CHECKING:
    from hf_tsv.checkpoints.formats.description import FactorsConfig, StoredWeight


def stored_text(kinds: Iterable[str]) -> str:
    """Number of tensors by how they are stored.

    Example:
        >>> stored_text(["factors", "factors", "dense"])
        '2 low-rank matrices, 1 tensor in full'
    """
    count = Counter(kinds)
    parts = (
        counted(count["factors"], "low-rank matrix", "low-rank matrices"),
        f"{counted(count['dense'], 'tensor')} in full",
        f"{count['none']:,} unchanged or left out",
    )
    return ", ".join(part for part in parts if not part.startswith("0 "))


@dataclass(frozen=True)
class KeptKind:
    """Sum over the changed weights of one kind of layer, such as `mlp.fc1`.

    `rank` is the triplets of one, least to most, and how many weights are stored otherwise;
    `energy` the share of their squared norm that is kept.
    """

    kind: str
    weights: int
    rank: str
    energy: float
    bytes: int

    @classmethod
    def of(cls, kind: str, weights: Sequence[StoredWeight]) -> KeptKind:
        """Sum over several weights."""
        stored = Counter(weight.stored for weight in weights)
        ranks = [weight.rank for weight in weights if weight.stored == "factors"]
        said = [" to ".join(map(str, sorted({min(ranks), max(ranks)})))] if ranks else []
        said += [f"{stored['dense']} in full"] if stored["dense"] else []
        said += [f"{stored['none']} not kept"] if stored["none"] else []
        total = sum(weight.norm**2 for weight in weights) or 1.0
        energy = sum(weight.energy * weight.norm**2 for weight in weights) / total
        size = sum(weight.bytes for weight in weights)
        return cls(kind, len(weights), ", ".join(said), energy, size)


@dataclass(frozen=True)
class KeptSection:
    """Matrices by kind, all other weights together, and the file of a picture beside the card."""

    kinds: Sequence[KeptKind]
    others: KeptKind | None
    picture: str | None

    @classmethod
    def of(cls, config: FactorsConfig, picture: str | None) -> KeptSection:
        """Section on all changed weights of a compressed task."""
        kinds: dict[str, list[StoredWeight]] = {}
        others: list[StoredWeight] = []
        for name, weight in config.weights.items():
            if weight.norm:
                matrix = len(weight.shape) == 2 or weight.stored == "factors"
                (kinds.setdefault(block_and_kind(name)[1], []) if matrix else others).append(weight)
        return cls(
            [KeptKind.of(kind, kinds[kind]) for kind in sorted(kinds, key=kind_order)],
            KeptKind.of("", others) if others else None,
            picture,
        )
