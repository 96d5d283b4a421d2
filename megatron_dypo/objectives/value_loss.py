"""Compute a critic's loss: half the squared distance of a token's value from its return, with PPO's value clipping.

L_t = w_t/2 max((V - R)^2, (V_c - R)^2), with V_c the value moved by at most ``clip`` from the old one (PPO, as in
OpenRLHF and Open-Reasoner-Zero). Beyond the clip, on the side of the return, it is constant.

Legend: N loss tokens of a micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


def value_loss(
    values_N: Tensor, old_N: Tensor, returns_N: Tensor, weight_N: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Return (summands [N], dL/dV [N]), without a graph; ``clip`` None: no clipping."""
    values_N = values_N.detach()
    error_N = values_N - returns_N
    if clip is None:
        return weight_N / 2 * error_N.square(), weight_N * error_N
    bounded_N = torch.clamp(values_N, old_N - clip, old_N + clip) - returns_N
    larger_N = torch.maximum(error_N.square(), bounded_N.square())
    return weight_N / 2 * larger_N, weight_N * error_N * (error_N.square() >= bounded_N.square())


@dataclass
class ValueStreams:
    """Per-token inputs [N] of one micro-batch's loss: old value, return, weight. ``loss`` sets ``total`` and
    ``clipped``, the loss and the number of tokens beyond the clip.
    """

    old_N: Tensor
    returns_N: Tensor
    weight_N: Tensor
    clip: float | None
    total: float = field(default=0.0, init=False)
    clipped: int = field(default=0, init=False)

    def loss(self, values_N: Tensor) -> Tensor:
        """Return the sum of all tokens' summands, differentiable in ``values_N``."""
        summands_N, slope_N = value_loss(values_N, self.old_N, self.returns_N, self.weight_N, self.clip)
        loss = summands_N.double().sum()
        self.total = loss.item()
        self.clipped = int(((slope_N == 0) & (summands_N > 0)).sum())
        attached = (slope_N.double() * (values_N - values_N.detach()).double()).sum()
        return (loss + attached).to(values_N.dtype)
