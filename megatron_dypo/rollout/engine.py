"""What a rollout engine is: token ids in, token ids and log-probs out, weights replaced in place.

Every rank runs one engine on its own share of the prompts; ``sync`` is called by all ranks together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from megatron_dypo.records import Response

if TYPE_CHECKING:
    from megatron_dypo.weight_sync.source import VersionedWeights


@dataclass(frozen=True)
class Request:
    """One response to sample. ``seed`` None is greedy decoding."""

    prompt_ids: np.ndarray
    seed: int | None


@dataclass(frozen=True)
class Sampling:
    """How to sample: lengths in tokens. ``eos_id``, one token or several (as transformers' ``eos_token_id``), ends a
    response and is part of it."""

    temperature: float
    top_p: float
    max_tokens: int
    eos_id: int | tuple[int, ...]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Every token that ends a response."""
        return (self.eos_id,) if isinstance(self.eos_id, int) else self.eos_id


class Engine(Protocol):
    """``generate`` keeps the order of the requests; log-probs are those of the distribution sampled from, and each
    response names the version of the weights.

    ``sleep`` gives the device's memory back, and without ``keep_weights`` the weights too, which the next use must then
    ``sync``. ``sync`` and ``generate`` take what they need again by themselves. ``devices``: how many work for it
    beside the trainer's, as rank 0 knows them.
    """

    @property
    def devices(self) -> int: ...

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]: ...

    def sync(self, weights: VersionedWeights) -> None: ...

    def sleep(self, keep_weights: bool) -> None: ...
