"""DYPO's mathematics as pure functions (docs/objective.md). Imports torch only: no megatron, no vllm."""

from megatron_dypo.objectives.coefficients import SequenceSums, SequenceTerms, sequence_terms
from megatron_dypo.objectives.gal import gal_coefficients, pair_statistics
from megatron_dypo.objectives.grading import Regime, grade, group_advantages
from megatron_dypo.objectives.token_loss import TokenStreams, dypo_loss

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
