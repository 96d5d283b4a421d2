"""Seconds of a step: rollout, log-prob passes, update, weight sync, and transfers between host and device.

A roofline with a few measured efficiencies (``rates.py``). It ranks layouts, and comes within a third of
published step times (docs/scaling.md); it ignores stragglers, slow file systems, and rewards.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.models.shape import ModelShape
from megatron_dypo.planner.cluster import Candidate, Cluster, StepWorkload
from megatron_dypo.planner.memory import (
    ENGINE_RESERVE,
    GRADIENT,
    OPTIMIZER,
    WEIGHT,
    Need,
    cache_bytes,
    dense_parameters,
    expert_parameters,
)
from megatron_dypo.planner.sync import syncs


@dataclass(frozen=True)
class Seconds:
    rollout: float
    logprob: float
    update: float
    sync: float
    offload: float
    overlap: bool

    @property
    def training(self) -> float:
        return self.logprob + self.update + self.offload

    @property
    def step(self) -> float:
        return (max if self.overlap else sum)((self.rollout, self.training)) + self.sync


def step_seconds(shape: ModelShape, candidate: Candidate, cluster: Cluster, work: StepWorkload, need: Need) -> Seconds:
    """Return the seconds of one step of ``work``; ``need.engine`` is vLLM's memory on a GPU."""
    rates = cluster.rates
    forward = _pass_seconds(shape, candidate, cluster, work, work.rollout_trained, 1, rates.forward)
    factor = {"none": 3.0, "selective": 3.5, "full": 4.0}[candidate.recompute]  # forward, backward, recomputation
    update = _pass_seconds(shape, candidate, cluster, work, work.trained, factor, rates.train, work.updates)
    update += work.updates * _reduce_seconds(shape, candidate, cluster)
    if work.balanced:  # counts the load of all tokens, before the first gradient
        update += _pass_seconds(shape, candidate, cluster, work, work.trained, 1, rates.forward)
    if work.side:  # its log-probs, and its own updates
        rounds, tokens = work.side_updates, work.rollout_trained
        learned = _pass_seconds(shape, candidate, cluster, work, tokens, factor, rates.train, rounds)
        update += forward + learned + rounds * _reduce_seconds(shape, candidate, cluster)
    if work.updates > 1:  # the trajectory coefficients are refreshed before each
        update += forward
    moved = 2 * (need.weights + need.optimizer + need.reference) if candidate.placement == "turns" else 0.0
    if candidate.reference == "host" and work.passes > 1:  # in and out; the link carries both directions at once
        moved += 2 * need.weights
    return Seconds(
        rollout=_rollout_seconds(shape, candidate, cluster, work, need.engine),
        logprob=work.passes * forward,
        update=update,
        sync=syncs(shape, candidate, cluster)["nccl" if candidate.on_servers else "in process"].total,
        offload=moved / (cluster.rates.link * cluster.gpu.host),
        overlap=work.overlap and candidate.placement == "servers",
    )


def _pass_seconds(
    shape: ModelShape,
    candidate: Candidate,
    cluster: Cluster,
    work: StepWorkload,
    tokens: float,
    factor: float,
    share: float,
    updates: int = 1,
) -> float:
    """Return the time of ``factor`` forward passes over ``tokens``, with exchanges within layers and the bubble."""
    if not tokens:
        return 0.0
    gpu = cluster.gpu
    dense = 2 * (shape.active_parameters - shape.vocab_size * shape.hidden_size * (not shape.tied_embeddings))
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim * work.mean_sequence  # causal: half
    reached = share * _width_share(shape, cluster.rates.narrow) * gpu.flops
    compute = tokens * factor * (dense + attention) / (candidate.ranks * reached)
    batches = -(-tokens // (candidate.data * work.budget * updates))  # each update drains the pipeline
    bubble = (candidate.pipeline - 1) / (candidate.virtual * batches)
    # Per layer and forward pass: two gathers and two scatters of hidden states with sequence parallelism, one of each
    # in a mixture; one gather of keys and values with context parallelism.
    t, c = candidate.tensor, candidate.context
    hidden = (2 if shape.num_experts else 4) * 2 * shape.hidden_size * (t - 1) / t / gpu.node
    hidden += _routed_seconds(shape, candidate, cluster)
    gathered = 2 * 2 * shape.num_query_groups * shape.head_dim / t * (c - 1)
    gathered /= gpu.node if t * c <= cluster.per_node else gpu.network
    mine = tokens / (candidate.data * c) * shape.num_layers / candidate.pipeline
    return (compute + mine * factor * (hidden + gathered) / cluster.rates.link) * (1 + bubble)


def _width_share(shape: ModelShape, narrow: float) -> float:
    """Return the fraction of the efficiency that narrow experts reach; 1 for a dense model."""
    if not shape.num_experts:
        return 1.0
    width = 1 / (1 / shape.hidden_size + 1 / shape.ffn_hidden_size)
    return width / (width + narrow)


def _routed_seconds(shape: ModelShape, candidate: Candidate, cluster: Cluster) -> float:
    """Return the time of a token's dispatch and return, per layer and forward pass, over its ranks' slowest link."""
    e, x = candidate.expert, candidate.expert_tensor
    link = cluster.gpu.node if e * x <= cluster.per_node else cluster.gpu.network
    copies = shape.router_topk * 2 * shape.hidden_size / candidate.tensor  # of a rank's slice of the tokens
    return 2 * copies * ((e - 1) / e + (x - 1)) / link


def _reduce_seconds(shape: ModelShape, candidate: Candidate, cluster: Cluster) -> float:
    """Return the time to reduce gradients and gather weights over data-parallel ranks, and of the optimizer's pass."""
    link = cluster.gpu.node if candidate.ranks <= cluster.per_node else cluster.gpu.network
    seconds = 0.0
    for count, d in (
        (dense_parameters(shape, candidate.tensor, candidate.pipeline), candidate.shards),
        (_experts(shape, candidate), candidate.expert_shards),
    ):
        exchanged = (GRADIENT + WEIGHT) * count * (d - 1) / d / (cluster.rates.link * link)
        seconds += exchanged + 2 * (GRADIENT + OPTIMIZER) * count / d / (cluster.rates.stream * cluster.gpu.memory)
    return seconds


def _experts(shape: ModelShape, candidate: Candidate) -> int:
    return expert_parameters(shape, candidate.pipeline, candidate.expert, candidate.expert_tensor)


def _rollout_seconds(
    shape: ModelShape, candidate: Candidate, cluster: Cluster, work: StepWorkload, room: float
) -> float:
    """Return the time of decoding, bound by memory or arithmetic, then of the longest responses, nearly alone."""
    tensor = candidate.engine_tensor
    gpu = cluster.gpu
    dense, experts = WEIGHT * dense_parameters(shape, tensor, 1), WEIGHT * expert_parameters(shape, 1, 1, tensor)
    share = work.prompts * work.samples / candidate.engines
    cache = cache_bytes(shape, tensor)
    fitting = (room - dense - experts - ENGINE_RESERVE) / (cache * (work.prompt_tokens + work.response_tokens))
    concurrent = max(1.0, min(share, fitting))
    hops = 2 * shape.num_layers * cluster.rates.hop if tensor > 1 else 0.0

    def step(sequences: float) -> float:
        idle = (1 - shape.router_topk / shape.num_experts) ** sequences if shape.num_experts else 0.0
        read = dense + (1 - idle) * experts  # experts that some token of the batch uses
        read += sequences * cache * (work.prompt_tokens + work.response_tokens / 2)
        arithmetic = 2 * shape.active_parameters / tensor * sequences / (cluster.rates.prefill * gpu.flops)
        return max(read / (cluster.rates.stream * gpu.memory), arithmetic) + cluster.rates.decode_step + hops

    bulk = share / concurrent * work.response_tokens * step(concurrent)
    tail = max(0.0, work.longest - work.prompt_tokens - work.response_tokens) * step(max(1.0, concurrent / 16))
    prefill = 2 * shape.active_parameters / tensor * work.prompts / candidate.engines * work.prompt_tokens
    return bulk + tail + prefill / (cluster.rates.prefill * gpu.flops)
