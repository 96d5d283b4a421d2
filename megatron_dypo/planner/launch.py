"""A plan as commands: which node's GPUs train, which sample, and the lines of ``launch/`` that start both.

Nodes are ``node0``, ``node1``, ... as in docs/launch.md. Servers get the last GPUs of the last nodes, each within one
node.
"""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from itertools import groupby

from megatron_dypo.config.load import still_read
from megatron_dypo.planner.cluster import Candidate, Cluster

PORT = 8000  # of a node's first server, as in launch/servers.sh
HEAD_PORT = 29500


@dataclass(frozen=True)
class Node:
    """GPUs 0 to ``ranks`` - 1 train; ``servers`` engines use the last ones."""

    name: str
    gpus: int
    ranks: int
    servers: int


def nodes_of(candidate: Candidate, cluster: Cluster) -> list[Node]:
    """Place ranks and servers on nodes. ``server_room`` must have room for the candidate's servers."""
    sizes = _sizes(cluster)
    left = candidate.engines if candidate.placement == "servers" else 0
    nodes: list[Node] = []
    for number in reversed(range(len(sizes))):
        servers = min(left, sizes[number] // candidate.engine_tensor)
        left -= servers
        ranks = sizes[number] - servers * candidate.engine_tensor
        nodes.insert(0, Node(f"node{number}", sizes[number], ranks, servers))
    return nodes


def server_room(cluster: Cluster, engine_tensor: int) -> int:
    """Return the number of servers of ``engine_tensor`` GPUs, each within one node, that fit."""
    return sum(size // engine_tensor for size in _sizes(cluster))


def _sizes(cluster: Cluster) -> list[int]:
    whole, rest = divmod(cluster.gpus, cluster.per_node)
    return [cluster.per_node] * whole + [rest] * (rest > 0)


def commands(candidate: Candidate, cluster: Cluster, engine_memory: float, config: str, given: list[str]) -> list[str]:
    """Return lines of shell, with comments naming their nodes. ``given``: overrides that ``plan`` itself received."""
    nodes = nodes_of(candidate, cluster)
    alone = len(nodes) == 1
    keys = candidate.keys(engine_memory)
    if candidate.placement == "servers":
        hosts = [(("127.0.0.1" if alone else node.name), number) for node in nodes for number in range(node.servers)]
        keys["rollout.servers"] = f"[{','.join(f'http://{host}:{PORT + number}' for host, number in hosts)}]"
    own = [override for override in given if override.partition("=")[0] not in keys]
    overrides = still_read(config, [*own, *(f"{name}={value}" for name, value in keys.items())])
    words = [shlex.quote(word) for word in (config, *overrides)]
    arguments = " ".join(words)
    trainers = [node for node in nodes if node.ranks]
    lines = []
    if candidate.placement == "servers":
        if not alone:
            lines.append("# on every node the same secret:")
        lines.append("export MEGATRON_DYPO_SERVER_TOKEN=$(openssl rand -hex 32)")
    for (gpus, ranks, servers), each in groupby(nodes, lambda node: (node.gpus, node.ranks, node.servers)):
        names = [node.name for node in each]
        if not alone:
            lines.append(f"# on {names[0]}:" if len(names) == 1 else f"# on each of {names[0]} to {names[-1]}:")
        if servers:
            host = "" if alone else "HOST=0.0.0.0 "
            beside = " &" if ranks else ""
            visible = _devices(gpus - servers * candidate.engine_tensor, gpus)
            lines.append(f"{host}{visible} TENSOR={candidate.engine_tensor} launch/servers.sh {arguments}{beside}")
        if ranks:
            visible = f"{_devices(0, ranks)} NPROC={ranks}"
            script = "launch/single_node.sh"
            if len(trainers) > 1:
                script = f"NNODES={len(trainers)} HEAD={trainers[0].name}:{HEAD_PORT} launch/multi_node.sh"
            lines.append(f"{visible} {script} {arguments}")
    return lines


def _devices(first: int, end: int) -> str:
    return f"CUDA_VISIBLE_DEVICES={','.join(map(str, range(first, end)))}"
