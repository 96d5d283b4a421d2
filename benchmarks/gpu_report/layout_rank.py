"""Train a small policy for a few updates in one layout; rank 0 writes the losses of every step.

torchrun --nproc-per-node RANKS -m benchmarks.gpu_report.layout_rank PRESET DTYPE PARALLEL OPTIMIZER OUT

PARALLEL and OPTIMIZER are JSON of the configuration's sections. Every layout trains the same global batches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch.distributed as dist

from benchmarks.gpu_report.workload import Batch, make_groups, trace
from megatron_dypo.config.schema import Config, Data, Model, Optimizer, Parallel, Rollout, Trainer
from megatron_dypo.models.shape import model_shape
from megatron_dypo.models.sharding import random_weights
from megatron_dypo.policy.policy import Policy
from megatron_dypo.runtime import distributed
from megatron_dypo.training.step import StepContext, update_policy

STEPS = 3
BATCH = Batch(prompts=8, samples=4, mean=48, longest=200, prompt_tokens=16, budget=256)


def main() -> None:
    preset, dtype, parallel, optimizer, out = sys.argv[1:]
    config = Config(
        model=Model(preset=preset, dtype=dtype),
        data=Data(train="none", prompts_per_step=BATCH.prompts, max_tokens_per_microbatch=BATCH.budget),
        parallel=Parallel(**json.loads(parallel)),
        rollout=Rollout(samples_per_prompt=BATCH.samples, max_response_tokens=BATCH.longest),
        optimizer=Optimizer(lr=1e-3, **json.loads(optimizer)),
        trainer=Trainer(steps=STEPS, run_dir="none"),
    )
    layout, shape = distributed.init(config.parallel), model_shape(config.model)
    policy = Policy(config, shape, layout, random_weights(shape, seed=0))
    losses = []
    for _ in range(STEPS):
        groups, trace_ids = make_groups(BATCH, shape.vocab_size), trace(BATCH, shape.vocab_size)
        outcome = update_policy(policy, groups, config, trace_ids, StepContext(1, config.optimizer.lr))
        if outcome.skipped:
            raise RuntimeError(outcome.skipped)
        losses.append({name: outcome.metrics[name] for name in ("loss/total", "train/grad_norm")})
    if layout.is_main:
        Path(out).write_text(json.dumps(losses))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
