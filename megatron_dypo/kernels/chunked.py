"""The head in plain torch: a chunk of tokens and a tile of the vocabulary at a time.

Buffers are used again: fresh pages cost as much as a pass over them. ``flow.py`` has the rest and the legend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_dypo.kernels import flow
from megatron_dypo.kernels.vocab import VocabShard, no_statistics, target_columns, tile_statistics

CHUNK = 512
CHUNK_ELEMENTS = 32 << 20  # of the whole vocabulary's logits: a large one is taken in shorter chunks


def logprob(
    hidden, weight, targets, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (ChunkedHead, ChunkedHead)
    return flow.LogProb.apply(heads, hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy)


def loss(hidden, weight, targets, token_loss, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool):
    arguments = (hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy)
    return flow.Loss.apply(ChunkedHead, *arguments, torch.is_grad_enabled())  # within a Function it never is


class ChunkedHead(flow.Head):
    """Keeps exp(z - the tile's max) of a chunk, at most CHUNK_ELEMENTS numbers, and one tile of logits."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        widest = max(tile.stop - tile.start for tile in self.shard.tiles)
        self.scratch = self.weight_VH.new_empty(self.longest * widest, dtype=self.dtype)
        # of one tile after the other, unless all are kept
        self.exp_K = self.scratch.new_empty(len(self.shard.tiles) if self.keep else 1, self.scratch.numel())

    def chunk_length(self) -> int:
        return self.shortened(CHUNK, CHUNK_ELEMENTS)

    def statistics(self, chunk: slice) -> Tensor:
        """[K, 4, t]; leaves exp(z - the tile's max) in ``exp_K``.

        Rows that fill up the chunk take part until the end: torch sums few rows in another order than many.
        """
        hidden_tH, tokens, stats = self.rows(chunk), chunk.stop - chunk.start, []
        targets_t = pad(self.targets_T[chunk], (0, hidden_tH.shape[0] - tokens))
        for k, tile in enumerate(self.shard.tiles):
            if tile.start == tile.stop:
                stats.append(no_statistics(hidden_tH.shape[0], self.scratch))
                continue
            z_tv = self._logits(chunk, hidden_tH, tile)
            exp_tv = self.exp_K[k if self.keep else 0, : z_tv.numel()].view(z_tv.shape)
            stats.append(tile_statistics(z_tv, *target_columns(targets_t, self.shard, tile), exp_tv, self.entropy))
        return torch.stack(stats)[..., :tokens]

    def formed(
        self, chunk: slice, a: Tensor, stats_K4t: Tensor, logp_t: Tensor, lse_t: Tensor, slope_t: Tensor
    ) -> flow.Tiles:
        slope_a, targets_a = slope_t[a], self.targets_T[chunk][a]
        for k, tile in self.tiles():
            width = tile.stop - tile.start
            exp_av = flow.pick(self.exp_K[k, : len(slope_t) * width].view(-1, width), a)
            share_a = (stats_K4t[k, 0] - lse_t)[a].exp()
            dz_av = exp_av.mul_((-slope_a * share_a).unsqueeze(1))
            yield tile, _add_at_targets(dz_av, slope_a, *target_columns(targets_a, self.shard, tile))

    def recomputed(self, chunk: slice, upstream: tuple[Tensor, ...], entropy_t: Tensor, lse_t: Tensor) -> flow.Tiles:
        dlogp_t, dentropy_t, dlse_t = upstream
        hidden_tH, has_entropy = self.rows(chunk), bool(dentropy_t.any())
        for _, tile in self.tiles():
            z_tv = self._logits(chunk, hidden_tH, tile)[: len(lse_t)]
            dz_tv = torch.sub(z_tv, lse_t.unsqueeze(1), out=self.exp_K[0, : z_tv.numel()].view(z_tv.shape)).exp_()
            if has_entropy:
                surprise_tv = z_tv.sub_((lse_t - entropy_t).unsqueeze(1))
                dz_tv.mul_(surprise_tv.mul_(-dentropy_t.unsqueeze(1)).add_((dlse_t - dlogp_t).unsqueeze(1)))
            else:
                dz_tv.mul_((dlse_t - dlogp_t).unsqueeze(1))
            yield tile, _add_at_targets(dz_tv, dlogp_t, *target_columns(self.targets_T[chunk], self.shard, tile))

    def _logits(self, chunk: slice, hidden_tH: Tensor, tile: slice) -> Tensor:
        """Scaled logits [t, v] (t as ``rows`` fills it up), in the scratch buffer: good until the next call."""
        weight_vH = self.weight(tile)
        z_tv = self.scratch[: hidden_tH.shape[0] * weight_vH.shape[0]].view(hidden_tH.shape[0], -1)
        flow.multiply(hidden_tH, weight_vH.t(), z_tv)
        if self.temperature_T is not None:
            z_tv[: chunk.stop - chunk.start].div_(self.temperature_T[chunk].unsqueeze(1))
        return z_tv


def _add_at_targets(dz_tv: Tensor, slope_t: Tensor, column_t: Tensor, here_t: Tensor) -> Tensor:
    """The onehot part of dz, in place."""
    return dz_tv.scatter_add_(1, column_t.unsqueeze(1), torch.where(here_t, slope_t, 0.0).unsqueeze(1))
