"""One batch of scored groups a step, sampled or replayed, the same on every rank.

With ``rollout.async_rollout`` the next step's batch is sampled by a thread while this step trains (``prefetch``). The
thread asks this rank's engine and reward function, and nothing of another rank: collectives are the main thread's.

Dynamic sampling: a prompt whose group would train nothing gives its place in the batch to another one. The replacement
is a pure function of (data.seed, step): place q's r-th one is number r * Q + q of the rows that are not in the batch,
in an order of the step's own. So no two places take the same row, and neither layout nor a resume changes the choice.
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
    sample,
    score,
    score_traces,
    share,
    trace_room,
)
from megatron_dypo.runtime.distributed import Layout, claim_device
from megatron_dypo.runtime.failure import begin_step, phase
from megatron_dypo.runtime.measure import StepTimer
from megatron_dypo.runtime.process import in_thread

log = logging.getLogger(__name__)


def check_staleness(groups: list[Group], version: int, config: Config) -> None:
    """Raises TrainingError where a response is older than ``rollout.max_staleness`` has it.

    ``version``: optimizer updates behind the policy that is about to train on the groups.
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
    """In optimizer updates; None where nothing is checked."""
    rollout = config.rollout
    if rollout.max_staleness is not None or rollout.engine == "replay":
        return rollout.max_staleness
    return most_updates(config.objective) if rollout.async_rollout else 0


@dataclass(frozen=True)
class DynamicSampling:
    """Whom to replace, and by whom. ``usable_teachers``: those of a group's teachers that may be drawn."""

    config: Config
    prompts: list[Prompt]
    tokenizer: Tokenizer
    usable_teachers: Callable[[Group], list[int]]
    before: int = 0  # steps of the run before those that the order of rows begins with

    @property
    def rounds(self) -> int:
        """Replacements in one place, at most."""
        return self.config.rollout.refill_rounds if self.config.rollout.dynamic_sampling else 0

    def trains(self, group: Group) -> bool:
        """Whether a scored group would train anything: a term of its regime has responses, or a trace, to train on."""
        objective = self.config.objective
        limits = objective.hard_max_solved, objective.gate, objective.easy_min_solved
        (regime,) = grade(torch.tensor([group.rewards]), objective.reward_threshold, *limits)
        sources = learning_sources(objective, dataclasses.replace(group, regime=regime))
        return Kind.ROLLOUT in sources or (Kind.TEACHER in sources and bool(self.usable_teachers(group)))

    def replacement(self, step: int, place: int, number: int) -> Group | None:
        """The ``number``-th (from 0) that may come to ``place``, not yet sampled; None where the rows have run out."""
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

    It is of one stage: steps have the run's numbers, and the order of the prompts begins after the ``before`` steps of
    earlier stages. ``prefetched`` is the batch that has been sampled ahead for the next step. Raises OSError, before
    training, where there can be no folder ``rollout.record``.
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
        """Return the step's groups with responses and rewards, the prefetched ones, or sampled (or read) now; and the
        step's experts."""
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
            return Batch(groups)
        groups = self._prompts(step)
        if not self._samples:
            return Batch(groups)
        return self._share(step, groups, self._fill(step, groups, clock), clock)

    @contextmanager
    def prefetch(self, step: int, clock: StepTimer) -> Iterator[None]:
        """Sample the batch of ``step`` in a thread while the body trains; at the end of the body it is ``prefetched``.

        Does nothing but run the body without ``rollout.async_rollout``, and past the stage's last step. ``clock``, of
        the step that trains, gets the seconds of the sampling, and as ``rollout_wait`` those that the end waited for
        it. Raises what the thread raised.
        """
        if not self.config.rollout.async_rollout:
            yield
            return
        groups, sampling_clock = self._prompts(step), StepTimer()

        def fill() -> list[list[Group]]:
            claim_device()  # a thread starts on the first one
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
        """Take up the prefetched batch that a checkpoint's ``file`` holds.

        Raises UserError where the data has changed so that it does not fit.
        """
        limits = {"vocab_size": self.shape.vocab_size, "longest": self.shape.max_position}
        groups = recording.read(file, self._by_id, self._samples, **limits)
        places = self.config.data.prompts_per_step
        self.prefetched = Batch(groups[:places], groups[places:])

    def deferred(self, waiting: Sequence[Waiting]) -> list[Group]:
        """Groups to train on of what waits in the queue. Raises UserError where data.train has no such trace."""
        groups = []
        for name, teachers in waiting:
            prompt = self._by_id.get(name)
            if prompt is None or max(teachers) >= len(prompt.teachers):
                missing = "prompt" if prompt is None else f"teacher {max(teachers)}"
                raise UserError(
                    f"data.train: {self.config.data.train}: the queue of the run to resume holds prompt {name!r}, and "
                    f"this {missing} is not there any more; restore the file, or start another run"
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
        """The step's rows of ``experts``, in an order of their own."""
        if not self.experts:
            return []
        data = self.config.data
        indices = batch_indices(step - self.before, data.experts_per_step, len(self.experts), data.seed, "experts")
        groups = encode_prompts([self.experts[i] for i in indices], self.tokenizer, data.max_prompt_tokens)
        return [dataclasses.replace(group, teacher_indices=(0,), expert=True) for group in groups]

    def _fill(self, step: int, groups: list[Group], clock: StepTimer) -> list[list[Group]]:
        """Sample and score this rank's places of the batch; returns the groups tried in each. Asks no other rank."""
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
        """Draw the groups' teachers, as grading does where no reward is asked of them, and score their traces."""
        draws, seed = self.config.objective.teachers_per_prompt, self.config.trainer.seed
        for group in groups:
            draw_teachers(group, self.usable_teachers(group), seed, step, draws)
        score_traces(groups, lambda group, i: len(self.encode_trace(group, i)), self.reward, self.config)

    def _share(self, step: int, groups: list[Group], tried: list[list[Group]], clock: StepTimer) -> Batch:
        """The whole batch, of what all ranks tried."""
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
                one.responses, one.teacher_indices, one.teacher_rewards = its
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

    def _check_replayed_rewards(self, step: int, groups: list[Group]) -> None:
        """Where drawn traces are scored, the recording must hold their draw and their rewards."""
        if not recipe(self.config.objective).scores_traces:
            return
        for group in groups:
            if group.teacher_indices is None or len(group.teacher_rewards) != len(group.teacher_indices):
                raise UserError(
                    f"{self.config.rollout.replay}: step {step}: prompt {group.prompt.id!r} was recorded without the "
                    f"rewards of its teachers' traces (objective.method: {self.config.objective.method})"
                )

    def record(self, step: int, groups: list[Group]) -> None:
        """Write the graded step to ``rollout.record``, if asked for; rank 0 does. A full disk is a warning."""
        if self.config.rollout.record and self.layout.is_main:
            with phase("recording"):
                try:
                    recording.record(self.config.rollout.record, step, groups)
                except OSError as error:
                    log.warning("step %d is not recorded and cannot be replayed, training goes on: %s", step, error)

    def usable_teachers(self, group: Group) -> list[int]:
        """Indices of the teachers whose trace is short enough."""
        room = trace_room(self.config, self.shape.max_position, len(group.prompt_ids))
        return [i for i in range(len(group.prompt.teachers)) if len(self.encode_trace(group, i)) <= room]

    def encode_trace(self, group: Group, teacher: int) -> np.ndarray:
        """Ids of one teacher's trace for the group's prompt, end token included."""
        if group.expert:  # of another data set: its ids may be those of prompts, and it is not asked for often
            return self.tokenizer.encode_trace(group.prompt.teachers[teacher].trace, group.prompt)
        return self._trace(group.prompt.id, teacher)

    def _encode_trace(self, prompt_id: str, teacher: int) -> np.ndarray:
        prompt = self._by_id[prompt_id]
        return self.tokenizer.encode_trace(prompt.teachers[teacher].trace, prompt)
