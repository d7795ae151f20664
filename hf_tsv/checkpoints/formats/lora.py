"""LoRA pairs: what their factors and the config of an adapter make of a weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hf_tsv.checkpoints.formats.adapter_names import CONFIG_FILE
from hf_tsv.checkpoints.storage.tensors import TensorInfo
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import quoted

if TYPE_CHECKING:
    from torch import Tensor

    from hf_tsv.linalg.updates import TaskSingularVectors

PART = re.compile(
    r"(.+)\.lora_(?:(A|B)(?:\.weight)?|B\.(bias)|(E)|embedding_(A|B)|(magnitude)_vector(?:\.weight)?)"
)
LONGEST_PATTERN = 300
# Constructs of a regular expression that make matching exponential, or a high polynomial.
REPEATED_GROUP = re.compile(r"\)[*+?{]|(?:[*+}?].*){4}")
MOST_TRIES = 10_000_000  # ways to try a pattern on a name: less than a second
ADALORA_RANK = 12  # PEFT's default of `init_r`

NEUTRAL_STARTS = ("gaussian", "eva", "orthogonal", "mica", "true", "false")
"""Values of `init_lora_weights`, besides true and false, that leave the base weights alone."""
TAKEN_OUT = ("pissa", "olora")
"""Those that take the pair's first value out of the base weights, and need only these for it."""
UNKNOWABLE = {
    "pissa_niter_": "at random",
    "corda": "from training data",
    "lora_ga": "from gradients",
    "loftq": "by quantisation",
}
"""Those that change the base weights in a way that is not stored, and how."""
VARIANTS = (
    "fan_in_fan_out", "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config",
    "use_qalora", "layer_replication", "target_parameters", "megatron_config",
)  # fmt: skip
"""Settings that, unless they are off, make of a pair something else than B A."""

Read = Callable[[TensorInfo], "Tensor"]
"""Reads a tensor, in float32."""


@dataclass(frozen=True)
class Lora:
    """Pair of one weight: Δ = scale · B diag(E) A, without E in plain LoRA."""

    scale: float  # α / r, or α / √r
    A: TensorInfo  # (r, d_in), or a convolution of that kind
    B: TensorInfo  # (d_out, r)
    E: TensorInfo | None = None  # (r, 1), of AdaLoRA
    bias: TensorInfo | None = None  # of B; scaled too
    magnitude: TensorInfo | None = None  # norm that each row of W0 + Δ is scaled to (DoRA)
    of_columns: bool = False  # it is the norm of each column: of an embedding
    taken_out: str | None = None  # the start of [`TAKEN_OUT`] that W0 lost

    def parts(self) -> list[TensorInfo]:
        """Tensors that the weight needs."""
        return [info for info in (self.A, self.B, self.E, self.magnitude) if info is not None]

    def weight(self, w0: Tensor, read: Read) -> Tensor:
        """Compute W0 + Δ in float32, as PEFT merges it; W0 is in float32."""
        import torch

        A, B = self.factors(read)
        base = w0 if self.taken_out is None else w0 - self._taken_out(w0, A.shape[0])
        delta = torch.mm(B.flatten(1), A.flatten(1)).reshape(w0.shape)
        merged = base + self.scale * delta
        if self.magnitude is None:
            return merged
        wanted, rows = read(self.magnitude).reshape(-1), merged.flatten(1)
        if self.of_columns:
            return torch.mul(rows, wanted / rows.norm(dim=0))
        return torch.mul(rows, (wanted / rows.norm(dim=1))[:, None]).reshape(w0.shape)

    def _taken_out(self, w0: Tensor, r: int) -> Tensor:
        """First value of scale · B A, which PiSSA and OLoRA took out of W0."""
        import torch

        if self.taken_out == "olora":
            Q, R = torch.linalg.qr(w0)
            return torch.mm(self.scale * Q[:, :r], R[:r])
        U, S, Vh = torch.linalg.svd(w0, full_matrices=False)
        return torch.mm(U[:, :r] * S[:r], Vh[:r])

    def factors(self, read: Read) -> tuple[Tensor, Tensor]:
        """A, and B with E: their product and the scale make Δ."""
        A, B = read(self.A), read(self.B)
        return A, B if self.E is None else B * read(self.E).reshape(-1)

    @property
    def is_product(self) -> bool:
        """Tell whether Δ is a matrix, and simply the product of its factors."""
        return self.magnitude is None and self.taken_out is None and len(self.A.shape) == 2

    def triplets(self, A: Tensor, B: Tensor) -> TaskSingularVectors:
        """Singular triplets of Δ from its factors, where it is their product."""
        import torch

        from hf_tsv.linalg import svd
        from hf_tsv.linalg.updates import TaskSingularVectors

        left, inner = torch.linalg.qr(B.double())
        right, outer = torch.linalg.qr(A.double().mT)
        U, S, Vh = svd.svd(self.scale * inner @ outer.mT)
        r = int((torch.finfo(torch.float32).eps * S[:1] < S).sum())
        return TaskSingularVectors((left @ U)[:, :r], S[:r], (Vh @ right.mT)[:r])


def pair_of(
    owner: str, config: Mapping[str, Any], module: str, parts: Mapping[str, TensorInfo]
) -> Lora:
    """Pair of a module of the adapted model, after a check of its parts and of the config.

    The shape of their product is that of [`product_shape`]; () where they do not multiply.
    """
    embedding = "embedding_A" in parts or "embedding_B" in parts
    names = ("embedding_B", "embedding_A") if embedding else ("A", "B")
    if not set(names) <= parts.keys():
        raise CheckpointError(
            f"{owner}: one of the two matrices of {module} is missing.", "Save it again."
        )
    A, B = (parts[name] for name in names)
    if embedding:  # W0 is (tokens, width), and its pair the transposes
        A, B = _turned(A), _turned(B)
    adaptive, wide = config.get("peft_type") == "ADALORA", B.shape[1:2]
    sizes = {
        "bias": B.shape[:1],
        "E": wide,
        "magnitude": A.shape[1:2] if embedding else B.shape[:1],
    }
    odd = [
        name for name, info in parts.items()
        if not info.dtype.is_floating_point
        or (name in sizes and math.prod(info.shape) != math.prod(sizes[name]))
    ]  # fmt: skip
    odd += ["a magnitude"] if config.get("use_dora") and "magnitude" not in parts else []
    odd += ["lora_E"] if ("E" in parts) != adaptive else []
    odd += [key for key in VARIANTS if config.get(key)]
    if odd:
        raise unreadable(
            f"{owner}: {odd[0]} of {module} is not as PEFT writes it for such a layer."
        )
    r = A.shape[0] if A.shape else 0
    start = _start(config.get("init_lora_weights", True), owner)
    is_plain = not embedding and not adaptive and len(A.shape) == 2
    if start is not None and not (is_plain and "attn" not in module.split(".")[-1:]):
        problem = f"{owner}: {module} cannot have been initialised by {start}."
        raise CheckpointError(problem, f"Correct init_lora_weights in its {CONFIG_FILE}.")
    scale = _adaptive_scale(owner, config, r) if adaptive else _scale(owner, config, module, r)
    return Lora(
        scale, A, B, parts.get("E"), parts.get("bias"), parts.get("magnitude"), embedding, start
    )


def product_shape(pair: Lora) -> tuple[int, ...]:
    """Shape of the product of both factors, or () if they do not multiply."""
    A, B = pair.A.shape, pair.B.shape
    if len(A) < 2 or len(A) != len(B) or B[1] != A[0] or math.prod(B[2:]) != 1:
        return ()
    return (B[0], *A[1:])


def unreadable(message: str) -> CheckpointError:
    """Error for an adapter that another library can still merge."""
    hint = "Merge it into its base with PEFT (merge_and_unload) and save the model."
    return CheckpointError(message, hint)


def refuse_slow(pattern: str, name: str, owner: str) -> None:
    """Refuse a regular expression of a config whose match with a module's name may take forever.

    Each repetition may end at any letter of the name, and each group be any of its alternatives.
    """
    repeats, groups = (sum(map(pattern.count, kind)) for kind in ("*+?}", "("))
    tries = len(name) ** repeats * (1 + pattern.count("|")) ** groups
    long = max(len(pattern), len(name)) > LONGEST_PATTERN
    if long or tries > MOST_TRIES or REPEATED_GROUP.search(pattern):
        problem = f"{owner}: the pattern {pattern[:60]!r} is not read: it may take forever."
        raise CheckpointError(problem, f"Write names of modules into its {CONFIG_FILE}.")


def _start(init: object, owner: str) -> str | None:
    """Start of the pair that the base weights lost, by the config's init_lora_weights.

    Raises:
        [`CheckpointError`]: it is not known what the base weights lost.
    """
    name = str(init).lower()
    if init is None or isinstance(init, bool) or (isinstance(init, str) and name in NEUTRAL_STARTS):
        return None
    if isinstance(init, str) and name in TAKEN_OUT:
        return name
    how = next((said for start, said in UNKNOWABLE.items() if name.startswith(start)), None)
    known = (
        f"changed the base weights {how}, and does not hold that change" if how else "is unknown"
    )
    raise CheckpointError(
        f"{owner}: its init_lora_weights is {quoted(init)}, which {known}.",
        "Where it was trained, save it as plain LoRA:"
        " save_pretrained(..., path_initial_model_for_weight_conversion=...).",
    )


def _turned(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=info.shape[::-1], order=() if info.order else (1, 0))


def _adaptive_scale(owner: str, config: Mapping[str, Any], r: int) -> float:
    """Scale of AdaLoRA: α over the rank it began with, which PEFT keeps when ranks shrink."""
    alpha = _number(config.get("lora_alpha", 8), "lora_alpha", owner)
    rank = _number(config.get("init_r", ADALORA_RANK), "init_r", owner)
    if rank <= 0:
        raise _no_number("init_r", owner)
    return (alpha if alpha > 0 else r) / (rank + 1e-5)


def _scale(owner: str, config: Mapping[str, Any], module: str, r: int) -> float:
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8), owner)
    alpha = _number(alpha, module, owner)
    if r == 0:
        raise _no_number(module, owner)
    return alpha / (math.sqrt(r) if config.get("use_rslora") else r)


def _number(value: object, what: str, owner: str) -> float:
    try:
        if not isinstance(value, bool) and math.isfinite(number := float(value)):  # type: ignore[arg-type]
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise _no_number(what, owner)


def _no_number(what: str, owner: str) -> CheckpointError:
    hint = f"Correct lora_alpha and alpha_pattern in its {CONFIG_FILE}."
    return CheckpointError(f"{owner}: the scale of {what} is not a number.", hint)


def _of_pattern(patterns: object, module: str, default: Any, owner: str) -> Any:
    """Value of the first pattern that ends a module's name, as PEFT looks it up."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        refuse_slow(pattern, module, owner)
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except (re.error, OverflowError, RecursionError):  # repetitions, groups in groups
            continue
    return default
