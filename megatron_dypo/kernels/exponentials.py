"""Gradients of a chunk's logits from its stored exponentials, for heads that keep exp z in place of z.

For a row, p = x share: x is exp z and share exp(-lse), or x is p itself and share 1 if exp z left its range (far
rows). With the slopes g of logp and e of the entropy, each / temperature, H the entropy, z = log x:

    dz = g (onehot - p) - e p (log p + H) = -share x (g + e (log x + log share + H))      but at the target
    dz = g (1 - p) - e p (logp + H)                                                       there

A factor of a whole row is left to the matrix products: without e it is -g share, and x is unchanged.

Legend as in ``autograd.py``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_dypo.kernels.vocab import miss


class Factors(NamedTuple):
    """Factors of each row [a]: dz = scale (x, or ``at_target`` at the target).

    With an entropy gradient ``of_log`` is (slope, dentropy) and dz = scale (x (slope + dentropy log x), or
    ``at_target``).
    """

    scale: Tensor
    at_target: Tensor
    of_log: tuple[Tensor, Tensor] | None = None


def factors(
    a: Tensor, far_t: Tensor, upstream: tuple[Tensor, Tensor | None], results: tuple[Tensor, Tensor, Tensor]
) -> Factors:
    """Return the rows' factors from the gradients [t] of logp and (or None) entropy, and [t] logp, entropy and lse."""
    dlogp_t, dentropy_t = upstream
    dlogp_a = dlogp_t[a]
    logp_a, entropy_a, lse_a = (result_t[a] for result_t in results)
    log_share_a = torch.where(far_t[a], 0.0, -lse_a)
    share_a = log_share_a.exp()
    if dentropy_t is None:
        return Factors(-dlogp_a * share_a, -miss(logp_a) / share_a)
    dentropy_a = dentropy_t[a]
    own_a = dlogp_a * miss(logp_a) - dentropy_a * logp_a.exp() * (logp_a + entropy_a)
    slope_a = dlogp_a + dentropy_a * (log_share_a + entropy_a)
    return Factors(-share_a, -own_a / share_a, (slope_a, dentropy_a))


def few_moved(active_t: Tensor) -> Tensor:
    """Indices of the active rows, compacted to the front; rows already there stay, the others fill the gaps."""
    a = torch.arange(int(active_t.sum()), device=active_t.device)
    if len(a) < len(active_t):
        a[~active_t[: len(a)]] = active_t[len(a) :].nonzero().flatten() + len(a)
    return a


def moved_to_front(x_tV: Tensor, a: Tensor, tiles: Iterable[tuple[int, slice]]) -> Tensor:
    """Compact the rows ``a`` of ``few_moved`` to the front and return them; tile by tile, which bounds the copies."""
    moved = (a >= len(a)).nonzero().flatten() if len(a) < len(x_tV) else a[:0]
    if len(moved):
        for _, tile in tiles:
            x_tV[:, tile].index_copy_(0, moved, x_tV[:, tile].index_select(0, a[moved]))
    return x_tV[: len(a)]
