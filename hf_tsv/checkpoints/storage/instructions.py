"""Interpreter of the pickle instructions that build tensors and containers.

Nothing that a pickle names is imported or called, and nothing is built that takes more memory than
a constant times the pickle itself.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from hf_tsv.checkpoints.storage.dtypes import DTYPES, DTYPES_OF_TORCH

# Most instructions of a pickle, of which 50,000 tensors take 1.6 million; most arguments of a call,
# since long tuples that are used over and over would take for ever.
MAX_STEPS, MOST_ARGUMENTS = 2_500_000, 20

MAPPINGS = ("OrderedDict", "defaultdict", "Counter")

STORAGES = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "UntypedStorage": "U8", "BoolStorage": "BOOL",
}  # fmt: skip

DTYPE_NAME = re.compile(r"bool|bit|(b?float|complex|u?int|qu?int|bits)\d\w*")
"""Names of torch's data types, which are not looked up there: its `getattr` runs code."""
ALIASES = {
    "half": "float16", "float": "float32", "double": "float64", "short": "int16", "int": "int32",
    "long": "int64", "chalf": "complex32", "cfloat": "complex64", "cdouble": "complex128",
}  # fmt: skip
"""Other names of some of them."""

# Supported instructions by name, besides those of `_Steps`.
VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
          "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES")  # fmt: skip
NEW: dict[str, Callable[[], Any]] = {
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set, "EMPTY_TUPLE": tuple,
}  # fmt: skip

# Modules whose functions no checkpoint has a use for. Nothing is ever called: a file that names
# them is refused because it attacks whoever unpickles it.
ATTACKS = frozenset({
    "os", "posix", "nt", "sys", "subprocess", "multiprocessing", "shutil", "socket", "pty",
    "platform", "ctypes", "importlib", "runpy", "pickle", "marshal", "code", "codeop", "webbrowser",
    "asyncio", "commands", "pip", "pydoc", "timeit", "cProfile", "bdb", "pdb", "urllib", "http",
    "requests", "operator", "torch.hub", "numpy.testing",
})  # fmt: skip
TYPES_OF_PYTHON = ("set", "frozenset", "complex", "bytearray", "list", "dict", "tuple", "slice",
                   "range", "int", "float", "str", "bool", "bytes", "object")  # fmt: skip
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True)
class Skipped:
    """Object of another type than a tensor's, of which only the type's name is known."""

    type: str


@dataclass(frozen=True, slots=True)
class _Named:
    """Name of an object that a pickle would import."""

    module: str
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    """Entry of the archive: its key, and the type of its values."""

    key: str
    dtype: object


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """Tensor as the pickle describes it, with nothing checked."""

    key: str
    dtype: object
    offset: Any
    shape: Any
    stride: Any
    as_stored: bool


def _is_attack(module: str, name: str) -> bool:
    """Tell whether a pickle that imports this name would run code of its author's choice."""
    if module in ("builtins", "__builtin__"):
        return name not in TYPES_OF_PYTHON
    if module == "torch":
        is_dtype = name in ALIASES or DTYPE_NAME.fullmatch(name)
        return not (is_dtype or name.endswith("Storage") or name in ("Size", "Tensor", "device"))
    if module == "torch._utils":
        return not name.startswith("_rebuild_")
    parts = module.split(".")
    above = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return "." in name or bool(above & ATTACKS)


def _dtype_of(value: object) -> object:
    """Data type of a storage or type object, or the name of an unknown one for errors."""
    if not isinstance(value, _Named):
        return None
    if value.name in STORAGES:
        return DTYPES[STORAGES[value.name]]
    if value.module != "torch":
        return value.name
    name = ALIASES.get(value.name, value.name)
    return DTYPES_OF_TORCH.get(name, name)


def _called(function: object, arguments: object) -> Any:
    """Result of a pickle's call, as far as it matters: tensors and mappings."""
    if not isinstance(function, _Named) or not isinstance(arguments, tuple):
        return Skipped("of a call")
    kind = function.name.removeprefix("_rebuild_")
    if function.module == "collections" and function.name in MAPPINGS:
        return {}
    if not function.module.startswith("torch"):
        return Skipped(f"{function.module}.{function.name}")
    if len(arguments) > MOST_ARGUMENTS:
        raise ValueError("more arguments than any tensor has")
    if kind in ("parameter", "parameter_with_state", "Parameter"):
        return arguments[0] if arguments else None
    if kind == "from_type_v2":
        return _called(arguments[0], arguments[2])
    if not function.name.startswith("_rebuild_"):
        return Skipped(f"{function.module}.{function.name}")
    if kind not in ("tensor", "tensor_v2", "tensor_v3"):
        return SavedTensor("", kind, 0, (), (), as_stored=False)
    storage, offset, shape, stride, *more = arguments
    if not isinstance(storage, _Storage):
        raise ValueError("a tensor of something else")
    typed = kind == "tensor_v3"  # the only kind that carries its own type
    dtype = _dtype_of(more[2]) if typed else storage.dtype
    bits = more[3:] if typed else more[2:]  # flags of values stored negated or conjugated
    return SavedTensor(storage.key, dtype, offset, shape, stride, as_stored=not any(bits))


def described(raw: bytes) -> Any:
    """Content that a pickle describes: containers, [`SavedTensor`]s, and [`Skipped`] for all else.

    Raises:
        `UnpicklingError`: it has what no checkpoint has, or would run code.
        `OverflowError`: it has more instructions than any model needs.
    """
    steps = _Steps()
    known = steps.known()
    for count, (instruction, argument, _) in enumerate(pickletools.genops(raw)):
        if count == MAX_STEPS:
            raise OverflowError
        if instruction.name not in known:
            raise ValueError(instruction.name)
        known[instruction.name](argument)
    return steps.stack.pop()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise pickle.UnpicklingError("a name that is no text")
    return value


class _Steps:
    """Interpreter of a pickle's instructions that builds only containers and descriptions."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def known(self) -> dict[str, Callable[[Any], None]]:
        """Functions by name of the instruction; not kept here, for a circle would live on."""
        push = self.stack.append
        return {
            **dict.fromkeys(VALUES, push),
            **{name: partial(self._new, kind) for name, kind in NEW.items()},
            **{name: partial(self._tuple, length) for name, length in TUPLES.items()},
            **dict.fromkeys(("BINPUT", "LONG_BINPUT"), self._put),
            **dict.fromkeys(("BINGET", "LONG_BINGET"), lambda place: push(self._memo[place])),
            **dict.fromkeys(("PROTO", "STOP"), lambda _: None),
            "NONE": lambda _: push(None),
            "NEWTRUE": lambda _: push(True),
            "NEWFALSE": lambda _: push(False),
            "MARK": lambda _: self._marks.append(len(self.stack)),
            "TUPLE": lambda _: push(tuple(self._since_mark())),
            "APPEND": lambda _: self._append([self.stack.pop()]),
            "APPENDS": lambda _: self._append(self._since_mark()),
            "SETITEM": lambda _: self._set([self.stack.pop(-2), self.stack.pop()]),
            "SETITEMS": lambda _: self._set(self._since_mark()),
            "GLOBAL": self._named,
            "BINPERSID": self._storage,
            "REDUCE": self._call,
            "NEWOBJ": self._call,
            "NEWOBJ_EX": self._call_with_names,
            "BUILD": lambda _: self.stack.pop(),
            "FRAME": lambda _: None,
            "MEMOIZE": lambda _: self._put(len(self._memo)),
            "STACK_GLOBAL": self._named_by_stack,
            "ADDITEMS": lambda _: self._append(self._since_mark()),
            "FROZENSET": lambda _: push(frozenset(map(id, self._since_mark()))),
        }

    def _since_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _new(self, kind: Callable[[], Any], _: None) -> None:
        self.stack.append(kind())

    def _tuple(self, length: int, _: None) -> None:
        items = tuple(self.stack[-length:])
        del self.stack[-length:]
        self.stack.append(items)

    def _put(self, place: int) -> None:
        self._memo[place] = self.stack[-1]

    def _append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        """Set only simple keys: hashing deeply nested tuples overflows the C stack."""
        target = self.stack[-1]
        if isinstance(target, dict):
            pairs = zip(items[::2], items[1::2], strict=True)
            target.update((k, v) for k, v in pairs if isinstance(k, str | int))

    def _named(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        if _is_attack(module, name):
            raise pickle.UnpicklingError(f"{module}.{name}")
        self.stack.append(_Named(module, name))

    def _named_by_stack(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self._named(f"{_text(module)} {_text(name)}")

    def _call_with_names(self, _: None) -> None:
        self.stack.pop()
        self._call(_)

    def _storage(self, _: None) -> None:
        found = self.stack.pop()
        # Nothing else is examined: comparing or printing deeply nested tuples takes for ever.
        few = isinstance(found, tuple) and 3 <= len(found) <= MOST_ARGUMENTS
        if not few or not all(isinstance(found[i], str) for i in (0, 2)) or found[0] != "storage":
            raise ValueError("no storage")
        self.stack.append(_Storage(found[2], _dtype_of(found[1])))

    def _call(self, _: None) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _called(self.stack[-1], arguments)
