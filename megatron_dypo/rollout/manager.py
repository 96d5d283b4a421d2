"""One batch of scored groups per step, sampled or replayed, the same on every rank.

With ``rollout.async_rollout`` a thread samples the next step's batch while this step trains (``prefetch``). The thread
uses only this rank's engine and reward function: collectives belong to the main thread.

Dynamic sampling: a prompt whose group would train nothing is replaced in the batch. The replacement is a pure function
of (data.seed, step): the r-th one of place q is number r * Q + q of the rows that are not in the batch, in an order
specific to the step. So no two places get the same row, and neither the layout nor a resume changes the choice.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from megatron_dypo.config.schema import Config
from megatron_dypo.data.dataset import batch_indices, spare_indices
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import TrainingError, UserError
from megatron_dypo.models.shape import ModelShape
from megatron_dypo.objectives.dypo import grade
from megatron_dypo.objectives.queue import Waiting
from megatron_dypo.objectives.recipes import learning_sources, most_updates, recipe
from megatron_dypo.records import Batch, Group, Kind, Prompt
from megatron_dypo.rollout import recording
from megatron_dypo.rollout.engine import Engine
from megatron_dypo.rollout.sampling import (
    RewardProtocol,
    draw_teachers,
    encode_prompts,
    keep_own_routing,
    sample,
    score,
    score_traces,
    share,
    trace_room,
    with_routing,
)
from megatron_dypo.runtime.distributed import Layout, claim_device
from megatron_dypo.runtime.failure import begin_step, phase
from megatron_dypo.runtime.measure import StepTimer
from megatron_dypo.runtime.process import in_thread

log = logging.getLogger(__name__)


def check_staleness(groups: list[Group], version: int, config: Config) -> None:
    """Raise TrainingError if a response is older than ``rollout.max_staleness`` allows.

    ``version``: optimizer updates of the policy that is about to train on the groups.
    """
    limit = _limit(config)
    if limit is None:
        return
    for group in groups:
        for response in group.responses:
            if response.weight_version < version - limit:
                raise TrainingError(
                    f"prompt {group.prompt.id}: a response was sampled from weights of version "
                    f"{response.weight_version} and the policy is at version {version}, "
                    f"more than rollout.max_staleness: {limit} updates later"
                )


def _limit(config: Config) -> int | None:
    """Return the limit in optimizer updates; None if nothing is checked."""
    rollout = config.rollout
    if rollout.max_staleness is not None or rollout.engine == "replay":
        return rollout.max_staleness
    return most_updates(config.objective) if rollout.async_rollout else 0


@dataclass(frozen=True)
class DynamicSampling:
    """Decides which groups to replace, and by which rows. ``usable_teachers``: a group's teachers that may be drawn."""

    config: Config
    prompts: list[Prompt]
    tokenizer: Tokenizer
    usable_teachers: Callable[[Group], list[int]]
    before: int = 0  # steps of the run before this order of rows begins

    @property
    def rounds(self) -> int:
        """Return the maximum number of replacements per place."""
        return self.config.rollout.refill_rounds if self.config.rollout.dynamic_sampling else 0

    def trains(self, group: Group) -> bool:
        """Return whether a scored group would train anything: its regime has a term with responses, or a trace."""
        objective = self.config.objective
        limits = objective.hard_max_solved, objective.gate, objective.easy_min_solved
        (regime,) = grade(torch.tensor([group.rewards]), objective.reward_threshold, *limits)
        sources = learning_sources(objective, dataclasses.replace(group, regime=regime))
        return Kind.ROLLOUT in sources or (Kind.TEACHER in sources and bool(self.usable_teachers(group)))

    def replacement(self, step: int, place: int, number: int) -> Group | None:
        """Return the ``number``-th replacement (from 0) for ``place``, not yet sampled; None if rows have run out."""
        data = self.config.data
        rows = spare_indices(step - self.before, data.prompts_per_step, len(self.prompts), data.seed)
        index = number * data.prompts_per_step + place
        if index >= len(rows):
            return None
        (group,) = encode_prompts([self.prompts[rows[index]]], self.tokenizer, data.max_prompt_tokens)
        return group


@dataclass
class RolloutManager:
    """Prompts in, scored groups out. Without an engine the steps are read from ``rollout.replay``.

    It belongs to one stage: steps have the run's numbers, and the order of prompts begins after the ``before`` steps of
    earlier stages. ``prefetched`` is the batch sampled ahead for the next step. Raises OSError, before training, if the
    folder ``rollout.record`` cannot be created.
    """

    config: Config
    prompts: list[Prompt]
    tokenizer: Tokenizer
    engine: Engine | None
    reward: RewardProtocol
    layout: Layout
    shape: ModelShape
    experts: list[Prompt] = field(default_factory=list)
    before: int = 0

    def __post_init__(self) -> None:
        if self.config.rollout.record and self.layout.is_main:
            Path(self.config.rollout.record).mkdir(parents=True, exist_ok=True)
        self._by_id = {prompt.id: prompt for prompt in self.prompts}
        self._trace = functools.lru_cache(maxsize=4096)(self._encode_trace)
        self._dynamic = DynamicSampling(self.config, self.prompts, self.tokenizer, self.usable_teachers, self.before)
        self._samples = self.config.rollout.samples_per_prompt if recipe(self.config.objective).samples else 0
        self.prefetched: Batch | None = None

    def batch(self, step: int, clock: StepTimer) -> Batch:
        """Return the step's groups with responses and rewards: prefetched, sampled or read now; and its experts."""
        batch = self._batch(step, clock)
        batch.experts = self._experts(step)
        return batch

    def _batch(self, step: int, clock: StepTimer) -> Batch:
        if self.prefetched is not None:
            batch, self.prefetched = self.prefetched, None
            return batch
        if self.engine is None:
            limits = {"vocab_size": self.shape.vocab_size, "longest": self.shape.max_position}
            groups = recording.replay(self.config.rollout.replay, step, self._by_id, self._samples, **limits)
            self._check_replayed_draws(step, groups)
            self._check_replayed_routing(step, groups)
            self._check_replayed_rewards(step, groups)
            keep_own_routing(groups, self.layout)
            return Batch(groups)
        groups = self._prompts(step)
        if not self._samples:
            return Batch(groups)
        return self._share(step, groups, self._fill(step, groups, clock), clock)

    @contextmanager
    def prefetch(self, step: int, clock: StepTimer) -> Iterator[None]:
        """Sample the batch of ``step`` in a thread while the body trains; after the body it is ``prefetched``.

        Only runs the body without ``rollout.async_rollout``, or past the stage's last step. ``clock``, of the training
        step, gets the seconds of sampling, and as ``rollout_wait`` those that the end of the body waited for it. Raises
        the thread's exception.
        """
        if not self.config.rollout.async_rollout:
            yield
            return
        groups, sampling_clock = self._prompts(step), StepTimer()

        def fill() -> list[list[Group]]:
            claim_device()  # a new thread starts on the first device
            begin_step(step)
            return self._fill(step, groups, sampling_clock)

        sampling = in_thread(fill, "rollout") if step <= self.before + self.config.trainer.steps else None
        yield
        with clock("rollout_wait"):
            if sampling is None:
                return
            with phase("rollout"):
                tried = sampling.result()
            self.prefetched = self._share(step, groups, tried, sampling_clock)
        clock.include(sampling_clock)

    def resume(self, file: Path) -> None:
        """Load the prefetched batch from a checkpoint's ``file``.

        Raises UserError if the data has changed so that it does not fit.
        """
        limits = {"vocab_size": self.shape.vocab_size, "longest": self.shape.max_position}
        groups = recording.read(file, self._by_id, self._samples, **limits)
        places = self.config.data.prompts_per_step
        keep_own_routing(groups, self.layout)
        self.prefetched = Batch(groups[:places], groups[places:])

    def deferred(self, waiting: Sequence[Waiting]) -> list[Group]:
        """Return the groups to train on of the queue's ``waiting`` items. Raises UserError if data.train lacks one."""
        groups = []
        for name, teachers in waiting:
            prompt = self._by_id.get(name)
            if prompt is None or max(teachers) >= len(prompt.teachers):
                missing = "prompt" if prompt is None else f"teacher {max(teachers)}"
                raise UserError(
                    f"data.train: {self.config.data.train}: the queue of the run to resume holds prompt {name!r}, and "
                    f"this {missing} is gone; restore the file or start another run"
                )
            (group,) = encode_prompts([prompt], self.tokenizer, self.config.data.max_prompt_tokens)
            group.teacher_indices = teachers
            groups.append(group)
        return groups

    def _prompts(self, step: int) -> list[Group]:
        data = self.config.data
        indices = batch_indices(step - self.before, data.prompts_per_step, len(self.prompts), data.seed)
        return encode_prompts([self.prompts[i] for i in indices], self.tokenizer, data.max_prompt_tokens)

    def _experts(self, step: int) -> list[Group]:
        """Return the step's rows of ``experts``, in an order of their own."""
        if not self.experts:
            return []
        data = self.config.data
        indices = batch_indices(step - self.before, data.experts_per_step, len(self.experts), data.seed, "experts")
        groups = encode_prompts([self.experts[i] for i in indices], self.tokenizer, data.max_prompt_tokens)
        return [dataclasses.replace(group, teacher_indices=(0,), expert=True) for group in groups]

    def _fill(self, step: int, groups: list[Group], clock: StepTimer) -> list[list[Group]]:
        """Sample and score this rank's places of the batch, without other ranks; return the groups tried in each."""
        layout = self.layout
        mine = range(layout.rank, len(groups), layout.world)
        tried = [[groups[place]] for place in mine]
        fresh = [groups[place] for place in mine]
        for refill in range(1 + self._dynamic.rounds):
            with clock("rollout"), phase("rollout"):
                sample(fresh, self.engine, self.config, self.tokenizer.end_ids, step)
            with clock("reward"), phase("reward"):
                score(fresh, self.tokenizer, self.reward, self.config)
                if recipe(self.config.objective).scores_traces:
                    self._score_traces(fresh, step)
            if refill == self._dynamic.rounds:
                break
            fresh = []
            for place, seen in zip(mine, tried, strict=True):
                if not self._dynamic.trains(seen[-1]) and (group := self._dynamic.replacement(step, place, refill)):
                    seen.append(group)
                    fresh.append(group)
            if not fresh:
                break
        return tried

    def _score_traces(self, groups: list[Group], step: int) -> None:
        """Draw the groups' teachers, as grading does without trace rewards, and score their traces."""
        draws, seed = self.config.objective.teachers_per_prompt, self.config.trainer.seed
        for group in groups:
            draw_teachers(group, self.usable_teachers(group), seed, step, draws)
        score_traces(groups, lambda group, i: len(self.encode_trace(group, i)), self.reward, self.config)

    def _share(self, step: int, groups: list[Group], tried: list[list[Group]], clock: StepTimer) -> Batch:
        """Combine what all ranks tried into the whole batch."""
        with phase("rollout exchange"):
            spent = clock.seconds["rollout"] + clock.seconds["reward"]
            sampled, seconds = share(tried, self.layout, spent)
            clock.compare(seconds)
        batch = Batch([])
        for place, group in enumerate(groups):
            more = range(len(sampled[place]) - 1)
            replacements = (self._dynamic.replacement(step, place, number) for number in more)
            seen = [group, *(each for each in replacements if each is not None)]
            for one, its in zip(seen, sampled[place], strict=True):
                one.holder = place % self.layout.world
                one.responses, one.teacher_indices, one.teacher_rewards = its
            batch.groups.append(seen[-1])
            batch.replaced += seen[:-1]
        return batch

    def _check_replayed_draws(self, step: int, groups: list[Group]) -> None:
        """Raise UserError if a drawn trace is too long for this model; a run's own draws always fit."""
        for group in groups:
            for teacher in group.teacher_indices or ():
                tokens = len(group.prompt_ids) + len(self.encode_trace(group, teacher))
                if tokens > self.shape.max_position:
                    raise UserError(
                        f"{self.config.rollout.replay}: step {step}: prompt {group.prompt.id!r} with the trace of "
                        f"teacher {teacher} has {tokens} tokens, more than the model's {self.shape.max_position}"
                    )

    def _check_replayed_routing(self, step: int, groups: list[Group]) -> None:
        """Raise UserError if routing is to be replayed and a response lacks this model's routing."""
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

    def _check_replayed_rewards(self, step: int, groups: list[Group]) -> None:
        """Raise UserError if drawn traces are scored and the recording lacks their draw or their rewards."""
        if not recipe(self.config.objective).scores_traces:
            return
        for group in groups:
            if group.teacher_indices is None or len(group.teacher_rewards) != len(group.teacher_indices):
                raise UserError(
                    f"{self.config.rollout.replay}: step {step}: prompt {group.prompt.id!r} was recorded without the "
                    f"rewards of its teachers' traces (objective.method: {self.config.objective.method})"
                )

    def record(self, step: int, groups: list[Group]) -> None:
        """Write the graded step to ``rollout.record``, if set, on rank 0; collective. A full disk is a warning."""
        if not self.config.rollout.record:
            return
        with phase("recording"):
            whole = with_routing(groups, self.layout)
            try:
                if self.layout.is_main:
                    recording.record(self.config.rollout.record, step, whole)
            except OSError as error:
                log.warning("step %d is not recorded and cannot be replayed, training continues: %s", step, error)

    def in_flight(self) -> list[Group]:
        """Return the next step's batch as a checkpoint holds it, complete on rank 0. Collective."""
        return with_routing(self.prefetched.sampled, self.layout) if self.prefetched else []

    def usable_teachers(self, group: Group) -> list[int]:
        """Return the indices of the teachers whose trace is short enough."""
        room = trace_room(self.config, self.shape.max_position, len(group.prompt_ids))
        return [i for i in range(len(group.prompt.teachers)) if len(self.encode_trace(group, i)) <= room]

    def encode_trace(self, group: Group, teacher: int) -> np.ndarray:
        """Return the ids of one teacher's trace for the group's prompt, end token included."""
        if group.expert:  # from another data set: its ids may clash with prompts', and it is rarely needed
            return self.tokenizer.encode_trace(group.prompt.teachers[teacher].trace, group.prompt)
        return self._trace(group.prompt.id, teacher)

    def _encode_trace(self, prompt_id: str, teacher: int) -> np.ndarray:
        prompt = self._by_id[prompt_id]
        return self.tokenizer.encode_trace(prompt.teachers[teacher].trace, prompt)
