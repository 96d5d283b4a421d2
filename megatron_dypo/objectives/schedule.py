"""The share of experts at a step: CHORD's mu (arXiv 2508.11408).

As in Trinity-RFT's `chord_policy_loss`, with steps counted from 1. All updates of one rollout have the same share.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_dypo.config.schema import Mix


def mu(mix: Mix, step: int) -> float:
    """Return mu: linear from 0 to ``peak`` in ``warmup`` steps, half a cosine to ``valley`` in ``decay``, constant."""
    if step < mix.warmup:
        return mix.peak * step / mix.warmup
    since = step - mix.warmup
    if since < mix.decay:
        return mix.valley + (mix.peak - mix.valley) * (1 + math.cos(math.pi * since / mix.decay)) / 2
    return mix.valley
