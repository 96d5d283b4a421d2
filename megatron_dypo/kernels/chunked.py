"""The head in plain torch: a chunk of tokens and a tile of the vocabulary at a time.

z = hidden @ weight.T / temperature; dlogp/dz = onehot - p, dlse/dz = p, dentropy/dz = -p (z - lse + entropy).
``logprob`` keeps O(T) numbers and forms one tile of logits at a time, again in its backward (4 matrix products).
``loss`` keeps exp(z) of one chunk of tokens, at most CHUNK_ELEMENTS numbers, and forms gradients at once (3 products).

Legend: T tokens, t those of a chunk, a those of them with a gradient; H hidden size; V local vocabulary rows, v those
of a tile; K this rank's tiles.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_dypo.kernels.vocab import (
    STATISTICS,
    TILES,
    VocabShard,
    combine,
    no_statistics,
    target_columns,
    tile_statistics,
)

CHUNK = 512
CHUNK_ELEMENTS = 32 << 20  # of the whole vocabulary's logits: a large one is taken in shorter chunks
ROWS = 16  # matrix products of fewer rows round differently


def logprob(
    hidden, weight, targets, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _LogProb.apply(hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy)


def loss(hidden, weight, targets, token_loss, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool):
    wanted = torch.is_grad_enabled()  # within a Function it never is
    return _Loss.apply(hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy, wanted)


class _Head:
    """One call's logits, tile by tile, in buffers that are used again: fresh pages cost as much as a pass over them."""

    def __init__(self, hidden: Tensor, weight_VH: Tensor, targets_T: Tensor, temperature_T: Tensor, shard: VocabShard):
        self.hidden_TH, self.weight_VH, self.targets_T, self.shard = hidden, weight_VH, targets_T, shard
        self.dtype = torch.promote_types(hidden.dtype, torch.float32)
        # Tensor cores multiply half precision and add in fp32; CPUs are faster in fp32 altogether.
        self.native = hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)
        self.temperature_T = None if bool((temperature_T == 1).all()) else temperature_T.to(self.dtype)
        self.length = max(ROWS, min(CHUNK, CHUNK_ELEMENTS // (shard.rows * shard.ranks) // ROWS * ROWS))
        rows = min(self.length, -(-targets_T.shape[0] // ROWS) * ROWS)
        self.widest = max(tile.stop - tile.start for tile in shard.tiles)
        self.scratch = torch.empty(rows * self.widest, dtype=self.dtype, device=hidden.device)

    def chunks(self) -> Iterator[slice]:
        tokens = self.targets_T.shape[0]
        return (slice(start, min(start + self.length, tokens)) for start in range(0, tokens, self.length))

    def rows(self, chunk: slice) -> Tensor:
        """The chunk's hidden states, as the products take them; zeros fill up to a multiple of ROWS."""
        hidden_tH = self.hidden_TH[chunk]
        hidden_tH = hidden_tH if self.native else hidden_tH.to(self.dtype)
        missing = -hidden_tH.shape[0] % ROWS
        return torch.nn.functional.pad(hidden_tH, (0, 0, 0, missing)) if missing else hidden_tH

    def weight(self, tile: slice) -> Tensor:
        return self.weight_VH[tile] if self.native else self.weight_VH[tile].to(self.dtype)

    def logits(self, chunk: slice, hidden_tH: Tensor, tile: slice) -> Tensor:
        """Scaled logits [t, v] (t as ``rows`` fills it up), in the scratch buffer: good until the next call."""
        weight_vH = self.weight(tile)
        z_tv = self.scratch[: hidden_tH.shape[0] * weight_vH.shape[0]].view(hidden_tH.shape[0], -1)
        _multiply(hidden_tH, weight_vH.t(), z_tv)
        if self.temperature_T is not None:
            z_tv[: chunk.stop - chunk.start].div_(self.temperature_T[chunk].unsqueeze(1))
        return z_tv

    def by_temperature(self, values_t: Tensor, chunk: slice) -> Tensor:
        return values_t if self.temperature_T is None else values_t / self.temperature_T[chunk]

    def statistics(self, chunk: slice, exp: Tensor, entropy: bool) -> Tensor:
        """[K, 4, t]; leaves exp(z - the tile's max) of every tile in ``exp`` [K, t v], or of the last in ``exp`` [t v].

        Rows that fill up the chunk take part until the end: torch sums few rows in another order than many.
        """
        hidden_tH, tokens, stats = self.rows(chunk), chunk.stop - chunk.start, []
        targets_t = torch.nn.functional.pad(self.targets_T[chunk], (0, hidden_tH.shape[0] - tokens))
        for k, tile in enumerate(self.shard.tiles):
            if tile.start == tile.stop:
                stats.append(no_statistics(hidden_tH.shape[0], self.scratch))
                continue
            z_tv = self.logits(chunk, hidden_tH, tile)
            exp_tv = (exp[k] if exp.dim() == 2 else exp)[: z_tv.numel()].view(z_tv.shape)
            stats.append(tile_statistics(z_tv, *target_columns(targets_t, self.shard, tile), exp_tv, entropy))
        return torch.stack(stats)[..., :tokens]


class _Gradients:
    """dhidden [T, H], and dweight [V, H] in fp32: in the weight's ``main_grad`` where Megatron keeps one."""

    def __init__(self, head: _Head, needs: tuple[bool, bool]):
        self.head, weight = head, head.weight_VH
        self.main_grad = _fp32_main_grad(weight) if needs[1] else None
        self.dhidden_TH = self.dweight_VH = None
        if needs[0]:  # a row is complete after its chunk, but for the sum over ranks
            dtype = head.dtype if head.shard.ranks > 1 else head.hidden_TH.dtype
            self.dhidden_TH = torch.zeros_like(head.hidden_TH, dtype=dtype)
        if needs[1]:
            self.dweight_VH = torch.zeros_like(weight, dtype=head.dtype) if self.main_grad is None else self.main_grad

    def add(self, rows: slice | Tensor, hidden_aH: Tensor, tiles: Iterator[tuple[slice, Tensor]]) -> None:
        """``tiles``: (columns, dz [a, v] with respect to the unscaled logits) of all of this rank's tiles."""
        dhidden_aH = torch.zeros(hidden_aH.shape, dtype=self.head.dtype, device=hidden_aH.device)
        for tile, dz_av in tiles:
            dz_av = dz_av.to(hidden_aH.dtype)
            if self.dhidden_TH is not None:
                _add_product(dhidden_aH, dz_av, self.head.weight(tile))
            if self.dweight_VH is not None:
                _add_product(self.dweight_VH[tile], dz_av.t(), hidden_aH)
        if self.dhidden_TH is not None:
            self.dhidden_TH[rows] = dhidden_aH.to(self.dhidden_TH.dtype)

    def hidden(self) -> Tensor | None:
        """dhidden [T, H]; each rank has the part that flows through its columns of the vocabulary."""
        if self.dhidden_TH is None:
            return None
        if self.head.shard.ranks > 1:
            dist.all_reduce(self.dhidden_TH, group=self.head.shard.group)
        return self.dhidden_TH.to(self.head.hidden_TH.dtype)

    def weight(self) -> Tensor | None:
        """What autograd is given: zeros where ``main_grad`` has it all.

        Not None: DDP waits for every gradient. And not mcore's mark of an added gradient, under which what a tied
        embedding adds to ours would be dropped.
        """
        weight = self.head.weight_VH
        if self.main_grad is not None:
            return torch.zeros_like(weight)
        return None if self.dweight_VH is None else self.dweight_VH.to(weight.dtype)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """left @ right into ``out``; half precision on tensor cores, added up in fp32."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return out.copy_(torch.mm(left, right, out_dtype=out.dtype))


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, in total's precision."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        total += torch.mm(left, right, out_dtype=total.dtype)


def _fp32_main_grad(weight: Tensor) -> Tensor | None:
    main_grad = getattr(weight, "main_grad", None)
    return main_grad if main_grad is not None and main_grad.dtype == torch.float32 else None


def _all_tokens(hidden: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    if not sequence_parallel or shard.ranks == 1:
        return hidden
    rows = [torch.empty_like(hidden) for _ in range(shard.ranks)]
    dist.all_gather(rows, hidden.contiguous(), group=shard.group)
    return torch.cat(rows)


def _own_rows(dhidden_TH: Tensor | None, shard: VocabShard, sequence_parallel: bool) -> Tensor | None:
    if dhidden_TH is None or not sequence_parallel or shard.ranks == 1:
        return dhidden_TH
    return dhidden_TH.chunk(shard.ranks)[dist.get_rank(shard.group)]


def _add_at_targets(dz_tv: Tensor, slope_t: Tensor, column_t: Tensor, here_t: Tensor) -> Tensor:
    """The onehot part of dz, in place."""
    return dz_tv.scatter_add_(1, column_t.unsqueeze(1), torch.where(here_t, slope_t, 0.0).unsqueeze(1))


class _LogProb(Function):
    """Forward keeps O(T) numbers; backward recomputes the logits of the tokens that have a gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy):
        head = _Head(_all_tokens(hidden, shard, sequence_parallel), weight, targets, temperature_T, shard)
        exp = torch.empty_like(head.scratch)
        stats = [head.statistics(chunk, exp, entropy) for chunk in head.chunks()]
        nothing = head.scratch.new_zeros(TILES // shard.ranks, STATISTICS, 0)
        logp_T, entropy_T, lse_T = combine(torch.cat([nothing, *stats], dim=2), shard)
        ctx.save_for_backward(head.hidden_TH, weight, targets, temperature_T, entropy_T, lse_T)
        ctx.shard, ctx.sequence_parallel = shard, sequence_parallel
        return logp_T, entropy_T, lse_T

    @staticmethod
    def backward(ctx, dlogp_T, dentropy_T, dlse_T):
        hidden_TH, weight, targets, temperature_T, entropy_T, lse_T = ctx.saved_tensors
        a = ((dlogp_T != 0) | (dentropy_T != 0) | (dlse_T != 0)).nonzero().flatten()
        head = _Head(hidden_TH[a], weight, targets[a], temperature_T[a], ctx.shard)
        gradients = _Gradients(head, ctx.needs_input_grad[:2])
        exp = torch.empty_like(head.scratch)
        upstream = dlogp_T[a], dentropy_T[a], dlse_T[a]
        for chunk in head.chunks():
            tiles = _recomputed(head, chunk, exp, upstream, entropy_T[a], lse_T[a])
            gradients.add(chunk, head.rows(chunk)[: chunk.stop - chunk.start], tiles)
        dhidden = gradients.hidden()
        if dhidden is not None:
            dhidden = torch.zeros_like(hidden_TH).index_copy_(0, a, dhidden)
        return _own_rows(dhidden, ctx.shard, ctx.sequence_parallel), gradients.weight(), *[None] * 5


def _recomputed(
    head: _Head, chunk: slice, exp: Tensor, upstream: tuple[Tensor, ...], entropy_A: Tensor, lse_A: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """(tile, dz [t, v]) of one chunk, one tile at a time."""
    dlogp_t, dentropy_t, dlse_t = (head.by_temperature(gradient_A[chunk], chunk) for gradient_A in upstream)
    hidden_tH, lse_t, has_entropy = head.rows(chunk), lse_A[chunk], bool(dentropy_t.any())
    for tile in head.shard.tiles:
        if tile.start == tile.stop:
            continue
        z_tv = head.logits(chunk, hidden_tH, tile)[: len(lse_t)]
        dz_tv = torch.sub(z_tv, lse_t.unsqueeze(1), out=exp[: z_tv.numel()].view(z_tv.shape)).exp_()
        if has_entropy:
            surprise_tv = z_tv.sub_((lse_t - entropy_A[chunk]).unsqueeze(1))
            dz_tv.mul_(surprise_tv.mul_(-dentropy_t.unsqueeze(1)).add_((dlse_t - dlogp_t).unsqueeze(1)))
        else:
            dz_tv.mul_((dlse_t - dlogp_t).unsqueeze(1))
        yield tile, _add_at_targets(dz_tv, dlogp_t, *target_columns(head.targets_T[chunk], head.shard, tile))


class _Loss(Function):
    """Forward forms the gradients of a token-local loss while the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy, wanted):
        head = _Head(_all_tokens(hidden, shard, sequence_parallel), weight, targets, temperature_T, shard)
        gradients = _Gradients(head, (wanted and hidden.requires_grad, wanted and weight.requires_grad))
        exp_K = head.scratch.new_empty(TILES // shard.ranks, head.scratch.numel())
        results = torch.empty(3, targets.shape[0], dtype=head.dtype, device=hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for chunk in head.chunks():
            stats_K4t = head.statistics(chunk, exp_K, entropy)
            logp_t, entropy_t, lse_t = combine(stats_K4t, shard)
            summands_t, slope_t = token_loss(logp_t, entropy_t if entropy else None, chunk)
            results[:, chunk] = torch.stack([logp_t, entropy_t, lse_t])
            total += summands_t.double().sum()
            a = (slope_t != 0).nonzero().flatten()
            if len(a) and wanted:
                tiles = _formed(head, chunk, a, exp_K, stats_K4t[:, 0] - lse_t, slope_t.to(head.dtype))
                gradients.add(chunk.start + a, _pick(head.rows(chunk)[: len(slope_t)], a), tiles)
        ctx.added = gradients.main_grad is not None
        dhidden = _own_rows(gradients.hidden(), shard, sequence_parallel)
        ctx.save_for_backward(dhidden, weight if ctx.added else gradients.weight())
        logprobs = results.unbind()
        ctx.mark_non_differentiable(*logprobs)
        return total.to(head.dtype), *logprobs

    @staticmethod
    def backward(ctx, dloss, *_):
        dhidden, dweight_VH = ctx.saved_tensors
        if ctx.added:
            if dloss != 1:
                raise RuntimeError(f"linear_loss: main_grad has the gradient of 1 x loss, not of {float(dloss)} x loss")
            dweight_VH = torch.zeros_like(dweight_VH)
        scaled = (gradient if gradient is None else gradient * dloss for gradient in (dhidden, dweight_VH))
        return *scaled, *[None] * 7


def _formed(
    head: _Head, chunk: slice, a: Tensor, exp_K: Tensor, top_less_lse_Kt: Tensor, slope_t: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """(tile, dz [a, v]) of the chunk's tokens ``a``, from exp(z - the tile's max)."""
    slope_a = head.by_temperature(slope_t, chunk)[a]
    targets_a = head.targets_T[chunk][a]
    for k, tile in enumerate(head.shard.tiles):
        if tile.start < tile.stop:
            width = tile.stop - tile.start
            exp_av = _pick(exp_K[k, : len(slope_t) * width].view(-1, width), a)
            dz_av = exp_av.mul_((-slope_a * top_less_lse_Kt[k][a].exp()).unsqueeze(1))
            yield tile, _add_at_targets(dz_av, slope_a, *target_columns(targets_a, head.shard, tile))


def _pick(rows_tx: Tensor, a: Tensor) -> Tensor:
    """The rows ``a``, without a copy where they are all."""
    return rows_tx if len(a) == len(rows_tx) else rows_tx[a]
