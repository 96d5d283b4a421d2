"""Measure the output head and its peers with benchmarks/linear_logprob.py, in both conventions for FLOPs.

4-product TFLOP/s count 8 T H V (forward, its recomputation, two gradients), useful ones 6 T H V, over active tokens,
whatever a head does. Legend: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_report.results import Record
from benchmarks.heads import CEILING, FLOOR, HEADS, NAIVE, Setting
from benchmarks.linear_logprob import PRESETS, compare
from benchmarks.tables import Shape

OURS, COMPACTED, CCE = "ours", "ours_compacted", "cce"
PEERS = ("quack", "liger_scaled_ce", CCE)


def head(record: Record) -> None:
    plan = PRESETS["tiny" if record.tiny else "report"]
    field = "cuda_seconds" if plan.device == "cuda" else "wall_seconds"
    shown: set[Setting] = set()

    def show(report: dict[str, Any]) -> None:
        """Print what is new."""
        for setting in set(map(_setting, report["results"])) - shown:
            shown.add(setting)
            shape = Shape(report, setting.tokens, setting.hidden, setting.vocab)
            place = f"T {setting.tokens}, H {setting.hidden}, V {setting.vocab}, {setting.active:.0%} active"
            header = ["", "ms", "useful TFLOP/s", "4-product TFLOP/s", "x three products", "GiB", "of naive's"]
            record.table(place, [*header, "largest error"], list(_rows(shape, setting.active, field)))
            _figures(record, shape, setting, field)

    with tempfile.TemporaryDirectory() as folder:
        report = compare(plan, Path(folder) / "head.json", show)
    for name, why in report["missing"].items():
        record.note(f"Not measured: {HEADS[name].label.replace('*', '')} ({why}).")


def _setting(result: dict[str, Any]) -> Setting:
    return Setting(**{each.name: result[each.name] for each in dataclasses.fields(Setting)})


def _rows(shape: Shape, active: float, field: str) -> Iterator[list[str]]:
    for name in shape.heads:
        stored = shape.records.get((name, active))
        if stored is None:
            continue
        label, seconds = HEADS[name].label.replace("*", ""), shape.value(name, active, field)
        if seconds is None:
            yield [label, stored["failed"], *[""] * 6]
            continue
        floor, of_naive = shape.value(FLOOR, active, field), shape.ratio(name, active, "peak_mib")
        errors = stored.get("errors", {}).values()
        yield [
            label,
            f"{1000 * seconds:.4g}",
            *(f"{stored['tflops'][count]:.3g}" for count in ("useful", "four_products")),
            f"{seconds / (active * floor):.2f}" if floor and not HEADS[name].products else "",
            f"{shape.value(name, active, 'peak_mib') / 1024:.2f}",
            "" if of_naive is None else f"{of_naive:.1%}",
            f"{max(errors):.1e}" if errors else "",
        ]


def _figures(record: Record, shape: Shape, setting: Setting, field: str) -> None:
    """Record ratios, as medians of the rounds' ratios; compacted if some tokens are inactive, as the policy does it."""
    active, place, what = setting.active, f"t{setting.tokens}", f"T {setting.tokens}, {setting.active:.0%} active"
    own = COMPACTED if active < 1 else OURS
    key = f"{place}_{round(100 * active)}"
    if (rates := shape.records[own, active].get("tflops")) and shape.measured(own, active):
        record.figure(f"{key}/useful", rates["useful"], "TFLOP/s", f"{what}: ours, useful")
        record.figure(f"{key}/four_products", rates["four_products"], "TFLOP/s", f"{what}: ours, 4-product")
    else:
        record.fail(f"{what}: ours: {shape.records[own, active].get('failed', 'not measured')}")
    if (ratio := shape.ratio(own, active, field, to=FLOOR)) is not None:
        record.figure(f"{key}/over_products", ratio / active, "x", f"{what}: ours, of the time of three bare products")
    if (ratio := shape.ratio(own, active, field, to=CEILING)) is not None:
        record.figure(f"{key}/over_one", ratio / (3 * active), "x", f"{what}: ours, of three times the logits' product")
    if (memory := shape.ratio(own, active, "peak_mib")) is not None:
        record.figure(f"{key}/memory", 100 * memory, "%", f"{what}: ours, of naive's memory beyond the inputs")
    for peer in (NAIVE, *PEERS):
        if (ratio := shape.ratio(own, active, field, to=peer)) is not None:
            label = HEADS[peer].label.replace("*", "")
            record.figure(f"{key}/over_{peer}", ratio, "x", f"{what}: ours, of {label}'s time")
