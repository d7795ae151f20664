"""LoRA adapters of PEFT as fine-tunes, with the weights that PEFT would merge."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats.change import Change, Original, refuse_huge
from hf_tsv.checkpoints.formats.task import Task
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.files import read_json
from hf_tsv.checkpoints.storage.headers import read_headers
from hf_tsv.checkpoints.storage.tensors import TensorInfo, digest, read_tensor
from hf_tsv.linalg import svd
from hf_tsv.linalg.updates import TaskSingularVectors
from hf_tsv.system.errors import CheckpointError

CONFIG_FILE = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
PART = re.compile(r"(.+)\.lora_(A\.weight|B\.weight|B\.bias|magnitude_vector(?:\.weight)?)")
LONGEST_PATTERN = 300
# Constructs of a regular expression that make matching exponential, or a high polynomial.
REPEATED_GROUP = re.compile(r"\)[*+?{]|(?:[*+}?].*){4}")
WRAPPER = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)\.")
# Prefixes that canonical names have and a class's own names lack, the likelier first.
PREFIXES = {"CLIPTextModel": ("text_model.", ""), "CLIPVisionModel": ("vision_model.", "")}


@dataclass(frozen=True)
class Lora:
    """LoRA pair of one module: Δ = scale · B A."""

    scale: float  # α / r, or α / √r
    A: TensorInfo  # (r, d_in), or a convolution of that kind
    B: TensorInfo  # (d_out, r)
    bias: TensorInfo | None = None  # of B; scaled too
    magnitude: TensorInfo | None = None  # norm that each row of W0 + Δ is scaled to (DoRA)


@dataclass(frozen=True)
class Adapter(Task):
    """LoRA adapter on a base model, read as the checkpoint that PEFT would make of them.

    Config and tensors are those of the base model that it has a part in. Pairs, tensors stored
    whole, and pairs with a bias are by canonical name of the weight or bias.
    """

    kind: ClassVar[str] = "PEFT adapter"
    says: ClassVar[str] = "is an adapter"
    has_few_triplets: ClassVar[bool] = True
    loads_as_model: ClassVar[bool] = False
    loading: ClassVar[str] = "Load it with PEFT: PeftModel.from_pretrained(base, …)."
    config_file: ClassVar[str] = CONFIG_FILE

    tensors: Mapping[str, TensorInfo]
    loras: Mapping[str, Lora] = field(kw_only=True)
    values: Mapping[str, TensorInfo] = field(kw_only=True)
    biases: Mapping[str, Lora] = field(kw_only=True)

    @property
    def rounded_to(self) -> torch.dtype | None:
        """None, since the factors of Δ are stored."""
        return None

    def parts(self, name: str) -> list[TensorInfo]:
        """Tensors of the adapter's files that reading one weight needs."""
        lora, biased = self.loras.get(name), self.biases.get(name)
        held = [lora.A, lora.B, lora.magnitude] if lora else [biased.bias] if biased else []
        return [info for info in (*held, self.values.get(name)) if info is not None]

    def weight(self, w0: Original) -> Tensor:
        """Compute W0 + Δ of one weight, as PEFT merges it."""
        exact = self.exact(w0)
        return exact if w0.name in self.values else exact.to(w0.tensor.dtype)

    def exact(self, w0: Original) -> Tensor:
        """Compute W0 + Δ of one weight, as PEFT merges it into a base loaded in float32."""
        name, whole = w0.name, self.values.get(w0.name)
        if whole is not None:
            pinned = w0.device.type == "cuda"
            return read_tensor(self.pinned.files, whole, name, str(self), pinned=pinned)
        base = w0.tensor.cpu()
        if not self.parts(name):
            return base.clone()
        lora = self.biases.get(name)
        if lora is not None and lora.bias is not None:
            return base.float() + lora.scale * self._part(lora.bias, name)
        lora = self.loras[name]
        A, B = self._part(lora.A, name), self._part(lora.B, name)
        delta = (B.flatten(1) @ A.flatten(1)).reshape(base.shape) * lora.scale
        merged = base.float() + delta
        if lora.magnitude is not None:
            magnitude = self._part(lora.magnitude, name).reshape(-1)
            rows = merged.flatten(1)
            merged = (rows * (magnitude / rows.norm(dim=1))[:, None]).reshape(base.shape)
        return merged

    def change(
        self, w0: Original, *, decomposed: bool = False, digests: dict[str, str] | None = None
    ) -> Change | None:
        """Find Δ of a weight, by its own triplets where these are wanted; see [`Task.change`]."""
        if not any(map(self.parts, w0.names)):
            return None
        own = self.triplets(w0.name, digests) if decomposed and len(w0.names) == 1 else None
        if own is None:
            return super().change(w0, decomposed=decomposed, digests=digests)
        if not own.rank:
            return None
        refuse_huge(w0.label, self, own)
        return Change(own.to(w0.device), float(own.S.norm()))

    def triplets(
        self, name: str, digests: dict[str, str] | None = None
    ) -> TaskSingularVectors | None:
        """Singular triplets of Δ from its factors; None if Δ is not simply their product."""
        lora = self.loras.get(name)
        if lora is None or lora.magnitude is not None or len(lora.A.shape) != 2:
            return None
        A, B = self._part(lora.A, name), self._part(lora.B, name)
        if digests is not None:
            digests |= {f"{name}.lora_A": digest(A), f"{name}.lora_B": digest(B)}
        left, inner = torch.linalg.qr(B.double())
        right, outer = torch.linalg.qr(A.double().mT)
        U, S, Vh = svd.svd(lora.scale * inner @ outer.mT)
        r = int((torch.finfo(torch.float32).eps * S[:1] < S).sum())
        return TaskSingularVectors((left @ U)[:, :r], S[:r], (Vh @ right.mT)[:r])

    def _part(self, info: TensorInfo, name: str) -> Tensor:
        return read_tensor(self.pinned.files, info, name, str(self)).float()


def open_adapter(pinned: PinnedCheckpoint, opener: Callable[[], Checkpoint]) -> Adapter:
    """Read configuration and headers of an adapter, then the base, to know the canonical names.

    Raises:
        [`CheckpointError`]: not a LoRA adapter, damaged, or of another base model: a module is not
            in the base, or has another shape there.
    """
    owner = str(pinned)
    config = read_json(pinned.files, CONFIG_FILE, owner)
    if (kind := config.get("peft_type")) != "LORA":
        said = f"an adapter of type {reprlib.repr(kind)}, and only LORA is read."
        raise _unreadable(f"{owner} is {said}")
    single = next((name for name in WEIGHTS if pinned.files.size(name) is not None), WEIGHTS[0])
    stored, files = read_headers(pinned.files, single, owner)
    stored = {name.removeprefix(PREFIX): info for name, info in stored.items()}
    pairs, whole = _sorted(stored, owner)
    base = opener()
    head = {name: info for name, info in whole.items() if layout.TASK_HEAD.match(name)}
    values = {name: info for name, info in whole.items() if name not in head}
    prefix = _prefix([*(f"{m}.weight" for m in pairs), *values], base, config)
    loras, biases = {}, {}
    for module, parts in pairs.items():
        name = f"{prefix}{module}.weight"
        loras[name] = _lora(owner, config, module, parts, base.tensors.get(name), base)
        if loras[name].bias is not None:
            biases[f"{prefix}{module}.bias"] = loras[name]
    own = {prefix + name: info for name, info in values.items()}
    for name in (*own, *biases):
        there = base.tensors.get(name)
        if there is None or (name in own and there.shape != own[name].shape):
            raise _no_place(owner, name, base)
    encoders = {name.split(".")[0] for name in (*loras, *own, *biases)}
    tensors = base.tensors
    if layout.is_clip(base.model_config) and not {"vision_model", "text_model"} <= encoders:
        tensors = {n: info for n, info in tensors.items() if n.split(".")[0] in encoders}
    return Adapter(
        pinned, base.model_config, tensors, files, head, loras=loras, values=own, biases=biases
    )


def _sorted(
    stored: Mapping[str, TensorInfo], owner: str
) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo]]:
    """Split tensors into the parts of each module's pair, and those stored whole."""
    pairs: dict[str, dict[str, TensorInfo]] = {}
    values: dict[str, TensorInfo] = {}
    for name, info in stored.items():
        if found := PART.fullmatch(name):
            part = "magnitude" if found[2].startswith("magnitude") else found[2]
            pairs.setdefault(found[1], {})[part] = info
        elif ".lora_" in name:
            raise _unreadable(f"{owner}: {name} is a kind of LoRA that is not read.")
        else:
            values[WRAPPER.sub(".", name)] = info
    for module, parts in pairs.items():
        if not {"A.weight", "B.weight"} <= parts.keys():
            raise CheckpointError(
                f"{owner}: one of the two matrices of {module} is missing.", "Save it again."
            )
    return pairs, values


def _prefix(wanted: Sequence[str], base: Checkpoint, config: Mapping[str, Any]) -> str:
    """Prefix with which most names of the adapter are canonical names of the base."""
    mapping = config.get("auto_mapping")
    model_class = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    prefixes = PREFIXES.get(str(model_class), ("", "vision_model.", "text_model."))
    return max(prefixes, key=lambda prefix: sum(prefix + name in base.tensors for name in wanted))


def _lora(
    owner: str,
    config: Mapping[str, Any],
    module: str,
    parts: Mapping[str, TensorInfo],
    weight: TensorInfo | None,
    base: Checkpoint,
) -> Lora:
    """Pair of a module, after a check that both factors fit each other and the weight."""
    A, B = parts["A.weight"], parts["B.weight"]
    if weight is None or len(A.shape) != len(weight.shape) or _shape(A, B) != weight.shape:
        raise _no_place(owner, f"{module}.weight", base)
    rows = math.prod(B.shape[:1])
    odd = [
        name for name, info in parts.items()
        if not info.dtype.is_floating_point
        or (name in ("B.bias", "magnitude") and math.prod(info.shape) != rows)
    ]  # fmt: skip
    if odd or config.get("fan_in_fan_out"):
        what = f"{odd[0] if odd else 'fan_in_fan_out'} of {module}"
        raise _unreadable(f"{owner}: {what} is not as PEFT writes it for such a layer.")
    scale = _scale(owner, config, module, A.shape[0])
    return Lora(scale, A, B, parts.get("B.bias"), parts.get("magnitude"))


def _scale(owner: str, config: Mapping[str, Any], module: str, r: int) -> float:
    alpha = _of_pattern(config.get("alpha_pattern"), module, config.get("lora_alpha", 8), owner)
    try:
        if isinstance(alpha, bool) or not math.isfinite(float(alpha)) or r == 0:
            raise ValueError
        return float(alpha) / (math.sqrt(r) if config.get("use_rslora") else r)
    except (TypeError, ValueError, OverflowError):
        hint = f"Correct lora_alpha and alpha_pattern in its {CONFIG_FILE}."
        raise CheckpointError(f"{owner}: the scale of {module} is not a number.", hint) from None


def _shape(first: TensorInfo, second: TensorInfo) -> tuple[int, ...]:
    """Shape of the product of both factors, or () if they do not multiply."""
    A, B = first.shape, second.shape
    if len(A) < 2 or len(A) != len(B) or B[1] != A[0] or math.prod(B[2:]) != 1:
        return ()
    return (B[0], *A[1:])


def _unreadable(message: str) -> CheckpointError:
    hint = "Merge it into its base with PEFT (merge_and_unload) and save the model."
    return CheckpointError(message, hint)


def _no_place(owner: str, name: str, base: Checkpoint) -> CheckpointError:
    return CheckpointError(
        f"{owner}: {name} is not in the base model {base}, or of another shape.",
        "Name the base model that the adapter was trained on with `base_model=REF`.",
    )


def _of_pattern(patterns: object, module: str, default: Any, owner: str) -> Any:
    """Value of the first pattern that ends a module's name, as PEFT looks it up."""
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if max(len(pattern), len(module)) > LONGEST_PATTERN or REPEATED_GROUP.search(pattern):
            problem = f"{owner}: the pattern {pattern[:60]!r} is not read: it may take forever."
            raise CheckpointError(problem, f"Write names of modules into its {CONFIG_FILE}.")
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error:
            continue
    return default
