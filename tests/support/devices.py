"""A device that is not the CPU, on a machine that has none: real numbers that claim to be there.

Inside [`elsewhere`] tensors can be made on `cuda` or `mps`, in every thread. They compute on the
CPU, and behave as on such a device where that matters: an operation that mixes devices is an error,
NumPy and addresses are out of reach, `mps` has no float64. What crosses between the devices, and
what makes the CPU wait for the device, is counted.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only

CPU = torch.device("cpu")
TO, FROM, WAIT = "to the device", "from the device", "waiting for the device"

aten = torch.ops.aten

# On CUDA these look at their result, or at whether they converged, before they return.
WAITING = {
    aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._linalg_eigh,
    aten._linalg_svd, aten.linalg_cholesky, aten.linalg_eig, aten.linalg_inv, aten._linalg_solve_ex,
    aten.repeat_interleave, aten._unique2, aten.bincount,
}  # fmt: skip
COPIES = {aten._to_copy, aten.copy_}
OUT_OF_REACH = {Tensor.numpy, Tensor.__array__, Tensor.data_ptr, Tensor.untyped_storage}


class MixedDevicesError(RuntimeError):
    """An operation was given tensors of several devices."""


class Elsewhere(Tensor):
    """A tensor on the device; `near` holds its numbers."""

    near: Tensor
    own: Device

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, near: Tensor, own: Device) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(
            cls,
            near.size(),
            strides=near.stride(),
            storage_offset=near.storage_offset(),
            dtype=near.dtype,
        )
        made.near, made.own = near, own
        return made

    def __init__(self, near: Tensor, own: Device) -> None:
        super().__init__()

    @property
    def device(self) -> torch.device:
        """The device, as Python sees it: to torch, which was built without it, this is the CPU."""
        return torch.device(self.own.kind, 0)

    @classmethod
    def __torch_dispatch__(
        cls,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        leaves = tree_leaves((args, kwargs))
        own = next(leaf.own for leaf in leaves if isinstance(leaf, Elsewhere))
        return own.call(func, args, dict(kwargs or {}))


class Device(TorchFunctionMode):
    """The device, and what it has counted, by thread and kind."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.counts, self.lock = kind, Counter[tuple[str, str]](), threading.Lock()
        self.largest: int | None = None  # bytes of a tensor that there is memory for

    def note(self, what: str) -> None:
        thread = threading.current_thread().name.rpartition("_")[0] or "main"
        with self.lock:
            self.counts[thread, what] += 1

    def counted(self, what: str, thread: str | None = None) -> int:
        """How often it happened, in all threads or in those of a pool."""
        return sum(
            n for key, n in self.counts.items() if key[1] == what and thread in (None, key[0])
        )

    def is_here(self, device: Any) -> bool:
        """Whether this is the device that a call names."""
        named = isinstance(device, (str, torch.device)) and torch.device(device).type == self.kind
        return named or (isinstance(device, int) and not isinstance(device, bool))

    def put(self, near: Tensor) -> Elsewhere:
        """Numbers of the CPU as a tensor of the device, in memory of its own."""
        return self._made(near.clone(memory_format=torch.preserve_format))

    def _made(self, near: Tensor) -> Elsewhere:
        if self.kind == "mps" and near.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        if self.largest is not None and near.nbytes > self.largest:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return Elsewhere(near, self)

    # What Python calls

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is Tensor.to:
            return self._to(*args, **kwargs)
        if func in (Tensor.cpu, Tensor.cuda):
            return self._to(args[0], CPU if func is Tensor.cpu else self.kind)
        if func is Tensor.type_as:
            return self._to(args[0], args[1])
        if any(isinstance(leaf, Elsewhere) for leaf in tree_leaves((args, kwargs))):
            return self._of_tensors(func, args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        if not self.is_here(kwargs.get("device")):
            return func(*args, **kwargs)
        assert not pinned, "only memory of the CPU can be pinned"
        if func in (torch.tensor, torch.as_tensor):
            self.note(TO)
        return self._made(func(*args, **{**kwargs, "device": CPU}))

    def _of_tensors(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in OUT_OF_REACH:
            raise TypeError(f"{func.__name__} is not to be had of a tensor on {self.kind}")
        if func in (Tensor.__getitem__, Tensor.__setitem__, Tensor.norm):
            return self.call(func, args, kwargs)
        if func is Tensor.tolist:
            self.note(FROM)
            self.note(WAIT)
            return args[0].near.tolist()
        return func(*args, **kwargs)

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given = [*args, *kwargs.values()]
        dtype, device = tensor.dtype, tensor.device
        for value in given:
            if isinstance(value, Tensor):
                dtype, device = value.dtype, value.device
            elif isinstance(value, torch.dtype):
                dtype = value
            elif isinstance(value, (str, torch.device)):
                device = torch.device(value)
        near = tensor.near if isinstance(tensor, Elsewhere) else tensor
        if device.type == tensor.device.type:
            copies = kwargs.get("copy") or dtype != tensor.dtype
            if not copies:
                return tensor
            made = near.to(dtype, copy=True)
            return self._made(made) if isinstance(tensor, Elsewhere) else made
        if self.is_here(device):
            self.note(TO)
            return self.put(near.to(dtype))
        assert device.type == "cpu", device
        self.note(FROM)
        self.note(WAIT)
        return near.to(dtype, copy=True)

    # What it comes down to

    def call(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation on the numbers."""
        packet = getattr(func, "overloadpacket", func)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = [leaf for leaf in leaves if isinstance(leaf, Elsewhere)]
        strangers = [t for t in leaves if not isinstance(t, Elsewhere) and t.dim()]
        if packet in COPIES:
            self._note_copy(args, kwargs)
        elif strangers:
            shapes = [tuple(t.shape) for t in strangers]
            raise MixedDevicesError(f"{func}: tensors of the CPU, {shapes}, beside {self.kind}")
        if packet in WAITING or self._looks_for_indices(packet, args):
            self.note(WAIT)
        leaves_device = kwargs.get("device")
        to_cpu = leaves_device is not None and not self.is_here(leaves_device)
        if leaves_device is not None:
            kwargs["device"] = CPU
        kwargs.pop("driver", None)  # of cuSOLVER
        kwargs.pop("pin_memory", None)
        known = {id(t.near): t for t in here}
        shapes = [t.shape for t in here]
        near_args, near_kwargs = tree_map_only(Elsewhere, lambda t: t.near, (args, kwargs))
        found = func(*near_args, **near_kwargs)
        assert [t.near.shape for t in here] == shapes, f"{func} changed a shape in place"
        if to_cpu or (packet is aten.copy_ and not isinstance(args[0], Elsewhere)):
            return found
        return tree_map_only(
            Tensor, lambda t: known[id(t)] if id(t) in known else self._made(t), found
        )

    def _note_copy(self, args: Any, kwargs: dict[str, Any]) -> None:
        pair = args[:2] if len(args) > 1 else (None, args[0])
        if len(args) > 1 and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor):
            there, here = (isinstance(t, Elsewhere) for t in pair)
            if there != here:
                self.note(TO if there else FROM)
                if here:
                    self.note(WAIT)
        elif kwargs.get("device") is not None and not self.is_here(kwargs["device"]):
            self.note(FROM)
            self.note(WAIT)

    def _looks_for_indices(self, packet: Any, args: Any) -> bool:
        """Whether entries are chosen by a mask, of which the places have to be known first."""
        indexing = (Tensor.__getitem__, Tensor.__setitem__, aten.index, aten.index_put_)
        chosen = tree_leaves(args[1]) if packet in indexing else []
        return any(isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in chosen)


@contextmanager
def elsewhere(kind: str = "cuda") -> Iterator[Device]:
    """Let tensors be made on a device of this kind, in this thread and those started meanwhile."""
    device, run = Device(kind), threading.Thread.run

    def run_there(thread: threading.Thread) -> None:
        with device:
            run(thread)

    with pytest.MonkeyPatch.context() as patch, device:
        patch.setattr(threading.Thread, "run", run_there)
        yield device
