"""The head's two autograd functions; a ``LogitHead`` forms the logits, one chunk of tokens at a time.

z = hidden @ weight.T / temperature; dlogp/dz = onehot - p, dlse/dz = p, dentropy/dz = -p (z - lse + entropy). At the
target, where p may be near 1, 1 - p is -expm1(logp), and z - lse is logp.
``LogProb`` keeps O(T) numbers and recomputes the logits in its backward (4 matrix products). ``Loss`` keeps one
chunk's logits and forms the gradients at once (3 products).

Legend: T tokens, t tokens of a chunk, a tokens of it with a gradient; H hidden size; V local vocabulary rows, v those
of a tile; K this rank's tiles.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_dypo.kernels.vocab import STATISTICS, TILES, VocabShard, combine

ROWS = 16  # products of fewer rows round differently
HALVES = (torch.bfloat16, torch.float16)
# Per tile: (columns, dz [a, v] with respect to the unscaled logits, None or the row factors [a] still to be applied,
# equal for all tiles)
Tiles = Iterator[tuple[slice, Tensor, Tensor | None]]


def multiplies_halves(hidden: Tensor) -> bool:
    """Return whether to multiply in half precision: tensor cores add in fp32; CPUs are faster in fp32 altogether."""
    return hidden.is_cuda and hidden.dtype in HALVES


class LogitHead(ABC):
    """The logits of one call; ``keep``: ``fused_backward`` follows ``statistics``, chunk by chunk."""

    def __init__(
        self,
        hidden_TH: Tensor,
        weight_VH: Tensor,
        targets_T: Tensor,
        temperature_T: Tensor,
        shard: VocabShard,
        entropy: bool = False,
        keep: bool = False,
    ):
        self.hidden_TH, self.weight_VH, self.targets_T, self.shard = hidden_TH, weight_VH, targets_T, shard
        self.entropy, self.keep = entropy, keep
        self.dtype = torch.promote_types(hidden_TH.dtype, torch.float32)
        self.native = multiplies_halves(hidden_TH)
        self.temperature_T = None if bool((temperature_T == 1).all()) else temperature_T.to(self.dtype)
        self.length = self.chunk_length()

    @abstractmethod
    def chunk_length(self) -> int:
        """Return the tokens per chunk, a multiple of ROWS."""

    @abstractmethod
    def statistics(self, chunk: slice) -> Tensor:
        """Return the statistics [K, 4, t] of this rank's tiles."""

    @abstractmethod
    def fused_backward(
        self,
        chunk: slice,
        a: Tensor,
        stats_K4t: Tensor,
        upstream: tuple[Tensor, Tensor | None],
        results: tuple[Tensor, Tensor, Tensor],
    ) -> Tiles:
        """Yield the tiles of dz for the tokens ``a`` of the chunk that ``statistics`` saw last.

        ``upstream``: gradients [t] of logp and, if any, of the entropy, each / temperature; ``results`` [t]: logp,
        entropy and lse.
        """

    @abstractmethod
    def recomputed(self, chunk: slice, upstream: tuple[Tensor, ...], results: tuple[Tensor, ...]) -> Tiles:
        """Yield the tiles of dz for all tokens of a chunk, with the logits recomputed.

        ``upstream``: gradients [t] of the ``results`` logp, entropy and lse, each / temperature.
        """

    def close(self) -> None:  # noqa: B027 - not every head holds memory
        """Release the head's memory."""

    def shortened(self, chunk: int, elements: int) -> int:
        """Limit ``chunk`` tokens so that their logits have at most ``elements`` elements; a multiple of ROWS.

        Counts the whole vocabulary, not the shard's: matrix products round depending on their number of rows.
        """
        vocabulary = self.shard.rows * self.shard.ranks
        return max(ROWS, min(chunk, elements // vocabulary // ROWS * ROWS))

    @property
    def longest(self) -> int:
        """Return the rows of the longest chunk, padded to a multiple of ROWS."""
        return min(self.length, -(-self.targets_T.shape[0] // ROWS) * ROWS)

    def order(self, active_t: Tensor) -> Tensor:
        """Return the indices of a chunk's active tokens, in the order that ``fused_backward`` takes them."""
        return active_t.nonzero().flatten()

    def chunks(self) -> Iterator[slice]:
        tokens = self.targets_T.shape[0]
        return (slice(start, min(start + self.length, tokens)) for start in range(0, tokens, self.length))

    def tiles(self) -> Iterator[tuple[int, slice]]:
        """Yield (number, columns) of this rank's non-empty tiles."""
        return ((k, tile) for k, tile in enumerate(self.shard.tiles) if tile.start < tile.stop)

    def rows(self, chunk: slice) -> Tensor:
        """Return the chunk's hidden states for the matrix products, zero-padded to a multiple of ROWS."""
        hidden_tH = self.hidden_TH[chunk]
        hidden_tH = hidden_tH if self.native else hidden_tH.to(self.dtype)
        missing = -hidden_tH.shape[0] % ROWS
        return torch.nn.functional.pad(hidden_tH, (0, 0, 0, missing)) if missing else hidden_tH

    def weight(self, tile: slice) -> Tensor:
        return self.weight_VH[tile] if self.native else self.weight_VH[tile].to(self.dtype)

    def by_temperature(self, values_t: Tensor, chunk: slice) -> Tensor:
        return values_t if self.temperature_T is None else values_t / self.temperature_T[chunk]


class Gradients:
    """dhidden [T, H], and dweight [V, H] in fp32: in the weight's ``main_grad`` if Megatron keeps one."""

    def __init__(self, head: LogitHead, needs: tuple[bool, bool]):
        self.head, weight = head, head.weight_VH
        self.main_grad = _fp32_main_grad(weight) if needs[1] else None
        self.dhidden_TH = self.dweight_VH = None
        if needs[0]:  # a row is complete after its chunk, except for the sum over ranks
            dtype = head.dtype if head.shard.ranks > 1 else head.hidden_TH.dtype
            self.dhidden_TH = torch.zeros_like(head.hidden_TH, dtype=dtype)
        if needs[1]:
            self.dweight_VH = torch.empty_like(weight, dtype=head.dtype) if self.main_grad is None else self.main_grad
        self.begun = self.main_grad is not None  # otherwise the first products overwrite instead of adding

    def add(self, rows: slice | Tensor, hidden_aH: Tensor, tiles: Tiles) -> None:
        """Add the products of all of this rank's ``tiles``, for the tokens ``rows``."""
        dhidden_aH = scaled_aH = scale_a = None
        for tile, dz_av, scale_a in tiles:
            dz_av = dz_av.to(hidden_aH.dtype)
            if self.dhidden_TH is not None:
                if dhidden_aH is None:
                    dhidden_aH = hidden_aH.new_empty(hidden_aH.shape, dtype=self.head.dtype)
                    multiply(dz_av, self.head.weight(tile), dhidden_aH)
                else:
                    _add_product(dz_av, self.head.weight(tile), dhidden_aH)
            if self.dweight_VH is not None:
                if scaled_aH is None:
                    scaled_aH = hidden_aH if scale_a is None else _scaled(hidden_aH, scale_a)
                (_add_product if self.begun else multiply)(dz_av.t(), scaled_aH, self.dweight_VH[tile])
        self.begun, scaled_aH = True, None
        if self.dhidden_TH is not None and dhidden_aH is not None:
            if scale_a is not None:
                dhidden_aH.mul_(scale_a.unsqueeze(1))
            if isinstance(rows, slice):
                self.dhidden_TH[rows].copy_(dhidden_aH)
            else:
                self.dhidden_TH.index_copy_(0, rows, dhidden_aH.to(self.dhidden_TH.dtype))

    def hidden(self) -> Tensor | None:
        """Return dhidden [T, H], summed over ranks; each has the part that flows through its vocabulary columns."""
        if self.dhidden_TH is None:
            return None
        if self.head.shard.ranks > 1:
            dist.all_reduce(self.dhidden_TH, group=self.head.shard.group)
        return self.dhidden_TH.to(self.head.hidden_TH.dtype)

    def weight(self) -> Tensor | None:
        """Return the weight's gradient for autograd: none of it if ``main_grad`` has it all."""
        weight = self.head.weight_VH
        if self.main_grad is not None:
            return nothing_left(weight)
        if self.dweight_VH is None:
            return None
        self.dweight_VH[self.head.shard.real.stop if self.begun else 0 :] = 0  # padding, or all without a gradient
        return self.dweight_VH.to(weight.dtype)


class LogProb(Function):
    """Log-probs: forward keeps O(T) numbers; backward recomputes the logits of the tokens that have a gradient."""

    @staticmethod
    def forward(ctx, heads, hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy):
        forms, ctx.recomputes = heads
        head = forms(_all_tokens(hidden, shard, sequence_parallel), weight, targets, temperature_T, shard, entropy)
        nothing = hidden.new_zeros(TILES // shard.ranks, STATISTICS, 0, dtype=head.dtype)
        stats = [head.statistics(chunk) for chunk in head.chunks()]
        head.close()
        logp_T, entropy_T, lse_T = combine(torch.cat([nothing, *stats], dim=2), shard)
        ctx.save_for_backward(head.hidden_TH, weight, targets, temperature_T, logp_T, entropy_T, lse_T)
        ctx.shard, ctx.sequence_parallel = shard, sequence_parallel
        return logp_T, entropy_T, lse_T

    @staticmethod
    def backward(ctx, dlogp_T, dentropy_T, dlse_T):
        hidden_TH, weight, targets, temperature_T, *results = ctx.saved_tensors
        a = ((dlogp_T != 0) | (dentropy_T != 0) | (dlse_T != 0)).nonzero().flatten()
        head = ctx.recomputes(hidden_TH[a], weight, targets[a], temperature_T[a], ctx.shard)
        gradients = Gradients(head, ctx.needs_input_grad[1:3])
        upstream, results = (dlogp_T[a], dentropy_T[a], dlse_T[a]), [result_T[a] for result_T in results]
        for chunk in head.chunks():
            scaled = tuple(head.by_temperature(gradient_A[chunk], chunk) for gradient_A in upstream)
            tiles = head.recomputed(chunk, scaled, tuple(result_A[chunk] for result_A in results))
            gradients.add(chunk, head.rows(chunk)[: chunk.stop - chunk.start], tiles)
        head.close()
        dhidden = gradients.hidden()
        if dhidden is not None:
            dhidden = torch.zeros_like(hidden_TH).index_copy_(0, a, dhidden)
        return None, _own_rows(dhidden, ctx.shard, ctx.sequence_parallel), gradients.weight(), *[None] * 5


class Loss(Function):
    """A token-local loss: forward forms its gradients while the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(
        ctx, forms, hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy, wanted
    ):
        hidden_TH = _all_tokens(hidden, shard, sequence_parallel)
        head = forms(hidden_TH, weight, targets, temperature_T, shard, entropy, keep=wanted)
        gradients = Gradients(head, (wanted and hidden.requires_grad, wanted and weight.requires_grad))
        results = torch.empty(3, targets.shape[0], dtype=head.dtype, device=hidden.device)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for chunk in head.chunks():
            stats_K4t = head.statistics(chunk)
            logp_t, entropy_t, lse_t = combine(stats_K4t, shard)
            summands_t, dlogp_t, dentropy_t = token_loss(logp_t, entropy_t if entropy else None, chunk)
            results[:, chunk] = torch.stack([logp_t, entropy_t, lse_t])
            total += summands_t.double().sum()
            active_t = dlogp_t != 0
            if dentropy_t is not None:
                pulled_t = dentropy_t != 0
                active_t, dentropy_t = active_t | pulled_t, dentropy_t if bool(pulled_t.any()) else None
            a = head.order(active_t)
            if len(a) and wanted:
                upstream = tuple(
                    None if gradient_t is None else head.by_temperature(gradient_t.to(head.dtype), chunk)
                    for gradient_t in (dlogp_t, dentropy_t)
                )
                tiles = head.fused_backward(chunk, a, stats_K4t, upstream, (logp_t, entropy_t, lse_t))
                rows = chunk if len(a) == len(dlogp_t) else chunk.start + a
                gradients.add(rows, pick(head.rows(chunk)[: len(dlogp_t)], a), tiles)
        head.close()
        ctx.added = gradients.main_grad is not None
        dhidden = _own_rows(gradients.hidden(), shard, sequence_parallel)
        ctx.save_for_backward(weight if ctx.added else None)
        ctx.gradients = dhidden, None if ctx.added else gradients.weight()
        logprobs = results.unbind()
        ctx.mark_non_differentiable(*logprobs)
        return total.to(head.dtype), *logprobs

    @staticmethod
    def backward(ctx, dloss, *_):
        if ctx.gradients is None:
            raise RuntimeError("linear_loss: backward was called twice; the gradients are formed once")
        (dhidden, dweight_VH), ctx.gradients = ctx.gradients, None
        if ctx.added:
            if dloss != 1:
                raise RuntimeError(
                    f"linear_loss: main_grad holds the gradient of 1 x loss, not of {float(dloss)} x loss"
                )
            return None, dhidden, nothing_left(ctx.saved_tensors[0]), *[None] * 7
        if dloss != 1:
            for gradient in (dhidden, dweight_VH):
                if gradient is not None:
                    gradient.mul_(dloss)
        return None, dhidden, dweight_VH, *[None] * 7


def pick(rows_tx: Tensor, a: Tensor) -> Tensor:
    """Return the rows ``a``, without a copy if they are all rows."""
    return rows_tx if len(a) == len(rows_tx) else rows_tx[a]


def multiply(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
    """Write left @ right into ``out``; half precision runs on tensor cores and accumulates in fp32."""
    if left.dtype != out.dtype and left.is_cuda:
        return torch.mm(left, right, out_dtype=out.dtype, out=out)
    return torch.mm(left.to(out.dtype), right.to(out.dtype), out=out)


def _add_product(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Add left @ right to ``out``, in out's precision."""
    if left.dtype != out.dtype and left.is_cuda:
        torch.addmm(out, left, right, out_dtype=out.dtype, out=out)
    else:
        out.addmm_(left.to(out.dtype), right.to(out.dtype))


def _scaled(hidden_aH: Tensor, scale_a: Tensor) -> Tensor:
    """Scale the rows in fp32, rounded once."""
    return torch.mul(hidden_aH, scale_a.unsqueeze(1), out=torch.empty_like(hidden_aH))


def nothing_left(weight: Tensor) -> Tensor | None:
    """Return the gradient for autograd of a weight whose ``main_grad`` has it all: None, which costs nothing.

    Zeros if DDP takes part in the backward pass and waits for every gradient (``awaits_grad``, set by the policy). Not
    mcore's mark of an added gradient, which would drop what a tied embedding adds to ours.
    """
    return torch.zeros_like(weight) if getattr(weight, "awaits_grad", False) else None


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
