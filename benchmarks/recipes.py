"""Compare DYPO with SFT only and GRPO only on the quickstart's task: same model, prompts, optimizer and steps.

python -m benchmarks.recipes [--seeds 3] [--steps 300] [--out runs/recipes]

Writes one run folder per recipe and seed (an existing one is resumed or reused) and prints a table with every seed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from megatron_dypo.monitor.metrics_file import read_metrics

RECIPES = ("dypo", "sft", "grpo")


def run(method: str, seed: int, steps: int, folder: Path) -> None:
    """Run the quickstart's configuration with another recipe and seed."""
    overrides = [
        f"objective.method={method}",
        f"trainer.seed={seed}",
        f"data.seed={seed}",
        f"trainer.steps={steps}",
        f"optimizer.schedule_steps={steps}",
        f"trainer.run_dir={folder}",
    ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "megatron_dypo", "train", "examples/quickstart/config.yaml", *overrides]
    subprocess.run(command, check=True, timeout=3600)


def outcome(folder: Path) -> dict[str, float | None]:
    """Return last-tenth means and the final held-out accuracy of one run."""
    metrics = [line for line in read_metrics(folder / "metrics.jsonl") if line["step"] > 0]
    tail = metrics[-max(1, len(metrics) // 10) :]

    def mean(name: str) -> float | None:
        values = [line[name] for line in tail if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    return {
        "greedy_accuracy": metrics[-1]["eval/valid/greedy_accuracy"],
        "reward": mean("reward/mean"),
        "offline_ratio": mean("dypo/offline_ratio"),
        "minutes": sum(line["time/step"] for line in metrics) / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/recipes"))
    options = parser.parse_args()
    results = []
    for seed in range(options.seeds):
        for method in RECIPES:
            folder = options.out / f"{method}-{seed}"
            run(method, seed, options.steps, folder)
            results.append({"method": method, "seed": seed, "steps": options.steps} | outcome(folder))
            print(json.dumps(results[-1]), flush=True)
    (options.out / "results.json").write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()
