"""Core attention over packed sequences (THD) for mcore's self-attention module: torch's SDPA or flash; and RoPE.

Under context parallelism a rank holds two slices of each sequence as queries, and gathers the keys and values of all
ranks. The work is divided into blocks: consecutive queries that attend to the keys of their sequence up to their own
last one. Without context parallelism a block is a whole sequence.

RoPE's angles are computed once per micro-batch, from its positions; mcore's unfused form would compute them in every
layer, for queries and for keys, sequence by sequence, from offsets that the host must know. Frequencies are scaled
according to Hugging Face's ``rope_type``.

Legend: T this rank's tokens, A heads, D head width; B blocks of a bucket, Q and K their padded numbers of queries and
keys.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from megatron_dypo.models.shape import ModelShape, RopeScaling
from megatron_dypo.policy.micro_batch import held_tokens
from megatron_dypo.runtime.versions import accepted

RECOMPILED = 64  # limit per process, over all models


def frequencies(shape: ModelShape) -> Tensor:
    """Return RoPE's frequencies [D / 2], fp32, in radians per token."""
    plain = 1.0 / shape.rope_base ** (torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim)
    scaling = shape.rope_scaling
    if scaling is None:
        return plain
    return {"linear": lambda: plain / scaling.factor, "llama3": lambda: _llama3(plain, scaling)}[scaling.rope_type]()


def angles(frequencies: Tensor, positions_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (cosines, sines), each [T, 1, D], computed in fp32."""
    half = positions_T[:, None].float() * frequencies
    whole_T1D = torch.cat([half, half], dim=-1)[:, None]
    return whole_T1D.cos().to(dtype), whole_T1D.sin().to(dtype)


def rotate(x_TAD: Tensor, cosines_T1D: Tensor, sines_T1D: Tensor) -> Tensor:
    """Rotate each pair (i, i + D / 2) of a head by its token's angle."""
    first, second = x_TAD.chunk(2, dim=-1)
    return x_TAD * cosines_T1D + torch.cat([-second, first], dim=-1) * sines_T1D


@cache
def rotation(compiled: bool) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return ``rotate``; ``compiled`` by torch it is one pass over memory, forward and backward.

    Queries and keys, with and without a gradient, of one size and of any, are compiled separately: 6 times per model.
    At its limit of 8 torch would silently continue uncompiled, and the two passes would round differently.
    """
    if not compiled:
        return rotate
    from torch._dynamo import config

    config.recompile_limit = max(config.recompile_limit, RECOMPILED)
    return torch.compile(rotate)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Scale like Llama 3.1: stretch long waves by ``factor``, keep short ones, and blend those in between."""
    original, factor = scaling.original_max_position_embeddings, scaling.factor
    waves = 2 * math.pi / plain
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stretched = torch.where(waves > original / low, plain / factor, plain)
    smooth = (original / waves - low) / (high - low)
    blended = (1 - smooth) * stretched / factor + smooth * stretched
    between = (waves >= original / high) & (waves <= original / low)
    return torch.where(between, blended, stretched)


@dataclass(frozen=True)
class Block:
    """Queries [query, query + queries) of this rank, and keys [key, key + keys) of the packed sequences.

    Causal at the end: the last query sees all keys, the one before all but the last, and so on.
    """

    query: int
    queries: int
    key: int
    keys: int


@dataclass(frozen=True)
class LengthBucket:
    """Blocks stacked into one SDPA call, padded after each block's last query and key, which no real query sees.

    ``queries`` [B * Q] and ``keys`` [B * K] index tokens, ``kept`` [n] the slots of real queries; ``mask`` [B, 1, Q, K]
    marks the visible keys, None if all blocks are square and plain causal.
    """

    rows: int
    queries: Tensor
    keys: Tensor
    kept: Tensor
    mask: Tensor | None


class Segments:
    """The attention structure of a micro-batch's packed tokens, from its ``cu_seqlens``."""

    def __init__(self, cu_seqlens: list[int], device: torch.device, context: int = 1, context_rank: int = 0):
        self.context, self._device = context, device
        held = held_tokens(cu_seqlens, context)
        self._gathered = held.reshape(-1).argsort()  # a token's position among those gathered in the ranks' order
        self.blocks = []
        for start, end in itertools.pairwise(cu_seqlens):
            if context == 1:
                self.blocks.append(Block(start, end - start, start, end - start))
                continue
            size, query = (end - start) // (2 * context), start // context
            for half, slice_ in enumerate((context_rank, 2 * context - 1 - context_rank)):
                self.blocks.append(Block(query + half * size, size, start, (slice_ + 1) * size))
        self.blocks = [block for block in self.blocks if block.queries]

    @cached_property
    def buckets(self) -> list[LengthBucket]:
        """Group blocks of similar size, for SDPA."""
        members = defaultdict(list)
        for block in self._in_order_of_size:
            members[_size(block)].append(block)
        return [self._bucket(*size, blocks) for size, blocks in members.items()]

    @cached_property
    def order(self) -> Tensor:
        """Return the index [T] that puts the kept queries of all buckets back into this rank's order."""
        tokens = [np.arange(block.query, block.query + block.queries) for block in self._in_order_of_size]
        return self._tensor(np.concatenate(tokens).argsort())

    @cached_property
    def varlen(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Return for flash attention: (keys of all blocks, offsets of queries, of keys, maximum lengths of each)."""
        keys = np.concatenate([self._gathered[block.key : block.key + block.keys] for block in self.blocks])
        sizes = np.array([(block.queries, block.keys) for block in self.blocks])
        offsets = np.pad(sizes.cumsum(0), ((1, 0), (0, 0))).astype(np.int32)
        return self._tensor(keys), *map(self._tensor, offsets.T.copy()), *sizes.max(0).tolist()

    @property
    def _in_order_of_size(self) -> list[Block]:
        return sorted(self.blocks, key=lambda block: (_size(block), block.query))

    def _bucket(self, plain: bool, most_queries: int, most_keys: int, blocks: list[Block]) -> LengthBucket:
        table = np.array([(block.query, block.queries, block.key, block.keys) for block in blocks])
        query, queries, key, keys = table.T[..., None]
        slots, key_slots = np.arange(most_queries), np.arange(most_keys)
        real_BQ = slots < queries
        mask = None if plain else self._tensor((key_slots <= (slots + keys - queries)[..., None])[:, None])
        return LengthBucket(
            rows=len(blocks),
            queries=self._tensor(np.where(real_BQ, query + slots, query).reshape(-1)),
            keys=self._tensor(self._gathered[np.where(key_slots < keys, key + key_slots, key)].reshape(-1)),
            kept=self._tensor(np.flatnonzero(real_BQ)),
            mask=mask,
        )

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def padded_length(length: int) -> int:
    """Round up to a multiple of 16, or of an eighth of the next power of two: at most a quarter more, 8% on average."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def _size(block: Block) -> tuple[bool, int, int]:
    return block.queries == block.keys, padded_length(block.queries), padded_length(block.keys)


def sdpa(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attend: query [T, A, D], key and value [T of all ranks, A_kv, D] -> [T, A * D]."""
    repeats = repeats_of_keys(query.device.type, query.dtype, query.shape[1], key.shape[1])
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    outputs, grouped = [], query.shape[1] != key.shape[1]
    for bucket in segments.buckets:
        q, k, v = (
            x.index_select(0, index).unflatten(0, (bucket.rows, -1)).transpose(1, 2)
            for x, index in ((query, bucket.queries), (key, bucket.keys), (value, bucket.keys))
        )
        causal = bucket.mask is None
        out_BAQD = scaled_dot_product_attention(
            q, k, v, attn_mask=bucket.mask, is_causal=causal, scale=scale, enable_gqa=grouped
        )
        outputs.append(out_BAQD.transpose(1, 2).flatten(0, 1).flatten(1).index_select(0, bucket.kept))
    return torch.cat(outputs).index_select(0, segments.order)


def repeats_of_keys(device: str, dtype: torch.dtype, heads: int, groups: int) -> int:
    """Return how often to repeat each of ``groups`` key heads for SDPA, so that no kernel writes scores [Q, K].

    On CUDA fp32 has no flash kernel, and the memory-efficient one needs as many key heads as query heads: with fewer,
    SDPA would fall back to plain products. Half precision and the CPU have kernels that take groups.
    """
    return heads // groups if device == "cuda" and dtype == torch.float32 else 1


def flash(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float) -> Tensor:
    """Attend as ``sdpa`` does, by torch's variable-length flash attention: CUDA, 16-bit types, no stacking, no mask."""
    from torch.nn.attention.varlen import varlen_attn

    keys, query_offsets, key_offsets, most_queries, most_keys = segments.varlen
    if segments.context > 1:
        key, value = key.index_select(0, keys), value.index_select(0, keys)
    options = varlen_options(varlen_attn, scale, grouped=query.shape[1] != key.shape[1])
    if "scale" not in options:  # torch 2.10 always divides by sqrt(D)
        query = query * (scale * math.sqrt(query.shape[-1]))
    return varlen_attn(query, key, value, query_offsets, key_offsets, most_queries, most_keys, **options).flatten(1)


def varlen_options(varlen_attn: Callable, scale: float, grouped: bool) -> dict[str, Any]:
    """Return the keywords that make this version of torch's ``varlen_attn`` causal; a block's last query sees all keys.

    2.10 has ``is_causal`` and no scale, later versions a window that is open to the left. From 2.12 on grouped queries
    must be announced; before, the operator accepts them as they are.
    """
    return accepted(varlen_attn, is_causal=True, window_size=(-1, 0), scale=scale, enable_gqa=grouped)


BACKENDS: dict[str, Callable[..., Tensor]] = {"sdpa": sdpa, "flash": flash}


class PackedAttention(torch.nn.Module):
    """mcore core attention: RoPE, and causal softmax attention within each packed sequence. It has no weights."""

    def __init__(
        self,
        config,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        softmax_scale: float | None = None,
        pg_collection=None,
        backend: str = "sdpa",
        compiled: bool = False,
        **_,
    ):
        super().__init__()
        self.rotate = rotation(compiled)
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)
        self.attend, self.context_group = BACKENDS[backend], pg_collection.cp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask=None, *, packed_seq_params, **_
    ) -> Tensor:
        """Map query [T, A, D], key and value [T, A_kv, D] to [T, A * D].

        ``packed_seq_params`` holds ``segments`` (how T is divided) and ``angles`` (of RoPE).
        """
        segments = packed_seq_params.segments
        query, key = (self.rotate(x, *packed_seq_params.angles) for x in (query, key))
        if segments.context > 1:  # in the backward pass each rank gets the sum of all ranks' gradients of its keys
            both = gather_from_sequence_parallel_region(torch.cat([key, value], dim=-1), group=self.context_group)
            key, value = both.split(key.shape[-1], dim=-1)
        return self.attend(query, key, value, segments, self.scale)
