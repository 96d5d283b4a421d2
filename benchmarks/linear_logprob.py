"""Compare the output head, forward and backward, with the naive one and the peers' (benchmarks/heads.py).

python -m benchmarks.linear_logprob [--preset cpu|cuda|entropy|report|tiny] [--rounds N] [--out FILE] python -m
benchmarks.linear_logprob --shapes 64,32,512 --heads naive ours --out tiny.json

Every head has its own process (benchmarks/worker.py), warmed up by an untimed step at every shape. In a round each runs
once, in sequence while the rest sleep, in reverse order every other round: a slow minute affects all alike, and ratios
are taken within a round. On the CPU a head slower than ``slow`` x naive runs in the first round only. Errors are
relative to float64, computed by another process. A head whose package is missing, that fails or that does not answer is
recorded as such, and the others continue.

Writes one JSON file with all rounds, again after every setting, so that a stop loses one setting at most; ``python -m
benchmarks.tables`` puts it into benchmarks/README.md. Other scripts call ``compare``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.heads import HEADS, NAIVE, SEQUENCES, Setting
from benchmarks.machine import RESULTS, ROOT, environment

FLOAT64 = "float64"
PACKAGES = ("torch", "triton", "liger-kernel", "nvidia-cutlass-dsl", "cut-cross-entropy", "quack-kernels")
CHECKED_TOKENS = 8192  # above it, at CUDA's shapes, float64 would dominate the run time
WARM_TOKENS = 1024  # tokens of the step at which, on CUDA, all heads compile at the same time


@dataclass(frozen=True)
class Plan:
    """What to measure. ``repeats``: timed steps per round; ``checked``: settings whose errors are measured."""

    device: str
    settings: tuple[Setting, ...]
    heads: tuple[str, ...] = tuple(HEADS)
    rounds: int = 3
    repeats: int = 1
    checked: frozenset[Setting] = frozenset()
    threads: int = 2  # per process; one process works at a time
    answer_seconds: float = 1200  # deadline of one request; a slower head is given up
    slow: float = 1.5  # x naive on the CPU, beyond which a head runs in the first round only
    results: str = "linear_logprob"  # name of the results file, before the device


def settings_of(shapes: list[str], actives: list[float]) -> tuple[Setting, ...]:
    return tuple(Setting(*map(int, shape.split(",")), active) for shape in shapes for active in actives)


def up_to_checked_tokens(settings: tuple[Setting, ...]) -> frozenset[Setting]:
    return frozenset(setting for setting in settings if setting.tokens <= CHECKED_TOKENS)


ACTIVE = [1.0, 0.85, 0.42]
CPU = settings_of(["2048,512,32000", "1024,256,152064"], ACTIVE)
# 19008: what one of 8 tensor-parallel ranks multiplies, without its collectives
CUDA = settings_of([f"{t},3584,{v}" for v in (152064, 19008) for t in (8192, 16384, 32768, 65536)], ACTIVE)
SMALL = Setting(2048, 3584, 19008, 0.42)  # its errors are taken within seconds
REPORT = settings_of(["8192,3584,152064"], [1.0]) + settings_of(["32768,3584,152064"], [1.0, 0.42])
REPORTED = (
    "matmul", "three_products", NAIVE, "ours", "ours_compacted", "ours_without_entropy", "ours_logprob",
    "liger_scaled_ce", "cce", "quack",
)  # fmt: skip
TINY = settings_of(["64,32,512"], [1.0, 0.42])
# "report" takes under 100 s on one H200, by arithmetic: a step of all heads together takes 1.7 s at T 32768, 1.2 s of
# it at 42% active and 0.4 s at T 8192; 2 rounds x (1 untimed + 3 timed) of these are 27 s; ten processes start in 15 s
# and compile side by side in 30 s; inputs, allocations and the check in float64 take the rest.
PRESETS = {
    "cpu": Plan("cpu", CPU, checked=up_to_checked_tokens(CPU)),
    "cuda": Plan("cuda", CUDA, rounds=4, repeats=5, checked=up_to_checked_tokens(CUDA)),
    "report": Plan("cuda", (SMALL, *REPORT), REPORTED, 2, 3, frozenset([SMALL]), answer_seconds=60),
    # one thread: two that wait for each other spin on a machine that others use, too, and spinning counts
    "entropy": Plan(
        "cpu", CPU[:1], ("ours", "ours_entropy_gradient"), 5, threads=1, slow=math.inf, results="entropy_gradient"
    ),
    "tiny": Plan("cpu", TINY, (NAIVE, "ours", "ours_compacted"), 1, checked=frozenset(TINY), threads=1),
}


class Worker:
    """One process: a line of JSON in, a line of JSON out."""

    def __init__(self, name: str, plan: Plan):
        self.name, self.seconds = name, plan.answer_seconds
        self.gone = None  # why it no longer answers
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, plan.device, str(plan.threads)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(plan.threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, setting: Setting, **request: Any) -> dict[str, Any]:
        self.send(setting, **request)
        return self.answer()

    def send(self, setting: Setting, **request: Any) -> None:
        if self.process.poll() is None:
            self.process.stdin.write(json.dumps({"setting": dataclasses.asdict(setting)} | request).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """Return its answer, or {"failed": why} from the first time that none comes."""
        if self.gone is None:
            if not select.select([self.process.stdout], [], [], self.seconds)[0]:
                self.gone = f"no answer within {self.seconds:g} s"
                self.process.kill()
            elif line := self.process.stdout.readline():
                return json.loads(line)
            else:
                self.gone = f"ended with exit code {self.process.wait()}"
        return {"failed": self.gone}

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def compare(plan: Plan, out: Path, after: Callable[[dict[str, Any]], None] = lambda report: None) -> dict[str, Any]:
    """Measure all of ``plan``; return the report, written to ``out`` and passed to ``after`` at every setting."""
    report = environment(plan.device, f"{plan.threads} threads", PACKAGES) | {"missing": {}, "results": []}
    workers = {}
    for name in dict.fromkeys([NAIVE, *plan.heads]):
        if plan.device in HEADS[name].devices:
            if missing := HEADS[name].missing(plan.device):
                report["missing"][name] = f"{missing} is not installed"
                print(f"{name}: {report['missing'][name]}", file=sys.stderr)
            else:
                workers[name] = Worker(name, plan)
    if plan.checked:
        workers[FLOAT64] = Worker(FLOAT64, plan)
    try:
        if plan.device == "cuda":
            warm_up(workers, plan)
        for setting in plan.settings:
            print(setting, file=sys.stderr)
            report["results"] += measure(workers, setting, plan)
            unfinished = out.with_name(out.name + ".part")
            unfinished.write_text(json.dumps(report, indent=1) + "\n")
            unfinished.replace(out)
            after(report)
    finally:
        for worker in workers.values():
            worker.close()
    return report


def warm_up(workers: dict[str, Worker], plan: Plan) -> None:
    """Run one step of every head, all at the same time: most of it is compilation on one core each."""
    for setting in {dataclasses.replace(each, tokens=WARM_TOKENS, active=0.42) for each in plan.settings}:
        asked = [worker for name, worker in workers.items() if name != FLOAT64 and HEADS[name].where(setting)]
        for worker in asked:
            worker.send(setting, repeats=0)
        for worker in asked:
            worker.answer()


def measure(workers: dict[str, Worker], setting: Setting, plan: Plan) -> list[dict[str, Any]]:
    """Return per head {"head", the fields of setting, "rounds": [...], "errors": {...}} or {..., "failed": why}."""
    names = [name for name in workers if name != FLOAT64 and HEADS[name].where(setting)]
    records = {name: {"head": name} | dataclasses.asdict(setting) | {"rounds": []} for name in names}

    def run(name: str, **request: Any) -> None:
        answer = workers[name].ask(setting, **request)
        if "failed" in answer:
            print(f"{name} at {setting}: {answer['failed']}", file=sys.stderr)
            names.remove(name)
        records[name]["rounds"] += answer.pop("rounds", [])
        records[name] |= answer

    with tempfile.TemporaryDirectory() as folder:
        check = {"reference": folder} if setting in plan.checked else {}
        if check and "failed" in (answer := workers[FLOAT64].ask(setting, **check)):
            print(f"{FLOAT64} at {setting}: {answer['failed']}", file=sys.stderr)
            check = {}
        for number in range(plan.rounds):
            for name in names.copy() if number % 2 == 0 else names[::-1]:
                run(name, repeats=plan.repeats, **(check if number == 0 else {}))
            if plan.device == "cpu" and number == 0 and NAIVE in names:
                limit = plan.slow * records[NAIVE]["rounds"][0]["cpu_seconds"]
                names = [name for name in names if records[name]["rounds"][0]["cpu_seconds"] <= limit]
    return [record | {"tflops": tflops(record)} for record in records.values()]


def tflops(record: dict[str, Any]) -> dict[str, float]:
    """Return TFLOP/s of the median step over the active tokens A, in both conventions that peers publish.

    "useful": 6 A H V, the three products that the gradients need; "four_products": 8 A H V, whatever a head does. A
    head that only multiplies counts its own products, under both names.
    """
    seconds = [figures.get("cuda_seconds", figures.get("wall_seconds")) for figures in record["rounds"]]
    if not seconds or "failed" in record:
        return {}
    head, active = HEADS[record["head"]], record["tokens"] * record["active"]
    products = {"useful": 3, "four_products": 4}
    if head.products:
        products, active = dict.fromkeys(products, head.products), record["tokens"]
    per_product = 2 * active * record["hidden"] * record["vocab"] / median(seconds) / 1e12
    return {name: count * per_product for name, count in products.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=list(PRESETS), help="sizes; default: cuda if there is a device, else cpu")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: the preset's")
    parser.add_argument("--threads", type=int, help="threads per process (one process works at a time)")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--repeats", type=int, help="timed steps per round")
    parser.add_argument("--shapes", nargs="+", metavar="T,H,V", help=f"shapes to time; T is a multiple of {SEQUENCES}")
    parser.add_argument("--active", nargs="+", type=float, default=ACTIVE, help="shares of active tokens")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    preset = options.preset or options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    plan = PRESETS[preset]
    names = ("device", "threads", "rounds", "repeats")
    plan = dataclasses.replace(plan, **{name: getattr(options, name) for name in names if getattr(options, name)})
    if options.heads:
        plan = dataclasses.replace(plan, heads=tuple(options.heads))
    if options.shapes:
        settings = settings_of(options.shapes, options.active)
        plan = dataclasses.replace(plan, settings=settings, checked=up_to_checked_tokens(settings))
    compare(plan, options.out or RESULTS / f"{plan.results}_{plan.device}.json")


if __name__ == "__main__":
    main()
