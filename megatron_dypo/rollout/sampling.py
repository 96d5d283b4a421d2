"""Prompts -> scored groups on every rank: each rank samples and scores its share, all get the result.

A batch has ``data.prompts_per_step`` places; a rank takes every world-th one, so that lengths even out. The groups
tried in a place are a list, the last of which stays there: one, except with dynamic sampling.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.errors import UserError
from megatron_dypo.records import Group, Prompt, Response, Teacher
from megatron_dypo.reward import Score
from megatron_dypo.reward.scorers import penalty
from megatron_dypo.rollout.engine import Engine, Request, Sampling
from megatron_dypo.rollout.routed_experts import compact
from megatron_dypo.runtime.determinism import choose, stable_hash
from megatron_dypo.runtime.distributed import Layout, all_gather_objects, gather_objects

RewardProtocol = Callable[[list[Prompt], list[str]], list[Score]]


def encode_prompts(prompts: list[Prompt], tokenizer: Tokenizer, longest: int) -> list[Group]:
    """Return groups without responses. Raises UserError naming a prompt that is empty or longer than ``longest``."""
    groups = [Group(prompt, tokenizer.encode_prompt(prompt)) for prompt in prompts]
    for group in groups:
        if not 0 < len(group.prompt_ids) <= longest:
            raise UserError(
                f"data: prompt {group.prompt.id} has {len(group.prompt_ids)} tokens; "
                f"data.max_prompt_tokens is {longest}"
            )
    return groups


def sampling(config: Config, end_ids: tuple[int, ...]) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.temperature, rollout.top_p, rollout.max_response_tokens, end_ids)


def sample(groups: list[Group], engine: Engine, config: Config, end_ids: tuple[int, ...], step: int) -> None:
    """Fill in the groups' responses.

    Each sample's seed is a hash of (seed, step, prompt, sample): neither layout nor order changes the draw.
    """
    k = config.rollout.samples_per_prompt
    requests = [
        Request(group.prompt_ids, stable_hash(config.trainer.seed, "sample", step, group.prompt.id, i))
        for group in groups
        for i in range(k)
    ]
    responses = engine.generate(requests, sampling(config, end_ids))
    for response in responses:
        if response.experts is not None:
            response.experts = compact(response.experts)
    for i, group in enumerate(groups):
        group.responses = responses[i * k : (i + 1) * k]


def score(groups: list[Group], tokenizer: Tokenizer, reward: RewardProtocol, config: Config | None = None) -> None:
    """Set every response's reward and fault; with ``config``, in training, subtract its penalties.

    An unfinished response with a given reward is neither graded nor penalised.
    """
    responses = [(group.prompt, response) for group in groups for response in group.responses]
    pairs = [each for each in responses if config is None or not give_unfinished_reward(each[1], config)]
    texts = [tokenizer.decode(response.ids) for _, response in pairs]
    scores = reward([prompt for prompt, _ in pairs], texts)
    for (_, response), text, (value, fault) in zip(pairs, texts, scores, strict=True):
        response.reward, response.fault = value, fault
        if config:
            response.reward -= penalty(config.reward, text, len(response.ids), config.rollout.max_response_tokens)


def give_unfinished_reward(response: Response, config: Config) -> bool:
    """Set the reward of an unfinished response to ``rollout.reward_unfinished``, whatever its text.

    Returns whether that applies: False if it finished, or the key is null.
    """
    value = config.rollout.reward_unfinished
    if value is None or response.finished:
        return False
    response.reward, response.fault = value, None
    return True


def draw_teachers(group: Group, usable: list[int], seed: int, step: int, draws: int) -> None:
    """Draw among a group's ``usable`` teachers by a hash of (seed, step, prompt id) only."""
    drawn = choose((seed, "teacher", step, group.prompt.id), len(usable), draws)
    group.teacher_indices = tuple(usable[i] for i in drawn)


def score_traces(groups: list[Group], tokens: Callable[[Group, int], int], reward: RewardProtocol, config: Config):
    """Set the rewards of the groups' drawn traces, scored as responses are.

    ``tokens(group, i)``: length of teacher i's trace. Raises UserError naming prompt and teacher if the reward function
    fails on one.
    """
    drawn = [(group, group.prompt.teachers[i], i) for group in groups for i in group.teacher_indices or ()]
    scores = reward([group.prompt for group, _, _ in drawn], [teacher.trace for _, teacher, _ in drawn])
    rewards: dict[int, list[float]] = {}
    for (group, teacher, i), (value, fault) in zip(drawn, scores, strict=True):
        if fault is not None:
            raise cannot_score(config, group.prompt, teacher, fault)
        value -= penalty(config.reward, teacher.trace, tokens(group, i), config.rollout.max_response_tokens)
        rewards.setdefault(id(group), []).append(value)
    for group in groups:
        group.teacher_rewards = tuple(rewards.get(id(group), ()))


def cannot_score(config: Config, prompt: Prompt, teacher: Teacher, fault: str) -> UserError:
    """Return the error for a reward function that fails on a trace to be scored."""
    return UserError(
        f"reward.function: {config.reward.function}: prompt {prompt.id}: the trace of teacher {teacher.name} cannot be "
        f"scored, which objective.method: {config.objective.method} asks for: {fault}"
    )


def trace_room(config: Config, longest: int, prompt_tokens: int) -> int:
    """Return the tokens of the longest trace that may be drawn after a prompt, for a model of ``longest`` tokens."""
    limit = config.data.max_teacher_tokens or config.rollout.max_response_tokens
    return min(limit, longest - prompt_tokens)


class Sampled(NamedTuple):
    """The results of sampling and scoring a group."""

    responses: list[Response]
    teacher_indices: tuple[int, ...] | None
    teacher_rewards: tuple[float, ...]


def _without_routing(sampled: Sampled) -> Sampled:
    return sampled._replace(responses=[dataclasses.replace(each, experts=None) for each in sampled.responses])


def keep_own_routing(groups: list[Group], layout: Layout) -> None:
    """Drop the routing of the groups that other ranks would have sampled, where every rank has read all groups."""
    for place, group in enumerate(groups):
        group.holder = place % layout.world
        if group.holder != layout.rank:
            for response in group.responses:
                response.experts = None


def with_routing(groups: Sequence[Group], layout: Layout) -> list[Group]:
    """Return the groups, on rank 0 with the routing that other ranks hold. Collective."""
    if layout.world == 1:
        return list(groups)
    mine = [(g, group) for g, group in enumerate(groups) if group.holder == layout.rank]
    held = {g: [response.experts for response in group.responses] for g, group in mine}
    whole = list(groups)
    for g, experts in (each for part in gather_objects(held) for each in part.items()):
        pairs = zip(groups[g].responses, experts, strict=True)
        responses = [dataclasses.replace(response, experts=its) for response, its in pairs]
        whole[g] = dataclasses.replace(groups[g], responses=responses)
    return whole


def share(tried: list[list[Group]], layout: Layout, seconds: float) -> tuple[list[list[Sampled]], list[float]]:
    """Exchange what each rank sampled for its places, except its routing; return the whole batch, [place, try], and
    all ranks' seconds.

    ``seconds``: the time of this rank's share, without waiting for others.
    """
    mine = [
        [Sampled(group.responses, group.teacher_indices, group.teacher_rewards) for group in groups] for groups in tried
    ]
    gathered = all_gather_objects((seconds, [[_without_routing(each) for each in its] for its in mine]))
    sampled: list = [None] * sum(len(theirs) for _, theirs in gathered)
    for rank, (_, theirs) in enumerate(gathered):
        sampled[rank :: layout.world] = mine if rank == layout.rank else theirs
    return sampled, [spent for spent, _ in gathered]
