"""Time a checkpoint and Megatron-Core's own save in one run: how long training pauses, and when the save is complete.

torchrun --standalone --nproc-per-node 2 -m benchmarks.checkpoints [--layers 2 --hidden 128] [--out FILE]

The default model is the quickstart's. Both save weights and Adam's moments of the same trained policy; ours adds
checksums and an fsync of every file. Prints one JSON object, or writes it to FILE; the figures are the slowest rank's,
the first save's, then the median of all.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_dypo.checkpoint.manager import Counters, Saver
from megatron_dypo.config.schema import Config, Data, Model, Objective, Optimizer, Shape, Trainer
from megatron_dypo.models.shape import model_shape
from megatron_dypo.models.sharding import random_weights
from megatron_dypo.policy.policy import Policy
from megatron_dypo.runtime import cpu_shim, distributed


def trained_policy(shape: Shape, shard_optimizer: bool) -> tuple[Config, Policy]:
    """Return a policy after one update, so that Adam has its moments."""
    config = Config(
        model=Model(preset="tiny", shape=shape),
        data=Data(train="none"),
        objective=Objective(reference="previous"),
        optimizer=Optimizer(distributed=shard_optimizer),
        trainer=Trainer(steps=10**6, save_every=1, keep_checkpoints=1, run_dir="none"),
    )
    layout = distributed.init()
    model = model_shape(config.model)
    policy = Policy(config, model, layout, random_weights(model, seed=0))
    policy.zero_gradients()
    policy.optimizer.zero_grad()
    policy.step(1e-3)
    return config, policy


def timed(action: Callable[[], float], repeats: int) -> dict[str, float]:
    """Time ``action``, which returns the seconds that it blocked the loop, as a whole."""
    held, whole = [], []
    for _ in range(repeats):
        dist.barrier()
        began = time.perf_counter()
        held.append(max(distributed.all_gather_objects(action())))
        whole.append(time.perf_counter() - began)
    return {
        "first_whole_after_seconds": whole[0],
        "held_up_seconds": statistics.median(held),
        "whole_after_seconds": statistics.median(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--shard-optimizer", action="store_true", help="time ours only: mcore's save fails with torch's Adam"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = Shape(num_layers=options.layers, hidden_size=options.hidden, ffn_hidden_size=4 * options.hidden)
    config, policy = trained_policy(shape, options.shard_optimizer)
    made = tempfile.mkdtemp(prefix="checkpoints-") if dist.get_rank() == 0 else ""
    run_dir = Path(distributed.all_gather_objects(made)[0])
    config.trainer.run_dir = str(run_dir)
    saver, step = Saver(config, policy), 0

    def ours() -> float:
        nonlocal step
        step += 1
        counters = Counters(step=step, weight_version=policy.version)
        began = time.perf_counter()
        saver.after_step(counters, None)
        held = time.perf_counter() - began
        saver.finish(counters)
        return held

    def mcores() -> float:
        from megatron.core import dist_checkpointing

        folder = run_dir / "mcore"
        if dist.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        dist.barrier()
        began = time.perf_counter()
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        with cpu_shim.cuda_type_names():
            model = policy.chunks[0].module.sharded_state_dict(metadata=metadata)
            optimizer = policy.optimizer.sharded_state_dict(model, metadata=metadata)
            dist_checkpointing.save({"model": model, "optimizer": optimizer}, str(folder))
        return time.perf_counter() - began

    figures = {"ours": timed(ours, options.repeats)}
    if not options.shard_optimizer:
        figures["megatron_core"] = timed(mcores, options.repeats)
    if dist.get_rank() == 0:
        size = sum(file.stat().st_size for file in run_dir.rglob("step_*/*"))
        named = {"ranks": dist.get_world_size(), "parameters": policy.shape.parameters, "mib": round(size / 2**20, 1)}
        versions = {"torch": torch.__version__}
        report = named | {k: {n: round(v, 3) for n, v in f.items()} for k, f in figures.items()} | versions
        if options.out:
            options.out.write_text(json.dumps(report, indent=1) + "\n")
        else:
            print(json.dumps(report))
        shutil.rmtree(run_dir)


if __name__ == "__main__":
    main()
