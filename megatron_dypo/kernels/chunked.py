"""The head in plain torch: one chunk of tokens and one tile of the vocabulary at a time.

Everything but the matrix products is bound by memory, so it uses few passes and few fresh pages: a maximum is taken
only if needed (``vocab.py``), exponentials of a chunk are contiguous so that one product covers all columns, factors of
a whole row are left to the products, and the memory is reused (``workspace.py``). ``autograd.py`` has the rest and the
legend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from megatron_dypo.kernels import autograd, exponentials, workspace
from megatron_dypo.kernels.vocab import (
    FAR,
    VocabShard,
    miss,
    no_statistics,
    put_at_targets,
    target_columns,
    tile_statistics,
)

CHUNK = 1024
CHUNK_ELEMENTS = 96 << 20  # of the whole vocabulary's logits, 384 MiB: a larger vocabulary gets shorter chunks

# A thread's share of the rows whose statistics are computed together: logits and exponentials stay in its 1 MiB of
# cache.
BLOCK_ELEMENTS = 128 << 10


def logprob(
    hidden, weight, targets, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    heads = (ChunkedHead, ChunkedHead)
    return autograd.LogProb.apply(heads, hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy)


def loss(hidden, weight, targets, token_loss, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool):
    arguments = (hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy)
    return autograd.Loss.apply(ChunkedHead, *arguments, torch.is_grad_enabled())  # inside a Function it is always False


class ChunkedHead(autograd.LogitHead):
    """Keeps exp(z - top) of a chunk, at most CHUNK_ELEMENTS numbers, or otherwise of a tile; top is mostly 0."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        widest = max(tile.stop - tile.start for tile in self.shard.tiles)
        self.block = max(1, torch.get_num_threads() * BLOCK_ELEMENTS // max(1, widest) // autograd.ROWS) * autograd.ROWS
        self.columns = self.shard.real.stop if self.keep else widest
        sizes = [self.longest * widest, self.longest * self.columns]
        self.memory = workspace.take(sum(sizes), self.weight_VH, self.dtype)
        self.z, self.exp = self.memory[: sum(sizes)].split(sizes)  # z of one tile after another

    def close(self) -> None:
        workspace.give_back(self.memory)

    def chunk_length(self) -> int:
        """Return a length that splits the tokens evenly: the products of a short chunk take as long as a full one."""
        tokens = max(1, self.targets_T.shape[0])
        chunks = -(-tokens // self.shortened(CHUNK, CHUNK_ELEMENTS))
        return -(-tokens // (chunks * autograd.ROWS)) * autograd.ROWS

    def statistics(self, chunk: slice) -> Tensor:
        """Return the statistics [K, 4, t]; leaves exp(z - the tile's top) in ``exp``.

        Rows that pad the chunk take part until the end: torch sums few rows in another order than many.
        """
        hidden_tH, tokens, stats = self._scaled_rows(chunk), chunk.stop - chunk.start, []
        targets_t = pad(self.targets_T[chunk], (0, hidden_tH.shape[0] - tokens))
        for tile in self.shard.tiles:
            if tile.start == tile.stop:
                stats.append(no_statistics(hidden_tH.shape[0], self.z))
                continue
            place = tile if self.keep else slice(0, tile.stop - tile.start)
            exp_tv = self._exp_tV(hidden_tH.shape[0])[:, place]
            by_row = (self._logits(hidden_tH, chunk, tile), *target_columns(targets_t, self.shard, tile), exp_tv)
            blocks = zip(*(x.split(self.block) for x in by_row), strict=True)
            of_blocks = [tile_statistics(z, column_t, here_t, exp, self.entropy) for z, column_t, here_t, exp in blocks]
            stats.append(torch.cat(of_blocks, dim=1))
        return torch.stack(stats)[..., :tokens]

    def fused_backward(
        self,
        chunk: slice,
        a: Tensor,
        stats_K4t: Tensor,
        upstream: tuple[Tensor, Tensor | None],
        results: tuple[Tensor, Tensor, Tensor],
    ) -> autograd.Tiles:
        """Yield dz of all columns at once, from ``exp`` (see ``exponentials.py``).

        A row is far if exp(-lse) is far from 1 or a tile needed a top: such rows become p itself.
        """
        if not self.columns:
            return
        lse_t = results[-1]
        exp_tV, top_Kt = self._exp_tV(len(lse_t)), stats_K4t[:, 0]
        far_t = (lse_t.abs() > FAR) | ((top_Kt != 0) & (stats_K4t[:, 1] != 0)).any(0)
        if bool(far_t.any()):
            for k, tile in self.tiles():
                exp_tV[:, tile].mul_(torch.where(far_t, top_Kt[k] - lse_t, 0.0).exp_().unsqueeze(1))
        by_row = exponentials.factors(a, far_t, upstream, results)
        exp_aV, scale_a = exponentials.moved_to_front(exp_tV, a, self.tiles()), by_row.scale
        if by_row.of_log is not None:
            self._multiply_by_log(exp_aV, *by_row.of_log)
        put_at_targets(exp_aV, by_row.at_target, *target_columns(self.targets_T[chunk][a], self.shard, self.shard.real))
        if self.native:  # half precision could not hold exp
            yield self.shard.real, exp_aV.mul_(scale_a.unsqueeze(1)), None
        else:
            yield self.shard.real, exp_aV, scale_a

    def _multiply_by_log(self, exp_aV: Tensor, slope_a: Tensor, dentropy_a: Tensor) -> None:
        """Replace x = exp by x (slope + dentropy log x), a few rows at a time, in the cache; overwrites z."""
        tiny, columns = torch.finfo(self.dtype).tiny, exp_aV.shape[1]  # 0 log 0 is 0
        rows = max(1, min(torch.get_num_threads() * BLOCK_ELEMENTS, len(self.z)) // columns)
        log_nV = self.z[: rows * columns].view(rows, columns)
        blocks = (x.split(rows) for x in (exp_aV, slope_a.unsqueeze(1), dentropy_a.unsqueeze(1)))
        for exp_nV, slope_n1, dentropy_n1 in zip(*blocks, strict=True):
            factor_nV = torch.clamp_min(exp_nV, tiny, out=log_nV[: len(exp_nV)]).log_()
            exp_nV.mul_(factor_nV.mul_(dentropy_n1).add_(slope_n1))

    def recomputed(self, chunk: slice, upstream: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> autograd.Tiles:
        dlogp_t, dentropy_t, dlse_t = upstream
        logp_t, entropy_t, lse_t = results
        hidden_tH, has_entropy = self._scaled_rows(chunk), bool(dentropy_t.any())
        pull = pull_t1 = (dlse_t - dlogp_t).unsqueeze(1)
        at_target_t = dlogp_t * miss(logp_t) + logp_t.exp() * (dlse_t - dentropy_t * (logp_t + entropy_t))
        for _, tile in self.tiles():
            dz_tv = self._logits(hidden_tH, chunk, tile)[: len(lse_t)]
            if has_entropy:
                surprise_tv = self.exp[: dz_tv.numel()].view(dz_tv.shape)
                torch.sub(dz_tv, (lse_t - entropy_t).unsqueeze(1), out=surprise_tv)
                pull = surprise_tv.mul_(-dentropy_t.unsqueeze(1)).add_(pull_t1)
            dz_tv.sub_(lse_t.unsqueeze(1)).exp_().mul_(pull)
            put_at_targets(dz_tv, at_target_t, *target_columns(self.targets_T[chunk], self.shard, tile))
            yield tile, dz_tv, None

    def _temperature_t1(self, chunk: slice, rows: int) -> Tensor | None:
        if self.temperature_T is None:
            return None
        return pad(self.temperature_T[chunk], (0, rows - (chunk.stop - chunk.start)), value=1.0).unsqueeze(1)

    def _scaled_rows(self, chunk: slice) -> Tensor:
        """Return ``rows`` / temperature, whose products with the weight are the logits; half precision unscaled."""
        hidden_tH = self.rows(chunk)
        temperature_t1 = None if self.native else self._temperature_t1(chunk, len(hidden_tH))
        return hidden_tH if temperature_t1 is None else hidden_tH / temperature_t1

    def _logits(self, hidden_tH: Tensor, chunk: slice, tile: slice) -> Tensor:
        """Return the scaled logits [t, v] of ``_scaled_rows`` (t padded likewise), valid until the next call."""
        weight_vH = self.weight(tile)
        z_tv = self.z[: hidden_tH.shape[0] * weight_vH.shape[0]].view(hidden_tH.shape[0], -1)
        autograd.multiply(hidden_tH, weight_vH.t(), z_tv)
        temperature_t1 = self._temperature_t1(chunk, len(z_tv)) if self.native else None
        if temperature_t1 is not None:  # dividing the rows would round them again
            z_tv.div_(temperature_t1)
        return z_tv

    def _exp_tV(self, rows: int) -> Tensor:
        return self.exp.view(self.longest, self.columns)[:rows]

    def order(self, active_t: Tensor) -> Tensor:
        return exponentials.few_moved(active_t)
