"""Weight transfers without CUDA or a real server: vLLM's own, with vLLM's code at both ends and a queue in place of
NCCL between them; and ours by shared memory.

``servers_of`` makes rollout servers that answer as vLLM's do (``Imitation``), each with a worker: the receiving engine
of that backend, our worker extension, and a plain model. The queue carries the arguments of ``broadcast``, so a stream
that the two ends split differently does not fit.
"""

from __future__ import annotations

import asyncio
import functools
import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from tests.rollout_server import Imitation

SECONDS = 10.0  # for a broadcast without another end


class Wire:
    """One sender and its receivers. ``sent``: the size in bytes of each broadcast."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.ends: list[queue.Queue] = []
        self.sent: list[int] = []
        self.turn = threading.Lock()

    def broadcast(self, tensor: Tensor, src: int, stream: object = None) -> None:
        self.sent.append(tensor.nbytes)
        for end in self.ends:
            end.put(tensor.clone())

    def receiver(self) -> SimpleNamespace:
        end: queue.Queue = queue.Queue()
        self.ends.append(end)

        def broadcast(tensor: Tensor, src: int, stream: object = None) -> None:
            came = end.get(timeout=SECONDS)
            assert (came.shape, came.dtype) == (tensor.shape, tensor.dtype), "the ends cut the stream differently"
            tensor.copy_(came)

        return SimpleNamespace(broadcast=broadcast, device=self.device)

    def destroy(self) -> None:
        self.ends.clear()


class PlainModel(nn.Module):
    """The tensors by their names in the checkpoint."""

    def __init__(self, sizes: dict[str, tuple[int, ...]], dtype: torch.dtype):
        super().__init__()
        for name, size in sizes.items():
            *path, last = name.split(".")
            place: nn.Module = self
            for part in path:
                if not hasattr(place, part):
                    place.add_module(part, nn.Module())
                place = getattr(place, part)
            place.register_parameter(last, nn.Parameter(torch.full(size, 7.0, dtype=dtype), requires_grad=False))

    def load_weights(self, weights) -> None:
        own = dict(self.named_parameters())
        for name, tensor in weights:
            own[name].data.copy_(tensor)


def worker_of(backend: str, model: nn.Module, wire: Wire):
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    from megatron_dypo.weight_sync.worker import BACKEND, WorkerExtension

    settings = SimpleNamespace(parallel_config=None, model_config=None)

    class Worker(WorkerExtension):
        def __init__(self) -> None:
            self.model_runner = SimpleNamespace(get_model=lambda: model)
            config = WeightTransferConfig(backend={"shared_memory": BACKEND}.get(backend, backend))
            self.engine = WeightTransferEngineFactory.create_engine(config, settings, wire.device, model)

        def init(self, info: dict) -> None:
            info = self.engine.parse_init_info(info)
            if backend in ("shared_memory", "ipc"):
                return self.engine.init_transfer_engine(info)
            self.engine.packed = info.packed
            self.engine.packed_buffer_size_bytes = info.packed_buffer_size_bytes
            self.engine.packed_num_buffers = info.packed_num_buffers
            self.engine.model_update_group = wire.receiver()

        def update(self, info: dict) -> None:
            with wire.turn:  # vLLM meanwhile replaces Tensor.copy_ of a process that a worker has for itself
                self.engine.receive_weights(self.engine.parse_update_info(info))

        def finish_weight_update(self) -> None:
            """Do nothing: these engines have nothing to finish."""

    return Worker()


@contextmanager
def servers_of(
    backend: str, count: int, sizes: dict, dtype: torch.dtype, monkeypatch
) -> Iterator[tuple[list[Imitation], list[PlainModel], Wire]]:
    """Return servers, their models and the wire to them, with nothing of CUDA left in vLLM's two ends."""
    from vllm.distributed.weight_transfer import nccl_engine, packed_tensor, sparse_nccl_engine

    wire, models = Wire(), [PlainModel(sizes, dtype) for _ in range(count)]
    for module in (nccl_engine, sparse_nccl_engine):
        monkeypatch.setattr(module, "open_trainer_endpoint", lambda info: wire)
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(packed_tensor, "_get_streams", lambda device, number: (stream,) * number)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_index", lambda index: nullcontext())

    _share_memory_in_place_of_ipc(monkeypatch)

    async def behave(worker, server: Imitation, path: str, body: dict) -> dict | None:
        if path == "collective_rpc":
            return {"results": [getattr(worker, body["method"])(**body["kwargs"])]}
        if path == "init_weight_transfer_engine":
            worker.init(body["init_info"])
        if path == "update_weights":
            await asyncio.to_thread(worker.update, body["update_info"])
        return None

    with ExitStack() as stack:
        workers = [worker_of(backend, model, wire) for model in models]
        servers = [stack.enter_context(Imitation(behave=functools.partial(behave, worker))) for worker in workers]
        yield servers, models, wire


def _share_memory_in_place_of_ipc(monkeypatch) -> None:
    """A handle of CUDA IPC is the number of a buffer of this process."""
    from torch.multiprocessing import reductions
    from vllm.distributed.weight_transfer import packed_tensor

    buffers: list[Tensor] = []
    plain = torch.empty

    def empty(*size: object, **options: object) -> Tensor:
        return plain(*size, **options | ({"device": "cpu"} if options.get("device") == "cuda" else {}))

    def handle(buffer: Tensor) -> tuple:
        buffers.append(buffer)
        return None, (len(buffers) - 1, b"\x00\xff", *range(2, 7))  # bytes, as a real one has, which JSON does not take

    monkeypatch.setenv("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid="GPU-0"))
    monkeypatch.setattr(torch.cuda, "ipc_collect", lambda: None)
    monkeypatch.setattr(packed_tensor, "reduce_tensor", handle)
    monkeypatch.setattr(reductions, "rebuild_cuda_tensor", lambda number, *_: buffers[number])
