"""One batch of scored groups a step, sampled or replayed, the same on every rank.

With ``rollout.async_rollout`` the next step's batch is sampled by a thread while this step trains. The thread asks this
rank's engine and reward function, and nothing of another rank: what ranks do together is left to the main thread.
"""

from __future__ import annotations

import functools
import logging
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_dypo.checkpoint.folders import IN_FLIGHT, listed_files
from megatron_dypo.config.schema import Config
from megatron_dypo.data.order import batch_indices
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.objectives.routing import RECIPES
from megatron_dypo.policy.shape import ModelShape
from megatron_dypo.records import Batch, Group, Prompt
from megatron_dypo.rollout import recorded
from megatron_dypo.rollout.collect import Reward, encode_prompts, sample, score, share
from megatron_dypo.rollout.engine import Engine
from megatron_dypo.rollout.refill import Refill
from megatron_dypo.runtime.background import in_thread
from megatron_dypo.runtime.distributed import Layout, claim_device
from megatron_dypo.runtime.failure import begin_step, phase
from megatron_dypo.runtime.stopwatch import Stopwatch

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _UnderWay:
    """A batch that a thread samples: its groups, not yet sampled, and what this rank will have tried for its places."""

    step: int
    groups: list[Group]
    clock: Stopwatch
    tried: Future[list[list[Group]]]


@dataclass
class RolloutSource:
    """Prompts in, scored groups out. Without an engine the steps are read from ``rollout.replay``.

    ``in_flight`` is the batch that has been sampled for the next step already. Raises OSError, before training, where
    there can be no folder ``rollout.record``.
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
        self._refill = Refill(self.config, self.prompts, self.tokenizer, self.usable_teachers)
        self._samples = self.config.rollout.samples_per_prompt if RECIPES[self.config.objective.method].samples else 0
        self._under_way: _UnderWay | None = None
        self.in_flight: Batch | None = None

    def batch(self, step: int, clock: Stopwatch) -> Batch:
        """The step's groups with responses and rewards: those in flight, or sampled (or read) now."""
        if self.in_flight is not None:
            batch, self.in_flight = self.in_flight, None
            return batch
        if self.engine is None:
            limits = {"vocab_size": self.shape.vocab_size, "longest": self.shape.max_position}
            groups = recorded.replay(self.config.rollout.replay, step, self._by_id, self._samples, **limits)
            self._check_replayed_draws(step, groups)
            self._check_replayed_routing(step, groups)
            return Batch(groups)
        groups = self._prompts(step)
        if not self._samples:
            return Batch(groups)
        return self._share(step, groups, self._fill(step, groups, clock), clock)

    def begin_next(self, step: int) -> None:
        """In ``step``, with overlap: start sampling the next step's batch, if there is to be one."""
        if not self.config.rollout.async_rollout or step == self.config.trainer.steps:
            return
        groups, clock = self._prompts(step + 1), Stopwatch()

        def fill() -> list[list[Group]]:
            claim_device()  # a thread starts on the first one
            begin_step(step + 1)
            return self._fill(step + 1, groups, clock)

        self._under_way = _UnderWay(step + 1, groups, clock, in_thread(fill, "rollout"))

    def finish_next(self, clock: Stopwatch) -> None:
        """Wait for the batch under way, if there is one: it is ``in_flight`` then. Raises what its thread raised.

        The step's clock gets the seconds of its sampling, and as ``rollout_wait`` those that were waited here.
        """
        if not self.config.rollout.async_rollout:
            return
        with clock("rollout_wait"):
            if self._under_way is None:
                return
            work, self._under_way = self._under_way, None
            with phase("rollout"):
                tried = work.tried.result()
            self.in_flight = self._share(work.step, work.groups, tried, work.clock)
        clock.include(work.clock)

    def resume(self, checkpoint: Path) -> None:
        """Take up the batch in flight that a checkpoint holds, if there is one.

        Raises UserError where the data has changed so that it does not fit.
        """
        if IN_FLIGHT in listed_files(checkpoint):
            limits = {"vocab_size": self.shape.vocab_size, "longest": self.shape.max_position}
            groups = recorded.read(checkpoint / IN_FLIGHT, self._by_id, self._samples, **limits)
            places = self.config.data.prompts_per_step
            self.in_flight = Batch(groups[:places], groups[places:])

    def _prompts(self, step: int) -> list[Group]:
        data = self.config.data
        indices = batch_indices(step, data.prompts_per_step, len(self.prompts), data.seed)
        return encode_prompts([self.prompts[i] for i in indices], self.tokenizer, data.max_prompt_tokens)

    def _fill(self, step: int, groups: list[Group], clock: Stopwatch) -> list[list[Group]]:
        """Sample and score this rank's places of the batch; returns the groups tried in each. Asks no other rank."""
        layout = self.layout
        mine = range(layout.rank, len(groups), layout.world)
        tried = [[groups[place]] for place in mine]
        fresh = [groups[place] for place in mine]
        for refill in range(1 + self._refill.rounds):
            with clock("rollout"), phase("rollout"):
                sample(fresh, self.engine, self.config, self.tokenizer.end_ids, step)
            with clock("reward"), phase("reward"):
                score(fresh, self.tokenizer, self.reward, self.config)
            if refill == self._refill.rounds:
                break
            fresh = []
            for place, seen in zip(mine, tried, strict=True):
                if not self._refill.trains(seen[-1]) and (group := self._refill.replacement(step, place, refill)):
                    seen.append(group)
                    fresh.append(group)
            if not fresh:
                break
        return tried

    def _share(self, step: int, groups: list[Group], tried: list[list[Group]], clock: Stopwatch) -> Batch:
        """The whole batch, of what all ranks tried."""
        with phase("rollout exchange"):
            spent = clock.seconds["rollout"] + clock.seconds["reward"]
            responses, seconds = share(tried, self.layout, spent)
            clock.compare(seconds)
        batch = Batch([])
        for place, group in enumerate(groups):
            more = range(len(responses[place]) - 1)
            seen = [group, *(self._refill.replacement(step, place, number) for number in more)]
            for one, its_responses in zip(seen, responses[place], strict=True):
                one.responses = its_responses
            batch.groups.append(seen[-1])
            batch.replaced += seen[:-1]
        return batch

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

    def _check_replayed_routing(self, step: int, groups: list[Group]) -> None:
        """Where it is to be taken again, every response must say where this model's routers sent it."""
        if self.config.policy.routing_replay != "rollout":
            return
        wanted = self.shape.num_layers, self.shape.router_topk
        for group in groups:
            for experts in (response.experts for response in group.responses):
                if experts is None or experts.shape[1:] != wanted or experts.max() >= self.shape.num_experts:
                    raise UserError(
                        f"{self.config.rollout.replay}: step {step}: prompt {group.prompt.id!r} was recorded without "
                        "this model's routing (policy.routing_replay: rollout)"
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
        prompt = self._by_id[prompt_id]
        return self.tokenizer.encode_trace(prompt.teachers[teacher].trace, prompt)
