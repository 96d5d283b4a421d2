"""Count collectives and time of one pass over the weights, as in a sync: 8 layers of a 235B-A22B-shaped mixture.

torchrun --nproc-per-node 16 -m benchmarks.export [--name now]

128 experts of width 24, hidden size 64, 4 heads, at EP 8 x PP 2 on 16 CPU ranks (gloo), each of which ends with every
full tensor. The tensors are small, so the time is that of the calls. Calls of ``torch.distributed`` are counted by
patching it, on the busiest rank.

Adds an entry under ``--name`` to benchmarks/results/export_cpu.json; an older commit's is measured by this same file.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist

from benchmarks.machine import RESULTS, environment
from megatron_dypo.config.schema import Config, Data, Model, Parallel, Trainer
from megatron_dypo.models.shape import PRESETS
from megatron_dypo.models.sharding import random_weights
from megatron_dypo.policy.policy import Policy
from megatron_dypo.runtime import distributed

CALLS = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce", "send", "recv")
SHAPE = dataclasses.replace(
    PRESETS["tiny-moe"],
    num_layers=8,
    hidden_size=64,
    ffn_hidden_size=24,
    head_dim=16,
    num_experts=128,
    router_topk=8,
)


def watched(name: str, plain: Callable, calls: collections.Counter[str]) -> Callable:
    def call(*arguments, **options):
        calls[name] += 1
        return plain(*arguments, **options)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the collectives of one pass over the weights, and time it.")
    parser.add_argument("--name", default="now")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS / "export_cpu.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    parallel = Parallel(expert=8, pipeline=2)
    config = Config(
        model=Model(preset="tiny-moe", dtype="fp32"),
        data=Data(train="none"),
        parallel=parallel,
        trainer=Trainer(steps=1, run_dir="none"),
    )
    layout = distributed.init(parallel)
    policy = Policy(config, SHAPE, layout, random_weights(SHAPE, seed=0))
    calls: collections.Counter[str] = collections.Counter()
    plain = {name: getattr(dist, name) for name in CALLS}
    for name, function in plain.items():
        setattr(dist, name, watched(name, function, calls))
    tensors = sum(1 for _ in policy.named_tensors())
    for name, function in plain.items():
        setattr(dist, name, function)
    seconds = []
    for _ in range(options.rounds):
        dist.barrier()
        start = time.perf_counter()
        for _ in policy.named_tensors():
            pass
        dist.barrier()
        seconds.append(time.perf_counter() - start)
    busiest = max(distributed.all_gather_objects(sum(calls.values())))
    if layout.is_main:
        found = json.loads(options.out.read_text()) if options.out.exists() else {}
        machine = environment("cpu", "16 ranks of 1 thread", ("torch", "megatron-core"))
        found[options.name] = machine | {
            "calls": busiest,
            "by_name": dict(calls),
            "tensors": tensors,
            "seconds": seconds,
        }
        options.out.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{options.name}: {tensors} tensors, {busiest} calls {dict(calls)}, {median(seconds):.2f} s")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
