"""Seconds of a step: rollout, log-prob passes, update, weight sync, and what moves between host and device.

A roofline with a few measured efficiencies, which are below in one place. It ranks layouts, and comes within a third of
published step times (docs/scaling.md); it knows nothing of stragglers, of slow file systems, or of rewards.
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

TRAIN, FORWARD, PREFILL = 0.40, 0.45, 0.50  # of the peak FLOPs: Megatron-Core pre-trains at 0.41-0.48 on H100
STREAM = 0.65  # of the peak memory bandwidth that decoding gets
LINK = 0.70  # of a link's bandwidth that a collective gets
DECODE_STEP = 0.004  # seconds of one decoding step that are neither memory nor arithmetic: scheduling, sampling, launch
NARROW = 1000  # a mixture gets w / (w + NARROW) of that, w the harmonic sum of hidden size and an expert's width:
# pre-training with Megatron-Core (FP8) gets 0.12 of an H100's bf16 peak for Qwen3-30B-A3B, 0.24 for 235B-A22B
HOP = 20e-6  # seconds of one small all-reduce within a node: two a layer in each decoding step with tensor parallelism


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
    """Of one step of ``work``; ``need.engine`` is vLLM's memory on a GPU."""
    forward = _pass_seconds(shape, candidate, cluster, work, work.rollout_trained, 1, FORWARD)
    factor = {"none": 3.0, "selective": 3.5, "full": 4.0}[candidate.recompute]  # forward, backward, some of it again
    update = _pass_seconds(shape, candidate, cluster, work, work.trained, factor, TRAIN, work.updates)
    update += work.updates * _reduce_seconds(shape, candidate, cluster)
    if work.balanced:  # the load of all tokens, before the first gradient
        update += _pass_seconds(shape, candidate, cluster, work, work.trained, 1, FORWARD)
    if work.side:  # its log-probs, and its own updates
        learned = _pass_seconds(shape, candidate, cluster, work, work.rollout_trained, factor, TRAIN, work.updates)
        update += forward + learned + work.updates * _reduce_seconds(shape, candidate, cluster)
    if work.updates > 1:  # the trajectory coefficients are refreshed before each
        update += forward
    moved = 2 * (need.weights + need.optimizer + need.reference) if candidate.placement == "turns" else 0.0
    if candidate.reference == "host" and work.passes > 1:  # in and out; the link carries both directions at once
        moved += 2 * need.weights
    return Seconds(
        rollout=_rollout_seconds(shape, candidate, cluster, work, need.engine),
        logprob=work.passes * forward,
        update=update,
        sync=_sync_seconds(shape, candidate, cluster),
        offload=moved / (LINK * cluster.gpu.host),
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
    """``factor`` forward passes' worth of arithmetic over ``tokens``, the exchanges within layers, and the bubble."""
    if not tokens:
        return 0.0
    gpu = cluster.gpu
    dense = 2 * (shape.active_parameters - shape.vocab_size * shape.hidden_size * (not shape.tied_embeddings))
    attention = 2 * shape.num_layers * shape.num_attention_heads * shape.head_dim * work.mean_sequence  # causal: half
    compute = tokens * factor * (dense + attention) / (candidate.ranks * share * _width_share(shape) * gpu.flops)
    batches = -(-tokens // (candidate.data * work.budget * updates))  # each update drains the pipeline
    bubble = (candidate.pipeline - 1) / (candidate.virtual * batches)
    # A layer and forward pass: two gathers and two scatters of hidden states, with sequence parallelism, in a mixture
    # one of each; with context parallelism one gather of keys and values.
    t, c = candidate.tensor, candidate.context
    hidden = (2 if shape.num_experts else 4) * 2 * shape.hidden_size * (t - 1) / t / gpu.node
    hidden += _routed_seconds(shape, candidate, cluster)
    gathered = 2 * 2 * shape.num_query_groups * shape.head_dim / t * (c - 1)
    gathered /= gpu.node if t * c <= cluster.per_node else gpu.network
    mine = tokens / (candidate.data * c) * shape.num_layers / candidate.pipeline
    return (compute + mine * factor * (hidden + gathered) / LINK) * (1 + bubble)


def _width_share(shape: ModelShape) -> float:
    """What is left of an efficiency where experts are narrow; 1 for a dense model."""
    if not shape.num_experts:
        return 1.0
    width = 1 / (1 / shape.hidden_size + 1 / shape.ffn_hidden_size)
    return width / (width + NARROW)


def _routed_seconds(shape: ModelShape, candidate: Candidate, cluster: Cluster) -> float:
    """A token's way to its experts and back, in one layer and forward pass, over the slowest link among their ranks."""
    e, x = candidate.expert, candidate.expert_tensor
    link = cluster.gpu.node if e * x <= cluster.per_node else cluster.gpu.network
    copies = shape.router_topk * 2 * shape.hidden_size / candidate.tensor  # of a rank's slice of the tokens
    return 2 * copies * ((e - 1) / e + (x - 1)) / link


def _reduce_seconds(shape: ModelShape, candidate: Candidate, cluster: Cluster) -> float:
    """Gradients summed over data-parallel ranks, weights gathered again; and the optimizer's pass over its state."""
    link = cluster.gpu.node if candidate.ranks <= cluster.per_node else cluster.gpu.network
    seconds = 0.0
    for count, d in (
        (dense_parameters(shape, candidate.tensor, candidate.pipeline), candidate.shards),
        (_experts(shape, candidate), candidate.expert_shards),
    ):
        exchanged = (GRADIENT + WEIGHT) * count * (d - 1) / d / (LINK * link)
        seconds += exchanged + 2 * (GRADIENT + OPTIMIZER) * count / d / (STREAM * cluster.gpu.memory)
    return seconds


def _experts(shape: ModelShape, candidate: Candidate) -> int:
    return expert_parameters(shape, candidate.pipeline, candidate.expert, candidate.expert_tensor)


def _rollout_seconds(
    shape: ModelShape, candidate: Candidate, cluster: Cluster, work: StepWorkload, room: float
) -> float:
    """Decoding, by memory bandwidth or arithmetic, whichever is slower; then the longest responses, nearly alone."""
    tensor = candidate.engine_tensor
    gpu = cluster.gpu
    dense, experts = WEIGHT * dense_parameters(shape, tensor, 1), WEIGHT * expert_parameters(shape, 1, 1, tensor)
    share = work.prompts * work.samples / candidate.engines
    cache = cache_bytes(shape, tensor)
    fitting = (room - dense - experts - ENGINE_RESERVE) / (cache * (work.prompt_tokens + work.response_tokens))
    concurrent = max(1.0, min(share, fitting))
    hops = 2 * shape.num_layers * HOP if tensor > 1 else 0.0

    def step(sequences: float) -> float:
        idle = (1 - shape.router_topk / shape.num_experts) ** sequences if shape.num_experts else 0.0
        read = dense + (1 - idle) * experts  # of those that some token of the batch goes through
        read += sequences * cache * (work.prompt_tokens + work.response_tokens / 2)
        arithmetic = 2 * shape.active_parameters / tensor * sequences / (PREFILL * gpu.flops)
        return max(read / (STREAM * gpu.memory), arithmetic) + DECODE_STEP + hops

    bulk = share / concurrent * work.response_tokens * step(concurrent)
    tail = max(0.0, work.longest - work.prompt_tokens - work.response_tokens) * step(max(1.0, concurrent / 16))
    prefill = 2 * shape.active_parameters / tensor * work.prompts / candidate.engines * work.prompt_tokens
    return bulk + tail + prefill / (PREFILL * gpu.flops)


def _sync_seconds(shape: ModelShape, candidate: Candidate, cluster: Cluster) -> float:
    """Every tensor is gathered over the ranks that share it out, and written into vLLM's weights; servers get it over
    the network."""
    total = WEIGHT * shape.parameters
    experts = WEIGHT * expert_parameters(shape, 1, 1, 1)
    gathered = 0.0
    for size, ranks in (
        (total - experts, candidate.tensor * candidate.pipeline),
        (experts, candidate.expert * candidate.expert_tensor * candidate.pipeline),
    ):
        link = cluster.gpu.node if ranks <= cluster.per_node else cluster.gpu.network
        gathered += size * (ranks - 1) / ranks / (LINK * link)
    sent = total / (LINK * cluster.gpu.network) if candidate.placement == "servers" else 0.0
    return gathered + sent + 2 * total / (STREAM * cluster.gpu.memory)
