"""Adapters that are merged by PEFT itself, one module at a time.

PEFT gets a model that has nothing but that module, under its real path, and the adapter's config.
"""

from __future__ import annotations

import dataclasses
import math
import re
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hf_tsv.checkpoints.formats.adapter_names import CONFIG_FILE
from hf_tsv.checkpoints.formats.lora import refuse_slow, unreadable
from hf_tsv.checkpoints.storage.tensors import TensorInfo
from hf_tsv.system.errors import CheckpointError
from hf_tsv.system.text import quoted

if TYPE_CHECKING:
    from torch import Tensor, nn

WEIGHT, BIAS = ("weight",), ("bias",)
BOTH = (*WEIGHT, *BIAS)
KINDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "BEFT": ("beft_", BIAS),
    "BOFT": ("boft_", WEIGHT),
    "C3A": ("c3a_", WEIGHT),
    "DEFT": ("deft_", WEIGHT),
    "DELORA": ("delora_", WEIGHT),
    "FOURIERFT": ("fourierft_", WEIGHT),
    "GRALORA": ("gralora_", WEIGHT),
    "HIRA": ("hira_", WEIGHT),
    "HRA": ("hra_", WEIGHT),
    "IA3": ("ia3_", BOTH),
    "LN_TUNING": ("ln_tuning_", BOTH),
    "LOHA": ("hada_", WEIGHT),
    "LOKR": ("lokr_", WEIGHT),
    "MISS": ("miss_", WEIGHT),
    "OFT": ("oft_", WEIGHT),
    "PEANUT": ("peanut_", WEIGHT),
    "PVERA": ("pvera_", WEIGHT),
    "RANDLORA": ("randlora_", WEIGHT),
    "ROAD": ("road_", BOTH),
    "SHIRA": ("shira_", WEIGHT),
    "VBLORA": ("vblora_", WEIGHT),
    "VERA": ("vera_", WEIGHT),
    "WAVEFT": ("waveft_", WEIGHT),
}
"""Types of adapters by name in PEFT: how the names of their tensors begin, and what they change.

They are those whose change of a module follows from that module, its tensors and shared ones.
"""

WITHOUT_WEIGHTS = (
    "ADAPTION_PROMPT", "CARTRIDGE", "CPT", "MULTITASK_PROMPT_TUNING", "POLY", "PREFIX_TUNING",
    "PROMPT_TUNING", "P_TUNING", "SHADOW", "XLORA",
)  # fmt: skip
"""Types whose effect depends on the input, or is on the input: PEFT cannot merge them either."""

SIZED = ("PVERA", "RANDLORA", "VERA")
"""Types whose shared tensors have the size of the largest module."""

ALONE = {
    "task_type": None, "auto_mapping": None, "base_model_name_or_path": None, "revision": None,
    "exclude_modules": None, "layers_to_transform": None, "layers_pattern": None,
    "modules_to_save": None, "bias": "none", "inference_mode": True,
}  # fmt: skip
"""Settings that choose modules, or describe others than the one that is merged."""
FREE = ("seed", "prng", "frequency", "alpha", "scaling", "lambda", "version")
"""Parts of the names of settings whose numbers are no sizes, or are limited by the module's own."""
SMALLEST_LIMIT = 4096  # sizes up to it are harmless, whatever the module
ONE_AT_A_TIME = threading.Lock()  # the state of warnings and of random numbers is the process's
BESIDE = "widest"  # module of the largest sizes, where PEFT derives those of shared tensors from it


@dataclasses.dataclass(frozen=True)
class Tuner:
    """Config of an adapter, its tensors that several modules share, and their largest sizes."""

    owner: str
    config: Mapping[str, Any]
    shared: Mapping[str, TensorInfo]
    widest: tuple[int, int] = (0, 0)  # d_out, d_in

    @property
    def kind(self) -> str:
        """Type of the adapter, of [`KINDS`]."""
        return str(self.config["peft_type"])


@dataclasses.dataclass(frozen=True)
class Tuned:
    """Adapted module: its path, the shape of its weight, and the adapter's tensors for it."""

    tuner: Tuner
    module: str
    shape: tuple[int, ...]
    has_bias: bool
    tensors: Mapping[str, TensorInfo]  # by name in the adapted model

    def parts(self) -> list[TensorInfo]:
        """Tensors that merging the module needs."""
        return [*self.tensors.values(), *self.tuner.shared.values()]

    def merged(self, kind: str, w0: Tensor, state: Mapping[str, Tensor]) -> Tensor:
        """Compute the module's weight or bias, which `kind` says, of W0 in float32.

        `state` are the tensors of the module and the shared ones, by name in the adapted model.
        """
        import torch

        with _in_one_line(self.tuner.owner, self.module), torch.no_grad():
            layer = self._injected(kind, w0, state)
            layer.merge()
            result: Tensor = getattr(layer.get_base_layer(), kind).detach()
            return result.reshape(w0.shape)

    def check(self) -> None:
        """Refuse tensors that are not those that PEFT gives such a module with such a config."""
        import torch

        infos = {**self.tensors, **self.tuner.shared}
        state = {
            name: torch.zeros(info.shape, dtype=info.dtype.torch) for name, info in infos.items()
        }
        with _in_one_line(self.tuner.owner, self.module), torch.no_grad():
            self._injected("weight", torch.zeros(self.shape), state)

    def _injected(self, kind: str, w0: Tensor, state: Mapping[str, Tensor]) -> Any:
        """Layer of PEFT around the base layer, with the adapter's tensors in it."""
        import torch
        from torch import nn

        peft = _peft()
        layer = _layer(self.module, self.shape, has_bias=self.has_bias)
        setattr(layer, kind, nn.Parameter(w0.clone(), requires_grad=False))
        root = nn.Module()
        _plant(root, self.module, layer)
        if self.tuner.kind in SIZED:
            rows, columns = self.tuner.widest
            beside = nn.Linear(columns, rows, bias=False, device="meta")
            beside.weight = nn.Parameter(torch.zeros(1, 1).expand(rows, columns), False)
            root.add_module(BESIDE, beside)
        model = peft.PeftModel(root, self._config()).eval()
        keys = {
            f"base_model.{'model.' if '.' in name else ''}{name}": t for name, t in state.items()
        }
        found = peft.set_peft_model_state_dict(model, keys)
        start = f"base_model.model.{self.module}."
        own = (name.removeprefix(start).split(".")[0] for name in found.missing_keys)
        lacking = (name for name in own if name.startswith(KINDS[self.tuner.kind][0]))
        missing = [name for name in lacking if name not in self.tuner.shared]
        if missing or found.unexpected_keys:
            what = f"lacks {missing[0]}" if missing else f"has {found.unexpected_keys[0]}"
            raise ValueError(f"the adapter {what}")
        return model.base_model.model.get_submodule(self.module)

    def _config(self) -> Any:
        """PEFT's config for the module alone."""
        config, limit = self.tuner.config, max(SMALLEST_LIMIT, *self.shape)
        cls = _peft().PEFT_TYPE_TO_CONFIG_MAPPING[self.tuner.kind]
        fields = {field.name for field in dataclasses.fields(cls)}
        if unknown := [key for key in config if key not in fields and config[key]]:
            raise ValueError(f"this version of PEFT does not know its setting {quoted(unknown[0])}")
        sizeless = {"r", "rank_pattern"} if self.tuner.kind == "LOKR" else set()
        for key, value in config.items():
            if key not in (*ALONE, "target_modules"):
                self._check("alpha" if key in sizeless else key, value, limit)
        paths = f"({re.escape(self.module)}|{BESIDE})"
        given = {**config, **ALONE, "target_modules": paths}
        return cls(**{key: value for key, value in given.items() if key in fields})

    def _check(self, key: str, value: object, limit: int) -> None:
        """Refuse a setting that makes PEFT wait or allocate for ever."""
        if isinstance(value, Mapping):
            for inner, one in value.items():
                refuse_slow(str(inner), self.module, self.tuner.owner)
                self._check(key, one, limit)
        elif isinstance(value, str):
            if "modules" in key or "pattern" in key:
                refuse_slow(value, self.module, self.tuner.owner)
        elif isinstance(value, Sequence):
            for one in value:
                self._check(key, one, limit)
        elif isinstance(value, int | float) and not (
            abs(value) <= limit or (math.isfinite(value) and any(part in key for part in FREE))
        ):
            raise ValueError(f"{key} is {value:.3g}")


def refuse_other(kind: object, owner: str) -> None:
    """Refuse a type of adapter that is neither read here nor merged by PEFT; or without PEFT."""
    if kind in WITHOUT_WEIGHTS:
        problem = f"{owner} is an adapter of type {kind}, which changes no weights."
        raise CheckpointError(problem, "Train a LoRA for the task: only changes of weights merge.")
    if kind not in KINDS:
        said = f"{owner} is an adapter of type {quoted(kind)}, which is not read."
        raise unreadable(said)
    _peft()


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        problem = "An adapter that is not a LoRA is merged by PEFT, which is not installed."
        raise CheckpointError(problem, "Run `pip install peft`.") from None
    return peft


def _layer(path: str, shape: tuple[int, ...], *, has_bias: bool) -> Any:
    """Layer of such a weight, zeros: what it computes is not asked for."""
    import torch
    from torch import nn

    options: dict[str, Any] = {"device": "meta"}
    if len(shape) == 1:
        layer: nn.Module = nn.LayerNorm(shape, bias=has_bias, **options)
    elif len(shape) == 4:
        layer = nn.Conv2d(shape[1], shape[0], shape[2:], bias=has_bias, **options)
    elif len(shape) == 2 and path.endswith("embedding"):
        layer = nn.Embedding(*shape, **options)
    elif len(shape) == 2:
        layer = nn.Linear(shape[1], shape[0], bias=has_bias, **options)
    else:
        raise ValueError(f"its weight has {len(shape)} dimensions")
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.zeros(parameter.shape), requires_grad=False))
    return layer


def _plant(root: nn.Module, path: str, layer: nn.Module) -> None:
    """Put a layer into a module under its path."""
    from torch import nn

    *folders, last = path.split(".")
    for folder in folders:
        root.add_module(folder, inner := nn.Module())
        root = inner
    root.add_module(last, layer)


@contextmanager
def _in_one_line(owner: str, module: str) -> Iterator[None]:
    """Say in one line what PEFT cannot do; its warnings are about training."""
    import torch

    try:
        with ONE_AT_A_TIME, warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore")
            yield
    except CheckpointError:
        raise
    except Exception as error:  # whatever PEFT's classes raise for a config or for shapes
        said = " ".join(str(error).split())[:300].rstrip(".")
        problem = f"{owner}: PEFT cannot apply it to {module}: {said}."
        raise CheckpointError(
            problem, f"Check its {CONFIG_FILE}, and the base model: `base_model=REF`."
        ) from None
