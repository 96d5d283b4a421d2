"""The head with materialised logits and torch's own autograd: the reference for the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dypo.kernels.vocab import VocabShard


def logprob(
    hidden, weight, targets, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if shard.ranks > 1:
        raise ValueError("backend: 'reference' supports one rank only")
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    z_TV = (hidden.to(dtype) @ weight.to(dtype).t() / temperature_T.unsqueeze(1).to(dtype))[:, : shard.vocab_size]
    lse_T = z_TV.logsumexp(1)
    log_p_TV = z_TV - lse_T.unsqueeze(1)
    return log_p_TV.gather(1, targets.unsqueeze(1)).squeeze(1), -(log_p_TV.exp() * log_p_TV).sum(1), lse_T


def loss(hidden, weight, targets, token_loss, temperature_T, shard: VocabShard, sequence_parallel: bool, entropy: bool):
    logp_T, entropy_T, lse_T = logprob(hidden, weight, targets, temperature_T, shard, sequence_parallel, entropy)
    summands_T, *slopes = token_loss(logp_T.detach(), entropy_T.detach() if entropy else None, slice(0, len(targets)))
    # the value of the summands with the gradient of the given derivatives
    total = summands_T.sum().detach()
    for result_T, slope_T in zip((logp_T, entropy_T), slopes, strict=True):
        if slope_T is not None:
            total = total + (slope_T.detach() * (result_T - result_T.detach())).sum()
    return total, logp_T.detach(), entropy_T.detach(), lse_T.detach()
