"""Which tokens of packed sequences a context-parallel rank holds.

Causal attention gives late tokens more to do than early ones, so each sequence is cut into 2 x CP equal slices, and
rank r holds slices r and 2 x CP - 1 - r: the same work for all. It is the order that mcore's RoPE and Transformer
Engine expect of packed (THD) sequences.
"""

from __future__ import annotations

import itertools

import numpy as np


def aligned_to(context: int) -> int:
    """What a segment's length must be a multiple of."""
    return 2 * context if context > 1 else 1


def held_tokens(cu_seqlens: list[int], context: int) -> np.ndarray:
    """[context, T / context]: the packed tokens of each rank, in the order in which it holds them."""
    if context == 1:
        return np.arange(cu_seqlens[-1]).reshape(1, -1)
    shares = []
    for start, end in itertools.pairwise(cu_seqlens):
        slices = np.arange(start, end).reshape(2 * context, -1)
        shares.append(np.concatenate([slices[:context], slices[: context - 1 : -1]], axis=1))
    return np.concatenate(shares, axis=1)
