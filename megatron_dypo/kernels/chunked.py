"""The head in plain torch, a chunk of tokens at a time: at most CHUNK x V_local logits exist, in fp32.

z = hidden @ weight.T / temperature; dlogp/dz = onehot - p, dlse/dz = p, dentropy/dz = -p (z - lse + entropy).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from megatron_dypo.kernels.vocab import VocabShard, softmax_statistics

CHUNK = 512


def logprob(
    hidden, weight, targets, temperature_T, shard: VocabShard, sequence_parallel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _LogProb.apply(hidden, weight, targets, temperature_T, shard, sequence_parallel)


def loss(hidden, weight, targets, token_loss, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool):
    return _Loss.apply(hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy)


def _chunks(tokens: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, tokens)) for start in range(0, tokens, CHUNK))


def _logits(hidden_tH: Tensor, weight_VH: Tensor, temperature_t: Tensor, shard: VocabShard) -> Tensor:
    return shard.mask_padding((hidden_tH.float() @ weight_VH.t()).div_(temperature_t.unsqueeze(1)))


def _all_tokens(hidden: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    if not sequence_parallel or shard.ranks == 1:
        return hidden
    rows = [torch.empty_like(hidden) for _ in range(shard.ranks)]
    dist.all_gather(rows, hidden.contiguous(), group=shard.group)
    return torch.cat(rows)


def _sum_over_ranks(dhidden_TH: Tensor, shard: VocabShard, sequence_parallel: bool) -> Tensor:
    """Each rank has the part of dhidden that flows through its columns; with sequence parallelism keep our rows."""
    if shard.ranks > 1:
        dist.all_reduce(dhidden_TH, group=shard.group)
        if sequence_parallel:
            return dhidden_TH.chunk(shard.ranks)[dist.get_rank(shard.group)]
    return dhidden_TH


class _Gradients:
    """Accumulates dhidden and dweight, chunk by chunk, in fp32."""

    def __init__(self, hidden_TH: Tensor, weight_VH: Tensor):
        self.weight = weight_VH
        self.dhidden_TH = torch.empty(hidden_TH.shape, dtype=torch.float32, device=hidden_TH.device)
        self.dweight_VH = torch.zeros(weight_VH.shape, dtype=torch.float32, device=hidden_TH.device)

    def add(self, chunk: slice, dz_tV: Tensor, hidden_tH: Tensor, temperature_t: Tensor) -> None:
        dlogits_tV = dz_tV.div_(temperature_t.unsqueeze(1))
        torch.mm(dlogits_tV, self.weight, out=self.dhidden_TH[chunk])
        self.dweight_VH.addmm_(dlogits_tV.t(), hidden_tH.float())


def _dlogp_dz(p_tV: Tensor, dlogp_t: Tensor, targets_t: Tensor, shard: VocabShard) -> Tensor:
    """dlogp_t (onehot - p), overwriting ``p_tV``."""
    local_t, here_t = shard.local_targets(targets_t)
    dz_tV = p_tV.mul_(-dlogp_t.unsqueeze(1))
    return dz_tV.scatter_add_(1, local_t.unsqueeze(1), torch.where(here_t, dlogp_t, 0.0).unsqueeze(1))


class _LogProb(Function):
    """Forward keeps O(T) numbers; backward recomputes the logits."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature_T, shard, sequence_parallel):
        hidden_TH, weight_VH = _all_tokens(hidden, shard, sequence_parallel), weight.float()
        results = torch.empty(3, targets.shape[0], dtype=torch.float32, device=hidden.device)
        for chunk in _chunks(targets.shape[0]):
            z_tV = _logits(hidden_TH[chunk], weight_VH, temperature_T[chunk], shard)
            results[:, chunk] = torch.stack(softmax_statistics(z_tV, targets[chunk], shard))
        logp_T, entropy_T, lse_T = results
        ctx.save_for_backward(hidden_TH, weight, targets, temperature_T, entropy_T, lse_T)
        ctx.shard, ctx.sequence_parallel = shard, sequence_parallel
        return logp_T, entropy_T, lse_T

    @staticmethod
    def backward(ctx, dlogp_T, dentropy_T, dlse_T):
        hidden_TH, weight, targets, temperature_T, entropy_T, lse_T = ctx.saved_tensors
        weight_VH, shard = weight.float(), ctx.shard
        gradients = _Gradients(hidden_TH, weight_VH)
        for chunk in _chunks(targets.shape[0]):
            z_tV = _logits(hidden_TH[chunk], weight_VH, temperature_T[chunk], shard)
            p_tV = (z_tV - lse_T[chunk].unsqueeze(1)).exp()
            surprise_tV = (z_tV - (lse_T - entropy_T)[chunk].unsqueeze(1)).masked_fill_(
                p_tV == 0, 0.0
            )  # padding is -inf
            extra_tV = p_tV * (dlse_T[chunk].unsqueeze(1) - dentropy_T[chunk].unsqueeze(1) * surprise_tV)
            dz_tV = _dlogp_dz(p_tV, dlogp_T[chunk], targets[chunk], shard).add_(extra_tV)
            gradients.add(chunk, dz_tV, hidden_TH[chunk], temperature_T[chunk])
        dhidden = _sum_over_ranks(gradients.dhidden_TH, shard, ctx.sequence_parallel)
        return dhidden.to(hidden_TH.dtype), gradients.dweight_VH.to(weight.dtype), None, None, None, None


class _Loss(Function):
    """Forward forms the gradients of a token-local loss while the logits are at hand; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, token_loss, temperature_T, shard, sequence_parallel, entropy):
        hidden_TH, weight_VH = _all_tokens(hidden, shard, sequence_parallel), weight.float()
        results = torch.empty(3, targets.shape[0], dtype=torch.float32, device=hidden.device)
        gradients = _Gradients(hidden_TH, weight_VH)
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for chunk in _chunks(targets.shape[0]):
            z_tV = _logits(hidden_TH[chunk], weight_VH, temperature_T[chunk], shard)
            logp_t, entropy_t, lse_t = softmax_statistics(z_tV, targets[chunk], shard)
            summands_t, dlogp_t = token_loss(logp_t, entropy_t if entropy else None, chunk)
            dz_tV = _dlogp_dz((z_tV - lse_t.unsqueeze(1)).exp_(), dlogp_t.float(), targets[chunk], shard)
            gradients.add(chunk, dz_tV, hidden_TH[chunk], temperature_T[chunk])
            results[:, chunk] = torch.stack([logp_t, entropy_t, lse_t])
            total += summands_t.double().sum()
        dhidden = _sum_over_ranks(gradients.dhidden_TH, shard, sequence_parallel)
        ctx.save_for_backward(dhidden.to(hidden.dtype), gradients.dweight_VH.to(weight.dtype))
        logprobs = results.unbind()
        ctx.mark_non_differentiable(*logprobs)
        return total.float(), *logprobs

    @staticmethod
    def backward(ctx, dloss, *_):
        dhidden, dweight_VH = ctx.saved_tensors
        return dhidden * dloss, dweight_VH * dloss, None, None, None, None, None, None
