"""RoPE's frequencies, scaled as Hugging Face's ``rope_type`` says. Legend: D head width."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_dypo.policy.shape import ModelShape, RopeScaling


def frequencies(shape: ModelShape) -> Tensor:
    """[D / 2], fp32, in radians a token."""
    plain = 1.0 / shape.rope_base ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    return {"linear": lambda: plain / scaling.factor, "llama3": lambda: _llama3(plain, scaling)}[scaling.rope_type]()


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
