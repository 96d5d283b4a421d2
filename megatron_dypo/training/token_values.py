"""Implement PPO's second model: a critic, which gives each token's advantage (GAE) and learns the returns.

A step's order: values of all responses, advantages and returns from these, then ``side.updates`` updates of the critic,
each on its own mini-batch of whole prompts, which need not be the policy's.

Legend: n tokens of one response, N loss tokens of a micro-batch on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from megatron_dypo.config.schema import Config
from megatron_dypo.models.rules import SCORE
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.models.sharding import random_weights
from megatron_dypo.objectives.coefficients import SequenceSums, sequence_terms
from megatron_dypo.objectives.correction import Correction
from megatron_dypo.objectives.token_advantages import Sums, gae, token_rewards
from megatron_dypo.objectives.value_loss import ValueStreams
from megatron_dypo.policy.critic import Critic
from megatron_dypo.policy.micro_batch import MicroBatch, spread
from megatron_dypo.records import Kind
from megatron_dypo.runtime.distributed import Layout, all_gather_objects, device
from megatron_dypo.training.minibatch import MiniBatch, build_minibatches
from megatron_dypo.training.responses import own_tokens, whole_responses
from megatron_dypo.training.side_model import Place, SideModel, SideResult, response_rewards

Known = dict[tuple[int, int], Tensor]  # by group of the step and sample: [2, n], values and returns


class TokenValues(SideModel):
    """PPO's critic (arXiv 1707.06347): the policy's body, from the policy's initial weights, and a fresh value head."""

    model = Critic
    policy: Critic

    def __init__(self, config: Config, shape: ModelShape, layout: Layout, read_weights: Callable[[str], Tensor]):
        fresh = random_weights(shape.critic, config.trainer.seed)

        def read(name: str) -> Tensor:
            return fresh(name) if name.startswith(f"{SCORE}.") else read_weights(name)

        super().__init__(config, shape.critic, layout, read)
        cut = config.objective.model_copy(update={"updates_per_rollout": config.side.updates})
        self._cut = self.own.model_copy(update={"objective": cut})  # for splitting into the critic's own mini-batches

    def advance(self, minibatches: list[MiniBatch], step: int) -> SideResult:
        raw: dict[Place, Tensor] = {}
        mine: dict[Place, Tensor] = {}
        for m, minibatch in enumerate(minibatches):
            rewards = dict(response_rewards(m, minibatch))
            for place, values_n, rewards_n in self._judged(m, minibatch, rewards):
                raw[place] = gae(rewards_n, values_n, self.config.objective.gae_gamma, self.config.objective.gae_lambda)
                mine[place] = torch.stack([values_n, raw[place] + values_n]).float()
        known = _by_sample(minibatches, self.shared(mine))
        if not known:
            return SideResult()
        if not all(bool(both_2n.isfinite().all()) for both_2n in known.values()):
            return SideResult(fault="the critic's values are not finite")
        metrics = self.whiten(minibatches, raw, sample=False) | _judgement(known)
        return self._learn([group for minibatch in minibatches for group in minibatch.groups], known, step, metrics)

    def _judged(
        self, m: int, minibatch: MiniBatch, rewards: dict[Place, float]
    ) -> Iterator[tuple[Place, Tensor, Tensor]]:
        """Yield this rank's responses, their values [n] and token rewards [n]; none except on the last stage."""
        penalty = self.config.objective.kl_in_reward
        for b, (batch, values_N) in enumerate(
            zip(minibatch.rollouts, self.policy.values(minibatch.rollouts), strict=False)
        ):
            values = whole_responses(batch, values_N, self.layout)
            log_ratios = [torch.zeros_like(values_n) for values_n in values]
            if penalty:
                old_N, reference_N = (minibatch.logp[name][b].double() for name in ("old", "reference"))
                log_ratios = whole_responses(batch, old_N - reference_N, self.layout)
            for place, values_n, log_ratio_n in zip(batch.places, values, log_ratios, strict=True):
                yield (m, place), values_n, token_rewards(rewards[m, place], log_ratio_n, penalty)

    def _learn(self, groups: list, known: Known, step: int, metrics: dict[str, float]) -> SideResult:
        """Run the critic's updates on the step's groups; return ``metrics`` with theirs."""
        losses: list[float] = []
        norms: list[float] = []
        clipped = tokens = first = 0
        for minibatch in build_minibatches(self.layout, groups, self._cut, _no_trace):
            if minibatch.sequences:
                streams = self._streams(minibatch, known, first, step)
                norms.append(self.learn(minibatch.rollouts, streams, step))
                if not math.isfinite(norms[-1]):
                    return SideResult(metrics, f"the critic's gradient norm is {norms[-1]:g}")
                own = (sum(each.total for each in streams), sum(each.clipped for each in streams))
                loss, beyond = map(
                    sum, zip(*all_gather_objects(own if self.layout.owns_logprobs else (0.0, 0)), strict=True)
                )
                losses.append(loss)
                clipped += beyond
                tokens += sum(sequence.loss_tokens for sequence in minibatch.sequences)
            first += len(minibatch.groups)
        metrics |= {"side/loss": sum(losses) / len(losses), "side/grad_norm": sum(norms) / len(norms)}
        return SideResult(metrics | {"side/clip_frac": clipped / tokens})

    def _streams(self, minibatch: MiniBatch, known: Known, first: int, step: int) -> list[ValueStreams]:
        """Return the inputs of each micro-batch's loss; a token has the weight that it has in the policy's loss.

        ``first``: index of the mini-batch's first group among the step's.
        """
        nothing: list[SequenceSums | None] = [None] * len(minibatch.sequences)
        longest = self.config.rollout.max_response_tokens
        terms = sequence_terms(
            minibatch.groups, minibatch.sequences, nothing, self.config.objective, Correction(), longest, step=step
        )

        def of(batch: MicroBatch) -> ValueStreams:
            sequences = [minibatch.sequences[place] for place in batch.places]
            both = [known[first + sequence.group, sequence.sample] for sequence in sequences]
            old_N, returns_N = (own_tokens(batch, [both_2n[which] for both_2n in both]) for which in (0, 1))
            weight_N = spread([terms.sequences[place].grpo for place in batch.places], batch.counts)
            old_N, returns_N, weight_N = (each_N.to(device()) for each_N in (old_N, returns_N, weight_N))
            return ValueStreams(old_N, returns_N, weight_N, self.config.objective.value_clip)

        return [of(batch) for batch in minibatch.rollouts]


def _by_sample(minibatches: list[MiniBatch], shared: dict[Place, Tensor]) -> Known:
    """Return the same by group of the step and sample, independent of the mini-batches."""
    found, first = {}, 0
    for m, minibatch in enumerate(minibatches):
        for place, sequence in enumerate(minibatch.sequences):
            if sequence.kind == Kind.ROLLOUT:
                found[first + sequence.group, sequence.sample] = shared[m, place]
        first += len(minibatch.groups)
    return found


def _judgement(known: Known) -> dict[str, float]:
    """Return the mean value, and the share of the returns' variance over tokens that the values explain."""
    values, returns, errors = (
        sum(map(Sums.of, parts), Sums())
        for parts in zip(
            *((v_n, r_n, r_n - v_n) for v_n, r_n in (both_2n.double() for both_2n in known.values())), strict=True
        )
    )
    found = {"side/value_mean": values.total / values.count}
    return found | ({"side/explained_variance": 1 - errors.spread / returns.spread} if returns.spread else {})


def _no_trace(group, teacher: int):
    raise AssertionError("a critic learns from responses alone")
