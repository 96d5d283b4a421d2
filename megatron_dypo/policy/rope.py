"""RoPE: frequencies, scaled as Hugging Face's ``rope_type`` says, and the rotation of packed queries and keys.

The angles of a micro-batch are formed once, from its positions; mcore's unfused form would form them in every layer,
for queries and for keys, sequence by sequence, by offsets that the host must know. Legend: T tokens, A heads, D head
width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from megatron_dypo.policy.shape import ModelShape, RopeScaling

RECOMPILED = 64  # times at most, for all models of a process


def frequencies(shape: ModelShape) -> Tensor:
    """[D / 2], fp32, in radians a token."""
    plain = 1.0 / shape.rope_base ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    return {"linear": lambda: plain / scaling.factor, "llama3": lambda: _llama3(plain, scaling)}[scaling.rope_type]()


def angles(frequencies: Tensor, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(cosines, sines), each [T, 1, D], formed in fp32."""
    half = positions_T[:, None].float() * frequencies
    whole_T1D = torch.cat([half, half], dim=-1)[:, None]
    return whole_T1D.cos().to(dtype), whole_T1D.sin().to(dtype)


def rotate(x_TAD: Tensor, cosines_T1D: Tensor, sines_T1D: Tensor) -> Tensor:
    """Each pair (i, i + D / 2) of a head turned by its token's angle."""
    first, second = x_TAD.chunk(2, dim=-1)
    return x_TAD * cosines_T1D + torch.cat([-second, first], dim=-1) * sines_T1D


@cache
def rotation(compiled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """``rotate``; ``compiled`` by torch it is one pass over memory, forward and backward.

    Queries and keys, with and without a gradient, of one size and of any are compiled each by itself: 6 times for a
    model. At its limit of 8 torch would go on uncompiled, in silence, and the two passes round differently.
    """
    if not compiled:
        return rotate
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, RECOMPILED)
    return torch.compile(rotate)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Llama 3.1's: long waves are stretched by ``factor``, short ones kept, and what lies between is blended."""
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    waves = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stretched = torch.where(waves > original / low, plain / factor, plain)
    smooth = (original / waves - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = (waves >= original / high) & (waves <= original / low)
    return torch.where(between, blended, stretched)
