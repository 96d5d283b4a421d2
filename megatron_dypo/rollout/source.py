"""One graded batch of groups a step, sampled or replayed, the same on every rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_dypo.batching.sequences import draw_teachers
from megatron_dypo.config.schema import Config
from megatron_dypo.data.order import batch_indices
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.monitor.stopwatch import Stopwatch
from megatron_dypo.objectives.grading import grade
from megatron_dypo.objectives.routing import RECIPES
from megatron_dypo.records import Group, Prompt
from megatron_dypo.rollout import recorded
from megatron_dypo.rollout.collect import Reward, encode_prompts, sample, score, share
from megatron_dypo.rollout.engine import Engine
from megatron_dypo.runtime.distributed import Layout, phase


@dataclass
class RolloutSource:
    """Prompts in, graded groups out. Without an engine the steps are read from ``rollout.replay``."""

    config: Config
    prompts: list[Prompt]
    tokenizer: Tokenizer
    engine: Engine | None
    reward: Reward
    layout: Layout
    longest: int  # model's limit in tokens

    def batch(self, step: int, weight_version: int, clock: Stopwatch) -> list[Group]:
        """The step's groups with responses, rewards, regimes and teacher draws."""
        config = self.config
        if self.engine is None:
            by_id = {prompt.id: prompt for prompt in self.prompts}
            groups = recorded.replay(config.rollout.replay, step, by_id, config.rollout.samples_per_prompt)
        else:
            indices = batch_indices(step, config.data.prompts_per_step, len(self.prompts), config.data.seed)
            groups = encode_prompts([self.prompts[i] for i in indices], self.tokenizer, config.data.max_prompt_tokens)
            if RECIPES[config.objective.method].samples:
                self._sample(groups, step, weight_version, clock)
        self._grade(groups, step)
        if config.rollout.record and self.layout.is_main:
            recorded.record(config.rollout.record, step, groups)
        return groups

    def encode_trace(self, group: Group, teacher: int):
        """Ids of one teacher's trace for the group's prompt, end token included."""
        return self.tokenizer.encode_trace(group.prompt.teachers[teacher].trace)

    def _sample(self, groups: list[Group], step: int, weight_version: int, clock: Stopwatch) -> None:
        with clock("rollout"), phase("rollout"):
            mine = sample(groups, self.engine, self.config, self.tokenizer.eos_id, step, self.layout)
        with clock("reward"), phase("reward"):
            score(mine, self.tokenizer, self.reward)
            share(groups, mine, self.layout)
        for group in groups:
            group.weight_version = weight_version

    def _grade(self, groups: list[Group], step: int) -> None:
        objective = self.config.objective
        recipe = RECIPES[objective.method]
        if recipe.samples:
            regimes = grade(
                torch.tensor([group.rewards for group in groups]), objective.reward_threshold, objective.hard_max_solved
            )
            for group, regime in zip(groups, regimes, strict=True):
                group.regime = regime
        limit = self.config.data.max_teacher_tokens or self.config.rollout.max_response_tokens
        for group in groups:
            if recipe.route(group.regime) == "teacher":
                room = min(limit, self.longest - len(group.prompt_ids))
                usable = [i for i in range(len(group.prompt.teachers)) if len(self.encode_trace(group, i)) <= room]
                draw_teachers(group, usable, self.config.trainer.seed, step, objective.teachers_per_prompt)
