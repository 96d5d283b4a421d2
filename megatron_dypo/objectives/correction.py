"""Weights of tokens (or responses) that the engine sampled from a slightly different policy."""

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
    """The correction's ``kind``, with its ``cap`` and ``floor`` (None: 1 / cap).

    ``truncate``: weight min(ratio, cap); ``mask``: 1 within [floor, cap], else 0; ``icepop`` (arXiv 2510.18855, M(k)):
    the ratio itself within [floor, cap], else 0; ``none``: 1.
    """

    kind: str = "none"
    cap: float = 2.0
    floor: float | None = None

    @classmethod
    def of(cls, rollout: Rollout) -> Correction:
        """Return the correction of a configuration."""
        return cls(rollout.correction, rollout.correction_cap, rollout.correction_floor)

    def weight(self, log_ratio: Tensor) -> Tensor:
        """Return the weight from log(old policy / engine's policy), in nats, elementwise."""
        return correction_weight(log_ratio, self.kind, self.cap, self.floor)

    def binds(self, log_ratio: Tensor) -> Tensor:
        """Return whether the weight is capped (truncate) or 0 (mask, icepop), elementwise."""
        if self.kind == "truncate":
            return log_ratio.clamp(max=LARGEST).exp() > self.cap
        return self.weight(log_ratio) == 0

    def is_below(self, log_ratio: Tensor) -> Tensor:
        """Return whether it binds at the floor, elementwise; never with ``truncate``, which has none."""
        return self.binds(log_ratio) & (log_ratio < 0)
