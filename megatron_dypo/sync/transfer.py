"""The trainer's side of a weight transfer: vLLM's four phases (init, start, update, finish) over each of its backends.

``nccl`` and ``ipc`` are vLLM's own. ``hand_over`` and ``shared_memory``, which need no CUDA, end in
``worker.LocalEngine``. Whole layers go at a time, so that neither side ever holds a second model.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import TYPE_CHECKING, Protocol, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from megatron_dypo.sync.weights import Meta

_Item = TypeVar("_Item")
BUCKET_BYTES = 256 * 2**20  # more only where one layer has more


class Source(Protocol):
    """``Weights``, watched or not."""

    def metadata(self) -> list[Meta]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class Client(Protocol):
    """The engine's (or all engines') end of the four phases; vLLM's ``VLLMWeightSyncClient``."""

    def init_weight_transfer_engine(self, init_info: dict) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict) -> None: ...

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def hand_over(client: Client, weights: Source) -> None:
    """To an engine in this process: each layer as it is gathered, without a copy. Collective."""
    client.start_weight_update()
    for tensors in _by_layer(weights):
        client.update_weights({"tensors": tensors})
    client.finish_weight_update()


class SharedMemory:
    """To engines in other processes of this machine. Two buckets: one is filled while the engines load the other.

    The memory has no name, so a kill leaves nothing behind.
    """

    def __init__(self, client: Client, weights: Source, is_sender: bool):
        self._client, self.source, self._is_sender = client, weights, is_sender
        self._buckets: list[_Memory] = []
        if is_sender:
            layers = _by_layer((meta.name, meta.nbytes) for meta in weights.metadata())
            sizes = [sum(nbytes for _, nbytes in layer) for layer in layers]
            size = min(max(BUCKET_BYTES, *sizes), sum(sizes))
            self._buckets = [_Memory(size), _Memory(size)]
            client.init_weight_transfer_engine({})

    def send_weights(self) -> None:
        """All four phases but the first. Collective; raises what the client raises."""
        if not self._is_sender:
            for _ in self.source:
                pass
            return
        self._client.start_weight_update()
        with ThreadPoolExecutor(1) as loader:
            loading: Future | None = None
            filling, spare = self._buckets
            for tensors in _by_layer(self.source):
                if not filling.fits(tensors):
                    loading = _after(loading, loader.submit, self._client.update_weights, filling.take())
                    filling, spare = spare, filling
                filling.add(tensors)
            _after(loading, self._client.update_weights, filling.take())
        self._client.finish_weight_update()

    def shutdown(self) -> None:
        for bucket in self._buckets:
            bucket.close()


class _Memory:
    """Shared pages, and what has been copied to them."""

    def __init__(self, size: int):
        self._size, self._descriptor = size, os.memfd_create("weights")
        os.posix_fallocate(self._descriptor, 0, size)  # an OSError now, not a SIGBUS later
        self._map = mmap.mmap(self._descriptor, size)
        self._places: list[tuple] = []
        self._used = 0

    def fits(self, tensors: list[tuple[str, Tensor]]) -> bool:
        return self._used + sum(tensor.nbytes for _, tensor in tensors) <= self._size

    def add(self, tensors: list[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            dtype = str(tensor.dtype).removeprefix("torch.")
            place = torch.frombuffer(self._map, dtype=tensor.dtype, count=tensor.numel(), offset=self._used)
            place.view(tensor.shape).copy_(tensor)
            self._places.append((name, dtype, list(tensor.shape), self._used))
            self._used += tensor.nbytes

    def take(self) -> dict:
        """The bucket as ``worker.Bucket`` has it; afterwards there is room again."""
        places, self._places, self._used = self._places, [], 0
        return {"tensors": places, "memory": (os.getpid(), self._descriptor, self._size)}

    def close(self) -> None:
        os.close(self._descriptor)


def _after(before: Future | None, action: Callable, *arguments):
    """``action(*arguments)``, once ``before`` has succeeded."""
    if before is not None:
        before.result()
    return action(*arguments)


def _by_layer(named: Iterable[tuple[str, _Item]]) -> Iterator[list[tuple[str, _Item]]]:
    """The stream in whole layers: the engine holds on to a layer's tensors until it has them all."""
    for _, layer in groupby(named, key=lambda pair: _layer(pair[0])):
        yield list(layer)


def _layer(name: str) -> str:
    """``model.layers.7`` of anything in that layer; a tensor outside of the layers is one by itself."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[1] == "layers" else name
