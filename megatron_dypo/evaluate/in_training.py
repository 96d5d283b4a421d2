"""Evaluate during training with the current engine: held-out prompts, once each and greedily, and the suites."""

from __future__ import annotations

from megatron_dypo.config.schema import Config
from megatron_dypo.data.tokenizer import Tokenizer
from megatron_dypo.evaluate.respond import engine_responses
from megatron_dypo.evaluate.run import metrics, run_suite
from megatron_dypo.evaluate.suites import Suite
from megatron_dypo.records import Group, Prompt
from megatron_dypo.reward import RewardFunction
from megatron_dypo.rollout.engine import Engine, Request
from megatron_dypo.rollout.sampling import RewardProtocol, sampling, score
from megatron_dypo.runtime.distributed import Layout, all_gather_objects


def greedy_accuracy(
    groups: list[Group], engine: Engine, config: Config, tokenizer: Tokenizer, reward: RewardProtocol, layout: Layout
) -> dict:
    """Return ``eval/valid/*``: share of right answers, mean length in tokens. The ranks share the prompts."""
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


def evaluate_now(
    held_out: list[Group],
    suites: dict[Suite, list[Prompt]],
    tokenizer: Tokenizer,
    engine: Engine,
    config: Config,
    reward: RewardFunction,
    layout: Layout,
) -> dict:
    """Return ``eval/valid/*`` and ``eval/<suite>/*``. Each rank takes its share of the prompts; collective."""
    found: dict = {}
    if held_out:
        found |= greedy_accuracy(held_out, engine, config, tokenizer, reward, layout)
    respond = engine_responses(engine, tokenizer, config)
    for suite, prompts in suites.items():
        found |= metrics(suite.name, run_suite(suite, prompts, config, respond, layout))
    return found
