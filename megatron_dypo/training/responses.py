"""Convert per-token numbers of a micro-batch to whole responses, and back: context-parallel ranks hold slices.

Legend: N loss tokens of a micro-batch on this rank, n tokens of one response.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state as mpu
from torch import Tensor

from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.runtime.distributed import Layout, all_gather_objects


def whole_responses(batch: MicroBatch, values_N: Tensor, layout: Layout) -> list[Tensor]:
    """Return one tensor [n] per sequence, float64 on the host, in the order of ``batch.places``.

    Collective over context-parallel ranks; each of them gets all sequences.
    """
    pieces = batch.split(values_N.double().cpu())
    if layout.cp == 1:
        return pieces
    mine = list(zip(batch.split(batch.tail_N), pieces, strict=True))
    everyone = all_gather_objects(mine, mpu.get_context_parallel_group())
    found = []
    for parts in zip(*everyone, strict=True):
        whole_n = torch.empty(sum(len(tail) for tail, _ in parts), dtype=torch.float64)
        for tail, piece in parts:
            whole_n[tail] = piece
        found.append(whole_n)
    return found


def own_tokens(batch: MicroBatch, responses: list[Tensor]) -> Tensor:
    """Return this rank's tokens [N] of whole responses, fp32."""
    parts = [whole_n[tail] for whole_n, tail in zip(responses, batch.split(batch.tail_N), strict=True)]
    return torch.cat([torch.zeros(0), *parts]).float()
