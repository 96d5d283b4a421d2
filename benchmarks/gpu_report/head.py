"""The output head beside its peers, by benchmarks/linear_logprob.py, in both ways to count its arithmetic.

4-product TFLOP/s count 8 T H V (forward, its recomputation, two gradients), useful ones 6 T H V, over active tokens,
whatever a head does. Legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_report.results import Record
from benchmarks.heads import CEILING, HEADS, NAIVE
from benchmarks.machine import ROOT
from benchmarks.tables import Shape

OURS, COMPACTED, CCE = "ours", "ours_compacted", "cce"
PEERS = ("quack", "liger_scaled_ce", "liger_logprob", CCE, "cce_torch_compile")
NAMES = [name for name in (CEILING, NAIVE, OURS, COMPACTED, "ours_without_entropy", *PEERS) if name in HEADS]


@dataclass(frozen=True)
class Run:
    """One call of the benchmark."""

    tokens: int
    hidden: int
    vocab: int
    actives: tuple[float, ...]
    heads: list[str]
    rounds: int


RUNS = (Run(32768, 3584, 152064, (1.0, 0.42), NAMES, 2), Run(8192, 3584, 152064, (1.0,), NAMES, 2))
TINY = (Run(64, 32, 512, (1.0, 0.42), [NAIVE, OURS, COMPACTED], 1),)


def head(record: Record) -> None:
    cuda = torch.cuda.is_available()
    for run in TINY if record.tiny else RUNS:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "head.json"
            sizes = ["--shapes", f"{run.tokens},{run.hidden},{run.vocab}", "--rounds", str(run.rounds)]
            sizes += ["--active", *map(str, run.actives), "--threads", "1", "--heads", *run.heads]
            command = [sys.executable, "-m", "benchmarks.linear_logprob", "--device", "cuda" if cuda else "cpu", *sizes]
            subprocess.run([*command, "--out", str(out)], cwd=ROOT, check=True)
            report = json.loads(out.read_text())
        for name, why in report["missing"].items():
            record.note(f"T {run.tokens}: {HEADS[name].label} is not measured: {why}")
        shape = Shape(report, run.tokens, run.hidden, run.vocab)
        for active in run.actives:
            title = f"T {run.tokens}, H {run.hidden}, V {run.vocab}, {active:.0%} active"
            header = ["", "ms", "useful TFLOP/s", "4-product TFLOP/s", "x three products", "GiB", "of naive's"]
            record.table(title, [*header, "largest error"], list(_rows(shape, active, _field(cuda))))
        _figures(record, shape, run, _field(cuda))


def _field(cuda: bool) -> str:
    return "cuda_seconds" if cuda else "wall_seconds"


def _rows(shape: Shape, active: float, field: str) -> Iterator[list[str]]:
    for name in shape.heads:
        stored = shape.records.get((name, active))
        if stored is None:
            continue
        label = HEADS[name].label.replace("*", "")
        seconds, peak = shape.value(name, active, field), shape.value(name, active, "peak_mib")
        if seconds is None:
            yield [label, stored["failed"], *[""] * 6]
            continue
        floor, of_naive = _floor(shape, active, field), shape.ratio(name, active, "peak_mib")
        errors = shape.measured(name, active).get("errors", {})
        rates = ["", ""]
        if name != CEILING:
            product = 2 * shape.tokens * active * shape.hidden * shape.vocab
            rates = [f"{count * product / seconds / 1e12:.3g}" for count in (3, 4)]
        yield [
            label,
            f"{1000 * seconds:.4g}",
            *rates,
            f"{seconds / floor:.2f}" if floor and name != CEILING else "",
            f"{peak / 1024:.2f}",
            "" if of_naive is None else f"{of_naive:.1%}",
            f"{max(errors.values()):.1e}" if errors else "",
        ]


def _floor(shape: Shape, active: float, field: str) -> float | None:
    """Seconds of three bare products over the active tokens."""
    product = shape.value(CEILING, active, field)
    return None if product is None else 3 * product * active


def _figures(record: Record, shape: Shape, run: Run, field: str) -> None:
    place = f"t{run.tokens}"
    floor = _floor(shape, 1.0, field)
    if floor and (ours := shape.value(OURS, 1.0, field)):
        useful = 6 * run.tokens * run.hidden * run.vocab / ours / 1e12
        record.figure(f"{place}/useful", useful, "TFLOP/s", f"T {run.tokens}: ours, useful")
        record.figure(f"{place}/four_products", useful * 4 / 3, "TFLOP/s", f"T {run.tokens}: ours, 4-product")
        record.figure(f"{place}/over_products", ours / floor, "x", f"T {run.tokens}: ours, of three bare products")
    if (memory := shape.ratio(OURS, 1.0, "peak_mib")) is not None:
        record.figure(f"{place}/memory", 100 * memory, "%", f"T {run.tokens}: ours, of naive's memory beyond the inputs")
    for active in run.actives:
        own = COMPACTED if active < 1 else OURS
        for peer in shape.heads:
            ratio = shape.ratio(own, active, field, to=peer)
            if peer in (*PEERS, NAIVE) and ratio is not None:
                key = "over_cce" if peer == CCE and active < 1 else f"over_{peer}_{active:g}"
                label = HEADS[peer].label.replace("*", "")
                record.figure(f"{place}/{key}", ratio, "x", f"T {run.tokens}, {active:.0%} active: ours, of {label}'s time")
    failed = [name for name in (OURS, COMPACTED) for a in run.actives if "failed" in shape.records.get((name, a), {})]
    if failed:
        record.fail(f"T {run.tokens}: {', '.join(dict.fromkeys(failed))} failed")
