"""Measure what routing replay does to a mixture of experts: a bf16 trainer against an fp32 engine, in one process.

python -m benchmarks.routing [--experts 32] [--updates 4] [--out benchmarks/results/routing_cpu.json]

A small mixture with random weights samples with transformers in fp32 (which returns its routing, without rounding of
its own); the same weights train in bf16, which here stands for any difference between an engine's kernels and a
trainer's. Every policy.routing_replay sees the same rollouts. The first table compares the trainer's log-probs with the
engine's before any update; the second shows how far several updates on those rollouts move the ratio.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks.machine import environment
from benchmarks.markdown import table
from megatron_dypo.config.schema import Config, Data, Model, Objective, Optimizer, PolicyOptions, Rollout, Trainer
from megatron_dypo.models.shape import PRESETS, ModelShape
from megatron_dypo.models.sharding import random_weights
from megatron_dypo.policy.policy import Policy as Mixture
from megatron_dypo.records import Group, Prompt, Regime
from megatron_dypo.rollout.engine import Request, Sampling
from megatron_dypo.rollout.hf_engine import HfEngine
from megatron_dypo.runtime import distributed
from megatron_dypo.training.minibatch import build_minibatches
from megatron_dypo.training.passes import logprob_passes
from megatron_dypo.training.step import StepContext, run_updates
from megatron_dypo.weight_sync.source import StoredWeights

ROUTINGS = ("off", "old", "rollout")
COLUMNS = (
    "rollout/mismatch_mean", "rollout/mismatch_max", "rollout/mismatch_kl", "moe/rerouted_frac",
    "policy/clip_frac", "train/grad_norm",
)  # fmt: skip
PROMPTS, SAMPLES, TOKENS = 16, 8, 48


def sampled(shape: ModelShape) -> list[Group]:
    """Return Mid groups of the engine's responses, alternately right and wrong."""
    engine = HfEngine(shape, returns_experts=True)
    engine.sync(StoredWeights(shape, torch.float32, random_weights(shape, seed=1)))
    random = np.random.default_rng(0)
    groups = []
    for q in range(PROMPTS):
        prompt = random.integers(3, shape.vocab_size, 12).astype(np.int32)
        requests = [Request(prompt, 1000 * q + i) for i in range(SAMPLES)]
        responses = engine.generate(requests, Sampling(1.0, 1.0, TOKENS, eos_id=1))
        for i, response in enumerate(responses):
            response.reward = float(i % 2)
        groups.append(Group(Prompt(f"p{q}", "1", ()), prompt, responses, Regime.MID))
    return groups


def measure(shape: ModelShape, groups: list[Group], routing: str, dtype: str, updates: int) -> dict[str, float]:
    config = Config(
        model=Model(preset="tiny-moe", dtype=dtype),
        policy=PolicyOptions(routing_replay=routing),
        data=Data(train="none", prompts_per_step=PROMPTS, max_tokens_per_microbatch=4096),
        rollout=Rollout(samples_per_prompt=SAMPLES, max_response_tokens=TOKENS),
        objective=Objective(updates_per_rollout=updates),
        optimizer=Optimizer(lr=1e-3),
        trainer=Trainer(steps=1, run_dir="none"),
    )
    policy = Mixture(config, shape, distributed.Layout(), random_weights(shape, seed=1))
    minibatches = build_minibatches(
        policy.layout, groups, config, lambda group, teacher: group.prompt_ids
    )  # none has a teacher
    before, _ = logprob_passes(policy, minibatches, config)
    after = run_updates(policy, minibatches, config, StepContext(1, 1e-3)).metrics
    return before | after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init()
    shape = dataclasses.replace(
        PRESETS["tiny-moe"], num_layers=4, num_experts=options.experts, router_topk=4, ffn_hidden_size=64
    )
    groups = sampled(shape)
    rows = {}
    for dtype in ("fp32", "bf16"):
        for routing in ROUTINGS:
            rows[f"{dtype} {routing}"] = measure(shape, groups, routing, dtype, options.updates)
    print(table(["", *COLUMNS], [[name, *(f"{row.get(key, 0):.3g}" for key in COLUMNS)] for name, row in rows.items()]))
    if options.out:
        report = environment("cpu", "1 thread", ("torch", "megatron-core", "transformers")) | {"rows": rows}
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
