"""The change of one weight by a fine-tune: W0, the update, its norm and its noise floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from hf_tsv.checkpoints.storage.tensors import digest
from hf_tsv.linalg import updates
from hf_tsv.linalg.products import largest_entry
from hf_tsv.linalg.updates import Measured, Update
from hf_tsv.system.errors import CheckpointError

LARGEST_UPDATE = 1e30  # entries beyond it are no update; sums of their squares would overflow
CPU = torch.device("cpu")


@dataclass
class Original:
    """One weight of the base model, W0, which is read when it is first asked for."""

    names: Sequence[str]  # canonical; several are stacked along dimension 0
    label: str  # of the weight, or of the stack, for errors
    base: str  # the base model's name, for errors
    shapes: Sequence[tuple[int, ...]]  # of each weight, if they are stacked
    read: Callable[[], Tensor]  # reads W0 as stored, stacked, on the device
    device: torch.device = CPU  # to which updates go too
    digests: dict[str, str] = field(default_factory=dict)  # those known so far, by name

    @cached_property
    def tensor(self) -> Tensor:
        """W0 as stored, stacked."""
        return self.read()

    @property
    def name(self) -> str:
        """Canonical name of a weight that is not stacked."""
        (name,) = self.names
        return name

    def parts(self) -> list[Original]:
        """Each weight of the stack; without a copy."""
        if len(self.names) == 1:
            return [self]
        spans = pairwise(accumulate((shape[0] for shape in self.shapes), initial=0))
        return [
            replace(self, names=[name], label=name, shapes=[], read=partial(self._rows, *span))
            for name, span in zip(self.names, spans, strict=True)
        ]

    def digest(self) -> str:
        """Digest of a weight that is not stacked; computed once, whoever asks."""
        if self.name not in self.digests:
            self.digests[self.name] = digest(self.tensor.cpu())
        return self.digests[self.name]

    def _rows(self, start: int, stop: int) -> Tensor:
        return self.tensor[start:stop]


@dataclass(frozen=True)
class Change:
    """Change of one weight by a fine-tune."""

    update: Update  # Δ in float32, or its singular triplets
    norm: float  # ‖Δ‖, Frobenius
    floor: float = 0.0  # spectral norm below which it is rounding of the stored checkpoints
    rounded_base: tuple[float, float] = (0.0, 0.0)  # evidence that W0 was rounded afterwards


def stacked(
    tensors: Sequence[Tensor],
    names: Sequence[str],
    device: torch.device,
    digests: dict[str, str] | None,
) -> Tensor:
    """Weights of these names side by side on a device, after their digests are noted."""
    if digests is not None:
        digests.update({n: digest(t) for n, t in zip(names, tensors, strict=True)})
    there = [tensor.to(device) for tensor in tensors]  # from pinned memory, if they are
    return there[0] if len(there) == 1 else torch.cat(there)


def update_of(
    name: str, task: object, fine_tuned: Tensor, base: Tensor, *, noisy: bool
) -> Measured:
    """Δ of W1 and W0 as stored, which takes the memory of W1; one that overflows is refused."""
    found = updates.measured(fine_tuned, base, noisy=noisy)
    if not found.largest < LARGEST_UPDATE:
        raise _huge(name, task)
    return found


def refuse_huge(name: str, task: object, update: Update, scale: float | None = None) -> None:
    """Refuse an update, or one times a scale, of which an entry or singular value is too large."""
    if scale is not None and abs(scale) <= 1:  # as it was before
        return
    if isinstance(update, Tensor):
        largest = largest_entry(update) if update.numel() else 0.0
    else:
        largest = float(update.S[0]) if update.rank else 0.0
    if largest * abs(scale or 1.0) < LARGEST_UPDATE:
        return
    if scale is None:
        raise _huge(name, task)
    what = f"the update of {name} times {scale:g}, the factor of the task,"
    problem = f"{task}: {what} is more than {LARGEST_UPDATE:g}."
    raise CheckpointError(problem, "Give it a smaller `weights=` or `scale=`.")


def _huge(name: str, task: object) -> CheckpointError:
    problem = f"{task}: {name} differs from the base model by more than {LARGEST_UPDATE:g}."
    return CheckpointError(problem, "The checkpoint is damaged; drop it or save it again.")
