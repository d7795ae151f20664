"""Adapters of PEFT as fine-tunes, with the weights that PEFT would merge."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar

from hf_tsv.checkpoints import layout
from hf_tsv.checkpoints.formats import adapter_names, lora, open_clip, peft_modules
from hf_tsv.checkpoints.formats.adapter_names import CONFIG_FILE, Fits, Place
from hf_tsv.checkpoints.formats.lora import Lora
from hf_tsv.checkpoints.formats.peft_modules import Tuned, Tuner
from hf_tsv.checkpoints.formats.task import Task, coarsest
from hf_tsv.checkpoints.formats.whole import Checkpoint
from hf_tsv.checkpoints.reference import PinnedCheckpoint
from hf_tsv.checkpoints.storage.files import read_json
from hf_tsv.checkpoints.storage.headers import read_headers
from hf_tsv.checkpoints.storage.tensors import TensorInfo, digest, read_tensor
from hf_tsv.system.errors import CheckpointError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from hf_tsv.checkpoints.formats.change import Change, Original
    from hf_tsv.linalg.updates import TaskSingularVectors

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
OWN_KINDS = ("LORA", "ADALORA", "TRAINABLE_TOKENS")  # read here; the others are PEFT's work
TOKENS = ".trainable_tokens_delta"
LARGEST_INDEX = 2**31


@dataclass(frozen=True)
class Tokens:
    """Rows of an embedding that are stored whole, and their numbers."""

    rows: tuple[int, ...]
    values: TensorInfo


@dataclass(frozen=True)
class Adapter(Task):
    """Adapter on a base model, read as the checkpoint that PEFT would make of them.

    Config and tensors are those of the base model that it has a part in. Pairs, pairs with a bias,
    tensors stored whole, tokens and modules are by canonical name of the weight or bias.
    """

    kind: ClassVar[str] = "PEFT adapter"
    says: ClassVar[str] = "is an adapter"
    is_adapter: ClassVar[bool] = True
    has_few_triplets: ClassVar[bool] = True
    loads_as_model: ClassVar[bool] = False
    loading: ClassVar[str] = "Load it with PEFT: PeftModel.from_pretrained(base, …)."
    config_file: ClassVar[str] = CONFIG_FILE

    tensors: Mapping[str, TensorInfo]
    loras: Mapping[str, Lora] = field(kw_only=True, default_factory=dict)
    biases: Mapping[str, Lora] = field(kw_only=True, default_factory=dict)
    values: Mapping[str, TensorInfo] = field(kw_only=True, default_factory=dict)
    embedded: Mapping[str, Tokens] = field(kw_only=True, default_factory=dict)
    modules: Mapping[str, Tuned] = field(kw_only=True, default_factory=dict)

    @property
    def rounded_to(self) -> torch.dtype | None:
        """Coarsest type of the tensors that it holds whole; elsewhere Δ is exact."""
        return coarsest(info.dtype for info in self.values.values())

    def parts(self, name: str) -> list[TensorInfo]:
        """Tensors of the adapter's files that reading one weight needs."""
        found = [self.values[name]] if name in self.values else []
        found += self.loras[name].parts() if name in self.loras else []
        found += [info] if name in self.biases and (info := self.biases[name].bias) else []
        found += [self.embedded[name].values] if name in self.embedded else []
        return found + (self.modules[name].parts() if name in self.modules else [])

    def weight(self, w0: Original) -> Tensor:
        """Compute W0 + Δ of one weight, as PEFT merges it."""
        merged = self.exact(w0)
        return merged if w0.name in self.values else merged.to(w0.tensor.dtype)

    def change(
        self, w0: Original, *, decomposed: bool = False, digests: dict[str, str] | None = None
    ) -> Change | None:
        """Find Δ of a weight, by its own triplets where these are wanted; see [`Task.change`]."""
        from hf_tsv.checkpoints.formats.change import Change, refuse_huge

        if not any(map(self.parts, w0.names)):
            return None
        own = self.triplets(w0.name, digests) if decomposed and len(w0.names) == 1 else None
        if own is None:
            return super().change(w0, decomposed=decomposed, digests=digests)
        if not own.rank:
            return None
        refuse_huge(w0.label, self, own)
        return Change(own.to(w0.device), float(own.S.norm()))

    def differs(self, w0: Original) -> bool:
        """Tell whether it changed a weight at all, however little."""
        return bool(self.parts(w0.name)) and super().differs(w0)

    def triplets(
        self, name: str, digests: dict[str, str] | None = None
    ) -> TaskSingularVectors | None:
        """Singular triplets of Δ from its factors; None if Δ is not simply their product."""
        pair = self.loras.get(name)
        if pair is None or not pair.is_product or name in self.values or name in self.embedded:
            return None
        A, B = pair.factors(self._read_as(name))
        if digests is not None:
            digests |= {f"{name}.lora_A": digest(A), f"{name}.lora_B": digest(B)}
        return pair.triplets(A, B)

    def exact(self, w0: Original) -> Tensor:
        """Compute W0 + Δ of one weight in float32, or read it where it is stored whole."""
        name = w0.name
        read, whole = self._read_as(name), self.values.get(name)
        if whole is not None and len(self.parts(name)) == 1:
            pinned = w0.device.type == "cuda"
            return read_tensor(self.pinned.files, whole, name, str(self), pinned=pinned)
        if not self.parts(name):
            return w0.tensor.cpu().clone()
        merged = w0.tensor.cpu().float() if whole is None else read(whole)
        if name in self.loras:
            pair = self.loras[name]
            if whole is not None:  # W0 of the adapter's own, from which the start is taken already
                pair = replace(pair, taken_out=None)
            merged = pair.weight(merged, read)
        if name in self.biases and (bias := self.biases[name].bias):
            merged = merged + self.biases[name].scale * read(bias)
        if name in self.modules:
            found = self.modules[name]
            infos = {**found.tensors, **found.tuner.shared}
            state = {own: self._part(info, name) for own, info in infos.items()}
            merged = found.merged(name.rpartition(".")[2], merged, state)
        if name in self.embedded:
            import torch

            tokens = self.embedded[name]
            merged = merged.index_copy(0, torch.tensor(tokens.rows), read(tokens.values))
        return merged

    def _read_as(self, name: str) -> lora.Read:
        return lambda info: self._part(info, name).float()

    def _part(self, info: TensorInfo, name: str) -> Tensor:
        tensor = read_tensor(self.pinned.files, info, name, str(self))
        return tensor.float() if tensor.is_floating_point() else tensor


@dataclass(frozen=True)
class _Sorted:
    """Tensors of an adapter by what they are, with the names of the adapted model."""

    pairs: dict[str, Lora]  # by module
    embedded: dict[str, Tokens]  # by module
    modules: dict[str, dict[str, TensorInfo]]  # by module; merged by PEFT
    shared: dict[str, TensorInfo]
    values: dict[str, TensorInfo]
    head: dict[str, TensorInfo]


def open_adapter(pinned: PinnedCheckpoint, opener: Callable[[], Checkpoint]) -> Adapter:
    """Read configuration and headers of an adapter, then the base, to know the canonical names.

    Raises:
        [`CheckpointError`]: an adapter of a type that cannot be merged, damaged, or of another base
            model: a module is not in the base, or has another shape there.
    """
    owner = str(pinned)
    config = read_json(pinned.files, CONFIG_FILE, owner)
    if (kind := config.get("peft_type")) not in OWN_KINDS:
        peft_modules.refuse_other(kind, owner)
    single = next((name for name in WEIGHTS if pinned.files.size(name) is not None), WEIGHTS[0])
    stored, files = read_headers(pinned.files, single, owner)
    found = _sorted(adapter_names.own_names(stored, owner), config, owner)
    base = opener()
    adapted = {*found.pairs, *found.embedded, *found.modules}
    place = adapter_names.find_place(_wanted(found), adapted, base, config, pinned)
    loras, biases = _placed_pairs(found.pairs, place, owner)
    values = {
        part.name: open_clip.part_of(info, part, owner)
        for name, info in found.values.items()
        for part in place.parts(name, info.shape)
    }
    tokens = {_placed(f"{m}.weight", place): one for m, one in found.embedded.items()}
    modules = _placed_modules(found, place, base, Tuner(owner, config, found.shared))
    for name in biases:
        if name not in base.tensors:
            raise adapter_names.no_place(owner, name, base)
    encoders = {name.split(".")[0] for name in (*loras, *values, *biases, *tokens, *modules)}
    tensors = base.tensors
    if layout.is_clip(base.model_config) and not {"vision_model", "text_model"} <= encoders:
        tensors = {n: info for n, info in tensors.items() if n.split(".")[0] in encoders}
    return Adapter(
        pinned, base.model_config, tensors, files, found.head,
        loras=loras, biases=biases, values=values, embedded=tokens, modules=modules,
    )  # fmt: skip


def _sorted(names: Mapping[str, TensorInfo], config: Mapping[str, Any], owner: str) -> _Sorted:
    """Sort tensors into pairs, rows of embeddings, modules of PEFT's, and those stored whole."""
    start, _ = peft_modules.KINDS.get(config["peft_type"], ("", ()))
    pairs: dict[str, dict[str, TensorInfo]] = {}
    result = _Sorted({}, {}, {}, {}, {}, {})
    for name, info in names.items():
        module, own, _ = name.partition(f".{start}") if start else ("", "", "")
        if found := None if start else lora.PART.fullmatch(name):
            part = next(filter(None, found.groups()[1:]))
            part = f"embedding_{part}" if "lora_embedding" in name else part
            pairs.setdefault(found[1], {})[part] = info
        elif not start and ".lora_" in name:
            raise lora.unreadable(f"{owner}: {name} is a kind of LoRA that is not read.")
        elif name.endswith(TOKENS):
            module = name.removesuffix(TOKENS)
            result.embedded[module] = Tokens(_rows(config, module, info, owner), info)
        elif own:
            result.modules.setdefault(module, {})[name] = info
        elif start and name.startswith(start):
            result.shared[name] = info
        elif layout.TASK_HEAD.match(name):
            result.head[name] = info
        else:
            result.values[name] = info
    if start and not result.modules:
        said = f"{owner} holds no tensors of an adapter of type {config['peft_type']}."
        raise lora.unreadable(said)
    for module, parts in pairs.items():
        attention = adapter_names.attention_of(module)
        if attention in pairs:
            # PEFT applies the pair of an attention's output projection twice, in training as in
            # merging, with the settings of the attention.
            pair = lora.pair_of(owner, config, attention, parts)
            result.pairs[module] = replace(pair, scale=2 * pair.scale)
        else:
            result.pairs[module] = lora.pair_of(owner, config, module, parts)
    return result


def _rows(config: Mapping[str, Any], module: str, info: TensorInfo, owner: str) -> tuple[int, ...]:
    """Numbers of the tokens whose embeddings are stored, one for each stored row."""
    said: object = config.get("trainable_token_indices") or config.get("token_indices")
    if isinstance(said, dict):
        said = next((v for key, v in said.items() if f".{module}".endswith(f".{key}")), None)
    rows = said if isinstance(said, list) else []
    sound = all(type(row) is int and 0 <= row < LARGEST_INDEX for row in rows)
    if not sound or len(set(rows)) != len(rows) or info.shape[:1] != (len(rows),):
        problem = f"{owner}: the token indices of {module} are not those of its stored rows."
        raise CheckpointError(problem, f"Correct trainable_token_indices in its {CONFIG_FILE}.")
    return tuple(rows)


def _wanted(found: _Sorted) -> dict[str, Fits]:
    """Tests for the weights that the base model must have, by name in the adapted model."""
    result = {name: adapter_names.shaped(info.shape) for name, info in found.values.items()}
    for module, pair in found.pairs.items():
        result[adapter_names.weight_of(module)] = adapter_names.shaped(lora.product_shape(pair))
    for module, tokens in found.embedded.items():
        result[f"{module}.weight"] = _has_rows(tokens)
    for module in found.modules:
        result[f"{module}.weight"] = lambda part, there: part.of == 1
    return result


def _has_rows(tokens: Tokens) -> Fits:
    last, width = max(tokens.rows, default=0), tokens.values.shape[1:]
    return lambda part, there: len(there) == 2 and last < there[0] and there[1:] == width


def _placed(name: str, place: Place) -> str:
    return place.parts(name)[0].name


def _placed_pairs(
    pairs: Mapping[str, Lora], place: Place, owner: str
) -> tuple[dict[str, Lora], dict[str, Lora]]:
    """Pairs by the canonical name of their weight, and those with a bias by that of the bias."""
    loras, biases = {}, {}
    for module, pair in pairs.items():
        parts = place.parts(adapter_names.weight_of(module), lora.product_shape(pair))
        for part in parts:
            loras[part.name] = replace(pair, B=open_clip.part_of(pair.B, part, owner))
        if len(parts) > 1 and (pair.bias or pair.magnitude):
            raise lora.unreadable(f"{owner}: {module} has more than a pair, and PEFT writes none.")
        if pair.bias is not None:
            biases[_placed(f"{module}.bias", place)] = pair
    return loras, biases


def _placed_modules(
    found: _Sorted, place: Place, base: Checkpoint, tuner: Tuner
) -> dict[str, Tuned]:
    """Modules that PEFT merges, by the canonical name of each weight and bias that it changes."""
    weights = {module: _placed(f"{module}.weight", place) for module in found.modules}
    shapes = {module: base.tensors[name].shape for module, name in weights.items()}
    if found.modules and tuner.kind in peft_modules.SIZED:
        rows, columns = (max(shape[i] for shape in shapes.values()) for i in (0, 1))
        tuner = replace(tuner, widest=(rows, columns))
    result, checked = {}, set()
    for module, tensors in found.modules.items():
        bias = f"{weights[module].removesuffix('weight')}bias"
        one = Tuned(tuner, module, shapes[module], bias in base.tensors, tensors)
        signature = (one.shape, tuple(sorted(info.shape for info in tensors.values())))
        if signature not in checked:
            one.check()
        checked.add(signature)
        _, kinds = peft_modules.KINDS[tuner.kind]
        for name in (f"{weights[module].removesuffix('weight')}{kind}" for kind in kinds):
            if name in base.tensors:
                result[name] = one
    return result
