"""Compare a step's cost with another revision's: CPU-seconds and peak memory, in alternation.

python -m benchmarks.step_cost --base REVISION [--rounds 5] [--steps 3] [--method dypo]

Each revision runs in its own process, from a work tree made by git, on one thread; both train on the same made-up
rollouts (log-prob passes, coefficients, training pass, optimizer step) and are warmed up by an untimed step. In a round
one works while the other sleeps, in reverse order every other round. Prints each round's ratio and the medians.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PROMPTS, SAMPLES, LONGEST = 32, 8, 96


def groups(step: int) -> list:
    """Return Easy, Mid and Hard groups of mixed lengths, the same in every revision."""
    import numpy as np

    from megatron_dypo.records import Group, Prompt, Regime, Response, Teacher

    random, made = np.random.default_rng(step), []
    for q in range(PROMPTS):
        regime = (Regime.MID, Regime.HARD, Regime.MID, Regime.EASY)[q % 4]
        solved = {Regime.EASY: SAMPLES, Regime.HARD: 0, Regime.MID: 1 + q % (SAMPLES - 1)}[regime]
        lengths = random.integers(1, LONGEST, SAMPLES)
        responses = [
            Response(
                random.integers(3, 4000, n).astype(np.int32),
                random.normal(-8.3, 0.3, n).astype(np.float32),
                "stop",
                float(i < solved),
            )
            for i, n in enumerate(lengths)
        ]
        prompt = Prompt(f"p{q}", "1", (Teacher("a", "first"), Teacher("b", "second")))
        made.append(Group(prompt, random.integers(3, 4000, 12).astype(np.int32), responses, regime, (0,)))
    return made


def trace(group, teacher: int):
    import numpy as np

    return np.random.default_rng(len(group.prompt.id) + teacher).integers(3, 4000, 50).astype(np.int32)


def serve(method: str) -> None:
    """Run a step per line of standard input; print its CPU-seconds and the process's peak memory during it as JSON."""
    import torch

    torch.set_num_threads(1)
    from megatron_dypo.config.schema import Config, Data, Model, Objective, Trainer
    from megatron_dypo.models.shape import PRESETS
    from megatron_dypo.models.sharding import random_weights
    from megatron_dypo.policy.policy import Policy
    from megatron_dypo.runtime import distributed
    from megatron_dypo.training.minibatch import build_minibatches
    from megatron_dypo.training.passes import logprob_passes
    from megatron_dypo.training.step import StepContext, run_updates

    config = Config(
        model=Model(preset="tiny"),
        data=Data(train="none", max_tokens_per_microbatch=2048),
        objective=Objective(method=method, kl_coef=0.1),
        trainer=Trainer(steps=1, run_dir="none"),
    )
    shape = dataclasses.replace(PRESETS["tiny"], vocab_size=4096)
    policy = Policy(config, shape, distributed.init(config.parallel), random_weights(shape, seed=1))
    for step, _ in enumerate(sys.stdin):
        Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        began = time.process_time()
        minibatches = build_minibatches(policy.layout, groups(step), config, trace)
        logprob_passes(policy, minibatches, config)
        run_updates(policy, minibatches, config, StepContext(step + 1, 1e-4))
        seconds = time.process_time() - began
        (peak,) = [line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line]
        print(json.dumps({"cpu_seconds": seconds, "peak_mib": int(peak) / 1024}), flush=True)


class Revision:
    """The process of one revision's work tree."""

    def __init__(self, tree: Path, method: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", "--method", method],
            cwd=tree,
            env=os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> dict[str, float]:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("{"):
            if not line:
                raise SystemExit("step_cost: a revision's process has ended")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--method", default="dypo")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.method)
        return
    here = Path(__file__).resolve().parents[1]
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        subprocess.run(["git", "-C", here, "worktree", "add", "--detach", before, options.base], check=True)
        try:
            revisions = {"before": Revision(before, options.method), "now": Revision(here, options.method)}
            for revision in revisions.values():
                revision.step()
            rounds = []
            for number in range(options.rounds):
                order = sorted(revisions, reverse=number % 2 == 1)
                found = {name: [revisions[name].step() for _ in range(options.steps)] for name in order}
                rounds.append(
                    {name: {key: median(step[key] for step in each) for key in each[0]} for name, each in found.items()}
                )
                ratios = {key: rounds[-1]["now"][key] / rounds[-1]["before"][key] for key in rounds[-1]["now"]}
                print(json.dumps(rounds[-1] | {"ratio": ratios}), flush=True)
            for key in ("cpu_seconds", "peak_mib"):
                of = {name: median(each[name][key] for each in rounds) for name in revisions}
                ratio = median(each["now"][key] / each["before"][key] for each in rounds)
                print(f"{key}: before {of['before']:.4g}, now {of['now']:.4g}, median ratio {ratio:.4f}")
            for revision in revisions.values():
                revision.process.stdin.close()
                revision.process.wait(60)
        finally:
            subprocess.run(["git", "-C", here, "worktree", "remove", "--force", before], check=True)


if __name__ == "__main__":
    main()
