"""The frozen reference: a second set of this rank's weights, exchanged with the policy's for a forward-only pass.

On the device only pointers are exchanged. In host memory there is one copy as well: contents are swapped through two
small staging buffers on the device, so while the reference is in the modules the policy's weights occupy its place.
Either way a parameter stays the object that mcore knows, and ``main_grad``, master weights and the distributed
optimizer's slices keep referring to the policy's storage.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_dypo.policy.host_memory import HostMemory
from megatron_dypo.runtime.distributed import device

STAGE = 2**25  # bytes of a staging buffer: the link reaches full speed from a few MiB on


class Reference(ABC):
    """The frozen weights by parameter name. After the first ``keep`` no further host memory is allocated."""

    on: ClassVar[str]  # its name in model.reference_on

    def __init__(self, parameters: Mapping[str, Parameter]):
        self._parameters = parameters

    @contextmanager
    def weights(self) -> Iterator[None]:
        """Put the reference into the modules during the block. An exception leaves it there: the run is over."""
        self.swap()
        yield
        self.swap()

    @abstractmethod
    def keep(self) -> None:
        """Freeze the current weights."""

    @abstractmethod
    def swap(self) -> None:
        """Exchange reference and policy, bit for bit; a second call restores both."""

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return the frozen weight in its parameter's shape, on either device."""

    @abstractmethod
    def write(self, name: str, weight: Tensor) -> None:
        """Replace a frozen weight."""

    @abstractmethod
    def on_device(self) -> Iterator[Tensor]:
        """Return the tensors on the policy's device, which are offloaded with the policy (trainer.offload)."""


class OnDevice(Reference):
    """A reference on the device, of the same size as the weights; nothing is copied."""

    on = "device"

    def __init__(self, parameters: Mapping[str, Parameter]):
        super().__init__(parameters)
        self._kept = {name: torch.empty_like(parameter.detach()) for name, parameter in parameters.items()}

    def keep(self) -> None:
        for name, parameter in self._parameters.items():
            self._kept[name].copy_(parameter.detach())

    def swap(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.data, self._kept[name] = self._kept[name], parameter.data

    def read(self, name: str) -> Tensor:
        return self._kept[name]

    def write(self, name: str, weight: Tensor) -> None:
        self._kept[name].copy_(weight)

    def on_device(self) -> Iterator[Tensor]:
        return iter(self._kept.values())


class OnHost(Reference):
    """A reference in (pinned) host memory, in whole chunks, with 2 STAGE bytes on the device."""

    on = "host"

    def __init__(self, parameters: Mapping[str, Parameter]):
        super().__init__(parameters)
        self._host = HostMemory()
        ends = itertools.accumulate((parameter.nbytes for parameter in parameters.values()), initial=0)
        self._places = dict(zip(parameters, itertools.pairwise(ends), strict=True))

    @property
    def host_bytes(self) -> int:
        return self._host.nbytes

    def keep(self) -> None:
        for on_device, on_host in self._host.beside(self._contents()):
            on_host.copy_(on_device, non_blocking=True)
        torch.get_device_module(device()).synchronize()

    def swap(self) -> None:
        """Swap piece by piece: one comes in while the last goes out, as the link carries both directions at once."""
        backend = torch.get_device_module(device())
        staging = torch.empty(2, STAGE, dtype=torch.uint8, device=device())
        inward, outward = backend.Stream(), backend.Stream()
        for stream in (inward, outward):
            stream.wait_stream(backend.current_stream())
        free = [outward.record_event(), outward.record_event()]  # events that free a staging buffer
        for i, (on_device, on_host) in enumerate(self._host.beside(self._contents(), STAGE)):
            stage = staging[i % 2, : len(on_host)]
            with backend.stream(inward):
                inward.wait_event(free[i % 2])
                stage.copy_(on_host, non_blocking=True)
            with backend.stream(outward):
                outward.wait_stream(inward)  # before its place in host memory is overwritten
                on_host.copy_(on_device, non_blocking=True)
                on_device.copy_(stage)
                free[i % 2] = outward.record_event()
        backend.synchronize()

    def read(self, name: str) -> Tensor:
        weight = torch.empty(self._parameters[name].shape, dtype=self._parameters[name].dtype)
        for piece, place in self._beside(name, weight):
            piece.copy_(place)
        return weight

    def write(self, name: str, weight: Tensor) -> None:
        for piece, place in self._beside(name, weight.to(self._parameters[name].dtype).contiguous()):
            place.copy_(piece)

    def on_device(self) -> Iterator[Tensor]:
        return iter(())

    def _contents(self) -> Iterator[Tensor]:
        return (_flat_bytes(parameter.detach()) for parameter in self._parameters.values())

    def _beside(self, name: str, weight: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        content, begin = _flat_bytes(weight), 0
        for place in self._host.places(*self._places[name]):
            yield content[begin : begin + len(place)], place
            begin += len(place)


def _flat_bytes(tensor: Tensor) -> Tensor:
    """Return a contiguous tensor's bytes as a view."""
    return tensor.view(-1).view(torch.uint8)


PLACES = {place.on: place for place in (OnDevice, OnHost)}
