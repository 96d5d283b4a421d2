"""Provide every weight of the policy under its Hugging Face name, for any number of passes of a weight sync."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from megatron_dypo.models.families import hf_shapes
from megatron_dypo.models.rules import EMBEDDING, HEAD
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.runtime.failure import phase

if TYPE_CHECKING:
    from megatron_dypo.policy.policy import Policy


@dataclass(frozen=True)
class Meta:
    """Name, dtype and full shape of a tensor to be sent."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def sent_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return name and full shape of every sent tensor, in order.

    A tied embedding is also sent as ``lm_head.weight``: otherwise vLLM silently keeps the old head.
    """
    found = {}
    for name, size in hf_shapes(shape).items():
        found[name] = size
        if name == EMBEDDING and shape.tied_embeddings:
            found[HEAD] = size
    return found


class VersionedWeights(Protocol):
    """The argument of an engine's ``sync``: ``Weights`` or ``StoredWeights``."""

    @property
    def version(self) -> int: ...

    def metadata(self) -> list[Meta]: ...

    def __iter__(self) -> Iterator[tuple[str, Tensor]]: ...


class Weights:
    """The policy's current weights at each pass; a ``WeightSource`` on vLLM's trainer side.

    A pass gathers each tensor from the ranks that hold parts of it, so all ranks must iterate together.
    """

    def __init__(self, policy: Policy):
        self._policy = policy

    @property
    def version(self) -> int:
        """Return the optimizer updates of these weights."""
        return self._policy.version

    def metadata(self) -> list[Meta]:
        """Return name, dtype and full shape of every tensor of a pass, in order; no collective."""
        dtype = next(iter(self._policy.parameters.values())).dtype
        return [Meta(name, dtype, size) for name, size in sent_shapes(self._policy.shape).items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._policy.named_tensors()


@dataclass(frozen=True)
class StoredWeights:
    """``Weights`` from files instead of a policy: ``read(name)`` returns a full tensor; every rank reads for itself."""

    shape: ModelShape
    dtype: torch.dtype
    read: Callable[[str], Tensor]
    version: int = 0

    def metadata(self) -> list[Meta]:
        return [Meta(name, self.dtype, size) for name, size in sent_shapes(self.shape).items()]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name in sent_shapes(self.shape):
            stored = EMBEDDING if name == HEAD and self.shape.tied_embeddings else name
            yield name, self.read(stored).to(self.dtype)


class Receiver(Protocol):
    """An engine whose weights are replaced in place."""

    def sync(self, weights: VersionedWeights) -> None: ...


def sync_weights(policy: Policy, engine: Receiver, seconds: float) -> int:
    """Send the policy's weights before a deadline, collectively; return the weight version the engine now serves."""
    with phase("weight sync", limit=(seconds, "rollout.sync_timeout")):
        engine.sync(Weights(policy))
    return policy.version
