"""Implement PRIME's second model: an implicit process reward model, which gives each token its advantage.

Legend: N loss tokens of a micro-batch on this rank, n tokens of one response.
"""

from __future__ import annotations

import math

from torch import Tensor

from megatron_dypo.objectives.coefficients import Correction, SequenceTerms
from megatron_dypo.objectives.recipes import shares
from megatron_dypo.objectives.token_advantages import (
    SCALE_FLOOR,
    group_advantages,
    largest_to_go,
    outcome_updates,
)
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.runtime.distributed import all_gather_objects, device
from megatron_dypo.training.minibatch import MiniBatch
from megatron_dypo.training.responses import whole_responses
from megatron_dypo.training.side_model import Place, SideModel, SideResult, response_rewards


class ProcessRewards(SideModel):
    """PRIME's implicit process reward model phi (arXiv 2502.01456).

    A token's process reward is q_t = log phi - log reference. phi learns, by one update per mini-batch, that beta sum
    q_t is the logit of a right response; the rewards come from the weights before that update.
    """

    def advance(self, minibatches: list[MiniBatch], step: int) -> SideResult:
        objective = self.config.objective
        process: dict[Place, Tensor] = {}
        losses, norms, hits = [], [], []
        for m, minibatch in enumerate(minibatches):
            if not minibatch.rollouts:
                continue
            process |= (ratios := self._ratios(m, minibatch))
            summed = self.shared({place: q_n.sum().item() for place, q_n in ratios.items()})
            if not all(map(math.isfinite, summed.values())):
                return SideResult(fault="the process reward model's log-probs are not finite")
            rewards = dict(response_rewards(m, minibatch))
            outcomes = [float(rewards[place] >= objective.reward_threshold) for place in summed]
            updates = outcome_updates(summed.values(), outcomes, objective.process_beta)
            slopes = {place: slope for (_, place), (_, slope) in zip(summed, updates, strict=True)}
            losses += [loss for loss, _ in updates]
            hits += [(ratio > 0) == (outcome > 0) for ratio, outcome in zip(summed.values(), outcomes, strict=True)]
            norms.append(self.learn(minibatch.rollouts, self._streams(minibatch, slopes, step), step))
            if not math.isfinite(norms[-1]):
                return SideResult(fault=f"the process reward model's gradient norm is {norms[-1]:g}")
        if not losses:
            return SideResult()
        raw = self._advantages(minibatches, process)
        metrics = {
            "side/loss": sum(losses) / len(losses),
            "side/accuracy": sum(hits) / len(hits),
            "side/grad_norm": sum(norms) / len(norms),
        }
        return SideResult(metrics | self.whiten(minibatches, raw, sample=True))

    def _streams(self, minibatch: MiniBatch, slopes: dict[int, float], step: int) -> list[TokenStreams]:
        """Return a loss whose dL/dlogp is the same for all tokens of a response, by its index."""
        return [
            TokenStreams.of(
                [SequenceTerms(slope=slopes[place]) for place in batch.places],
                batch.counts,
                device=device(),
                objective=self.own.objective,
                correction=Correction(),
                share=shares(self.own.objective, step),
            )
            for batch in minibatch.rollouts
        ]

    def _ratios(self, m: int, minibatch: MiniBatch) -> dict[Place, Tensor]:
        """Return q [n] of this rank's whole responses; empty except on the last pipeline stage."""
        phi = self.policy.logprobs(minibatch.rollouts)
        found = {}
        for batch, phi_N, reference_N in zip(minibatch.rollouts, phi, minibatch.logp["reference"], strict=False):
            q_N = phi_N.double() - reference_N.double()
            for place, q_n in zip(batch.places, whole_responses(batch, q_N, self.layout), strict=True):
                found[m, place] = q_n
        return found

    def _advantages(self, minibatches: list[MiniBatch], process: dict[Place, Tensor]) -> dict[Place, Tensor]:
        """Return this rank's advantages before whitening. Rewards are scaled by the step's largest reward-to-go."""
        scale = max(all_gather_objects(largest_to_go(process.values()))) + SCALE_FLOOR
        process = {place: q_n / scale for place, q_n in process.items()}
        means = self.shared({place: q_n.mean().item() for place, q_n in process.items()})
        as_code = self.config.objective.process_baseline == "code"
        raw: dict[Place, Tensor] = {}
        for m, minibatch in enumerate(minibatches):
            packed: dict[int, dict[int, Place]] = {}  # by group, then by sample
            for place, _ in response_rewards(m, minibatch):
                sequence = minibatch.sequences[place[1]]
                packed.setdefault(sequence.group, {})[sequence.sample] = place
            for g, places in packed.items():
                of_group = {sample: means[place] for sample, place in places.items()}
                mine = {sample: process[place] for sample, place in places.items() if place in process}
                found = group_advantages(minibatch.groups[g].rewards, of_group, mine, as_code=as_code)
                raw |= {places[sample]: raw_n for sample, raw_n in found.items()}
        return raw
