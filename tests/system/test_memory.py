"""Memory of large tensors."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch

from hf_tsv.system import memory
from hf_tsv.system.memory import empty, reused

MB = 1 << 20

pytestmark = pytest.mark.skipif(not memory._huge_pages(), reason="this system offers no huge pages")


def block(size: int) -> torch.Tensor:
    return empty(size, dtype=torch.uint8)


def kept() -> list[int]:
    """Sizes of the freed blocks, in MB."""
    return [len(b) // MB for b in memory._freed.blocks]


@pytest.mark.parametrize("shape", [(0,), (3,), (1 << 20, 3), (1100, 1200)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_an_empty_tensor_is_like_any_other(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = empty(*shape, dtype=dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    tensor.fill_(3)
    assert bool((tensor == 3).all())


def test_freed_memory_is_used_again() -> None:
    with reused():
        first = block(9 * MB)
        place = first.data_ptr()
        view = first[5:].view(-1)
        del first
        assert kept() == []  # something still looks at it
        del view
        assert kept() == [10]
        assert block(10 * MB - 3).data_ptr() == place
    assert kept() == []


def test_what_is_kept_makes_way_for_another_size() -> None:
    with reused():
        held = [block(size * MB) for size in (2, 4, 10, 6)]
        while held:
            del held[0]
        assert kept() == [2, 4, 10, 6]
        other = block(7 * MB + 1)  # as many of the oldest as it is large
        assert kept() == [6]
        del other
        assert kept() == [6, 8]


def test_live_tensors_never_share_memory() -> None:
    with reused():
        held = []
        for i in range(40):
            held.append(block((1 + i % 4) * 2 * MB).fill_(i))
            if i % 3 == 0:
                del held[len(held) // 2]
            gc.collect(0)
        assert all(len(set(t[:: MB // 2].tolist())) == 1 for t in held)
        spans = sorted((t.data_ptr(), t.data_ptr() + t.numel()) for t in held)
        assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def test_what_is_kept_can_be_given_back() -> None:
    with reused():
        held = [block(2 * MB), block(4 * MB)]
        held.pop()
        assert kept() == [4]
        memory.give_back()
        assert kept() == []
        del held
        assert kept() == [2]


def test_too_little_memory_is_not_an_error_of_the_disk() -> None:
    with pytest.raises(MemoryError):
        empty(1 << 50, dtype=torch.uint8)


def test_nothing_is_kept_outside() -> None:
    with reused():
        with reused():
            inner = block(4 * MB)
        del inner
        assert kept() == [4]
        late = block(2 * MB)
    assert kept() == []
    del late
    assert kept() == []
