"""The interface of a rollout engine: token ids in, token ids and log-probs out, weights replaced in place.

Every rank runs one engine on its own share of the prompts; all ranks call ``sync`` together.
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
    """Sampling parameters; lengths in tokens.

    ``eos_id``, one token or several (as transformers' ``eos_token_id``), ends a response and is part of it.
    """

    temperature: float
    top_p: float
    max_tokens: int
    eos_id: int | tuple[int, ...]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Return every token that ends a response."""
        return (self.eos_id,) if isinstance(self.eos_id, int) else self.eos_id


class Engine(Protocol):
    """An engine: ``generate`` keeps the order of the requests and returns log-probs of the sampling distribution.

    Each response names the version of its weights. ``sleep`` releases device memory, and without ``keep_weights`` the
    weights too, which have to be synced before the next use. ``sync`` and ``generate`` wake the engine as needed.
    ``devices``: devices of its own in addition to the trainer's, as known to rank 0.
    """

    @property
    def devices(self) -> int: ...

    def generate(self, requests: list[Request], sampling: Sampling) -> list[Response]: ...

    def sync(self, weights: VersionedWeights) -> None: ...

    def sleep(self, keep_weights: bool) -> None: ...
