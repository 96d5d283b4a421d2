"""The head on CUDA in bf16: the matrix product of the logits and their statistics in one Triton kernel.

The logits stay in registers. A program takes a block of tokens and one part of a tile of the vocabulary, column block
by column block; the parts of a tile are joined in order. A row's bits depend on nothing but its hidden state and the
tile: neither on the tensor-parallel size, nor on its place in the pack, nor on the run.

Where gradients will be formed, exp(z - the largest z of the row in its column block) is kept in the precision of the
inputs, and that largest z in fp32. At the target, where p may be near 1, the gradient is formed from the log-prob.

Legend as in ``flow.py``; s parts of a tile, b column blocks of a tile.
"""

from __future__ import annotations

import functools

import triton
import triton.language as tl
from torch import Tensor

from megatron_dypo.kernels import flow
from megatron_dypo.kernels.triton_rows import RowHead
from megatron_dypo.kernels.vocab import STATISTICS

BLOCK_T, BLOCK_V, BLOCK_H = 128, 128, 64
# 96 KiB of shared memory, too: two programs a multiprocessor, one multiplies while the other reduces
OPTIONS = {"num_warps": 8, "num_stages": 3, "maxnreg": 128}
PART = 16 * BLOCK_V  # columns of a part of a tile
GROUP = 16  # blocks of tokens that run side by side: with as many parts they share what lies in the L2 cache
CHUNK = 64 << 10  # where nothing is kept
KEPT_CHUNK, KEPT_ELEMENTS = 8192, 512 << 20  # 1 GiB in bf16
GRADIENT_ROWS, JOIN_BLOCK = 16, 256


@triton.jit
def _halves(z):
    """The left and the right half of the columns; in registers, they stay where they are."""
    return tl.split(tl.permute(tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def _absorb(z, columns, stop, scale, target, state, exp_ptrs, top_ptrs, KEEP: tl.constexpr):
    """The statistics with those of some more columns z [t, c]; with KEEP stores exp(z - top) and that top."""
    top, total, weighted, z_target = state
    # padding: exp makes it 0; finite, for z exp must be 0, too
    z = tl.where((columns < stop)[None, :], z * scale[:, None], -1e30)
    higher = tl.maximum(top, tl.max(z, 1))
    exp = tl.exp(z - higher[:, None])
    shrink = tl.exp(top - higher)
    total = total * shrink + tl.sum(exp, 1)
    weighted = weighted * shrink + tl.sum(z * exp, 1)
    z_target += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), 1)
    if KEEP:
        tl.store(exp_ptrs + columns[None, :], exp.to(exp_ptrs.dtype.element_ty))
        tl.store(top_ptrs, higher)
    return higher, total, weighted, z_target


@triton.jit(do_not_specialize=["tokens", "parts", "width", "real", "start"])
def fused_statistics_kernel(
    hidden_ptr, weight_ptr, target_ptr, scale_ptr, partial_ptr, exp_ptr, top_ptr,
    tokens, H, parts, width, real, start, exp_tile, exp_pitch, top_pitch,
    KEEP: tl.constexpr, EVEN_H: tl.constexpr, GROUP: tl.constexpr, PART: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Statistics [K, s, 4, t] of hidden [t, H] @ weight [V, H].T * scale [t]; columns from ``real`` on are padding.

    With KEEP also exp [K, t, pitch] of each tile, and the subtracted top [K, b, t].
    """
    # programs of GROUP blocks of tokens run side by side, part after part
    program = tl.program_id(0)
    blocks = tl.cdiv(tokens, BLOCK_T)
    all_parts = tl.num_programs(0) // blocks
    first = program // (GROUP * all_parts) * GROUP
    members = min(blocks - first, GROUP)
    within = program % (GROUP * all_parts)
    part = within // members
    tile = part // parts
    first_row = (first + within % members) * BLOCK_T
    first_column = tile * width
    begin = part % parts * PART  # within the tile
    stop = min(min(begin + PART, width), real - first_column)

    # one 64-bit base and small offsets; rows and columns beyond the last repeat it, so that loads need no mask
    t, v, h = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_H)
    present = t < tokens - first_row
    read = tl.minimum(t, tokens - first_row - 1)
    target = tl.load(target_ptr + first_row + read) - start - first_column
    target = tl.where(target < stop, target, -1).to(tl.int32)  # the next tile's is not this one's padding
    scale = tl.load(scale_ptr + first_row + read)
    hidden_ptrs = hidden_ptr + first_row.to(tl.int64) * H + (read[:, None] * H + h[None, :])
    weight_ptr += first_column.to(tl.int64) * H
    exp_ptrs = exp_ptr + tile.to(tl.int64) * exp_tile + first_row.to(tl.int64) * exp_pitch + t[:, None] * exp_pitch
    top_ptrs = top_ptr + tile.to(tl.int64) * (exp_pitch // BLOCK_V * 4) * top_pitch + first_row + t
    zeros = tl.zeros((BLOCK_T,), tl.float32)
    state = (tl.full((BLOCK_T,), float("-inf"), tl.float32), zeros, zeros, zeros)
    for column in range(begin, stop, BLOCK_V):
        columns = tl.minimum(v, stop - column - 1)
        weight_ptrs = weight_ptr + column * H + (columns[None, :] * H + h[:, None])
        z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, H, BLOCK_H):
            if EVEN_H:
                x = tl.load(hidden_ptrs + k)
                w = tl.load(weight_ptrs + k)
            else:
                x = tl.load(hidden_ptrs + k, mask=(h < H - k)[None, :], other=0.0)
                w = tl.load(weight_ptrs + k, mask=(h < H - k)[:, None], other=0.0)
            z = tl.dot(x, w, z, input_precision="ieee")
        # one quarter of the columns after the other needs registers for exp of a quarter
        left, right = _halves(z)
        z0, z1 = _halves(left)
        z2, z3 = _halves(right)
        q = column + tl.arange(0, BLOCK_V // 4)
        tops = top_ptrs + column // (BLOCK_V // 4) * top_pitch
        state = _absorb(z0, q, stop, scale, target, state, exp_ptrs, tops, KEEP)
        state = _absorb(z1, q + BLOCK_V // 4, stop, scale, target, state, exp_ptrs, tops + top_pitch, KEEP)
        state = _absorb(z2, q + BLOCK_V // 2, stop, scale, target, state, exp_ptrs, tops + 2 * top_pitch, KEEP)
        state = _absorb(z3, q + BLOCK_V // 4 * 3, stop, scale, target, state, exp_ptrs, tops + 3 * top_pitch, KEEP)
    top, total, weighted, z_target = state
    partial_ptrs = partial_ptr + part.to(tl.int64) * 4 * tokens + first_row + t
    tl.store(partial_ptrs, top, mask=present)
    tl.store(partial_ptrs + tokens, total, mask=present)
    tl.store(partial_ptrs + 2 * tokens, weighted, mask=present)
    tl.store(partial_ptrs + 3 * tokens, z_target, mask=present)


@triton.jit(do_not_specialize=["tokens", "parts"])
def join_kernel(partial_ptr, stats_ptr, tokens, parts, BLOCK: tl.constexpr):
    """Statistics [K, 4, t] of the tiles from those of their parts [K, s, 4, t], joined from first to last."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = rows < tokens
    tile = tl.program_id(1).to(tl.int64)
    top = tl.full((BLOCK,), -3.4028234663852886e38, tl.float32)  # finite: a tile without columns joins others
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    z_target = tl.zeros((BLOCK,), tl.float32)
    for part in range(parts):
        part_ptrs = partial_ptr + (tile * parts + part) * 4 * tokens + rows
        highest = tl.load(part_ptrs, mask=present, other=0.0)
        higher = tl.maximum(top, highest)
        shrink, share = tl.exp(top - higher), tl.exp(highest - higher)
        total = total * shrink + tl.load(part_ptrs + tokens, mask=present, other=0.0) * share
        weighted = weighted * shrink + tl.load(part_ptrs + 2 * tokens, mask=present, other=0.0) * share
        z_target += tl.load(part_ptrs + 3 * tokens, mask=present, other=0.0)
        top = higher
    stats_ptrs = stats_ptr + tile * 4 * tokens + rows
    tl.store(stats_ptrs, top, mask=present)
    tl.store(stats_ptrs + tokens, total, mask=present)
    tl.store(stats_ptrs + 2 * tokens, weighted, mask=present)
    tl.store(stats_ptrs + 3 * tokens, z_target, mask=present)


@triton.jit(do_not_specialize=["active", "start"])
def kept_gradient_kernel(
    exp_ptr, top_ptr, rows_ptr, target_ptr, logp_ptr, lse_ptr, slope_ptr, dz_ptr,
    active, pitch, top_pitch, start, BLOCK_A: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dz [a, v] = slope (onehot - p) of one tile, of its rows ``rows`` [a], from the kept exp [t, v] and top [b, t]."""
    i = tl.program_id(0) * BLOCK_A + tl.arange(0, BLOCK_A)
    present = (i < active)[:, None, None]
    row = tl.load(rows_ptr + i, mask=i < active, other=0)[:, None, None]
    block = tl.program_id(1).to(tl.int64)
    quarter = tl.arange(0, 4)[None, :, None]
    columns = block * BLOCK_V + quarter * (BLOCK_V // 4) + tl.arange(0, BLOCK_V // 4)[None, None, :]
    exp = tl.load(exp_ptr + row * pitch + columns).to(tl.float32)
    slope = tl.load(slope_ptr + row)
    share = tl.exp(tl.load(top_ptr + (block * 4 + quarter) * top_pitch + row) - tl.load(lse_ptr + row))
    at_target = columns == tl.load(target_ptr + row) - start
    dz = tl.where(at_target, slope * (1.0 - tl.exp(tl.load(logp_ptr + row))), exp * (-slope * share))
    dz_ptrs = dz_ptr + i.to(tl.int64)[:, None, None] * pitch + columns
    tl.store(dz_ptrs, dz.to(dz_ptr.dtype.element_ty), mask=present)


class FusedHead(RowHead):
    """Keeps exp(z) of a chunk in the inputs' precision, at most KEPT_ELEMENTS numbers, or nothing."""

    def chunk_length(self) -> int:
        if not self.keep:
            return CHUNK
        kept = KEPT_ELEMENTS // (self.shard.tile_width * len(self.shard.tiles))
        return max(BLOCK_T, min(KEPT_CHUNK, kept // BLOCK_T * BLOCK_T))

    @functools.cached_property
    def _exp_Ktv(self) -> Tensor:
        return self._dz_tv.new_empty(len(self.shard.tiles), self._whole_blocks, self.pitch)

    @functools.cached_property
    def _top_Kbt(self) -> Tensor:
        return self.scale_T.new_empty(len(self.shard.tiles), self.pitch // BLOCK_V * 4, self._whole_blocks)

    @property
    def _whole_blocks(self) -> int:
        """Rows that the kernel writes."""
        return triton.cdiv(self.longest, BLOCK_T) * BLOCK_T

    def statistics(self, chunk: slice) -> Tensor:
        hidden_tH, weight_VH, shard = self.hidden_TH[chunk].contiguous(), self.weight_VH.contiguous(), self.shard
        (tokens, H), tiles = hidden_tH.shape, len(shard.tiles)
        parts = triton.cdiv(shard.tile_width, PART)
        partial_Ks4t = self.scale_T.new_empty(tiles, parts, STATISTICS, tokens)
        # unread without KEEP
        exp_Ktv, top_Kbt = (self._exp_Ktv, self._top_Kbt) if self.keep else (hidden_tH, partial_Ks4t)
        fused_statistics_kernel[(triton.cdiv(tokens, BLOCK_T) * tiles * parts,)](
            hidden_tH, weight_VH, self.targets_T[chunk], self.scale_T[chunk], partial_Ks4t, exp_Ktv, top_Kbt,
            tokens, H, parts, shard.tile_width, shard.tiles[-1].stop, shard.start,
            self._whole_blocks * self.pitch, self.pitch, self._whole_blocks,
            KEEP=self.keep, EVEN_H=H % BLOCK_H == 0, GROUP=GROUP, PART=PART,
            BLOCK_T=BLOCK_T, BLOCK_V=BLOCK_V, BLOCK_H=BLOCK_H, **OPTIONS,
        )  # fmt: skip
        stats_K4t = self.scale_T.new_empty(tiles, STATISTICS, tokens)
        join_kernel[(triton.cdiv(tokens, JOIN_BLOCK), tiles)](partial_Ks4t, stats_K4t, tokens, parts, BLOCK=JOIN_BLOCK)
        return stats_K4t

    def formed(
        self, chunk: slice, a: Tensor, stats_K4t: Tensor, logp_t: Tensor, lse_t: Tensor, slope_t: Tensor
    ) -> flow.Tiles:
        for k, tile in self.tiles():
            width = tile.stop - tile.start
            dz_av = self._dz_tv[: len(a), :width]
            kept_gradient_kernel[(triton.cdiv(len(a), GRADIENT_ROWS), triton.cdiv(width, BLOCK_V))](
                self._exp_Ktv[k], self._top_Kbt[k], a, self.targets_T[chunk], logp_t, lse_t, slope_t, dz_av,
                len(a), self.pitch, self._whole_blocks, self.shard.start + tile.start,
                BLOCK_A=GRADIENT_ROWS, BLOCK_V=BLOCK_V,
            )  # fmt: skip
            yield tile, dz_av
