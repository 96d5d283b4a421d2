"""Proof that an engine took what the trainer sent: a checksum of each tensor on both sides."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_dypo.errors import TrainingError

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.source import Meta
    from megatron_dypo.weight_sync.transfer import WeightSource


def checksum(tensor: Tensor) -> str:
    """SHA-256 of the elements' bytes, wherever they lie and in whatever order of strides."""
    # A copy: numpy would mark the storage as one that must not be resized, and offload empties storages.
    plain = tensor.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy()).hexdigest()


class ChecksummedWeights:
    """Weights that remember a checksum of each tensor of the last pass."""

    def __init__(self, weights: WeightSource):
        self._weights = weights
        self.sent: dict[str, str] = {}

    def metadata(self) -> list[Meta]:
        return self._weights.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.sent = {}
        for name, tensor in self._weights:
            self.sent[name] = checksum(tensor)
            yield name, tensor

    def compare(self, taken: Sequence[dict[str, str]], engine: str) -> None:
        """Raises TrainingError naming the first tensor of which a worker of ``engine`` has other bytes, or none."""
        if not taken:
            raise TrainingError(f"weight sync to {engine}: no worker has checksums (rollout.verify_sync)")
        for worker, theirs in enumerate(taken):
            for meta in self.metadata():
                where = f"weight sync to {engine}, worker {worker}: {meta.name}"
                if meta.name not in theirs:
                    raise TrainingError(f"{where}: was not received (rollout.verify_sync)")
                if theirs[meta.name] != self.sent.get(meta.name):
                    raise TrainingError(f"{where}: differs from the trainer's (rollout.verify_sync)")
