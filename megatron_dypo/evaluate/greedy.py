"""Greedy accuracy on held-out prompts, inside training: the engine as it stands, one answer a prompt."""

from __future__ import annotations

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.records import Group
from megatron_dypo.rollout.collect import Reward, sampling, score
from megatron_dypo.rollout.engine import Engine, Request
from megatron_dypo.runtime.distributed import Layout, all_gather_objects


def greedy_accuracy(
    groups: list[Group], engine: Engine, config: Config, tokenizer: Tokenizer, reward: Reward, layout: Layout
) -> dict:
    """``eval/valid/*``: share of right answers, mean length (tokens). Each rank takes its share of the prompts."""
    mine = [Group(group.prompt, group.prompt_ids) for group in groups[layout.rank :: layout.world]]
    requests = [Request(group.prompt_ids, None) for group in mine]
    responses = engine.generate(requests, sampling(config, tokenizer.end_ids))
    for group, response in zip(mine, responses, strict=True):
        group.responses = [response]
    score(mine, tokenizer, reward)
    threshold = config.objective.reward_threshold
    local = [(response.reward >= threshold, len(response.ids)) for response in responses]
    every = [pair for part in all_gather_objects(local) for pair in part]
    return {
        "eval/valid/greedy_accuracy": sum(right for right, _ in every) / len(every),
        "eval/valid/response_tokens": sum(length for _, length in every) / len(every),
    }
