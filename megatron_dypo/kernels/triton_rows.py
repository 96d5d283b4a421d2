"""The head on CUDA for any precision: cuBLAS forms a tile of logits, Triton kernels read it row by row.

One kernel reads the logits once for the four statistics; one reads them once more and writes dz in the precision of
the gradients' matrix products. Sums run in a fixed order without atomics: every run gives the same bits.

Legend as in ``flow.py``. A pitch is the distance of two rows, a multiple of PITCH: what lies between a row's columns
and the pitch is nobody's, and is read and written so that all loads and stores are of 16 bytes.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_dypo.kernels import flow
from megatron_dypo.kernels.vocab import STATISTICS, no_statistics

CHUNK = 4096  # the sum of dweight is read and written once a chunk: short ones would be bound by that
CHUNK_ELEMENTS = 256 << 20  # of the whole vocabulary's logits, 1 GiB in fp32: a large one is taken in shorter chunks
STATISTICS_BLOCK, GRADIENT_BLOCK = 4096, 2048  # columns
STATISTICS_OPTIONS = {"num_warps": 8}
PITCH = 128


@triton.jit(do_not_specialize=["width", "start", "tokens"])
def row_statistics_kernel(
    z_ptr, target_ptr, scale_ptr, stats_ptr, pitch, width, start, tokens, BLOCK: tl.constexpr
):  # fmt: skip
    """Statistics [4, t] of z [t, v] * scale [t]; one program a row, blocks from first to last."""
    row = tl.program_id(0)
    z_ptr += row.to(tl.int64) * pitch
    scale = tl.load(scale_ptr + row)
    top = float("-inf")
    total = 0.0
    weighted = 0.0
    for begin in range(0, width, BLOCK):
        columns = begin + tl.arange(0, BLOCK)
        z = tl.load(z_ptr + columns, mask=columns < pitch, other=0.0) * scale
        z = tl.where(columns < width, z, -1e30)  # exp makes it 0; finite, for z exp must be 0, too
        higher = tl.maximum(top, tl.max(z, 0))
        exp = tl.exp(z - higher)
        shrink = tl.exp(top - higher)
        total = total * shrink + tl.sum(exp, 0)
        weighted = weighted * shrink + tl.sum(z * exp, 0)
        top = higher
    column = tl.load(target_ptr + row) - start
    here = (column >= 0) & (column < width)
    z_target = tl.load(z_ptr + column, mask=here, other=0.0) * scale
    tl.store(stats_ptr + row, top)
    tl.store(stats_ptr + tokens + row, total)
    tl.store(stats_ptr + 2 * tokens + row, weighted)
    tl.store(stats_ptr + 3 * tokens + row, z_target)


@triton.jit(do_not_specialize=["start"])
def row_gradient_kernel(
    z_ptr, rows_ptr, target_ptr, scale_ptr, lse_ptr, slope_ptr, pull_ptr, entropy_ptr, dentropy_ptr, dz_ptr,
    pitch, start, ENTROPY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dz [a, v] = onehot slope + p (pull - dentropy (z - lse + entropy)), of the rows ``rows`` [a] of z [t, v]."""
    i = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + i)
    lse = tl.load(lse_ptr + row)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * pitch + columns, mask=columns < pitch, other=0.0) * tl.load(scale_ptr + row)
    factor = tl.load(pull_ptr + row)
    if ENTROPY:
        factor -= tl.load(dentropy_ptr + row) * (z - lse + tl.load(entropy_ptr + row))
    at_target = columns == tl.load(target_ptr + row) - start
    dz = tl.exp(z - lse) * factor + tl.where(at_target, tl.load(slope_ptr + row), 0.0)
    tl.store(dz_ptr + i * pitch + columns, dz.to(dz_ptr.dtype.element_ty), mask=columns < pitch)


class RowHead(flow.Head):
    """Keeps a chunk's logits in fp32, at most CHUNK_ELEMENTS of them, or else one tile of them."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.targets_T = self.targets_T.contiguous()
        self.pitch = -(-self.shard.tile_width // PITCH) * PITCH
        # z * scale, where the definition divides: exact at temperature 1
        ones_T = torch.ones_like(self.targets_T, dtype=self.dtype)
        self.scale_T = self.by_temperature(ones_T, slice(None))

    def chunk_length(self) -> int:
        return self.shortened(CHUNK, CHUNK_ELEMENTS)

    @functools.cached_property
    def _z_Ktv(self) -> Tensor:
        return self.scale_T.new_empty(len(self.shard.tiles) if self.keep else 1, self.longest, self.pitch)

    @functools.cached_property
    def _dz_tv(self) -> Tensor:
        dtype = self.weight_VH.dtype if self.native else self.dtype
        return self.weight_VH.new_empty(self.longest, self.pitch, dtype=dtype)

    def _logits(self, hidden_tH: Tensor, k: int, tile: slice) -> Tensor:
        """Logits [t, v] before the temperature, t as ``rows`` fills it up; good until the next of that number."""
        z_tv = self._z_Ktv[k if self.keep else 0, : hidden_tH.shape[0], : tile.stop - tile.start]
        return flow.multiply(hidden_tH, self.weight(tile).t(), z_tv)

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

    def formed(
        self, chunk: slice, a: Tensor, stats_K4t: Tensor, logp_t: Tensor, lse_t: Tensor, slope_t: Tensor
    ) -> flow.Tiles:
        slope_t = slope_t.contiguous()
        for k, tile in self.tiles():
            z_tv = self._z_Ktv[k, :, : tile.stop - tile.start]
            yield tile, self._gradient(chunk, tile, z_tv, a, lse_t, slope_t, -slope_t), None

    def recomputed(self, chunk: slice, upstream: tuple[Tensor, ...], entropy_t: Tensor, lse_t: Tensor) -> flow.Tiles:
        dlogp_t, dentropy_t, dlse_t = upstream
        hidden_tH, all_t = self.rows(chunk), torch.arange(len(lse_t), device=lse_t.device)
        through_entropy = (entropy_t, dentropy_t) if bool(dentropy_t.any()) else None
        for k, tile in self.tiles():
            z_tv = self._logits(hidden_tH, k, tile)
            pull_t = dlse_t - dlogp_t
            yield tile, self._gradient(chunk, tile, z_tv, all_t, lse_t, dlogp_t, pull_t, through_entropy), None

    def _gradient(
        self,
        chunk: slice,
        tile: slice,
        z_tv: Tensor,
        a: Tensor,
        lse_t: Tensor,
        slope_t: Tensor,
        pull_t: Tensor,
        through_entropy: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """dz [a, v], good until the next call."""
        width = tile.stop - tile.start
        dz_av = self._dz_tv[: len(a), :width]
        row_gradient_kernel[(len(a), triton.cdiv(width, GRADIENT_BLOCK))](
            z_tv, a, self.targets_T[chunk], self.scale_T[chunk], lse_t, slope_t, pull_t,
            *(through_entropy or (lse_t, lse_t)), dz_av, self.pitch, self.shard.start + tile.start,
            ENTROPY=through_entropy is not None, BLOCK=GRADIENT_BLOCK,
        )  # fmt: skip
        return dz_av
