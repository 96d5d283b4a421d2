"""How much a token (or response) counts when the engine sampled it from a slightly other policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from megatron_dypo.kernels.grouped_loss import correction_weight
from megatron_dypo.kernels.token_functions import LARGEST

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Rollout


@dataclass(frozen=True)
class Correction:
    """``truncate``: weight min(ratio, cap); ``mask``: 1 within [floor, cap], else 0; ``icepop`` (arXiv 2510.18855,
    M(k)): the ratio itself within [floor, cap], else 0; ``none``: 1. A floor of None is 1 / cap."""

    kind: str = "none"
    cap: float = 2.0
    floor: float | None = None

    @classmethod
    def of(cls, rollout: Rollout) -> Correction:
        """The one that a configuration asks for."""
        return cls(rollout.correction, rollout.correction_cap, rollout.correction_floor)

    def weight(self, log_ratio: Tensor) -> Tensor:
        """Weight from log(old policy / engine's policy), in nats, elementwise."""
        return correction_weight(log_ratio, self.kind, self.cap, self.floor)

    def binds(self, log_ratio: Tensor) -> Tensor:
        """Whether the weight is capped (truncate) or 0 (mask, icepop), elementwise."""
        if self.kind == "truncate":
            return log_ratio.clamp(max=LARGEST).exp() > self.cap
        return self.weight(log_ratio) == 0

    def is_below(self, log_ratio: Tensor) -> Tensor:
        """Whether it binds at its lower end, elementwise; never with ``truncate``, which has none."""
        return self.binds(log_ratio) & (log_ratio < 0)
