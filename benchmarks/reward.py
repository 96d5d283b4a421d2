"""Measure how fast answers are graded, and what hanging ones cost.

python -m benchmarks.reward

Two measurements of ``reward.function: math`` with two worker processes:

simple   responses of about 1,500 characters that end in a box: integers, decimals, fractions, percentages and units,
         half of them wrong; the expressions among them go to math-verify. Responses per second, of the whole mix, of
         what the text rules decide alone, and of what math-verify decides.
hangs    gradings that all go to math-verify, 1% of which never end: wall time, and for comparison what those alone may
         take (their deadlines, over the workers), and the processes left, zombies included.

Workers are started before the clock. Writes benchmarks/results/reward_cpu.json; docs/rewards.md quotes it.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import RESULTS, environment
from megatron_dypo.config.schema import Reward
from megatron_dypo.records import Prompt
from megatron_dypo.reward import RewardFunction, build_reward

WORKERS = 2
HANG = "9^{9^{9^{9}}}"
REASONING = "We add the parts, so that x = 3y + 4 and \\frac{a}{b} holds for each of them. " * 20
KINDS = {"integer": 60, "fraction": 15, "decimal": 12, "unit": 10, "expression": 3}  # per cent


def pair(kind: str, draw: random.Random) -> tuple[str, str]:
    """Return (ground truth, answer that is right half the time)."""
    n, d, off = draw.randrange(2, 5000), draw.randrange(2, 99), draw.choice((0, 0, 1, 2))
    if kind == "integer":
        return str(n), draw.choice((f"{n + off}", f"{n + off:,}", f"x = {n + off}", f"{n + off}.0"))
    if kind == "fraction":
        return f"\\frac{{{n}}}{{{d}}}", draw.choice((f"{n + off}/{d}", f"\\dfrac{{{2 * (n + off)}}}{{{2 * d}}}"))
    if kind == "decimal":
        return f"{n / 100}", draw.choice((f"{(n + off) / 100:.3f}", f"\\frac{{{n + off}}}{{100}}"))
    if kind == "unit":
        return f"{n}\\%", draw.choice((f"{n + off}", f"{n + off}\\%", f"{n + off} \\text{{ percent}}"))
    return f"{n}x + {d}", f"{d} + {n + off}x"


def responses(pairs: list[tuple[str, str]]) -> tuple[list[Prompt], list[str]]:
    prompts = [Prompt(str(index), truth, ()) for index, (truth, _) in enumerate(pairs)]
    return prompts, [f"{REASONING}\\boxed{{{answer}}}" for _, answer in pairs]


def timed(reward: RewardFunction, pairs: list[tuple[str, str]]) -> tuple[float, list]:
    """Return wall-clock seconds, and the scores."""
    prompts, texts = responses(pairs)
    start = time.perf_counter()
    scores = reward(prompts, texts)
    return time.perf_counter() - start, scores


def started(workers: int, cpu_seconds: float) -> RewardFunction:
    """Return a reward function whose workers have started."""
    reward = build_reward(Reward(workers=workers, cpu_seconds=cpu_seconds))
    timed(reward, [(f"y + {n}", f"{n} + y") for n in range(8 * workers)])
    return reward


def simple(count: int) -> dict[str, Any]:
    draw = random.Random(0)
    kinds = draw.choices([*KINDS], [*KINDS.values()], k=count)
    pairs = [pair(kind, draw) for kind in kinds]
    by_text = [one for one, kind in zip(pairs, kinds, strict=True) if kind != "expression"]
    by_math_verify = [one for one, kind in zip(pairs, kinds, strict=True) if kind == "expression"]
    with started(WORKERS, 5.0) as reward:
        seconds, scores = timed(reward, pairs)
        text_seconds, _ = timed(reward, by_text)
    with started(WORKERS, 5.0) as reward:  # its workers have not seen these answers
        expression_seconds, _ = timed(reward, by_math_verify)
    return {
        "responses": count,
        "right": sum(score.value for score in scores) / count,
        "faults": sum(score.fault is not None for score in scores),
        "to_math_verify": len(by_math_verify) / count,
        "per_second": round(count / seconds),
        "per_second_text_rules": round(len(by_text) / text_seconds),
        "per_second_math_verify": round(len(by_math_verify) / expression_seconds),
    }


def hangs(count: int, cpu_seconds: float) -> dict[str, Any]:
    before = set(psutil.Process().children(recursive=True))
    hanging = {index for index in range(count) if index % 100 == 50}
    pairs = [
        ("5", f"{HANG}+{n}") if n in hanging else (f"\\sqrt{{{2 * n * n}}}", f"{n}\\sqrt{{2}}") for n in range(count)
    ]
    with started(WORKERS, cpu_seconds) as reward:
        alone, _ = timed(reward, [one for n, one in enumerate(pairs) if n not in hanging])
    with started(WORKERS, cpu_seconds) as reward:
        seconds, scores = timed(reward, pairs)
        during = set(psutil.Process().children(recursive=True)) - before
        zombies = sum(process.status() == psutil.STATUS_ZOMBIE for process in during)
    return {
        "gradings": count,
        "hangs": len(hanging),
        "cpu_seconds": cpu_seconds,
        "faults": sum(score.fault is not None for score in scores),
        "right": sum(score.value for score in scores),
        "seconds": round(seconds, 2),
        "seconds_without_hangs": round(alone, 2),
        "seconds_of_deadlines": len(hanging) * cpu_seconds / WORKERS,
        "processes": len(during),
        "zombies": zombies,
        "processes_after_close": len(set(psutil.Process().children(recursive=True)) - before),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simple", type=int, default=20_000, help="responses in the mix")
    parser.add_argument("--gradings", type=int, default=10_000, help="gradings, 1%% of which hang")
    parser.add_argument("--cpu-seconds", type=float, default=0.5, help="deadline of one grading")
    parser.add_argument("--out", type=Path, default=RESULTS / "reward_cpu.json")
    args = parser.parse_args()
    logging.disable()  # it would log a line per batch with hangs
    report = environment("cpu", f"{WORKERS} workers", ["math-verify", "sympy", "latex2sympy2-extended"])
    report |= {"mix_percent": KINDS, "simple": simple(args.simple), "hangs": hangs(args.gradings, args.cpu_seconds)}
    args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
