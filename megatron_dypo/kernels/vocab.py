"""One rank's share of the vocabulary, and the statistics that join the shares into a softmax.

The vocabulary is cut into a fixed number of tiles whatever the tensor-parallel size. Each tile yields (max, sum of
exp, sum of z exp, z of the target); one all-gather brings all tiles to all ranks, which combine them in the same order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TILES = 8


@dataclass(frozen=True)
class VocabShard:
    """``rows`` local columns of the logits, starting at global id ``start``; ids >= ``vocab_size`` are padding."""

    rows: int
    start: int
    vocab_size: int
    group: dist.ProcessGroup | None
    ranks: int

    @classmethod
    def of(cls, rows: int, group: dist.ProcessGroup | None, vocab_size: int | None) -> VocabShard:
        ranks = 1 if group is None else dist.get_world_size(group)
        rank = 0 if group is None else dist.get_rank(group)
        if ranks > TILES or TILES % ranks:
            raise ValueError(f"tp_group: {ranks} ranks do not divide the {TILES} tiles of the vocabulary")
        if vocab_size is not None and not 0 < vocab_size <= rows * ranks:
            raise ValueError(f"vocab_size: {vocab_size} does not fit {rows * ranks} weight rows")
        return cls(rows, rank * rows, rows * ranks if vocab_size is None else vocab_size, group, ranks)

    def mask_padding(self, z_tV: Tensor) -> Tensor:
        """-inf (in place) where a column is vocabulary padding."""
        real = max(0, min(self.rows, self.vocab_size - self.start))
        z_tV[:, real:] = float("-inf")
        return z_tV

    def local_targets(self, targets_t: Tensor) -> tuple[Tensor, Tensor]:
        """(column of each target, clamped into the shard; whether the target is in this shard)."""
        local_t = targets_t - self.start
        here_t = (local_t >= 0) & (local_t < self.rows)
        return local_t.clamp(0, self.rows - 1), here_t


def softmax_statistics(z_tV: Tensor, targets_t: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """(logp [t], entropy [t], lse [t]) of the scaled, masked logits ``z_tV`` of this shard; one collective under TP."""
    tiles = TILES // shard.ranks
    if shard.rows % tiles:
        tiles = 1  # a vocabulary that was not padded: tests and single-rank use
    z_tKv = z_tV.unflatten(1, (tiles, -1))
    top_tK = z_tKv.amax(-1)
    floor_tK = top_tK.clamp(min=torch.finfo(torch.float32).min)  # an all-padding tile has max -inf
    exp_tKv = (z_tKv - floor_tK.unsqueeze(-1)).exp()
    weighted_tK = (exp_tKv * z_tKv.clamp(min=torch.finfo(torch.float32).min)).sum(-1)
    local_t, here_t = shard.local_targets(targets_t)
    target_t = torch.where(here_t, z_tV.gather(1, local_t.unsqueeze(1)).squeeze(1), 0.0)
    target_tK = torch.zeros_like(top_tK)
    target_tK[:, 0] = target_t
    stats_Kt4 = torch.stack([floor_tK, exp_tKv.sum(-1), weighted_tK, target_tK], dim=-1).transpose(0, 1).contiguous()
    if shard.ranks > 1:
        gathered = [torch.empty_like(stats_Kt4) for _ in range(shard.ranks)]
        dist.all_gather(gathered, stats_Kt4, group=shard.group)
        stats_Kt4 = torch.cat(gathered)
    floor_Kt, sum_Kt, weighted_Kt, targets_Kt = stats_Kt4.unbind(-1)
    top_t = floor_Kt.amax(0)
    scale_Kt = (floor_Kt - top_t).exp()
    total_t = (sum_Kt * scale_Kt).sum(0)
    lse_t = top_t + total_t.log()
    entropy_t = lse_t - (weighted_Kt * scale_Kt).sum(0) / total_t
    return targets_Kt.sum(0) - lse_t, entropy_t, lse_t
