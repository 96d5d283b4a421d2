"""Evaluation inside training, with the engine as it stands: held-out prompts once each and greedily, and the suites."""

from __future__ import annotations

from megatron_dypo.config.schema import Config
from megatron_dypo.evaluate.greedy import greedy_accuracy
from megatron_dypo.evaluate.respond import engine_responses
from megatron_dypo.evaluate.run import metrics, run_suite
from megatron_dypo.preflight import Inputs
from megatron_dypo.reward import RewardFunction
from megatron_dypo.rollout.engine import Engine
from megatron_dypo.runtime.distributed import Layout


def evaluate_now(inputs: Inputs, engine: Engine, config: Config, reward: RewardFunction, layout: Layout) -> dict:
    """``eval/valid/*`` and ``eval/<suite>/*``. Each rank takes its share of the prompts; collective."""
    found = {}
    if inputs.held_out:
        found |= greedy_accuracy(inputs.held_out, engine, config, inputs.tokenizer, reward, layout)
    respond = engine_responses(engine, inputs.tokenizer, config)
    for suite, prompts in inputs.suites.items():
        found |= metrics(suite.name, run_suite(suite, prompts, config, respond, layout))
    return found
