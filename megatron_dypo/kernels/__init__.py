"""Hidden states -> log-probs -> loss without the [tokens, vocabulary] logits. Imports torch only."""

from megatron_dypo.kernels.head import LogProbs, linear_logprob, linear_loss

__all__ = ["LogProbs", "linear_logprob", "linear_loss"]
