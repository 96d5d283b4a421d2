"""What a sync sends: every weight of the policy under its Hugging Face name, as often as it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_dypo.convert.mapping import hf_shapes
from megatron_dypo.convert.rules import EMBEDDING, HEAD
from megatron_dypo.policy.policy import Policy


@dataclass(frozen=True)
class Meta:
    """One tensor to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


class Weights:
    """The policy's weights as they are at each pass; what vLLM's trainer side calls a ``WeightSource``.

    A pass gathers each tensor from the ranks that hold parts of it, so all ranks have to make it together. A tied
    embedding is sent as ``lm_head.weight`` as well: vLLM keeps the old head otherwise, in silence.
    """

    def __init__(self, policy: Policy):
        self._policy = policy

    @property
    def version(self) -> int:
        """Optimizer updates behind these weights."""
        return self._policy.version

    def metadata(self) -> list[Meta]:
        """Name, dtype and full shape of all that a pass yields, in its order; asks no other rank."""
        shape, dtype = self._policy.shape, next(iter(self._policy.parameters.values())).dtype
        found = []
        for name, size in hf_shapes(shape).items():
            found.append(Meta(name, dtype, size))
            if name == EMBEDDING and shape.tied_embeddings:
                found.append(Meta(HEAD, dtype, size))
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        return self._policy.named_tensors()
