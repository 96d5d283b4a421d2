"""Where an engine's routers sent tokens, as text (a recorded rollout, a server's answer) and beside packed tokens.

Legend: n tokens of prompt and response but for the last, which the engine never read; T a micro-batch's tokens on this
rank, L layers, K experts of a token.
"""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from torch import Tensor

from megatron_dypo.batching.micro_batch import MicroBatch
from megatron_dypo.errors import TrainingError
from megatron_dypo.records import Group, Sequence


def as_text(experts_nLK: np.ndarray) -> str:
    """Base64 of an ``.npy`` file: vLLM's form."""
    stream = io.BytesIO()
    np.save(stream, experts_nLK, allow_pickle=False)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def from_text(text: str, tokens: int) -> np.ndarray:
    """[n, L, K] of a prompt and response of so many ``tokens``. Raises ValueError where it is something else."""
    experts = np.load(io.BytesIO(base64.b64decode(text, validate=True)), allow_pickle=False)
    if experts.ndim != 3 or len(experts) != tokens - 1 or experts.dtype.kind not in "iu":
        raise ValueError(f"experts {list(experts.shape)} ({experts.dtype}) of {tokens} tokens")
    return experts


def packed_experts(batch: MicroBatch, sequences: list[Sequence], groups: list[Group]) -> Tensor | None:
    """int16 [T, L, K], -1 where the engine routed nothing: each sequence's last token, and what fills up.

    None without any sequence. Raises TrainingError where a response says nothing of its routing.
    """
    if not batch.places:
        return None
    responses = [groups[sequences[place].group].responses[sequences[place].sample] for place in batch.places]
    if any(response.experts is None for response in responses):
        raise TrainingError("policy.routing: replay_rollout, but the rollout says nothing of its routing")
    packed = torch.full((len(batch.owner_T), *responses[0].experts.shape[1:]), -1, dtype=torch.int16)
    for i, response in enumerate(responses):
        known = response.experts
        mine = torch.nonzero((batch.owner_T == i) & (batch.positions_T < len(known))).squeeze(1)
        packed[mine] = torch.from_numpy(known.astype(np.int16))[batch.positions_T[mine]]
    return packed
