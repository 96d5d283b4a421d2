"""Send only the values that changed since the last sync, over vLLM's ``sparse_nccl``, as flat indices and new values.

A value changed if its bits differ. An update with lr 1e-6 leaves most bf16 values unchanged, because it is far smaller
than their spacing; a changed value takes 6 bytes with its index instead of 2. Rank 0 keeps in host memory what it sent
last, a whole model. Legend: N elements of a tensor, C of them changed.
"""

from __future__ import annotations

import logging
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from megatron_dypo.errors import UserError
from megatron_dypo.weight_sync.checksum import ChecksummedWeights
from megatron_dypo.weight_sync.transfer import BUCKET_BYTES, Client, WeightSource, buckets

log = logging.getLogger(__name__)
PAYS = 1 / 3  # of the values: if more have changed, sending all of them, two bytes each, takes fewer bytes
_BITS = {2: torch.int16, 4: torch.int32}


class LastSent:
    """The values last sent of each tensor, in host memory."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def changes(self, name: str, tensor: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Return flat indices (int32 [C]) and values [C] that differ from those last sent, and remember ``tensor``.

        All values differ if none were sent, or if ``whole``.
        """
        flat_N = tensor.detach().reshape(-1)
        if name not in self._kept:
            whole = True
            self._kept[name] = torch.empty(flat_N.shape, dtype=flat_N.dtype, pin_memory=flat_N.is_cuda)
        kept_N, bits = self._kept[name], _BITS[flat_N.itemsize]
        if whole:
            places_C = torch.arange(len(flat_N), dtype=torch.int32, device=flat_N.device)
        else:
            changed_N = flat_N.view(bits) != kept_N.to(flat_N.device).view(bits)
            places_C = changed_N.nonzero().squeeze(1).int()
        kept_N.copy_(flat_N)
        return places_C, flat_N[places_C]


class SparseNccl:
    """A ``Transfer`` around vLLM's ``sparse_nccl`` sender, a bucket at a time. The first sync sends everything.

    vLLM writes the values into its layers in place; there, a tensor that ``rollout.verify_sync`` compares is sent
    whole. ``engine``: vLLM's, on the sending rank. Raises UserError for a tensor with more elements than int32 can
    index.
    """

    def __init__(self, engine: Any, client: Client, source: WeightSource, is_sender: bool):
        self.source = source
        self._engine, self._client, self._is_sender = engine, client, is_sender
        self._last, self._everything = LastSent(), True
        self._values = self._changed = 0  # of this sync's tensors that were compared with the last sync's
        for meta in source.metadata():
            if torch.Size(meta.shape).numel() >= 2**31:
                raise UserError(f"rollout.sync_backend: sparse_nccl: {meta.name} has 2**31 elements or more: take nccl")

    def send_weights(self) -> None:
        """Run the phases start, update, finish. Collective; raises what the client raises."""
        if not self._is_sender:
            for _ in self.source:
                pass
            return
        self._values = self._changed = 0
        self._client.start_weight_update()
        stream = iter(self.source)
        for cut in buckets(self.source.metadata(), BUCKET_BYTES):
            self._engine.send_weight_chunk([self._patch(name, tensor) for name, tensor in islice(stream, cut.count)])
        self._client.finish_weight_update()
        self._everything = False
        if self._changed > PAYS * self._values:
            share = self._changed / self._values
            log.warning(
                "rollout.sync_backend: sparse_nccl: %.0f%% of the values changed: nccl sends fewer bytes", 100 * share
            )

    def _patch(self, name: str, tensor: Tensor) -> Any:
        from vllm.distributed.weight_transfer.sparse_nccl_engine import SparseWeightPatch

        watched = self.source.turn.has(name) if isinstance(self.source, ChecksummedWeights) else False
        whole = self._everything or watched
        places_C, values_C = self._last.changes(name, tensor, whole)
        if not whole:
            self._values, self._changed = self._values + tensor.numel(), self._changed + len(places_C)
        return SparseWeightPatch(name, places_C, values_C, tuple(tensor.shape))

    def shutdown(self) -> None:
        if self._is_sender:
            self._engine.shutdown()
