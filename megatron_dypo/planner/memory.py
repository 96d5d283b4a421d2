"""Bytes on the busiest GPU of a layout (weights, gradients, optimizer, activations, head, vLLM), and of host memory.

docs/memory.md explains the terms. Legend: P parameters of a rank, T tokens of a micro-batch on a rank, L layers, h
hidden size, F width of the MLP or of an expert, S of the shared experts, E experts, K per token, q and k widths of all
query and of all key heads, V padded vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from megatron_dypo.kernels.workspace import head_bytes
from megatron_dypo.models.families import EMBEDDING_RULE, FAMILIES, HEAD_RULE, NORM_RULE, VALUE_HEAD_RULE
from megatron_dypo.models.rules import WeightRule
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.planner.cluster import Candidate, Cluster, StepWorkload
from megatron_dypo.policy.host_memory import rounded

GIB = 2**30
WEIGHT, GRADIENT, OPTIMIZER = 2, 4, 12  # bytes per parameter in bf16: the optimizer's are a master copy and two moments
WIDTHS = {"bf16": (WEIGHT, OPTIMIZER), "fp32": (4, 8)}  # bytes per parameter: the weight, and the optimizer's state
RESERVE = 5 * GIB  # CUDA's context, NCCL's buffers, CUDA graphs, and fragmentation
ENGINE_RESERVE = 2 * GIB  # vLLM's own activations and graphs
ENGINE_MOST = 0.9  # vLLM's largest share of a GPU
SEQUENCES = 8  # of the longest kind, the minimum that vLLM must have room for
UNEVEN = 1.5  # tokens of the busiest rank's experts relative to an even share; a guess


@dataclass(frozen=True)
class Need:
    """Bytes on a trainer's GPU; ``engine`` is what vLLM can use there (0 with servers).

    ``optimizer`` is also the peak of an update: Adam is fused (policy/optimizer.py) and makes no copies.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    head: float
    reference: float = 0.0
    engine: float = 0.0

    @property
    def static(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.reference

    @property
    def policy(self) -> float:
        """Return the bytes in training, without vLLM."""
        return self.static + self.activations + self.head + RESERVE


def rank_parameters(shape: ModelShape, tensor: int, pipeline: int, expert: int = 1, expert_tensor: int = 1) -> int:
    """Return the parameters of the rank that holds most."""
    return dense_parameters(shape, tensor, pipeline) + expert_parameters(shape, pipeline, expert, expert_tensor)


@functools.lru_cache
def expert_parameters(shape: ModelShape, pipeline: int, expert: int, expert_tensor: int) -> int:
    """Return a rank's share of its stage's experts, without shared experts; 0 for a dense model."""
    one = _count([rule for rule in FAMILIES[shape.family].layer if rule.of_every_expert], shape, expert_tensor)
    return shape.num_layers // pipeline * shape.num_experts // expert * one


@functools.lru_cache
def dense_parameters(shape: ModelShape, tensor: int, pipeline: int) -> int:
    """Return the other parameters of the rank that holds most: an end stage has the embedding or head, too."""
    one = _count([rule for rule in FAMILIES[shape.family].layer if not rule.of_every_expert], shape, tensor)
    layers = shape.num_layers // pipeline * one
    embedding, norm = (_count([rule], shape, tensor) for rule in (EMBEDDING_RULE, NORM_RULE))
    rule = VALUE_HEAD_RULE if shape.value_head else HEAD_RULE
    head = _count([rule], shape, tensor)  # of a last stage that is not the first, also where it is tied
    if pipeline == 1:
        return layers + embedding + norm + (0 if shape.tied_embeddings else head)
    return layers + max(embedding, head + norm)


def _count(rules: Iterable[WeightRule], shape: ModelShape, tensor: int) -> int:
    total = 0
    for rule in rules:
        parts = [torch.empty(size, device="meta") for size in rule.sizes(shape)]
        total += rule.fold(parts, shape).numel() // (1 if rule.axis is None else tensor)
    return total


def activation_bytes(shape: ModelShape, candidate: Candidate, tokens: float) -> float:
    """Return the bytes that forward passes in flight keep for their backward passes, in bf16.

    Per token and layer 8h + 6q + 6k (2q more with norms of queries and keys) and the MLP's, of which ``selective``
    keeps all but the MLP's and ``full`` 2h; recomputed activations exist for one layer at a time (Korthikanti et al.
    2022, section 4, for this model).
    """
    h = shape.hidden_size
    query, key = shape.num_attention_heads * shape.head_dim, shape.num_query_groups * shape.head_dim
    mlp, passing = _mlp_bytes(shape, candidate)
    before_norm = 2 * query if FAMILIES[shape.family].qk_norm else 0  # keys before it are kept anyway, with the values
    without_mlp = 8 * h + 6 * query + 6 * key + before_norm
    kept = {"none": without_mlp + mlp, "selective": without_mlp, "full": 2 * h}[candidate.recompute]
    once = without_mlp + mlp - kept + passing
    layers: float = shape.num_layers
    if candidate.virtual > 1:
        layers *= 1 + (candidate.pipeline - 1) / (candidate.pipeline * candidate.virtual)
    return tokens * (layers * kept + once) / candidate.tensor


def _mlp_bytes(shape: ModelShape, candidate: Candidate) -> tuple[float, float]:
    """Return (bytes kept, bytes that exist for one layer at a time), per token and layer.

    A mixture keeps the router's fp32 input, two fp32 arrays of E and one of bools, and for each of a token's K experts
    their input (which all expert-tensor-parallel ranks have) and 6F; dispatch and combination add three more copies of
    that input.
    """
    h, ffn = shape.hidden_size, shape.ffn_hidden_size
    if not shape.num_experts:
        return 6 * ffn, 0.0
    copies = UNEVEN * shape.router_topk
    experts = copies * (2 * h * candidate.expert_tensor + 6 * ffn)
    router = 4 * h + 9 * shape.num_experts
    return router + experts + 6 * shape.shared_expert_ffn_hidden_size, 3 * copies * 2 * h * candidate.expert_tensor


def _head_bytes(shape: ModelShape, candidate: Candidate, tokens: float, dtype: str) -> float:
    """Return the bytes of the loss tokens' gathered hidden states, and of ``kernels/`` for log-probs and gradients."""
    sizes = math.ceil(tokens), shape.hidden_size, shape.padded_vocab
    kind = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return tokens * shape.hidden_size * kind.itemsize + head_bytes(*sizes, kind, ranks=candidate.tensor)


def cache_bytes(shape: ModelShape, tensor: int) -> float:
    """Return the bytes of one token's keys and values per vLLM GPU, in bf16; at least one key/value head."""
    return 2 * 2 * shape.num_layers * max(1, shape.num_query_groups / tensor) * shape.head_dim


def policy_need(shape: ModelShape, candidate: Candidate, work: StepWorkload, dtype: str = "bf16") -> Need:
    """Return the need of training on the busiest rank, including a second model's weights, gradients and optimizer.

    Assumes sequence parallelism with tensor parallelism.
    """
    dense, experts = held(shape, candidate)
    trained = [(dense, experts), *(held(each, candidate) for each in second_models(shape, work))]
    all_dense, all_experts = (sum(each) for each in zip(*trained, strict=True))
    weight, optimizer = WIDTHS[dtype]
    tokens = max(work.budget, work.longest) / candidate.context
    return Need(
        weights=weight * (all_dense + all_experts),
        gradients=GRADIENT * (all_dense + all_experts),
        optimizer=optimizer * (all_dense / candidate.shards + all_experts / candidate.expert_shards),
        activations=weight / WEIGHT * activation_bytes(shape, candidate, tokens),
        head=_head_bytes(shape, candidate, tokens, dtype),
        reference=weight * (dense + experts) if candidate.reference == "device" else 0.0,
    )


def second_models(shape: ModelShape, work: StepWorkload) -> list[ModelShape]:
    """Return the shapes of models trained alongside the policy: its own, or with a value head of one row."""
    return [shape.critic if work.side == "critic" else shape] if work.side else []


def held(shape: ModelShape, candidate: Candidate) -> tuple[int, int]:
    """Return the parameters of the busiest rank: (dense, experts)."""
    dense = dense_parameters(shape, candidate.tensor, candidate.pipeline)
    return dense, expert_parameters(shape, candidate.pipeline, candidate.expert, candidate.expert_tensor)


def engine_need(shape: ModelShape, tensor: int, work: StepWorkload) -> float:
    """Return the minimum that vLLM needs per GPU: weights, and room for a few sequences."""
    return engine_weights(shape, tensor) + SEQUENCES * work.longest * cache_bytes(shape, tensor) + ENGINE_RESERVE


def engine_weights(shape: ModelShape, tensor: int) -> float:
    """Return vLLM's weights in bytes per GPU; tensor parallelism also shards every expert."""
    return WEIGHT * rank_parameters(shape, tensor, 1, expert_tensor=tensor)


def engine_room(shape: ModelShape, candidate: Candidate, cluster: Cluster, need: Need) -> float:
    """Return the bytes that vLLM can use on a GPU: alongside the policy, in turns with it, or alone."""
    most = ENGINE_MOST * cluster.memory
    if candidate.placement == "beside":
        return min(most, cluster.memory - need.policy)
    if candidate.placement == "turns":
        return min(most, cluster.memory - RESERVE)
    return most


def misfit(
    shape: ModelShape, candidate: Candidate, cluster: Cluster, work: StepWorkload, need: Need
) -> tuple[float, str] | None:
    """Return (excess bytes, the reason in words) if a candidate does not fit, else None."""
    over = need.policy - cluster.memory
    if over > 0:
        parts = f"weights, gradients, optimizer {need.static / GIB:.0f}, activations {need.activations / GIB:.0f}"
        return over, f"policy {need.policy / GIB:.0f} GiB ({parts})"
    tensor = candidate.engine_tensor
    # in a weight sync vLLM keeps a layer's unsharded experts until the last has arrived; the next layer is gathered
    # meanwhile
    layer = WEIGHT * expert_parameters(shape, shape.num_layers, 1, 1)
    both = need.static + engine_weights(shape, tensor) + 2 * layer + RESERVE
    if candidate.placement == "turns" and both > cluster.memory:
        return both - cluster.memory, f"policy and vLLM's weights take {both / GIB:.0f} GiB in a weight sync"
    least, room = engine_need(shape, tensor, work) + layer, engine_room(shape, candidate, cluster, need)
    if least > room:
        where = {"beside": "beside the policy", "turns": "in turns with the policy", "servers": "on a server's GPU"}
        return (
            least - room,
            f"vLLM needs {least / GIB:.0f} GiB {where[candidate.placement]}, {max(0, room) / GIB:.0f} left",
        )
    return None


@dataclass(frozen=True)
class HostNeed:
    """Bytes per rank: ``reference`` and ``offload`` are pinned during the run; ``snapshot`` is freed after a save."""

    reference: float
    offload: float
    snapshot: float

    @property
    def total(self) -> float:
        return self.reference + self.offload + self.snapshot


def host_need(shape: ModelShape, candidate: Candidate, work: StepWorkload, dtype: str = "bf16") -> HostNeed:
    """Return the busiest rank's host memory. P: parameters; w: bytes per weight; s: optimizer bytes; d: shards.

    A reference on the host: w P. trainer.offload: (w + s / d) P per model, plus w P for a reference on the device. A
    snapshot: (w + s) P per model, plus w P for a reference, split over the ranks that hold the same weights.
    """
    weight, optimizer = WIDTHS[dtype]
    dense, experts = held(shape, candidate)
    need = policy_need(shape, candidate, work, dtype)
    models = [held(each, candidate) for each in (shape, *second_models(shape, work))]
    referred = weight if candidate.reference != "none" else 0
    written = [
        (weight + optimizer) * sum(of) + referred * own
        for of, own in zip(zip(*models, strict=True), (dense, experts), strict=True)
    ]
    moved = need.weights + need.optimizer + need.reference
    return HostNeed(
        reference=rounded(weight * (dense + experts)) if candidate.reference == "host" else 0.0,
        offload=rounded(moved) if candidate.placement == "turns" else 0.0,
        snapshot=written[0] / candidate.copies + written[1] / candidate.expert_copies if work.saves else 0.0,
    )
