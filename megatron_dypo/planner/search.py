"""Search every layout that the model and the GPUs allow: those that fit, best first, and why others do not."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from megatron_dypo.config.schema import Parallel
from megatron_dypo.errors import UserError
from megatron_dypo.models.limits import check_layout
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.planner.cluster import Candidate, Cluster, StepWorkload, expert_parts
from megatron_dypo.planner.launch import server_room
from megatron_dypo.planner.memory import HostNeed, Need, engine_room, host_need, misfit, policy_need
from megatron_dypo.planner.steptime import Seconds, step_seconds

SIZES = (1, 2, 4, 8)
EXPERTS = (1, 2, 4, 8, 16, 32, 64, 128)
CONTEXTS = (1, 2, 4)
RECOMPUTE = ("none", "selective", "full")
ALIKE = 0.03  # fraction of a step's time
SERVER_SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75)


@dataclass(frozen=True)
class Plan:
    """A candidate that fits. ``engine_memory`` is vLLM's share of a GPU."""

    candidate: Candidate
    need: Need
    host: HostNeed
    seconds: Seconds
    engine_memory: float
    tokens_per_second: float  # prompts and responses, per GPU


@dataclass(frozen=True)
class Rejected:
    """A layout that does not fit, wherever vLLM is placed and whatever is recomputed."""

    layout: str
    reason: str


def plan(shape: ModelShape, cluster: Cluster, work: StepWorkload) -> tuple[list[Plan], list[Rejected]]:
    """Return the best plan of each (layout, placement), fastest first; and the layouts that never fit, with reasons."""
    made: list[Plan] = []
    closest: dict[str, tuple[float, str]] = {}
    fitting: set[str] = set()
    references = ("device", "host") if work.reference == "auto" else (work.reference,)
    for cut, fault, candidates in _cuts(shape, cluster):
        if fault:
            closest[cut] = (float("inf"), fault)
            continue
        for candidate in (replace(each, reference=on) for each in candidates for on in references):
            need = policy_need(shape, candidate, work)
            if found := misfit(shape, candidate, cluster, work, need):
                closest[cut] = min(closest.get(cut, found), found)
                continue
            fitting.add(cut)
            room = engine_room(shape, candidate, cluster, need)
            engine = 0.0 if candidate.placement == "servers" else room
            seconds = step_seconds(shape, candidate, cluster, work, replace(need, engine=room))
            rate = work.prompts * work.samples * work.mean_sequence / seconds.step / cluster.gpus
            host = host_need(shape, candidate, work)
            made.append(Plan(candidate, replace(need, engine=engine), host, seconds, room / cluster.memory, rate))
    fastest = min(made, key=lambda each: each.seconds.step, default=None)
    best: dict[tuple, Plan] = {}
    for each in sorted(made, key=lambda each: _rank(each, fastest, work)):
        best.setdefault((str(each.candidate), each.candidate.placement, each.candidate.engine_tensor), each)
    return list(best.values()), [Rejected(cut, reason) for cut, (_, reason) in closest.items() if cut not in fitting]


def _rank(made: Plan, fastest: Plan, work: StepWorkload) -> tuple[float, ...]:
    """Rank plans as fast as the fastest by simplicity; then the others by their time.

    The fastest decides where the reference is and whether a rollout overlaps: the best plan's keys, given to ``plan``,
    then leave both the fastest and the best unchanged.
    """
    cut, first, step = made.candidate, fastest.candidate, made.seconds.step
    alike = cut.reference == first.reference
    alike &= cut.on_servers == first.on_servers or (first.on_servers and not work.overlap)
    if step > (1 + ALIKE) * fastest.seconds.step or not alike:
        return (1, step)
    parts = cut.pipeline * cut.virtual * cut.context, cut.tensor * cut.expert_tensor * cut.engine_tensor, cut.expert
    return 0, *parts, step, made.seconds.training


def _cuts(shape: ModelShape, cluster: Cluster) -> Iterator[tuple[str, str | None, Iterator[Candidate]]]:
    """Yield (name, why the model cannot be divided so, candidates) for each TP, PP, CP and placement of experts."""
    for tensor in SIZES:
        for pipeline in (size for size in range(1, shape.num_layers + 1) if tensor * size <= cluster.gpus):
            if shape.num_layers % pipeline or cluster.gpus % (tensor * pipeline):
                continue
            for context in CONTEXTS:
                if tensor * pipeline * context > cluster.gpus:
                    continue
                name = f"TP{tensor} PP{pipeline}" + (f" CP{context}" if context > 1 else "")
                cut = {"tensor": tensor, "pipeline": pipeline, "context": context}
                fault = _fault(cut, shape)
                if tensor > cluster.per_node:
                    fault = fault or f"tensor parallelism over nodes of {cluster.per_node} GPUs is slow"
                if fault or not shape.num_experts:
                    yield name, fault, _candidates(shape, cluster, cut)
                    continue
                for expert, expert_tensor in itertools.product(EXPERTS, sorted({1, tensor})):
                    if expert * expert_tensor * pipeline <= cluster.gpus:
                        experts = {"expert": expert, "expert_tensor": expert_tensor}
                        parts = [name, *expert_parts(expert, expert_tensor)]
                        yield " ".join(parts), _fault(cut | experts, shape), _candidates(shape, cluster, cut | experts)


def _fault(cut: dict[str, int], shape: ModelShape) -> str | None:
    """Return why the model does not allow this layout, or None."""
    try:
        check_layout(Parallel(**cut, sequence_parallel=cut["tensor"] > 1), shape, 0, "")
    except UserError as error:
        return str(error).removeprefix(": ")
    return None


def _candidates(shape: ModelShape, cluster: Cluster, cut: dict[str, int]) -> Iterator[Candidate]:
    """Yield the candidates of a layout that the model allows."""
    pipeline, replica = cut["pipeline"], cut["tensor"] * cut["pipeline"] * cut["context"]
    experts = pipeline * cut.get("expert", 1) * cut.get("expert_tensor", 1)
    multiple = math.lcm(replica, experts)  # of the trainer's ranks
    for virtual in SIZES[: 3 if pipeline > 1 else 1]:
        if shape.num_layers % (pipeline * virtual):
            continue
        for recompute in RECOMPUTE:
            known: dict[str, Any] = cut | {"virtual": virtual, "recompute": recompute}
            if cluster.gpus % multiple == 0:
                for placement in ("beside", "turns"):
                    yield Candidate(**known, data=cluster.gpus // replica, placement=placement)
            trainers = {multiple * round(cluster.gpus * (1 - share) / multiple) for share in SERVER_SHARES}
            for servers in sorted(cluster.gpus - ranks for ranks in trainers if 0 < ranks < cluster.gpus):
                for engine_tensor in (size for size in SIZES if servers % size == 0 and _divides(shape, size)):
                    if servers // engine_tensor > server_room(cluster, engine_tensor):
                        continue
                    placed: dict[str, Any] = {
                        "placement": "servers",
                        "server_gpus": servers,
                        "engine_tensor": engine_tensor,
                    }
                    yield Candidate(**known, data=(cluster.gpus - servers) // replica, **placed)


def _divides(shape: ModelShape, tensor: int) -> bool:
    """Return whether vLLM can shard the model so; it repeats key/value heads if there are fewer than GPUs."""
    groups = shape.num_query_groups
    return shape.num_attention_heads % tensor == 0 and (groups % tensor == 0 or tensor % groups == 0)
