"""DYPO's mathematics as pure functions (docs/objective.md). Imports only torch: no megatron, no vllm."""

from megatron_dypo.objectives.coefficients import SequenceSums, SequenceTerms, sequence_terms
from megatron_dypo.objectives.dypo import gal_coefficients, grade, group_advantages, pair_statistics
from megatron_dypo.objectives.token_loss import TokenStreams, dypo_loss
from megatron_dypo.records import Regime

__all__ = [
    "Regime",
    "SequenceSums",
    "SequenceTerms",
    "TokenStreams",
    "dypo_loss",
    "gal_coefficients",
    "grade",
    "group_advantages",
    "pair_statistics",
    "sequence_terms",
]
