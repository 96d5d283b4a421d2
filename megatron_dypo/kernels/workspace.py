"""Memory for a chunk's logits on the CPU, kept from one call to the next.

A process's first write to a page has the kernel find and clear it: for a chunk's logits that costs as much as all the
passes over them. So the largest block of each dtype that a call has given back is kept, as CUDA's allocator would.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

_kept: dict[torch.dtype, Tensor] = {}


def take(elements: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """At least so many, uninitialised, on ``like``'s device: the caller's alone, until it may give them back."""
    if like.device.type != "cpu":
        return like.new_empty(elements, dtype=dtype)
    block = _kept.pop(dtype, None)
    return _fresh(elements, dtype) if block is None or len(block) < elements else block


def give_back(block: Tensor) -> None:
    """What ``take`` gave: nobody may use it any more."""
    if block.device.type == "cpu" and len(block) > len(_kept.get(block.dtype, ())):
        _kept[block.dtype] = block


def release() -> None:
    """Keep nothing."""
    _kept.clear()


def held() -> int:
    """Bytes kept for the next calls."""
    return sum(block.nbytes for block in _kept.values())


def _fresh(elements: int, dtype: torch.dtype) -> Tensor:
    """In huge pages where Linux gives them: the products then miss fewer addresses."""
    with torch.inference_mode(False):  # a later call outside of it must be able to write there
        if elements == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(elements, dtype=dtype)
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype)
