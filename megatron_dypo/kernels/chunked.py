"""The head in plain torch: a chunk of tokens and a tile of the vocabulary at a time.

What is not a matrix product is bound by memory: logits become exponentials in place, a block of rows at a time that
stays in the cache, and a factor of a whole row is left to the products. ``flow.py`` has the rest and the legend.
"""

from __future__ import annotations

import contextlib
import functools
import mmap

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_dypo.kernels import flow
from megatron_dypo.kernels.vocab import VocabShard, no_statistics, target_columns, tile_statistics

CHUNK = 1024
CHUNK_ELEMENTS = 96 << 20  # of the whole vocabulary's logits, 384 MiB: a large one is taken in shorter chunks
# A thread's share of a block of rows: much smaller ones are many short operations, much larger ones leave the cache.
BLOCK_ELEMENTS = 512 << 10
SMALLEST_SHARE = -60.0  # log of p's sum over a tile; see ``formed``


def logprob(
    hidden, weight, targets, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (ChunkedHead, ChunkedHead)
    return flow.LogProb.apply(heads, hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy)


def loss(hidden, weight, targets, token_loss, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool):
    arguments = (hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy)
    return flow.Loss.apply(ChunkedHead, *arguments, torch.is_grad_enabled())  # within a Function it never is


class ChunkedHead(flow.Head):
    """Keeps exp(z - the tile's max) of a chunk, at most CHUNK_ELEMENTS numbers, or else of one tile."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        widest = max(tile.stop - tile.start for tile in self.shard.tiles)
        # of one tile after the other, unless all are kept
        tiles, size = len(self.shard.tiles) if self.keep else 1, self.longest * widest
        self.exp_K = _large_buffer(tiles * size, self.weight_VH, self.dtype).view(tiles, size)
        self.block = max(1, torch.get_num_threads() * BLOCK_ELEMENTS // max(1, widest) // flow.ROWS) * flow.ROWS
        self.scratch = self.exp_K.new_empty(min(self.block, self.longest) * widest)

    def chunk_length(self) -> int:
        """Chunks of about one length: the products of a short last one would take as long as those of a whole one."""
        tokens = max(1, self.targets_T.shape[0])
        chunks = -(-tokens // self.shortened(CHUNK, CHUNK_ELEMENTS))
        return -(-tokens // (chunks * flow.ROWS)) * flow.ROWS

    def statistics(self, chunk: slice) -> Tensor:
        """[K, 4, t]; leaves exp(z - the tile's max) in ``exp_K``.

        Rows that fill up the chunk take part until the end: torch sums few rows in another order than many.
        """
        hidden_tH, tokens, stats = self._scaled_rows(chunk), chunk.stop - chunk.start, []
        targets_t = pad(self.targets_T[chunk], (0, hidden_tH.shape[0] - tokens))
        for k, tile in enumerate(self.shard.tiles):
            if tile.start == tile.stop:
                stats.append(no_statistics(hidden_tH.shape[0], self.exp_K))
                continue
            z_tv = self._logits(hidden_tH, k if self.keep else 0, tile)
            blocks = self._blocks(z_tv, *target_columns(targets_t, self.shard, tile))
            stats.append(torch.cat([tile_statistics(*block, self.scratch, self.entropy) for block in blocks], dim=1))
        return torch.stack(stats)[..., :tokens]

    def formed(
        self, chunk: slice, a: Tensor, stats_K4t: Tensor, logp_t: Tensor, lse_t: Tensor, slope_t: Tensor
    ) -> flow.Tiles:
        """dz = slope (onehot - p) = -slope share (exp - onehot / share), where p = exp share.

        A share below e^-60 is taken for that: 1 / share stays finite, and p is wrong by e^-60 at most.
        """
        slope_a, targets_a = slope_t[a], self.targets_T[chunk][a]
        for k, tile in self.tiles():
            width = tile.stop - tile.start
            exp_av = self._picked(self.exp_K[k, : len(slope_t) * width].view(-1, width), a)
            share_a = (stats_K4t[k, 0] - lse_t)[a].clamp_(min=SMALLEST_SHARE).exp_()
            _add_at_targets(exp_av, -1 / share_a, *target_columns(targets_a, self.shard, tile))
            yield tile, exp_av, -slope_a * share_a

    def recomputed(self, chunk: slice, upstream: tuple[Tensor, ...], entropy_t: Tensor, lse_t: Tensor) -> flow.Tiles:
        dlogp_t, dentropy_t, dlse_t = upstream
        hidden_tH, has_entropy = self._scaled_rows(chunk), bool(dentropy_t.any())
        by_row = [x.unsqueeze(1) for x in (lse_t, lse_t - entropy_t, -dentropy_t, dlse_t - dlogp_t)]
        for _, tile in self.tiles():
            dz_tv = self._logits(hidden_tH, 0, tile)[: len(lse_t)]
            for z_bv, lse_b1, mean_b1, pull_entropy_b1, pull in self._blocks(dz_tv, *by_row):
                if has_entropy:
                    surprise_bv = torch.sub(z_bv, mean_b1, out=self.scratch[: z_bv.numel()].view(z_bv.shape))
                    pull = surprise_bv.mul_(pull_entropy_b1).add_(pull)
                z_bv.sub_(lse_b1).exp_().mul_(pull)
            _add_at_targets(dz_tv, dlogp_t, *target_columns(self.targets_T[chunk], self.shard, tile))
            yield tile, dz_tv, None

    def _blocks(self, *by_row: Tensor):
        """The same few rows of each, block after block."""
        return zip(*(x.split(self.block) for x in by_row), strict=True)

    def _scaled_rows(self, chunk: slice) -> Tensor:
        """``rows`` / temperature: their products with the weight are the scaled logits."""
        hidden_tH = self.rows(chunk)
        if self.temperature_T is None:
            return hidden_tH
        missing = hidden_tH.shape[0] - (chunk.stop - chunk.start)
        return hidden_tH / pad(self.temperature_T[chunk], (0, missing), value=1.0).unsqueeze(1)

    def _logits(self, hidden_tH: Tensor, k: int, tile: slice) -> Tensor:
        """Scaled logits [t, v] (t as ``rows`` fills it up), in ``exp_K[k]``."""
        weight_vH = self.weight(tile)
        z_tv = self.exp_K[k, : hidden_tH.shape[0] * weight_vH.shape[0]].view(hidden_tH.shape[0], -1)
        return flow.multiply(hidden_tH, weight_vH.t(), z_tv)

    def _picked(self, exp_tv: Tensor, a: Tensor) -> Tensor:
        """The rows ``a``, good until the next call."""
        if len(a) == len(exp_tv):
            return exp_tv
        out = self._picked_rows[: len(a) * exp_tv.shape[1]].view(len(a), -1)
        return torch.index_select(exp_tv, 0, a, out=out)

    @functools.cached_property
    def _picked_rows(self) -> Tensor:
        return torch.empty_like(self.exp_K[0])


def _large_buffer(elements: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised; in huge pages where Linux gives them, since fresh small ones cost more than a pass over them."""
    if like.device.type != "cpu" or elements == 0 or not hasattr(mmap, "MADV_HUGEPAGE"):
        return like.new_empty(elements, dtype=dtype)
    memory = mmap.mmap(-1, elements * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def _add_at_targets(dz_tv: Tensor, value_t: Tensor, column_t: Tensor, here_t: Tensor) -> None:
    """The onehot part of dz."""
    dz_tv.scatter_add_(1, column_t.unsqueeze(1), torch.where(here_t, value_t, 0.0).unsqueeze(1))
