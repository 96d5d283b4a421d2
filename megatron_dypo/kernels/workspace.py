"""How much the head takes: chunks and bytes on CUDA, and memory on the CPU, kept from one call to the next.

On CUDA a chunk's logits, or their exponentials, are all there until its gradients are formed. Long chunks are better,
as the sum of dweight, fp32 [V, H], is read and written once a chunk; so a chunk is as long as its memory allows.

On the CPU a process's first write to a page has the kernel find and clear it: for a chunk's logits that costs as much
as all the passes over them. So the largest block of each dtype that a call has given back is kept, as CUDA's allocator
would.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from megatron_dypo.kernels.vocab import TILES

PITCH = 128  # the distance of two rows of logits is a multiple of it, so that all loads and stores are of 16 bytes

# Triton's row kernels: fp32 logits of the whole vocabulary, at most 1 GiB
CHUNK, CHUNK_ELEMENTS = 4096, 256 << 20

# the fused kernel, of a chunk that keeps its exponentials, at most KEPT_BYTES of them, and of one that does not
KEPT_CHUNK, KEPT_BYTES = 8192, 832 << 20
FUSED_CHUNK = 16384
BLOCK_T = BLOCK_V = 128  # tokens and columns that a program multiplies at a time
PART = 4 * BLOCK_V  # columns of a program, whose statistics are joined afterwards
PARTIAL = 4 * 4  # bytes of them, a token

_kept: dict[torch.dtype, Tensor] = {}


def pitch(width: int) -> int:
    """Elements from one row of ``width`` columns to the next."""
    return -(-width // PITCH) * PITCH


def kept_chunk(tokens: int, width: int, tiles: int, itemsize: int) -> int:
    """Tokens of a chunk whose exponentials are kept: chunks of about one length, in whole blocks."""
    most = min(KEPT_CHUNK, KEPT_BYTES // (tiles * pitch(width) * itemsize))
    chunks = -(-max(1, tokens) // max(BLOCK_T, most // BLOCK_T * BLOCK_T))
    return -(-max(1, tokens) // (chunks * BLOCK_T)) * BLOCK_T


def head_bytes(
    tokens: int,
    hidden: int,
    vocab: int,
    dtype: torch.dtype = torch.bfloat16,
    ranks: int = 1,
    fused: bool | None = None,
) -> int:
    """Bytes on a CUDA device that a training pass of the head takes beside its inputs and ``main_grad``, at the peak.

    ``vocab``: padded rows of the whole weight, of which each of ``ranks`` has its share. The gradient of the hidden
    states is among them (under tensor parallelism also in fp32); what has a few numbers a token is not. ``fused``: of
    which kernels, if not of those that ``dtype`` goes to.
    """
    tiles, item = max(1, TILES // ranks), dtype.itemsize
    width = -(-vocab // TILES)
    if fused or (fused is None and dtype == torch.bfloat16):
        chunk = kept_chunk(tokens, width, tiles, item)
        kept = chunk * tiles * (pitch(width) * item + -(-width // PART) * PARTIAL)
    else:
        chunk = min(CHUNK, CHUNK_ELEMENTS // vocab // 16 * 16, -(-tokens // 16) * 16)
        kept = chunk * pitch(width) * (tiles * 4 + item)
    # dhidden's sum over tiles; rows of hidden states, picked where some have no slope, and scaled
    chunks = kept + chunk * hidden * (4 + 2 * item)
    if ranks == 1:
        return tokens * hidden * item + chunks
    return tokens * hidden * 4 + max(chunks, tokens * hidden * item)


def take(elements: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """At least ``elements``, uninitialised, on ``like``'s device: the caller's alone, until it gives them back."""
    if like.device.type != "cpu":
        return like.new_empty(elements, dtype=dtype)
    block = _kept.pop(dtype, None)
    return _fresh(elements, dtype) if block is None or len(block) < elements else block


def give_back(block: Tensor) -> None:
    """What ``take`` gave: the caller may not use it any more."""
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
