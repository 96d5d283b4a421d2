"""Offload the policy between its passes, so that the rollout engine can use its device memory.

Tensors stay the same objects: only their storages are emptied, after a copy to host memory, and refilled. So everything
that shares a storage (mcore's views into its buffers, master weights, a tied head) is restored without being known
here. mcore's own ``offload_to_cpu`` gives tensors new storages, which separates the distributed optimizer's fp32 slices
from the weights that they are views of, and does nothing without its distributed optimizer or without CUDA.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from megatron.core import parallel_state as mpu
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, UntypedStorage

from megatron_dypo.kernels import workspace
from megatron_dypo.policy.host_memory import HostMemory
from megatron_dypo.policy.optimizer import inner_optimizers
from megatron_dypo.policy.reference import Reference
from megatron_dypo.runtime.distributed import device
from megatron_dypo.runtime.failure import phase
from megatron_dypo.runtime.measure import Stopwatch


class Offload:
    """Moves weights, gradients, optimizer state and a reference on the device to host memory and back.

    In between nothing may read or write any of them: their storages have 0 bytes. A new stage of the run may have
    another ``reference``. ``clock`` measures the seconds spent moving.
    """

    def __init__(self, chunks: list[DistributedDataParallel], optimizer, reference: Reference | None):
        self._chunks, self._optimizer, self.reference = chunks, optimizer, reference
        self._host = HostMemory()
        self._kept: list[tuple[UntypedStorage, int]] = []  # storages emptied after a copy, and their bytes
        self._gradients: list[tuple[UntypedStorage, int]] = []  # storages emptied without one
        self.clock = Stopwatch("offload")

    def require_device(self) -> None:
        """Assert that the policy is on the device: reading an emptied storage would end the process."""
        assert not self._kept, "the policy is in host memory while the rollout engine has the device"

    @contextmanager
    def on_host(self) -> Iterator[None]:
        """Keep the policy in host memory during the block. An exception leaves it there: the run is over."""
        self.to_host()
        yield
        self.to_device()

    def to_host(self) -> None:
        """Copy the device's storages to the host and empty them; gradients are emptied without a copy."""
        self.require_device()
        with self.clock(), phase("offload"):
            reference = self.reference.on_device() if self.reference else ()
            self._kept = _sized(chain(_weights(self._chunks), _optimizer_state(self._optimizer), reference))
            self._gradients = _sized(_gradients(self._chunks))
            for on_device, on_host in self._pieces():
                on_host.copy_(on_device, non_blocking=True)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            for storage, _ in self._kept + self._gradients:
                storage.resize_(0)
            _drop_scratch(self._chunks)
            workspace.release()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()  # otherwise torch would keep the memory

    def to_device(self) -> None:
        """Bring everything back, bit for bit; gradients come back as zeros."""
        with self.clock(), phase("offload"):
            for storage, size in self._kept + self._gradients:
                storage.resize_(size)
            for on_device, on_host in self._pieces():
                on_device.copy_(on_host, non_blocking=True)
            for storage, _ in self._gradients:
                storage.fill_(0)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._kept, self._gradients = [], []

    @property
    def host_bytes(self) -> int:
        """Return the bytes of host memory kept for the next time."""
        return self._host.nbytes

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (bytes of a storage, their place in host memory), piece by piece."""
        empty = torch.empty(0, dtype=torch.uint8, device=device())
        return self._host.beside(empty.new_empty(0).set_(storage) for storage, _ in self._kept)


def _weights(chunks: list[DistributedDataParallel]) -> Iterator[Tensor]:
    """Return the weights; with the distributed optimizer they are views into a few buffers."""
    return chain.from_iterable(chunk.parameters() for chunk in chunks)


def _gradients(chunks: list[DistributedDataParallel]) -> Iterator[Tensor]:
    """Return mcore's gradient buffers, of which every ``main_grad`` is a view."""
    return (buffer.grad_data for chunk in chunks for buffer in chunk.buffers + chunk.expert_parallel_buffers)


def _optimizer_state(optimizer) -> Iterator[Tensor]:
    """Yield master weights and, after the first update, moments, and step counts if they are on the device."""
    for inner in inner_optimizers(optimizer):
        for group in inner.param_groups:
            yield from group["params"]
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _drop_scratch(chunks: list[DistributedDataParallel]) -> None:
    """Release what mcore keeps of the last micro-batch: later stages' inputs, and the sequence-parallel buffer."""
    for chunk in chunks:
        chunk.module.set_input_tensor(None)
    mpu.get_global_memory_buffer().buffer.clear()


def _sized(tensors: Iterator[Tensor]) -> list[tuple[UntypedStorage, int]]:
    """Return the non-empty storages of the tensors on this rank's device, each once, and their bytes."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device == device()]
    return [(s, s.nbytes()) for s in {s.data_ptr(): s for s in storages if s.nbytes()}.values()]
