"""Functions of one token's log-prob that the grouped loss weights, with hand-written derivatives.

    surrogate of the ratio rho, times the advantage A
      clip   min(rho A, clip(rho) A)                     PPO, GRPO; implemented in grouped_loss.py
      cispo  sg(clip(rho)) A logp                        MiniMax-M1, arXiv 2506.13585, Eq. 4 and 5
      sapo   (4 / tau) sigmoid(tau (rho - 1)) A          arXiv 2511.20347; tau by the sign of A
    shape f(p) of the probability p = exp(logp)
      luffy  p / (p + gamma)                             arXiv 2504.14945
      p      p                                           LUFFY without shaping
      nll    logp
      phi    sg(p (1 - p)) logp                          CHORD, arXiv 2508.11408
      sg_p   sg(p) logp                                  CHORD's importance weights

sg: held constant by the derivative. verl and TRL have cispo and sapo under these names; TRL's ``epsilon_high`` of cispo
is the bound itself, whereas here, in verl and in slime the bound is 1 + clip_high.
"""

from __future__ import annotations

import torch
from torch import Tensor

SURROGATES = ("clip", "cispo", "sapo")
SHAPES = ("none", "luffy", "p", "nll", "phi", "sg_p")
LARGEST = 60.0  # exponents are bounded so that float32 stays finite


def cispo(ratio: Tensor, advantage: Tensor, logp: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return (surrogate, its derivative in logp, whether the ratio was outside the bounds 1 - low and 1 + high)."""
    bounded = ratio.clamp(1 - low, 1 + high)
    slope = bounded * advantage
    return slope * logp, slope, bounded != ratio


def sapo(ratio: Tensor, advantage: Tensor, tau_pos: float, tau_neg: float) -> tuple[Tensor, Tensor]:
    """Return (surrogate, derivative in the log ratio): rho softly bounded with temperature tau, slope A at rho = 1."""
    up = advantage > 0
    tau = torch.full_like(ratio, tau_neg).masked_fill_(up, tau_pos)
    gain = torch.full_like(ratio, 4 / tau_neg).masked_fill_(up, 4 / tau_pos)
    excess = tau * (ratio - 1)
    gate, shut = torch.sigmoid(excess), torch.sigmoid(-excess)  # 1 - gate would cancel
    return gate * gain * advantage, ratio * shut * gate * 4 * advantage


def shaped(logp: Tensor, shape: str, gamma: float) -> tuple[Tensor, Tensor]:
    """Return (f, df/dlogp) of a shape other than none."""
    if shape == "nll":
        return logp, torch.ones_like(logp)
    p = logp.clamp(max=LARGEST).exp_()
    if shape == "luffy":
        shifted = p + gamma
        f = p / shifted
        return f, f * (gamma / shifted)
    if shape == "p":
        return p, p
    weight = p * -logp.clamp(max=LARGEST).expm1_() if shape == "phi" else p  # 1 - p would cancel where p is near 1
    return weight * logp, weight
