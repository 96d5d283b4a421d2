"""Prove that an engine received what the trainer sent: checksums of each tensor on both sides, and of stored ones."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from megatron_dypo.errors import TrainingError

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.source import Meta
    from megatron_dypo.weight_sync.transfer import WeightSource

Verify = Literal["off", "sent", "stored"]


def checksum(tensor: Tensor) -> str:
    """Return the SHA-256 of the elements' bytes, independent of device and strides."""
    # A copy: numpy would mark the storage as not resizable, and offload empties storages.
    plain = tensor.detach().to("cpu", copy=True).contiguous().view(-1).view(torch.uint8)
    return hashlib.sha256(plain.numpy()).hexdigest()


@dataclass(frozen=True)
class Turn:
    """The tensors compared in a sync: one share of ``of``, so that ``of`` consecutive syncs cover all of them.

    Tensors of one module are in the same share, because a worker reads its fused tensors as one.
    """

    number: int
    of: int

    def has(self, name: str) -> bool:
        module = name.rsplit(".", 2)[0]
        return zlib.crc32(module.encode()) % self.of == self.number % self.of


class ChecksummedWeights:
    """Weights that record, in each pass, a checksum of every tensor that has its turn."""

    def __init__(self, weights: WeightSource, turn: Turn):
        self._weights, self.turn = weights, turn
        self.sent: dict[str, str] = {}

    def metadata(self) -> list[Meta]:
        return self._weights.metadata()

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        self.sent = {}
        for name, tensor in self._weights:
            if self.turn.has(name):
                self.sent[name] = checksum(tensor)
            yield name, tensor

    def compare(self, reports: Sequence[dict], engine: str) -> None:
        """Raise TrainingError naming the first tensor that a worker of ``engine`` lacks, got twice, or holds altered.

        ``reports``: each worker's ``weight_report``.
        """
        if not reports:
            raise TrainingError(f"weight sync to {engine}: no worker returned checksums (rollout.verify_sync)")
        for worker, report in enumerate(reports):
            for meta in self.metadata():
                if fault := self._fault(meta.name, report):
                    where = f"weight sync to {engine}, worker {worker}: {meta.name}"
                    raise TrainingError(f"{where}: {fault} (rollout.verify_sync)")

    def _fault(self, name: str, report: dict) -> str | None:
        times = report["times"].get(name, 0)
        if times != 1:
            return "was not received" if times == 0 else f"was received {times} times"
        if not self.turn.has(name):
            return None
        if report["given"].get(name) != self.sent.get(name):
            return "differs from the trainer's"
        return report["stored"].get(name)
