"""Drive the trainer's side of a weight transfer: vLLM's four phases (init, start, update, finish) over each backend.

``nccl`` and ``ipc`` are vLLM's own. ``send_in_process`` and ``shared_memory``, which need no CUDA, end in
``worker.LocalEngine``. The stream is split into buckets of whole layers, and a larger layer (one of many experts) into
several, so that neither side ever holds a second model, nor the trainer all experts of a layer.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from megatron_dypo.errors import TrainingError

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.source import Meta

BUCKET_BYTES = 256 * 2**20  # exceeded only by a single larger tensor


class WeightSource(Protocol):
    """An iterable of the policy's weights, such as ``Weights``, with or without checksums."""

    def metadata(self) -> list[Meta]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class Client(Protocol):
    """The engine's (or all engines') end of the four phases; vLLM's ``VLLMWeightSyncClient``."""

    def init_weight_transfer_engine(self, init_info: dict) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


class Transfer(Protocol):
    """The trainer's side of an open weight transfer: ``SharedMemory``, or one of vLLM's trainer engines.

    ``source`` is sent by the next ``send_weights``: a ``WeightSource``, or vLLM's own type of that name.
    """

    source: Any

    def send_weights(self) -> None: ...

    def shutdown(self) -> None: ...


@dataclass(frozen=True)
class Bucket:
    """The next ``count`` tensors of the stream, ``nbytes`` in all; ``part`` of a layer, or whole layers."""

    count: int
    nbytes: int
    part: bool


def buckets(weights: list[Meta], limit: int) -> list[Bucket]:
    """Split the stream into buckets of at most ``limit`` bytes, or one tensor."""
    found: list[Bucket] = []
    for _, members in groupby(weights, key=lambda meta: _layer(meta.name)):
        layer = [meta.nbytes for meta in members]
        part = sum(layer) > limit and len(layer) > 1
        for piece in ([size] for size in layer) if part else [layer]:
            last = found[-1] if found else None
            if last and last.part == part and last.nbytes + sum(piece) <= limit:
                found[-1] = Bucket(last.count + len(piece), last.nbytes + sum(piece), part)
            else:
                found.append(Bucket(len(piece), sum(piece), part))
    return found


def send_in_process(client: Client, weights: WeightSource) -> None:
    """Send to an engine in this process: the tensors as they are gathered, without a copy. Collective."""
    client.start_weight_update()
    stream = iter(weights)
    for cut in buckets(weights.metadata(), BUCKET_BYTES):
        client.update_weights({"tensors": list(islice(stream, cut.count))})
    client.finish_weight_update()


class SharedMemory:
    """Sends to engines in other processes of this machine, through two buckets.

    One is filled, tensor by tensor, while the engines load the other. The memory has no name, so a kill leaves nothing
    behind.
    """

    def __init__(self, client: Client, weights: WeightSource, is_sender: bool):
        self._client, self._is_sender = client, is_sender
        self.source: WeightSource = weights
        self._buckets: list[_Memory] = []
        if is_sender:
            self._cuts = buckets(weights.metadata(), BUCKET_BYTES)
            size = max(cut.nbytes for cut in self._cuts)
            self._buckets = [_Memory(size), _Memory(size)]
            client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        """Run all four phases but the first. Collective; raises what the client raises."""
        if not self._is_sender:
            for _ in self.source:
                pass
            return
        if buckets(self.source.metadata(), BUCKET_BYTES) != self._cuts:
            raise TrainingError("weight sync: the weights have other sizes than when the transfer was opened")
        self._client.start_weight_update()
        with ThreadPoolExecutor(1) as loader:
            loading: Future | None = None
            filling, spare = self._buckets
            stream = iter(self.source)
            for cut in self._cuts:
                for name, tensor in islice(stream, cut.count):
                    filling.add(name, tensor)
                loading = _after(loading, loader.submit, self._client.update_weights, filling.take(cut.part))
                filling, spare = spare, filling
            _after(loading, lambda: None)
        self._client.finish_weight_update()

    def shutdown(self) -> None:
        for bucket in self._buckets:
            bucket.close()


class _Memory:
    """Shared pages, and the tensors copied to them."""

    def __init__(self, size: int):
        self._size, self._descriptor = size, os.memfd_create("weights")
        try:
            os.posix_fallocate(self._descriptor, 0, size)  # an OSError now rather than a SIGBUS later
        except OSError as error:
            os.close(self._descriptor)
            raise TrainingError(
                f"rollout.sync_backend: shared_memory: there is no room for 2 x {size:,} bytes: {error.strerror}"
            ) from None
        self._map = mmap.mmap(self._descriptor, size)
        self._places: list[tuple] = []
        self._used = 0

    def add(self, name: str, tensor: Tensor) -> None:
        dtype = str(tensor.dtype).removeprefix("torch.")
        place = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
        place.view(tensor.shape).copy_(tensor)
        self._places.append((name, dtype, list(tensor.shape), self._used))
        self._used += tensor.nbytes

    def take(self, part: bool) -> dict:
        """Return the bucket as ``worker.BucketInfo`` describes it, and empty it."""
        places, self._places, self._used = self._places, [], 0
        return {"tensors": places, "memory": (os.getpid(), self._descriptor, self._size), "part": part}

    def close(self) -> None:
        os.close(self._descriptor)


def _after(before: Future | None, action: Callable, *arguments):
    """Run ``action(*arguments)`` once ``before`` has succeeded."""
    if before is not None:
        before.result()
    return action(*arguments)


def _layer(name: str) -> str:
    """Return the layer's prefix, such as ``model.layers.7``; a tensor outside the layers is one by itself."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else name
