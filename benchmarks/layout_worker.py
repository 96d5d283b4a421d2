"""Time updates of a fresh policy on a made-up global batch, in one layout of benchmarks/layouts.py.

torchrun --standalone --nproc-per-node RANKS -m benchmarks.layout_worker JOB OUT

JOB is the JSON of a ``Job``; rank 0 writes a JSON object to the file OUT. An update is what training does with one
graded batch: plan, old pass, training pass, optimizer step. Wall time is the slowest rank's, between two barriers;
CPU-seconds are summed over ranks and threads; memory is the largest rank's peak, on the CPU all resident memory, with
torch's own.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.layouts import Job, Size
from benchmarks.packing import lognormal_lengths
from megatron_dypo.config.schema import Config, Data, Model, Objective, Parallel, Rollout, Shape, Trainer
from megatron_dypo.models.shape import model_shape
from megatron_dypo.models.sharding import random_weights
from megatron_dypo.policy.policy import Policy
from megatron_dypo.records import Group, Prompt, Regime, Response
from megatron_dypo.runtime import distributed
from megatron_dypo.training.minibatch import build_minibatches
from megatron_dypo.training.passes import logprob_passes
from megatron_dypo.training.step import StepContext, run_updates


def make_config(job: Job) -> Config:
    size = job.size
    shape = Shape(
        num_layers=size.layers,
        hidden_size=size.hidden,
        ffn_hidden_size=size.ffn,
        num_attention_heads=size.heads,
        num_query_groups=size.groups,
        head_dim=size.hidden // size.heads,
        vocab_size=size.vocab,
        max_position=size.cap,
    )
    return Config(
        model=Model(preset="tiny", shape=shape),
        parallel=Parallel(**job.parallel),
        data=Data(train="none", prompts_per_step=size.prompts, max_tokens_per_microbatch=size.budget),
        rollout=Rollout(samples_per_prompt=size.responses, max_response_tokens=size.cap),
        objective=Objective(reference="previous"),
        trainer=Trainer(steps=1, run_dir="none"),
    )


def make_groups(size: Size) -> list[Group]:
    """Make prompts whose responses are right and wrong in turn, so that all of them train."""
    random, prompt_length = np.random.default_rng(0), size.mean // 8
    lengths = lognormal_lengths(
        size.prompts * size.responses, size.mean - prompt_length, size.cap - prompt_length, seed=0
    )
    groups = []
    for q in range(size.prompts):
        responses = [
            Response(
                random.integers(0, size.vocab, length).astype(np.int32),
                np.full(length, -np.log(size.vocab), np.float32),
                "stop",
                float(i % 2),
            )
            for i, length in enumerate(lengths[q * size.responses : (q + 1) * size.responses])
        ]
        prompt_ids = random.integers(0, size.vocab, prompt_length).astype(np.int32)
        groups.append(Group(Prompt(f"p{q}", "1", ()), prompt_ids, responses, Regime.MID))
    return groups


def timed_update(policy: Policy, groups: list[Group], config: Config) -> dict[str, float]:
    """Return the figures of one update, the same on all ranks."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    minibatches = build_minibatches(
        policy.layout, groups, config, lambda group, teacher: group.prompt_ids
    )  # no group has a teacher
    _, offenders = logprob_passes(policy, minibatches, config)
    outcome = run_updates(policy, minibatches, config, StepContext(1, 1e-5))
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    cpu = time.process_time() - cpu
    dist.barrier()
    wall = time.perf_counter() - wall
    if offenders or outcome.skipped:
        raise RuntimeError(offenders or outcome.skipped)
    spent = distributed.all_gather_objects((wall, cpu))
    return {
        "wall_seconds": max(wall for wall, _ in spent),
        "cpu_seconds": sum(cpu for _, cpu in spent),
        "tokens": sum(sequence.length for sequence in minibatches[0].sequences),
        "micro_batches": len(minibatches[0].rollouts),
        "gradient_norm": outcome.grad_norms[0],
        "memory_gib": outcome.memory.get("perf/device_memory_gib", outcome.memory["perf/host_memory_gib"]),
    }


def main() -> None:
    job, out = Job.from_json(sys.argv[1]), Path(sys.argv[2])
    config, groups = make_config(job), make_groups(job.size)
    layout = distributed.init(config.parallel)
    shape = model_shape(config.model)
    policy = Policy(config, shape, layout, random_weights(shape, seed=0))
    timed_update(policy, groups[: max(1, len(groups) // 8)], config)
    updates = [timed_update(policy, groups, config) for _ in range(job.updates)]
    if layout.is_main:
        out.write_text(json.dumps({"parameters": shape.parameters, "updates": updates}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
