"""An engine's routing of tokens, as text (a recorded rollout, a server's response) and along packed tokens.

Legend: n tokens of prompt and response except the last, which the engine never read; T a micro-batch's tokens on this
rank, L layers, K experts of a token.
"""

from __future__ import annotations

import base64
import io
import math
from tokenize import TokenError

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from megatron_dypo.errors import TrainingError
from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.records import Group, Sequence


def as_text(experts_nLK: np.ndarray) -> str:
    """Return the base64 of an ``.npy`` file: vLLM's format."""
    stream = io.BytesIO()
    np.save(stream, experts_nLK, allow_pickle=False)
    return base64.b64encode(stream.getvalue()).decode("ascii")


def from_text(text: str, tokens: int) -> np.ndarray:
    """Return [n, L, K] for a prompt and response of ``tokens`` tokens. Raises ValueError if it is anything else.

    The header is checked before memory is allocated: ``np.load`` would trust any size that it names, and open archives.
    """
    content = base64.b64decode(text, validate=True)
    stream = io.BytesIO(content)
    version = npy.read_magic(stream)
    if version != (1, 0):
        raise ValueError(f"experts: version {version} of the .npy format, not (1, 0)")
    try:
        shape, by_columns, dtype = npy.read_array_header_1_0(stream)
    except (TypeError, TokenError) as error:
        raise ValueError(f"experts: {error}") from None
    if len(shape) != 3 or shape[0] != tokens - 1 or min(shape) < 1 or dtype.kind not in "iu":
        raise ValueError(f"experts {list(shape)} ({dtype}) of {tokens} tokens")
    if len(content) - stream.tell() != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"experts: {len(content) - stream.tell()} bytes do not hold {list(shape)} of {dtype}")
    experts = np.frombuffer(content, dtype, offset=stream.tell()).reshape(shape, order="F" if by_columns else "C")
    if experts.min() < 0 or experts.max() > np.iinfo(np.int16).max:
        raise ValueError(f"experts {experts.min()} to {experts.max()}")
    return experts


def packed_experts(batch: MicroBatch, sequences: list[Sequence], groups: list[Group]) -> Tensor | None:
    """Return int16 [T, L, K], -1 if the engine routed nothing: each sequence's last token, and padding.

    None without sequences. Raises TrainingError if a response lacks its routing, or has another model's.
    """
    if not batch.places:
        return None
    responses = [groups[sequences[place].group].responses[sequences[place].sample] for place in batch.places]
    known = [response.experts for response in responses if response.experts is not None]
    if len(known) < len(responses):
        raise TrainingError("policy.routing_replay: rollout, but the rollout has no routing")
    sizes = sorted({experts.shape[1:] for experts in known})
    if len(sizes) > 1:
        raise TrainingError(f"policy.routing_replay: rollout: rollouts have (layers, a token's experts) {sizes}")
    packed = torch.full((len(batch.owner_T), *sizes[0]), -1, dtype=torch.int16)
    for i, experts in enumerate(known):
        mine = torch.nonzero((batch.owner_T == i) & (batch.positions_T < len(experts))).squeeze(1)
        packed[mine] = torch.from_numpy(experts.astype(np.int16))[batch.positions_T[mine]]
    return packed
