"""The output head, forward and backward, beside the naive one and the peers' (benchmarks/heads.py).

    python -m benchmarks.linear_logprob [--device cpu|cuda] [--threads 2] [--rounds N]
    python -m benchmarks.linear_logprob --shapes 64,32,512 --heads naive ours --out tiny.json

Every head has a process of its own (benchmarks/worker.py), warmed by an untimed step at every shape. In a round each
runs once, one after the other while the rest sleep, in reverse order every other round: a slow minute hits all alike,
and ratios are taken within a round. On the CPU a head that takes more than SLOW x naive runs in the first round only.
Errors are against float64, computed by yet another process.

Writes one JSON file with all rounds; ``python -m benchmarks.tables`` puts it into docs/performance.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import select
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.heads import HEADS, NAIVE, SEQUENCES, Setting
from benchmarks.machine import RESULTS, ROOT, environment

SHAPES = {
    "cpu": ["2048,512,32000", "1024,256,152064"],
    # 19008: what one of 8 tensor-parallel ranks multiplies, without its collectives
    "cuda": [f"{tokens},3584,{vocab}" for vocab in (152064, 19008) for tokens in (8192, 16384, 32768, 65536)],
}
ROUNDS = {"cpu": 3, "cuda": 4}
REPEATS = {"cpu": 1, "cuda": 5}  # timed steps a round
SLOW = 1.5
FLOAT64 = "float64"
PACKAGES = ("torch", "triton", "liger-kernel", "cut-cross-entropy")
CHECKED_TOKENS = 8192  # beyond it, at CUDA's shapes, float64 takes longer than all else
ANSWER_SECONDS = 1200


class Worker:
    """One process: a line of JSON to it, a line of JSON back."""

    def __init__(self, name: str, device: str, threads: int):
        self.name = name
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", name, device, str(threads)],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": str(threads), "TORCHINDUCTOR_COMPILE_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, setting: Setting, **request: Any) -> dict[str, Any]:
        self.process.stdin.write(json.dumps({"setting": dataclasses.asdict(setting)} | request).encode() + b"\n")
        self.process.stdin.flush()
        if not select.select([self.process.stdout], [], [], ANSWER_SECONDS)[0]:
            raise TimeoutError(f"{self.name}: no answer within {ANSWER_SECONDS} s at {setting}")
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: ended with exit code {self.process.wait()} at {setting}")
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(workers: dict[str, Worker], setting: Setting, device: str, rounds: int) -> list[dict[str, Any]]:
    """One record a head: {"head", the setting's fields, "rounds": [...], "errors": {...}} or {..., "failed": why}."""
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
        check = {"reference": folder} if setting.tokens <= CHECKED_TOKENS else {}
        if check:
            workers[FLOAT64].ask(setting, **check)
        for number in range(rounds):
            for name in names.copy() if number % 2 == 0 else names[::-1]:
                run(name, repeats=REPEATS[device], **(check if number == 0 else {}))
            if device == "cpu" and number == 0 and NAIVE in names:
                limit = SLOW * records[NAIVE]["rounds"][0]["cpu_seconds"]
                names = [name for name in names if records[name]["rounds"][0]["cpu_seconds"] <= limit]
    return list(records.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2, help="of each process, one of which works at a time")
    parser.add_argument("--rounds", type=int, help="3 on the CPU, 4 of 5 steps each on CUDA")
    parser.add_argument("--shapes", nargs="+", metavar="T,H,V", help=f"T in multiples of {SEQUENCES}")
    parser.add_argument("--active", nargs="+", type=float, default=[1.0, 0.85, 0.42], help="shares of active tokens")
    parser.add_argument("--heads", nargs="+", choices=list(HEADS), default=list(HEADS))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    device = options.device
    report = environment(device, f"{options.threads} threads", PACKAGES) | {"missing": {}, "results": []}
    workers = {FLOAT64: Worker(FLOAT64, device, options.threads)}
    for name in dict.fromkeys([NAIVE, *options.heads]):
        if device not in HEADS[name].devices:
            continue
        if importlib.util.find_spec(HEADS[name].package):
            workers[name] = Worker(name, device, options.threads)
        else:
            report["missing"][name] = f"{HEADS[name].package} is not installed"
            print(f"{name}: {report['missing'][name]}", file=sys.stderr)
    try:
        for shape in options.shapes or SHAPES[device]:
            for active in options.active:
                setting = Setting(*map(int, shape.split(",")), active)
                print(setting, file=sys.stderr)
                report["results"] += measure(workers, setting, device, options.rounds or ROUNDS[device])
    finally:
        for worker in workers.values():
            worker.close()
    out = options.out or RESULTS / f"linear_logprob_{device}.json"
    out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
