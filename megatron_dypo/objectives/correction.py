"""Rollout correction: how much a token (or response) counts when the engine sampled it from a slightly other policy."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megatron_dypo.kernels.grouped_loss import LARGEST, correction_weight


@dataclass(frozen=True)
class Correction:
    """``truncate``: weight min(ratio, cap); ``mask``: 0 outside [1/cap, cap], else 1; ``none``: 1."""

    kind: str = "none"
    cap: float = 2.0

    def weight(self, log_ratio: Tensor) -> Tensor:
        """Weight from log(old policy / engine's policy), in nats, elementwise."""
        return correction_weight(log_ratio, self.kind, self.cap)

    def binds(self, log_ratio: Tensor) -> Tensor:
        """Whether the weight is capped (truncate) or 0 (mask), elementwise."""
        if self.kind == "truncate":
            return log_ratio.clamp(max=LARGEST).exp() > self.cap
        return self.weight(log_ratio) == 0
