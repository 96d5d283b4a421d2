"""Memory of the head: chunk lengths and bytes on CUDA, and buffers on the CPU, kept from one call to the next.

On CUDA a chunk's logits, or their exponentials, stay in memory until its gradients are formed. Long chunks are better,
because the sum of dweight, fp32 [V, H], is read and written once per chunk; so a chunk is as long as its memory allows.

On the CPU the first write to a page makes the kernel find and clear it: for a chunk's logits that costs as much as all
passes over them. So the largest released block of each dtype is kept, as CUDA's allocator would.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from megatron_dypo.kernels.vocab import TILES

PITCH = 128  # rows of logits are a multiple of it apart, so that all loads and stores are of 16 bytes

# Triton's row kernels: fp32 logits of the whole vocabulary, at most 1 GiB
CHUNK, CHUNK_ELEMENTS = 4096, 256 << 20

# the fused kernel: a chunk that keeps its exponentials, at most KEPT_BYTES of them, and one that does not
KEPT_CHUNK, KEPT_BYTES = 8192, 832 << 20
FUSED_CHUNK = 16384
BLOCK_T = BLOCK_V = 128  # tokens and columns that a program multiplies at a time
PART = 4 * BLOCK_V  # columns per program; their statistics are joined afterwards
PARTIAL = 4 * 4  # bytes of statistics per token

_kept: dict[torch.dtype, Tensor] = {}


def pitch(width: int) -> int:
    """Return the elements from one row of ``width`` columns to the next."""
    return -(-width // PITCH) * PITCH


def kept_chunk(tokens: int, width: int, tiles: int, itemsize: int) -> int:
    """Return the tokens per chunk if exponentials are kept: chunks of about one length, in whole blocks."""
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
    """Return the peak bytes that a training pass of the head needs on CUDA in addition to inputs and ``main_grad``.

    ``vocab``: padded rows of the whole weight, divided among ``ranks``. Includes the gradient of the hidden states
    (under tensor parallelism also in fp32), but nothing with only a few numbers per token. ``fused``: for the fused
    kernels or the others; None: those that ``dtype`` uses.
    """
    tiles, item = max(1, TILES // ranks), dtype.itemsize
    width = -(-vocab // TILES)
    if fused or (fused is None and dtype == torch.bfloat16):
        chunk = kept_chunk(tokens, width, tiles, item)
        kept = chunk * tiles * (pitch(width) * item + -(-width // PART) * PARTIAL)
    else:
        chunk = min(CHUNK, CHUNK_ELEMENTS // vocab // 16 * 16, -(-tokens // 16) * 16)
        kept = chunk * pitch(width) * (tiles * 4 + item)
    # dhidden's sum over tiles; rows of hidden states, selected if some have no slope, and scaled
    chunks = kept + chunk * hidden * (4 + 2 * item)
    if ranks == 1:
        return tokens * hidden * item + chunks
    return tokens * hidden * 4 + max(chunks, tokens * hidden * item)


def take(elements: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return at least ``elements`` uninitialised elements on ``like``'s device, the caller's until given back."""
    if like.device.type != "cpu":
        return like.new_empty(elements, dtype=dtype)
    block = _kept.pop(dtype, None)
    return _fresh(elements, dtype) if block is None or len(block) < elements else block


def give_back(block: Tensor) -> None:
    """Return a block from ``take``; the caller must not use it any more."""
    if block.device.type == "cpu" and len(block) > len(_kept.get(block.dtype, ())):
        _kept[block.dtype] = block


def release() -> None:
    """Release all buffers."""
    _kept.clear()


def held() -> int:
    """Return the bytes kept for the next calls."""
    return sum(block.nbytes for block in _kept.values())


def _fresh(elements: int, dtype: torch.dtype) -> Tensor:
    """Allocate in huge pages if Linux has them: the products then have fewer TLB misses."""
    with torch.inference_mode(False):  # a later call outside of it must be able to write to it
        if elements == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(elements, dtype=dtype)
        memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # the kernel may not have them
            memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=dtype)
