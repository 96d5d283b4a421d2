"""Measure tokens per second of a training update in every layout, in one run.

python -m benchmarks.layouts [--device cpu|cuda] [--layouts dp1 tp2-sp-pp2 ...] [--rounds 3] [--updates 2] python -m
benchmarks.layouts --layouts dp8 tp8-sp --layers 32 --hidden 4096 ...

A layout's name joins its parts: dp, tp, pp, vpp (model chunks of a pipeline rank) and cp with their sizes, and sp for
sequence parallelism. Each runs in processes of its own (benchmarks/layout_worker.py, under torchrun), one after the
other, in reverse order every other round, so that a slow minute affects all alike. All train the same model on the same
global batch, so their gradient norms must agree.

Writes one JSON file with all rounds; ``python -m benchmarks.tables`` puts it into benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, ROOT, environment
from benchmarks.packing import CAP, MEAN, lognormal_lengths
from megatron_dypo.training.packing import plan_micro_batches


@dataclass(frozen=True)
class Size:
    """The model and the global batch; lengths in tokens, prompt included: lognormal of this mean, at most ``cap``."""

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    vocab: int
    prompts: int
    responses: int
    mean: int
    cap: int
    budget: int


@dataclass(frozen=True)
class Job:
    """A layout to time. ``parallel``: the configuration's section; ``updates``: after one on 1/8 of the batch."""

    size: Size
    parallel: dict = field(default_factory=dict)
    updates: int = 1

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**values | {"size": Size(**values["size"])})


LAYOUTS = {
    "cpu": [
        "dp1", "dp2", "tp2", "tp2-sp", "pp2", "pp2-vpp2", "cp2",
        "dp4", "pp4", "tp2-sp-pp2", "tp2-sp-pp2-vpp2", "tp2-sp-cp2", "pp2-cp2",
    ],
    "cuda": [
        "dp8", "tp2-sp-dp4", "tp4-sp-dp2", "tp8-sp", "pp2-dp4", "tp2-sp-pp2-dp2", "tp2-sp-pp4", "tp2-sp-pp4-vpp2",
        "cp2-dp4", "tp2-sp-cp2-dp2", "tp4-sp-cp2", "tp2-sp-pp2-cp2",
    ],
}  # fmt: skip
SIZE_FIELDS = [each.name for each in fields(Size)]
SIZES = {
    "cpu": Size(
        layers=4,
        hidden=256,
        ffn=1024,
        heads=8,
        groups=4,
        vocab=4096,
        prompts=8,
        responses=4,
        mean=256,
        cap=1024,
        budget=1024,
    ),
    "cuda": Size(
        layers=32,
        hidden=4096,
        ffn=14336,
        heads=32,
        groups=8,
        vocab=128256,
        prompts=64,
        responses=8,
        mean=MEAN,
        cap=CAP,
        budget=16384,
    ),
}
KEYS = {"tp": "tensor", "pp": "pipeline", "vpp": "virtual_pipeline", "cp": "context"}
PACKAGES = ("torch", "megatron-core", "transformer-engine")
PLANNED, RANKS, BUDGET = 65_536, 32, 16_384
SECONDS = 3600


def parse(name: str) -> tuple[int, dict[str, Any]]:
    """Return a layout's number of ranks and its configuration section."""
    sizes, parallel = {"dp": 1}, {}
    for part in name.split("-"):
        found = re.fullmatch(r"(dp|tp|pp|vpp|cp)([1-9][0-9]*)|sp", part)
        if not found:
            raise ValueError(f"{name}: {part} is none of dpN, tpN, ppN, vppN, cpN and sp")
        if part == "sp":
            parallel["sequence_parallel"] = True
        else:
            sizes[found[1]] = int(found[2])
    parallel |= {KEYS[axis]: size for axis, size in sizes.items() if axis in KEYS}
    return math.prod(size for axis, size in sizes.items() if axis != "vpp"), parallel


def measure(name: str, size: Size, updates: int) -> dict[str, Any]:
    """Return what a fresh group of processes measures."""
    ranks, parallel = parse(name)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command = [*launcher, "-m", "benchmarks.layout_worker", Job(size, parallel, updates).to_json(), str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=SECONDS)
        return json.loads(out.read_text())


def planning_seconds() -> float:
    """Return the CPU time of one plan of many sequences."""
    lengths = lognormal_lengths(PLANNED, MEAN, CAP, seed=0)
    began = time.process_time()
    plan_micro_batches(lengths, RANKS, BUDGET)
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--layouts", nargs="+", metavar="NAME", help="layouts to time; ratios are to the first")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=2, help="timed updates per round")
    parser.add_argument("--out", type=Path)
    for name in SIZE_FIELDS:
        parser.add_argument(f"--{name}", type=int)
    options = parser.parse_args()
    device = options.device
    given = {name: getattr(options, name) for name in SIZE_FIELDS}
    size = replace(SIZES[device], **{name: value for name, value in given.items() if value is not None})
    names = options.layouts or LAYOUTS[device]
    records = {name: {"layout": name, "ranks": parse(name)[0], "rounds": []} for name in names}
    report = environment(device, "1 thread a rank", PACKAGES) | {
        "size": asdict(size),
        "planning": {"sequences": PLANNED, "ranks": RANKS, "budget": BUDGET, "cpu_seconds": planning_seconds()},
        "results": list(records.values()),
    }
    out = options.out or RESULTS / f"layouts_{device}.json"
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            measured = measure(name, size, options.updates)
            report["parameters"] = measured["parameters"]
            records[name]["rounds"].append(measured["updates"])
            print(number + 1, name, measured["updates"][-1], file=sys.stderr)
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
