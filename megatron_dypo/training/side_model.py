"""A second model that learns beside the policy, and what it makes of a step's responses: each token's advantage.

It is a ``Policy`` of its own at the same layout, started from the same weights, with its own optimizer and its own part
of the checkpoint. ``SIDES`` says which one a recipe asks for.

Legend: N loss tokens of a micro-batch on this rank, n tokens of one response.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from megatron_dypo.config.schema import Config, Objective, Optimizer
from megatron_dypo.config.stages import learning_rate
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.objectives.coefficients import Correction, SequenceTerms
from megatron_dypo.objectives.recipes import recipe, shares
from megatron_dypo.objectives.token_advantages import (
    SCALE_FLOOR,
    Sums,
    group_advantages,
    largest_to_go,
    outcome_updates,
)
from megatron_dypo.objectives.token_loss import TokenStreams
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Kind
from megatron_dypo.runtime.distributed import Layout, all_gather_objects, device
from megatron_dypo.training.minibatch import MiniBatch
from megatron_dypo.training.responses import own_tokens, whole_responses

Place = tuple[int, int]  # (mini-batch, place among its sequences)


def side_config(config: Config) -> Config:
    """The second model's own configuration: its optimizer, no reference, a loss of slopes alone, and routers that
    choose for themselves, whatever the policy's take again."""
    sharding = {name: getattr(config.optimizer, name) for name in ("distributed", "overlap_grad_reduce")}
    adam = {name: getattr(config.side, name) for name in Optimizer.model_fields if name not in sharding}
    own = {"optimizer": Optimizer(**adam | sharding), "objective": Objective(method="sft")}
    return config.model_copy(update=own | {"policy": config.policy.model_copy(update={"routing_replay": "off"})})


@dataclass
class SideResult:
    """What the second model's part of a step gave: metrics, and why the step must be left out, if it must."""

    metrics: dict[str, float] = field(default_factory=dict)
    fault: str | None = None


class SideModel(ABC):
    """A second model. ``advance`` trains it on a step's responses and sets ``logp["advantage"]`` of each mini-batch."""

    def __init__(self, config: Config, shape: ModelShape, layout: Layout, read_weights: Callable[[str], Tensor]):
        self.config, self.layout = config, layout
        self.own = side_config(config)
        self.policy = Policy(self.own, shape, layout, read_weights)

    @abstractmethod
    def advance(self, minibatches: list[MiniBatch], step: int) -> SideResult:
        """Collective. Reads the mini-batches' log-probs, of old policy and reference."""

    def learn(self, minibatch: MiniBatch, slopes: dict[int, float], step: int) -> float:
        """One update by dL/dlogp, the same for all tokens of a response, by its place; returns the gradient's norm.

        A norm that is not finite leaves the update out.
        """
        batches = minibatch.rollouts
        streams = [
            TokenStreams.of(
                [SequenceTerms(slope=slopes[place]) for place in batch.places],
                batch.counts,
                device=device(),
                objective=self.own.objective,
                correction=Correction(),
                share=shares(self.own.objective, step),
            )
            for batch in batches
        ]
        self.policy.accumulate(batches, streams)
        norm = max(all_gather_objects(self.policy.grad_norm()), key=lambda norm: (not math.isfinite(norm), norm))
        if math.isfinite(norm):
            self.policy.step(learning_rate(step, self.own.optimizer))
        return norm

    def shared(self, mine: dict[Place, float]) -> dict[Place, float]:
        """Numbers of single responses, of all ranks; every rank that holds a response's tokens may bring them."""
        counts = self.layout.owns_logprobs and self.layout.cp_rank == 0
        return {place: value for part in all_gather_objects(mine if counts else {}) for place, value in part.items()}

    def whiten(self, minibatches: list[MiniBatch], raw: dict[Place, Tensor], sample: bool) -> dict[str, float]:
        """Set each mini-batch's stream of advantages, whitened over all tokens of the step; returns their metrics."""
        counts = self.layout.owns_logprobs and self.layout.cp_rank == 0
        mine = sum(map(Sums.of, raw.values()), Sums()) if counts else Sums()
        sums = sum(all_gather_objects(mine), Sums())
        for m, minibatch in enumerate(minibatches):
            minibatch.logp["advantage"] = [
                own_tokens(batch, [sums.whiten(raw[m, place], sample) for place in batch.places])
                for batch in minibatch.rollouts
                if self.layout.is_last_stage
            ]
        return {"advantage/mean": sums.total / sums.count} if sums.count else {}


class ProcessRewards(SideModel):
    """PRIME's implicit process reward model phi (arXiv 2502.01456).

    A token's process reward is q_t = log phi - log reference. phi learns, by one update a mini-batch, that beta sum q_t
    is the logit of a right response; the rewards are those of the weights before that update.
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
            rewards = dict(_rewards(m, minibatch))
            outcomes = [float(rewards[place] >= objective.reward_threshold) for place in summed]
            updates = outcome_updates(summed.values(), outcomes, objective.process_beta)
            slopes = {place: slope for (_, place), (_, slope) in zip(summed, updates, strict=True)}
            losses += [loss for loss, _ in updates]
            hits += [(ratio > 0) == (outcome > 0) for ratio, outcome in zip(summed.values(), outcomes, strict=True)]
            norms.append(self.learn(minibatch, slopes, step))
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

    def _ratios(self, m: int, minibatch: MiniBatch) -> dict[Place, Tensor]:
        """q [n] of this rank's responses, whole; empty except on the last pipeline stage."""
        phi = self.policy.logprobs(minibatch.rollouts)
        found = {}
        for batch, phi_N, reference_N in zip(minibatch.rollouts, phi, minibatch.logp["reference"], strict=False):
            q_N = phi_N.double() - reference_N.double()
            for place, q_n in zip(batch.places, whole_responses(batch, q_N, self.layout), strict=True):
                found[m, place] = q_n
        return found

    def _advantages(self, minibatches: list[MiniBatch], process: dict[Place, Tensor]) -> dict[Place, Tensor]:
        """Before whitening, of this rank's responses. Rewards are scaled by the step's largest reward-to-go."""
        scale = max(all_gather_objects(largest_to_go(process.values()))) + SCALE_FLOOR
        process = {place: q_n / scale for place, q_n in process.items()}
        means = self.shared({place: q_n.mean().item() for place, q_n in process.items()})
        as_code = self.config.objective.process_baseline == "code"
        raw: dict[Place, Tensor] = {}
        for m, minibatch in enumerate(minibatches):
            packed: dict[int, dict[int, Place]] = {}  # by group, then by sample
            for place, _ in _rewards(m, minibatch):
                sequence = minibatch.sequences[place[1]]
                packed.setdefault(sequence.group, {})[sequence.sample] = place
            for g, places in packed.items():
                of_group = {sample: means[place] for sample, place in places.items()}
                mine = {sample: process[place] for sample, place in places.items() if place in process}
                found = group_advantages(minibatch.groups[g].rewards, of_group, mine, as_code=as_code)
                raw |= {places[sample]: raw_n for sample, raw_n in found.items()}
        return raw


def _rewards(m: int, minibatch: MiniBatch) -> list[tuple[Place, float]]:
    """Each packed response and its reward, in the order of the sequences."""
    return [
        ((m, place), minibatch.groups[sequence.group].responses[sequence.sample].reward)
        for place, sequence in enumerate(minibatch.sequences)
        if sequence.kind == Kind.ROLLOUT
    ]


SIDES: dict[str, type[SideModel]] = {"prm": ProcessRewards}


def build_side(
    config: Config, shape: ModelShape, layout: Layout, read_weights: Callable[[str], Tensor]
) -> SideModel | None:
    """The second model that the recipe asks for, None where it asks for none."""
    side = recipe(config.objective).side
    return SIDES[side](config, shape, layout, read_weights) if side else None
