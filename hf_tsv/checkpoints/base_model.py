"""Which base model fine-tunes come from, when the user does not say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hf_tsv.checkpoints.files import read_json
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.errors import CheckpointError, HfTsvError

CONFIG = ("config.json", "_name_or_path")


def named_by(item: PinnedCheckpoint) -> list[str]:
    """Base models that a checkpoint names: in its card, else in its config.

    Args:
        item ([`PinnedCheckpoint`]): a fine-tune.

    Returns:
        `list[str]`: repository ids; empty when it says nothing.
    """
    value = item.card.get("base_model")
    names = [value] if isinstance(value, str) else value
    if isinstance(names, list) and any(names):
        return [n for n in names if isinstance(n, str) and n and not n.startswith((".", "/", "~"))]
    for file, key in (("adapter_config.json", "base_model_name_or_path"), CONFIG):
        if item.files.size(file) is None:
            continue
        try:
            name = read_json(item.files, file, str(item)).get(key)
        except HfTsvError:  # reported when the checkpoint is opened
            return []
        if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
            return [name] if name != item.ref else []
    return []


def infer(said: Mapping[str, Sequence[str]]) -> tuple[str, list[str]]:
    """The base model that the inputs agree on.

    Args:
        said (`Mapping[str, Sequence[str]]`): what each fine-tune names; some may say nothing.

    Returns:
        `tuple[str, list[str]]`: the base model, and the inputs that name it.

    Raises:
        [`CheckpointError`]: nobody names one, or they disagree; the error says who says what.
    """
    names = {name for found in said.values() for name in found}
    if len(names) == 1:
        return names.pop(), [item for item, found in said.items() if found]
    hint = "Name it with --base-model."
    if not names:
        raise CheckpointError("No checkpoint says which base model it was fine-tuned from.", hint)
    lines = [f"{item}: {', '.join(found) or 'nothing'}" for item, found in said.items()]
    raise CheckpointError(
        "The checkpoints name different base models: " + "; ".join(lines) + ".", hint
    )
