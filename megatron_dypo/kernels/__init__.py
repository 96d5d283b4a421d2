"""Hidden states -> log-probs -> loss without the [tokens, vocabulary] logits. Imports torch, and Triton on CUDA."""

from megatron_dypo.kernels.grouped_loss import LossRule, empty_sums, grouped_loss, read_sums
from megatron_dypo.kernels.head import LogProbs, linear_logprob, linear_loss

__all__ = ["LogProbs", "LossRule", "empty_sums", "grouped_loss", "linear_logprob", "linear_loss", "read_sums"]
