"""One rank's shard of the vocabulary, and the statistics that combine the shards into a softmax.

The vocabulary is split into TILES tiles whatever the tensor-parallel size. Each tile of the logits yields a top, the
sums of exp(z - top) and of z exp(z - top) over all columns but the target's, and the target's z; one all-gather sends
them to all ranks, which combine them in the same order. The target is excluded so that 1 - p keeps its digits where p
is near 1: with R = (sum over the others) / exp(z_target), logp = -log1p(R).
A rank also forms the logits tile by tile, so that every matrix product has the same shape at any tensor-parallel size:
log-prob and entropy are then equal bit for bit. Padding is not part of any tile, so no mask is needed.

Legend: t tokens, K tiles (8 over all ranks), v columns of a tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

TILES = 8
STATISTICS = 4
FAR = 30.0  # |log of a sum of exp| up to which sums, products and quotients stay well within fp32: e^30 is 1e13


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

    @property
    def tile_width(self) -> int:
        """Return the columns of every tile but the last."""
        return -(-self.rows // (TILES // self.ranks))

    @property
    def tiles(self) -> list[slice]:
        """Return this rank's tiles as ranges of local columns, without padding; one may be empty."""
        width, real = self.tile_width, self.real.stop
        return [slice(min(k * width, real), min((k + 1) * width, real)) for k in range(TILES // self.ranks)]

    @property
    def real(self) -> slice:
        """Return the local columns that are not padding."""
        return slice(0, max(0, min(self.rows, self.vocab_size - self.start)))


def target_columns(targets_t: Tensor, shard: VocabShard, tile: slice) -> tuple[Tensor, Tensor]:
    """Return (column of each target in the tile, clamped; whether the target is in it)."""
    column_t = targets_t - (shard.start + tile.start)
    width = tile.stop - tile.start
    return column_t.clamp(0, width - 1), (column_t >= 0) & (column_t < width)


def tile_statistics(z_tv: Tensor, column_t: Tensor, here_t: Tensor, exp_tv: Tensor, entropy: bool) -> Tensor:
    """Return the statistics [4, t] of one tile's scaled logits, which it overwrites.

    Leaves exp(z - top) in ``exp_tv``, 0 at targets. top is 0 while the sum of exp(z) is far from the limits of fp32,
    which saves two passes; otherwise it is the maximum. That depends on the row alone, not on its neighbours or the
    ranks.
    """
    target_t = torch.where(here_t, z_tv.gather(1, column_t.unsqueeze(1)).squeeze(1), 0.0)
    sum_t = put_at_targets(torch.exp(z_tv, out=exp_tv), 0.0, column_t, here_t).sum(1)
    top_t = torch.zeros_like(sum_t)
    whole_t = sum_t + torch.where(here_t, target_t.exp(), 0.0)
    far_t = ~((whole_t > math.exp(-FAR)) & (whole_t < math.exp(FAR)))  # not-a-number counts as far
    if bool(far_t.any()):
        top_t = torch.where(far_t, z_tv.amax(1), top_t)
        torch.exp(z_tv.sub_(top_t.unsqueeze(1)), out=exp_tv)
        sum_t = put_at_targets(exp_tv, 0.0, column_t, here_t).sum(1)
    weighted_t = z_tv.mul_(exp_tv).sum(1) + top_t * sum_t if entropy else torch.zeros_like(top_t)
    return torch.stack([top_t, sum_t, weighted_t, target_t])


def put_at_targets(x_tv: Tensor, value_t: Tensor | float, column_t: Tensor, here_t: Tensor) -> Tensor:
    """Write ``value_t`` at each row's target if it is in the tile; return ``x_tv``."""
    column_t1 = column_t.unsqueeze(1)
    value_t = torch.where(here_t, value_t, x_tv.gather(1, column_t1).squeeze(1)).to(x_tv.dtype)
    return x_tv.scatter_(1, column_t1, value_t.unsqueeze(1))


def no_statistics(tokens: int, like: Tensor) -> Tensor:
    """Return the statistics [4, t] of a tile without columns."""
    return like.new_tensor([torch.finfo(like.dtype).min, 0.0, 0.0, 0.0]).unsqueeze(1).expand(-1, tokens)


def combine(stats_K4t: Tensor, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """Return (logp [t], entropy [t], lse [t]) from all ranks' tiles; one collective under tensor parallelism."""
    if shard.ranks > 1:
        gathered = [torch.empty_like(stats_K4t) for _ in range(shard.ranks)]
        dist.all_gather(gathered, stats_K4t, group=shard.group)
        stats_K4t = torch.cat(gathered)
    top_Kt, sum_Kt, weighted_Kt, target_Kt = stats_K4t.unbind(1)
    target_t = _in_order(target_Kt)
    top_t = torch.maximum(top_Kt.amax(0), target_t)
    scale_Kt = (top_Kt - top_t).exp()
    others_t, weighted_t = _in_order(sum_Kt * scale_Kt), _in_order(weighted_Kt * scale_Kt)
    own_t = (target_t - top_t).exp()
    total_t = others_t + own_t
    lse_t = top_t + total_t.log()
    likely_t = own_t > others_t  # then no two numbers of the size of z are subtracted
    logp_t = torch.where(likely_t, -torch.log1p(others_t / own_t), target_t - lse_t)
    plain_t = lse_t - (weighted_t + target_t * own_t) / total_t
    entropy_t = torch.where(likely_t, (target_t * others_t - weighted_t) / total_t - logp_t, plain_t)
    return logp_t, entropy_t, lse_t


def miss(logp_t: Tensor) -> Tensor:
    """Return 1 - p with full precision."""
    return -torch.expm1(logp_t)


def _in_order(values_Kt: Tensor) -> Tensor:
    """Sum over the tiles, first to last; torch's own sum uses another order for the last few of many tokens."""
    return functools.reduce(torch.add, values_Kt.unbind())
