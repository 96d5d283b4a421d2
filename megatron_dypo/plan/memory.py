"""Bytes on the busiest GPU of a layout: weights, gradients, optimizer, activations, head, and vLLM (docs/memory.md).

Legend: P parameters of a rank, T tokens of a micro-batch on a rank, L layers, h hidden size, F MLP width, q and k
widths of all query and of all key heads, V padded vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_dypo.convert.families import FAMILIES
from megatron_dypo.convert.mapping import EMBEDDING_RULE, HEAD_RULE, NORM_RULE
from megatron_dypo.convert.rules import Rule
from megatron_dypo.plan.cluster import Candidate, Cluster, Work
from megatron_dypo.policy.shape import ModelShape

GIB = 2**30
WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12  # bytes a parameter in bf16: the optimizer's are a master copy and two moments
RESERVE = 5 * GIB  # CUDA's context, NCCL's buffers, CUDA graphs, and what an allocator cannot use
ENGINE_RESERVE = 2 * GIB  # vLLM's own activations and graphs
ENGINE_MOST = 0.9  # vLLM's share of a GPU at most
SEQUENCES = 8  # of the longest kind, the fewest that vLLM must have room for


@dataclass(frozen=True)
class Need:
    """Bytes on a trainer's GPU; ``engine`` is what vLLM can have there (0 with servers)."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    engine: float = 0.0

    @property
    def static(self) -> float:
        return self.weights + self.gradients + self.optimizer

    @property
    def policy(self) -> float:
        """In training, without vLLM."""
        return self.static + self.activations + self.head + RESERVE


@functools.lru_cache
def rank_parameters(shape: ModelShape, tensor: int, pipeline: int) -> int:
    """Parameters of the rank with the most: a stage at an end has the embedding, or the head, besides its layers."""
    layers = shape.num_layers // pipeline * _count(FAMILIES[shape.family].layer, shape, tensor)
    embedding, norm = (_count([rule], shape, tensor) for rule in (EMBEDDING_RULE, NORM_RULE))
    head = _count([HEAD_RULE], shape, tensor)  # of a last stage that is not the first, also where it is tied
    if pipeline == 1:
        return layers + embedding + norm + (0 if shape.tied_embeddings else head)
    return layers + max(embedding, head + norm)


def _count(rules: Iterable[Rule], shape: ModelShape, tensor: int) -> int:
    total = 0
    for rule in rules:
        parts = [torch.empty(size, device="meta") for size in rule.sizes(shape)]
        total += rule.fold(parts, shape).numel() // (1 if rule.axis is None else tensor)
    return total


def activation_bytes(shape: ModelShape, candidate: Candidate, tokens: float) -> float:
    """What the forward passes under way keep for their backward passes, in bf16.

    Per token and layer 8h + 6q + 4k + 6F, of which ``selective`` keeps all but the MLP's 6F and ``full`` 2h; what is
    recomputed exists for one layer at a time (Korthikanti et al. 2022, section 4, for this model).
    """
    h, ffn, q, k = _widths(shape)
    everything, without_mlp, inputs = 8 * h + 6 * q + 4 * k + 6 * ffn, 8 * h + 6 * q + 4 * k, 2 * h
    kept = {"none": everything, "selective": without_mlp, "full": inputs}[candidate.recompute]
    again = everything - kept
    layers = shape.num_layers
    if candidate.virtual > 1:
        layers *= 1 + (candidate.pipeline - 1) / (candidate.pipeline * candidate.virtual)
    return tokens * (layers * kept + again) / candidate.tensor


def _widths(shape: ModelShape) -> tuple[int, int, int, int]:
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    return shape.hidden_size, shape.ffn_hidden_size, query, key


def cache_bytes(shape: ModelShape) -> int:
    """Keys and values of one token, in bf16."""
    return 2 * 2 * shape.num_layers * shape.num_query_groups * shape.head_dim


def policy_need(shape: ModelShape, candidate: Candidate, work: Work) -> Need:
    """What training takes on the busiest rank. Sequence parallelism wherever tensor parallelism is."""
    count = rank_parameters(shape, candidate.tensor, candidate.pipeline)
    tokens = max(work.budget, work.longest) / candidate.context
    return Need(
        weights=WEIGHT * count,
        gradients=GRADIENT * count,
        optimizer=OPTIMIZER * count / candidate.shards,
        activations=activation_bytes(shape, candidate, tokens),
        head=tokens * shape.hidden_size * 8,  # hidden states in bf16, their gradient in fp32 and in bf16
    )


def engine_need(shape: ModelShape, tensor: int, work: Work) -> float:
    """The least that vLLM can work with on each of its ``tensor`` GPUs: weights, and room for a few sequences."""
    weights = WEIGHT * rank_parameters(shape, tensor, 1)
    return weights + SEQUENCES * work.longest * cache_bytes(shape) / tensor + ENGINE_RESERVE


def engine_room(shape: ModelShape, candidate: Candidate, cluster: Cluster, need: Need) -> float:
    """Bytes that vLLM can have on a GPU beside the policy, in turns with it, or alone."""
    most = ENGINE_MOST * cluster.memory
    if candidate.placement == "beside":
        return min(most, cluster.memory - need.policy)
    if candidate.placement == "turns":
        return min(most, cluster.memory - RESERVE)
    return most


def misfit(
    shape: ModelShape, candidate: Candidate, cluster: Cluster, work: Work, need: Need
) -> tuple[float, str] | None:
    """(bytes too many, the reason in words) where a candidate does not fit; None where it does."""
    over = need.policy - cluster.memory
    if over > 0:
        parts = f"weights, gradients, optimizer {need.static / GIB:.0f}, activations {need.activations / GIB:.0f}"
        return over, f"policy {need.policy / GIB:.0f} GiB ({parts})"
    tensor = candidate.engine_tensor
    both = need.static + WEIGHT * rank_parameters(shape, tensor, 1) + RESERVE
    if candidate.placement == "turns" and both > cluster.memory:
        return both - cluster.memory, f"policy and vLLM's weights take {both / GIB:.0f} GiB in a weight sync"
    least, room = engine_need(shape, tensor, work), engine_room(shape, candidate, cluster, need)
    if least > room:
        where = {"beside": "beside the policy", "turns": "in turns with the policy", "servers": "on a server's GPU"}
        return (
            least - room,
            f"vLLM needs {least / GIB:.0f} GiB {where[candidate.placement]}, {max(0, room) / GIB:.0f} left",
        )
    return None
