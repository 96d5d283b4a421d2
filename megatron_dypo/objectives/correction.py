"""Rollout correction: how much a token (or response) counts when the engine sampled it from a slightly other policy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Correction:
    """``truncate``: weight min(ratio, cap); ``mask``: 0 outside [1/cap, cap], else 1; ``none``: 1."""

    kind: str = "none"
    cap: float = 2.0

    def weight(self, log_ratio: Tensor) -> Tensor:
        """Weight from log(old policy / engine's policy), in nats, elementwise."""
        ratio = log_ratio.clamp(max=60.0).exp()
        if self.kind == "truncate":
            return ratio.clamp(max=self.cap)
        if self.kind == "mask":
            return ((ratio >= 1 / self.cap) & (ratio <= self.cap)).to(ratio.dtype)
        return torch.ones_like(ratio)
