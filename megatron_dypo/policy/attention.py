"""Core attention over packed sequences (THD) with torch's SDPA, for mcore's self-attention module.

Segments of similar length are stacked into one causal SDPA call: padding sits behind each segment's last token, where
a causal mask never looks, so stacking changes no result. Legend: T tokens, B segments of a bucket, L their padded
length, A heads, D head width.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def padded_length(length: int) -> int:
    """Round up to a multiple of 16, or of an eighth of the next power of two: at most about 14% padding when long."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


@dataclass(frozen=True)
class Segments:
    """How packed tokens stack into buckets of equal padded length, and back.

    ``buckets``: (gather [B * L] token indices, B, kept [n] slots that hold real tokens); ``order`` [T] puts the kept
    slots of all buckets, one after the other, back into packing order.
    """

    buckets: list[tuple[Tensor, int, Tensor]]
    order: Tensor

    @classmethod
    def of(cls, cu_seqlens: list[int], device: torch.device) -> Segments:
        members = defaultdict(list)
        for start, end in itertools.pairwise(cu_seqlens):
            if end > start:
                members[padded_length(end - start)].append((start, end - start))
        buckets, tokens = [], []
        for length, segments in sorted(members.items()):
            starts, sizes = torch.tensor(segments).unsqueeze(-1).unbind(1)
            slots = torch.arange(length).unsqueeze(0)
            real_BL = slots < sizes
            gather_BL = torch.where(real_BL, starts + slots, starts)
            buckets.append(
                (gather_BL.flatten().to(device), len(segments), real_BL.flatten().nonzero().squeeze(1).to(device))
            )
            tokens.append(gather_BL[real_BL])
        return cls(buckets, torch.cat(tokens).argsort().to(device))


class PackedAttention(torch.nn.Module):
    """mcore core attention: causal softmax attention within each packed segment. No weights."""

    def __init__(
        self, config, layer_number: int, attn_mask_type, attention_type: str, softmax_scale: float | None = None, **_
    ):
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, *, packed_seq_params, **_
    ) -> Tensor:
        """query [T, A, D], key and value [T, A_kv, D] -> [T, A * D]; ``packed_seq_params.segments``: how T is cut."""
        segments, outputs = packed_seq_params.segments, []
        for gather, rows, kept in segments.buckets:
            q, k, v = (x.index_select(0, gather).unflatten(0, (rows, -1)).transpose(1, 2) for x in (query, key, value))
            grouped = q.shape[1] != k.shape[1]
            out_BALD = scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
            outputs.append(out_BALD.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, kept))
        return torch.cat(outputs).index_select(0, segments.order)
