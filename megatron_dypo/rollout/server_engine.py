"""vLLM servers, on this or other machines, as the engine: every rank samples its share, rank 0 sends the weights."""

from __future__ import annotations

import asyncio
import secrets
import socket
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_dypo.config.schema import Config
from megatron_dypo.errors import UserError
from megatron_dypo.records import Response
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.router import Limits, Router
from megatron_dypo.rollout.server import Server
from megatron_dypo.rollout.server_pool import ServerPool
from megatron_dypo.rollout.vllm_args import MOST_SEQUENCES, sync_backend
from megatron_dypo.rollout.vllm_versions import weight_source
from megatron_dypo.runtime.distributed import Layout, all_gather_objects, device_kind
from megatron_dypo.weight_sync.checksum import ChecksummedWeights, Turn
from megatron_dypo.weight_sync.sparse import SparseNccl
from megatron_dypo.weight_sync.transfer import SharedMemory, Transfer, WeightSource

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.source import VersionedWeights

IN_ONE_GROUP = ("nccl", "sparse_nccl")  # workers of all servers wait for each other


class ServerEngine:
    """See ``Engine``. Raises UserError if a server is not up in time, or serves another model or tokenizer.

    A response's log-probs and ids travel as JSON, which keeps every bit of them.
    """

    def __init__(self, config: Config, wanted: str, layout: Layout):
        rollout, self._layout = config.rollout, layout
        self._servers = [Server(url) for url in rollout.servers]
        self._pool = ServerPool(self._servers, wanted, rollout.server_timeout, rollout.sync_timeout)
        kind = device_kind()
        window = max(4, MOST_SEQUENCES[kind] // layout.world)  # all ranks together fill a server
        self._limits = Limits(window, rollout.server_timeout, rollout.request_timeout)
        self._backend = sync_backend(config, kind)
        self._verify, self._verify_syncs = rollout.verify_sync, rollout.verify_syncs
        self._syncs = 0
        self._sizes: dict[str, int] = {}  # workers per server, including servers excluded now
        self._transfer: Transfer | None = None
        self._label, self._version, self._lost = "", 0, dict[str, str]()
        if layout.is_main:
            self._pool.wait_for_all()
        self._run = all_gather_objects(secrets.token_hex(4))[0]  # distinguishes this run's weights from any other's

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]:
        """Sample on the servers. Raises TrainingError if no server with the weights is left."""
        dispatch = Router(self._servers, self._lost, self._label, self._limits)
        responses = asyncio.run(dispatch.run(requests, sampling))
        for response in responses:
            response.weight_version = self._version
        return responses

    def sync(self, weights: VersionedWeights) -> None:
        """Send to all servers that answer; the others are excluded until the next sync. Collective."""
        label, same = f"{self._run}:{weights.version}", True
        turn, verified = Turn(self._syncs, self._verify_syncs), self._verify != "off" and self._layout.is_main
        source: WeightSource = ChecksummedWeights(weights, turn) if verified else weights
        if self._layout.is_main:
            same = self._pool.refresh(self._label)
            sizes = self._pool.world_sizes()
            self._sizes |= {server.url: size for server, size in zip(self._pool.members, sizes, strict=True)}
            before = list(self._pool.members)
            self._pool.label = label
            self._pool.call_workers("prepare_update", verify=self._verify, number=turn.number, of=turn.of)
            same = same and before == self._pool.members
            self._pool.all_or_none = self._backend in IN_ONE_GROUP
        transfer = self._transfer
        if transfer is None or not all(all_gather_objects(same)):
            if transfer is not None:
                transfer.shutdown()
            self._transfer = transfer = _open_transfer(self._backend, self._pool, source, self._layout)
        ours = isinstance(transfer, (SharedMemory, SparseNccl))
        transfer.source = source if ours else weight_source(source)
        transfer.send_weights()
        if self._layout.is_main:
            self._pool.all_or_none = False
            if isinstance(source, ChecksummedWeights):
                for url, reports in self._pool.call_workers("weight_report").items():
                    source.compare(reports, url)
            self._pool.resume()
        self._lost = all_gather_objects(self._pool.lost)[0]
        self._label, self._version = label, weights.version
        self._syncs += 1

    @property
    def devices(self) -> int:
        """Return the number of the servers' workers; on rank 0, once synced."""
        return sum(self._sizes.values())

    def sleep(self, keep_weights: bool) -> None:
        """Do nothing: servers have devices of their own."""


def _open_transfer(backend: str, pool: ServerPool, source: WeightSource, layout: Layout) -> Transfer:
    """Return the trainer's side of a weight transfer, ready to send; collective.

    Raises UserError naming a worker's layer that ``sparse_nccl`` cannot change.
    """
    if backend == "shared_memory":
        return SharedMemory(pool, source, layout.is_main)
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory as Factory
    from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
    from vllm.distributed.weight_transfer.packed_tensor import DEFAULT_PACKED_BUFFER_SIZE_BYTES as BUFFER

    client: Any = pool  # its protocol also has lists of updates, which none of these sends
    if backend == "ipc":
        room = max(BUFFER, *(meta.nbytes for meta in source.metadata()))  # vLLM rejects a tensor that does not fit
        info = IPCTrainerInitInfo(rank=layout.rank, packed=True, packed_buffer_size_bytes=room)
        return Factory.trainer_init(info, client=client, source=weight_source(source))
    address, port = _endpoint(pool.members) if layout.is_main else ("", 0)
    group = address, port, 1 + (sum(pool.world_sizes()) if layout.is_main else 0)
    if backend == "nccl":  # packed: in vLLM's two buffers of 1 GiB
        return Factory.trainer_init(
            NCCLTrainerInitInfo(*group, rank=layout.rank), client=client, source=weight_source(source)
        )
    from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseNCCLTrainerInitInfo

    if layout.is_main:
        _check_in_place(pool)
    engine = Factory.trainer_init(SparseNCCLTrainerInitInfo(*group, rank=layout.rank), client=client)
    return SparseNccl(engine, pool, source, layout.is_main)


def _check_in_place(pool: ServerPool) -> None:
    """Raise UserError naming the first server with a layer that does not keep its weights in loading order."""
    for url, faults in pool.call_workers("in_place_fault").items():
        for fault in filter(None, faults):
            raise UserError(f"rollout.sync_backend: sparse_nccl: {url}: {fault}; take nccl")


def _endpoint(servers: list[Server]) -> tuple[str, int]:
    """Return this machine's address as the servers see it, and a port that is free now."""
    farthest = max(servers, key=lambda server: not server.is_local)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:  # sends nothing: the kernel picks the route
        probe.connect((farthest.host, urlsplit(farthest.url).port))
        address = probe.getsockname()[0]
    with socket.socket(socket.AF_INET) as free:
        free.bind((address, 0))
        return address, free.getsockname()[1]
