"""Seconds of a weight sync in three terms: the ranks gather, rank 0 sends, vLLM loads.

``gather`` is models/export.py: the stage that has a layer broadcasts each rank's row to the other stages, then the
ranks that share the layer gather its rows. ``send`` is `rollout.sync_backend`'s; all servers take part in one
broadcast. ``load`` writes all weights into vLLM's layers. A layer is gathered while another is sent: the slowest term
counts.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from megatron_dypo.models.families import hf_shapes
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.planner.cluster import Candidate, Cluster
from megatron_dypo.planner.memory import WEIGHT, expert_parameters

CHANGED = 0.013  # fraction of the bf16 values that an update at lr 1e-6 changes (benchmarks/README.md)
PLACED = 3  # times the bytes of a value, if its place is sent with it


@dataclass(frozen=True)
class Sync:
    """One way to sync, and what it ``needs``. ``streams``: vLLM loads one buffer while the next is sent."""

    way: str
    gather: float
    send: float
    load: float
    streams: bool
    needs: str

    @property
    def total(self) -> float:
        return max(self.gather, max(self.send, self.load) if self.streams else self.send + self.load)


def syncs(shape: ModelShape, candidate: Candidate, cluster: Cluster) -> dict[str, Sync]:
    """Return every way by its name, whether the placement allows it or not."""
    gpu, total = cluster.gpu, WEIGHT * shape.parameters
    link, stream = cluster.rates.link, cluster.rates.stream
    gather = _gather(shape, candidate, cluster, link)
    load = (1 + 1 / candidate.engine_tensor) * total / (stream * gpu.memory) + cluster.rates.load_tensor * _tensors(
        shape
    )
    wire = total / (link * (gpu.node if cluster.gpus <= cluster.per_node else gpu.network))
    host, copy = total / (link * gpu.host), 2 * total / (stream * gpu.memory)
    ways = (
        ("in process", 0.0, load, True, "vLLM in the trainer's processes"),
        ("nccl", wire, load, True, "servers"),
        (
            "sparse_nccl",
            host + CHANGED * PLACED * wire,
            load,
            False,
            "servers, lr of about 1e-6, a copy in host memory",
        ),
        ("ipc", copy, load, False, "servers on the trainer's GPUs"),
        ("shared_memory", host, load + host, True, "servers on the trainer's node"),
    )
    return {way: Sync(way, gather, send, loading, streams, needs) for way, send, loading, streams, needs in ways}


@functools.lru_cache(maxsize=32)
def _tensors(shape: ModelShape) -> int:
    return len(hf_shapes(shape))


def _gather(shape: ModelShape, candidate: Candidate, cluster: Cluster, link: float) -> float:
    experts = WEIGHT * expert_parameters(shape, 1, 1, 1)
    rest = WEIGHT * shape.parameters - experts
    seconds = 0.0
    for size, rows in ((rest, candidate.tensor), (experts, candidate.expert * candidate.expert_tensor)):
        inside = min(rows, cluster.per_node)  # ranks of a node, each with its own share of the network
        nodes = -(-rows // cluster.per_node)
        node = size * (rows - 1) / rows / (link * cluster.gpu.node)
        network = size * (nodes - 1) / nodes / (link * inside * cluster.gpu.network)
        stages = cluster.gpu.network if candidate.ranks > cluster.per_node else cluster.gpu.node
        seconds += max(node, network)
        seconds += size / rows * (candidate.pipeline - 1) / candidate.pipeline / (link * stages)
    return seconds
