"""A value model: the policy's body with a head of H weights, one number per hidden state.

Every tensor-parallel rank holds the whole head and computes all values from gathered hidden states: splitting H numbers
would add an exchange and save nothing. Gradients of head and hidden states are therefore complete and equal on these
ranks.

Legend: H hidden size, N loss tokens of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_dypo.objectives.value_loss import ValueStreams
from megatron_dypo.policy.micro_batch import MicroBatch
from megatron_dypo.policy.policy import Policy


class Critic(Policy):
    """A Megatron-Core GPT with a value head (``ModelShape.critic``) and its optimizer.

    A token's value is that of the hidden state that predicts it.
    """

    def values(self, batches: list[MicroBatch]) -> list[Tensor]:
        """Return fp32 values [N] of each micro-batch's loss tokens; empty except on the last pipeline stage."""
        if not batches:
            return []
        with torch.no_grad():
            found = self._run(batches, lambda hidden, batch: (self._values(hidden, batch),), forward_only=True)
        return [values_N for (values_N,) in found]

    def _loss(self, hidden: Tensor, batch: MicroBatch, stream: ValueStreams) -> tuple[Tensor, Tensor]:
        values_N = self._values(hidden, batch)
        return stream.loss(values_N), values_N.detach()

    def _values(self, hidden: Tensor, batch: MicroBatch) -> Tensor:
        hidden_NH, weight_1H, _ = self._head_inputs(hidden, batch)
        return hidden_NH.float() @ weight_1H.float().squeeze(0)
