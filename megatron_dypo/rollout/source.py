"""One batch of scored groups a step, sampled or replayed, the same on every rank."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dypo.config.schema import Config
from megatron_dypo.data.order import batch_indices
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.objectives.routing import RECIPES
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.records import Group, Prompt
from megatron_dypo.rollout import recorded
from megatron_dypo.rollout.collect import Reward, encode_prompts, sample, score, share
from megatron_dypo.rollout.engine import Engine
from megatron_dypo.runtime.distributed import Layout
from megatron_dypo.runtime.failure import phase
from megatron_dypo.runtime.stopwatch import Stopwatch

log = logging.getLogger(__name__)


@dataclass
class RolloutSource:
    """Prompts in, scored groups out. Without an engine the steps are read from ``rollout.replay``.

    Raises OSError, before training, where there can be no folder ``rollout.record``.
    """

    config: Config
    prompts: list[Prompt]
    tokenizer: Tokenizer
    engine: Engine | None
    reward: Reward
    layout: Layout
    shape: ModelShape

    def __post_init__(self) -> None:
        if self.config.rollout.record and self.layout.is_main:
            Path(self.config.rollout.record).mkdir(parents=True, exist_ok=True)
        self._by_id = {prompt.id: prompt for prompt in self.prompts}
        self._trace = functools.lru_cache(maxsize=4096)(self._encode_trace)

    def batch(self, step: int, clock: Stopwatch) -> list[Group]:
        """The step's groups with responses and rewards."""
        config, samples = self.config, RECIPES[self.config.objective.method].samples
        if self.engine is None:
            k = config.rollout.samples_per_prompt if samples else 0
            limits = {"vocab_size": self.shape.vocab_size, "longest": self.shape.max_position}
            groups = recorded.replay(config.rollout.replay, step, self._by_id, k, **limits)
            self._check_replayed_draws(step, groups)
            return groups
        indices = batch_indices(step, config.data.prompts_per_step, len(self.prompts), config.data.seed)
        groups = encode_prompts([self.prompts[i] for i in indices], self.tokenizer, config.data.max_prompt_tokens)
        if samples:
            with clock("rollout"), phase("rollout"):
                mine = sample(groups, self.engine, config, self.tokenizer.eos_id, step, self.layout)
            with clock("reward"), phase("reward"):
                score(mine, self.tokenizer, self.reward)
            with phase("rollout exchange"):
                clock.compare(share(groups, mine, self.layout, clock.seconds["rollout"] + clock.seconds["reward"]))
        return groups

    def _check_replayed_draws(self, step: int, groups: list[Group]) -> None:
        """A drawn trace that this model cannot take is an error; what a run draws by itself always fits."""
        for group in groups:
            for teacher in group.teacher_indices or ():
                tokens = len(group.prompt_ids) + len(self.encode_trace(group, teacher))
                if tokens > self.shape.max_position:
                    raise UserError(
                        f"{self.config.rollout.replay}: step {step}: prompt {group.prompt.id!r} with the trace of "
                        f"teacher {teacher} has {tokens} tokens, more than the model's {self.shape.max_position}"
                    )

    def record(self, step: int, groups: list[Group]) -> None:
        """Write the graded step to ``rollout.record``, if asked for; rank 0 does. A full disk is a warning."""
        if self.config.rollout.record and self.layout.is_main:
            with phase("recording"):
                try:
                    recorded.record(self.config.rollout.record, step, groups)
                except OSError as error:
                    log.warning("step %d is not recorded and cannot be replayed, training goes on: %s", step, error)

    def usable_teachers(self, group: Group) -> list[int]:
        """Indices of the teachers whose trace is short enough."""
        limit = self.config.data.max_teacher_tokens or self.config.rollout.max_response_tokens
        room = min(limit, self.shape.max_position - len(group.prompt_ids))
        return [i for i in range(len(group.prompt.teachers)) if len(self.encode_trace(group, i)) <= room]

    def encode_trace(self, group: Group, teacher: int) -> np.ndarray:
        """Ids of one teacher's trace for the group's prompt, end token included."""
        return self._trace(group.prompt.id, teacher)

    def _encode_trace(self, prompt_id: str, teacher: int) -> np.ndarray:
        return self.tokenizer.encode_trace(self._by_id[prompt_id].teachers[teacher].trace)
