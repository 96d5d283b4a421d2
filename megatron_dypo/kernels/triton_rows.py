"""The head on CUDA for any precision: cuBLAS forms a tile of logits, Triton kernels read it row by row.

One kernel reads the logits once for the four statistics; another reads them again and writes dz in the precision of the
gradients' matrix products. Sums run in a fixed order without atomics, so every run gives the same bits.

Legend as in ``autograd.py``. A pitch is the distance of two rows (``workspace.pitch``); the padding between a row's
columns and the pitch is read and written so that all loads and stores are of 16 bytes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dypo.kernels import autograd, workspace
from megatron_dypo.kernels.vocab import STATISTICS, miss, no_statistics

STATISTICS_BLOCK, GRADIENT_BLOCK = 4096, 2048  # columns
STATISTICS_OPTIONS = {"num_warps": 8}


@triton.jit(do_not_specialize=["width", "start", "tokens"])
def row_statistics_kernel(
    z_ptr, target_ptr, scale_ptr, stats_ptr, pitch, width, start, tokens, BLOCK: tl.constexpr
):  # fmt: skip
    """Statistics [4, t] of z [t, v] * scale [t], with the target's column left out of the sums; one program per row."""
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * pitch
    scale = tl.load(scale_ptr + row)
    column = tl.load(target_ptr + row) - start
    top = float("-inf")
    others = 0.0
    weighted = 0.0
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + columns, mask=columns < pitch, other=0.0) * scale
        z = tl.where(columns < width, z, -1e30)  # exp makes it 0; finite, because z exp must be 0, too
        higher = tl.maximum(top, tl.max(z, 0))
        exp = tl.where(columns == column, 0.0, tl.exp(z - higher))
        shrink = tl.exp(top - higher)
        others = others * shrink + tl.sum(exp, 0)
        weighted = weighted * shrink + tl.sum(z * exp, 0)
        top = higher
    here = (column >= 0) & (column < width)
    z_target = tl.load(z_ptr + column, mask=here, other=0.0) * scale
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + tokens + row, others)
    tl.store(stats_ptr + 2 * tokens + row, weighted)
    tl.store(stats_ptr + 3 * tokens + row, z_target)


@triton.jit(do_not_specialize=["start"])
def row_gradient_kernel(
    z_ptr, rows_ptr, target_ptr, scale_ptr, logp_ptr, miss_ptr, lse_ptr, dlogp_ptr, lift_ptr, entropy_ptr,
    dentropy_ptr, dz_ptr, pitch, start, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz [a, v] = slope (onehot - p) + p (lift - dentropy (log p + entropy)), for the rows ``rows`` [a] of z [t, v].

    log p is z - lse, except at the target, where it is logp; ``miss`` is 1 - p there.
    """
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    lse = tl.load(lse_ptr + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * pitch + columns, mask=columns < pitch, other=0.0) * tl.load(scale_ptr + row)
    at_target = columns == tl.load(target_ptr + row) - start
    log_p = tl.where(at_target, tl.load(logp_ptr + row), z - lse)
    dlogp = tl.load(dlogp_ptr + row)
    factor = tl.load(lift_ptr + row)
    if ENTROPY:
        factor -= tl.load(dentropy_ptr + row) * (log_p + tl.load(entropy_ptr + row))
    at_once = tl.where(at_target, factor, factor - dlogp)  # 1 - p is not computed from p
    dz = tl.exp(log_p) * at_once + tl.where(at_target, dlogp * tl.load(miss_ptr + row), 0.0)
    tl.store(dz_ptr + i * pitch + columns, dz.to(dz_ptr.dtype.element_ty), mask=columns < pitch)


class RowHead(autograd.LogitHead):
    """Keeps a chunk's logits in fp32, or otherwise one tile of them (size in ``workspace.py``)."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.targets_T = self.targets_T.contiguous()
        self.pitch = workspace.pitch(self.shard.tile_width)
        # z * scale, whereas the definition divides: exact at temperature 1
        ones_T = torch.ones_like(self.targets_T, dtype=self.dtype)
        self.scale_T = self.by_temperature(ones_T, slice(None))

    def close(self) -> None:
        for kept in ("_z_Ktv", "_dz_tv", "_exp_Ktv"):
            self.__dict__.pop(kept, None)

    def chunk_length(self) -> int:
        return self.shortened(workspace.CHUNK, workspace.CHUNK_ELEMENTS)

    @functools.cached_property
    def _z_Ktv(self) -> Tensor:
        return self.scale_T.new_empty(len(self.shard.tiles) if self.keep else 1, self.longest, self.pitch)

    @functools.cached_property
    def _dz_tv(self) -> Tensor:
        dtype = self.weight_VH.dtype if self.native else self.dtype
        return self.weight_VH.new_empty(self.longest, self.pitch, dtype=dtype)

    def _logits(self, hidden_tH: Tensor, k: int, tile: slice) -> Tensor:
        """Return the logits [t, v] before the temperature, t padded as in ``rows``; valid until its next use."""
        z_tv = self._z_Ktv[k if self.keep else 0, : hidden_tH.shape[0], : tile.stop - tile.start]
        return autograd.multiply(hidden_tH, self.weight(tile).t(), z_tv)

    def statistics(self, chunk: slice) -> Tensor:
        hidden_tH, tokens = self.rows(chunk), chunk.stop - chunk.start
        stats_K4t = self.scale_T.new_empty(len(self.shard.tiles), STATISTICS, tokens)
        stats_K4t[:] = no_statistics(tokens, stats_K4t)
        for k, tile in self.tiles():
            z_tv = self._logits(hidden_tH, k, tile)
            row_statistics_kernel[(tokens,)](
                z_tv, self.targets_T[chunk], self.scale_T[chunk], stats_K4t[k], self.pitch, z_tv.shape[1],
                self.shard.start + tile.start, tokens, BLOCK=STATISTICS_BLOCK, **STATISTICS_OPTIONS,
            )  # fmt: skip
        return stats_K4t

    def fused_backward(
        self,
        chunk: slice,
        a: Tensor,
        stats_K4t: Tensor,
        upstream: tuple[Tensor, Tensor | None],
        results: tuple[Tensor, Tensor, Tensor],
    ) -> autograd.Tiles:
        dlogp_t, dentropy_t = upstream
        dentropy_t = None if dentropy_t is None else dentropy_t.contiguous()
        slopes = dlogp_t.contiguous(), dentropy_t, torch.zeros_like(results[-1])
        values = results[0], miss(results[0]), *results[1:]
        for k, tile in self.tiles():
            z_tv = self._z_Ktv[k, :, : tile.stop - tile.start]
            yield tile, self._gradient(chunk, tile, z_tv, a, slopes, values), None

    def recomputed(self, chunk: slice, upstream: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> autograd.Tiles:
        (dlogp_t, dentropy_t, dlse_t), (logp_t, entropy_t, lse_t) = upstream, results
        given = dlogp_t, dentropy_t if bool(dentropy_t.any()) else None, dlse_t
        known = logp_t, miss(logp_t), entropy_t, lse_t
        hidden_tH, all_t = self.rows(chunk), torch.arange(len(dlse_t), device=dlse_t.device)
        for k, tile in self.tiles():
            z_tv = self._logits(hidden_tH, k, tile)
            yield tile, self._gradient(chunk, tile, z_tv, all_t, given, known), None

    def _gradient(
        self,
        chunk: slice,
        tile: slice,
        z_tv: Tensor,
        a: Tensor,
        upstream: tuple[Tensor, Tensor | None, Tensor],
        results: tuple[Tensor, Tensor, Tensor, Tensor],
    ) -> Tensor:
        """Return dz [a, v], valid until the next call, from the gradients of logp, entropy and lse.

        ``results`` are logp, 1 - p, entropy and lse; entropy is not read if it has no gradient.
        """
        dlogp_t, dentropy_t, dlse_t = upstream
        logp_t, miss_t, entropy_t, lse_t = results
        width = tile.stop - tile.start
        dz_av = self._dz_tv[: len(a), :width]
        row_gradient_kernel[(len(a), triton.cdiv(width, GRADIENT_BLOCK))](
            z_tv, a, self.targets_T[chunk], self.scale_T[chunk], logp_t, miss_t, lse_t, dlogp_t, dlse_t,
            entropy_t, lse_t if dentropy_t is None else dentropy_t,
            dz_av, self.pitch, self.shard.start + tile.start, ENTROPY=dentropy_t is not None, BLOCK=GRADIENT_BLOCK,
        )  # fmt: skip
        return dz_av
