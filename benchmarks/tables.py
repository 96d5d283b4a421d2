"""Put the results under benchmarks/results/ into the pages that quote them, so that they never disagree.

    python -m benchmarks.tables

In benchmarks/README.md it replaces what stands between ``<!-- NAME -->`` and ``<!-- end NAME -->`` for every name in
SECTIONS; README.md and docs/status.md get their GPU columns. Figures are medians over rounds; "x naive" is the median
of the rounds' ratios.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.gpu_report.published import README, STATUS, performance, with_gpu_column, with_ticks
from benchmarks.heads import HEADS, NAIVE
from benchmarks.machine import RESULTS, ROOT
from benchmarks.markdown import measured_on, table
from benchmarks.rollout_tables import changed_values, export, overlap, weight_sync

PAGE = ROOT / "benchmarks" / "README.md"
Report = dict[str, Any]
Record = dict[str, Any]


def in_order(records: list[Record]) -> list[str]:
    """Return the heads that have records, in order."""
    names = {record["head"] for record in records}
    return [name for name in HEADS if name in names]


class Shape:
    """The records of one (T, H, V)."""

    def __init__(self, report: Report, tokens: int, hidden: int, vocab: int):
        self.tokens, self.hidden, self.vocab = tokens, hidden, vocab
        place = (tokens, hidden, vocab)
        records = [r for r in report["results"] if (r["tokens"], r["hidden"], r["vocab"]) == place]
        self.records = {(r["head"], r["active"]): r for r in records}
        self.actives = list(dict.fromkeys(r["active"] for r in records))
        self.heads = in_order(records)

    @classmethod
    def all_of(cls, report: Report) -> list[Shape]:
        places = dict.fromkeys((r["tokens"], r["hidden"], r["vocab"]) for r in report["results"])
        return [cls(report, *place) for place in places]

    def measured(self, head: str, active: float) -> Record | None:
        record = self.records.get((head, active))
        return None if record is None or "failed" in record else record

    def value(self, head: str, active: float, field: str) -> float | None:
        record = self.measured(head, active)
        return None if record is None else median(r[field] for r in record["rounds"])

    def ratio(self, head: str, active: float, field: str, to: str = NAIVE) -> float | None:
        record, other = self.measured(head, active), self.measured(to, active)
        if record is None or other is None:
            return None
        return median(own[field] / base[field] for own, base in zip(record["rounds"], other["rounds"], strict=False))

    def worst(self, head: str, *names: str) -> float | None:
        records = [self.measured(head, active) for active in self.actives]
        errors = [r["errors"][name] for r in records if r for name in names if name in r.get("errors", {})]
        return max(errors, default=None)

    def cell(self, head: str, active: float, field: str, form: str) -> str:
        record = self.records.get((head, active))
        if record is None:
            return "-"
        if "failed" in record:
            return record["failed"].split(":")[0]
        ratio = self.ratio(head, active, field)
        return form.format(self.value(head, active, field)) + ("" if ratio is None else f" ({ratio:.2f}x)")


def error(value: float | None) -> str:
    return "-" if value is None else f"{value:.1e}"


def percent(active: float) -> str:
    return f"{active:.0%} active"


def heads_measured_on(report: Report) -> str:
    missing = report.get("missing", {}).items()
    return measured_on(report) + "".join(f" Not measured: {HEADS[name].label} ({why})." for name, why in missing)


def head_list(report: Report) -> str:
    return "\n".join(f"- {HEADS[name].label}: {HEADS[name].note}." for name in in_order(report["results"]))


def head_cpu(report: Report) -> str:
    parts = [heads_measured_on(report), head_list(report)]
    for shape in Shape.all_of(report):
        parts.append(f"### T {shape.tokens}, H {shape.hidden}, V {shape.vocab}, fp32")
        rows = [
            [
                HEADS[head].label,
                *(
                    shape.cell(head, active, field, form)
                    for active in shape.actives
                    for field, form in (("cpu_seconds", "{:.2f}"), ("wall_seconds", "{:.2f}"))
                ),
            ]
            for head in shape.heads
        ]
        header = [f"{what}, {percent(active)}" for active in shape.actives for what in ("CPU-s", "wall s")]
        parts.append(table(["", *header], rows))
        rows = [
            [
                HEADS[head].label,
                *(shape.cell(head, active, "peak_mib", "{:.0f}") for active in shape.actives),
                error(shape.worst(head, "logp")),
                error(shape.worst(head, "dhidden", "dweight")),
            ]
            for head in shape.heads
        ]
        header = [f"peak MiB, {percent(active)}" for active in shape.actives]
        parts.append(table(["", *header, "log-prob error", "gradient error"], rows))
    parts += ["### Targets", table(["target", "T, H, V", "measured", "met"], targets_cpu(report))]
    return "\n\n".join(parts)


ENTROPY_LIMIT = 1.08  # of the head's CPU-seconds, with the entropy's gradient


def entropy_gradient(report: Report) -> str:
    (shape,) = Shape.all_of(report)
    (active,) = shape.actives
    heads = ("ours", "ours_entropy_gradient")
    without, with_it = ([r["cpu_seconds"] for r in shape.measured(head, active)["rounds"]] for head in heads)
    rows = [
        [
            HEADS[head].label,
            f"{shape.value(head, active, 'cpu_seconds'):.2f}",
            f"{shape.ratio(head, active, 'cpu_seconds', to='ours'):.3f}x",
            f"{shape.value(head, active, 'peak_mib'):.0f}",
        ]
        for head in heads
    ]
    ratio = shape.ratio(heads[1], active, "cpu_seconds", to="ours")
    ratios = ", ".join(f"{a / b:.3f}" for a, b in zip(with_it, without, strict=True))
    place = f"T {shape.tokens}, H {shape.hidden}, V {shape.vocab}, fp32, {percent(active)}; {len(with_it)} rounds"
    result = f"Each round's ratio: {ratios}. At most {ENTROPY_LIMIT}x is the aim, met: {yes(ratio <= ENTROPY_LIMIT)}."
    parts = [measured_on(report), place + ".", table(["", "CPU-s", "x without", "peak MiB"], rows), result]
    return "\n\n".join(parts)


def targets_cpu(report: Report) -> Iterable[list[str]]:
    """Yield [target, shape, measured, yes or no] for what the report can answer."""
    for shape in Shape.all_of(report):
        place = f"{shape.tokens}, {shape.hidden}, {shape.vocab}"
        limits = [
            ("CPU-seconds at most 1.0x naive, all active", "ours", 1.0, "cpu_seconds", 1.0),
            ("peak memory at most 0.35x naive, all active", "ours", 1.0, "peak_mib", 0.35),
            ("CPU-seconds at most 0.5x naive at 42% active, slopes zero", "ours", 0.42, "cpu_seconds", 0.5),
            ("the same, compacted", "ours_compacted", 0.42, "cpu_seconds", 0.5),
        ]
        for target, head, active, field, limit in limits:
            ratio = shape.ratio(head, active, field)
            if ratio is not None:
                yield [target, place, f"{ratio:.2f}x", yes(ratio <= limit)]
        for active in shape.actives:
            # peers are told which tokens are inactive, so ours is, too; they give no entropy
            with_entropy = "ours" if active == 1 else "ours_compacted"
            peers = [
                peer
                for peer in shape.heads
                if not peer.startswith(("ours", NAIVE)) and (shape.ratio(peer, active, "peak_mib") or 1) < 1
            ]
            for own, what in ((with_entropy, ""), ("ours_without_entropy", ", no entropy either")):
                if peers and shape.measured(own, active):
                    ratio, peer = max((shape.ratio(own, active, "cpu_seconds", to=peer), peer) for peer in peers)
                    target = f"faster than every peer that uses less memory than naive, {percent(active)}{what}"
                    yield [target, place, f"{ratio:.2f}x the fastest, {HEADS[peer].label}", yes(ratio < 1)]
        for target, names, limit in (
            ("log-probs within 2e-5 of float64", ["logp"], 2e-5),
            ("gradients within 1e-5 of their norm", ["dhidden", "dweight"], 1e-5),
        ):
            worst = max((shape.worst(head, *names) or 0 for head in shape.heads if head.startswith("ours")), default=0)
            if worst:
                yield [target, place, f"{worst:.1e}", yes(worst <= limit)]


def yes(met: bool) -> str:
    return "yes" if met else "**no**"


def checkpoints(report: Report) -> str:
    names = {
        "held_up_seconds": "training held up, s",
        "whole_after_seconds": "checkpoint whole after, s",
        "first_whole_after_seconds": "the first one, s",
    }
    savers = {"ours": "ours", "megatron_core": "Megatron-Core `dist_checkpointing.save`"}
    rows = [[label, *(f"{report[key][name]:.2f}" for name in names)] for key, label in savers.items() if key in report]
    size = f"{report['ranks']} ranks, {report['parameters']:,} parameters, {report['mib']} MiB; torch {report['torch']}"
    return size + ".\n\n" + table(["", *names.values()], rows)


def packing(report: Report) -> str:
    names = ["prompts x responses", "data-parallel ranks", "budget", "multiple", "micro-batches a rank"]
    names += ["filled", "least filled", "perfect packing", "busiest rank", "the worst", "costliest micro-batch"]
    rows = [
        [
            f"{plan['prompts']} x {plan['responses']}",
            *(f"{plan[name]:,}" for name in ("ranks", "budget", "multiple")),
            f"{plan['micro_batches_a_rank']:.1f}",
            *(f"{plan[name]:.1%}" for name in ("filled", "filled_least", "filled_if_perfect")),
            *(f"{plan[name]:.3f}" for name in ("busiest_rank", "busiest_rank_worst", "costliest_micro_batch")),
        ]
        for plan in report["plans"]
    ]
    parts = [table(names, rows)]
    labels = {"padded_sorted": "padded, sorted", "padded": "padded, as they come"}
    columns = [name for name in report["computed"][0] if name != "budget"]
    header = [labels.get(name) or "packed, TP {} x CP {}".format(*name.split("x")) for name in columns]
    rows = [[f"{line['budget']:,}", *(f"{line[name]:.1%}" for name in columns)] for line in report["computed"]]
    parts.append(table(["budget", *header], rows))
    return "\n\n".join(parts)


def layouts(report: Report) -> str:
    """Return the table of layouts; ratios are the medians of the rounds' ratios to the first layout."""
    size, planning = report["size"], report["planning"]
    first = report["results"][0]

    def rounds(record: Record, field: str) -> list[float]:
        return [median(update[field] for update in updates) for updates in record["rounds"]]

    def ratio(record: Record, field: str) -> float:
        own, base = rounds(record, field), rounds(first, field)
        return median(a / b for a, b in zip(own, base, strict=True))

    tokens = first["rounds"][0][0]["tokens"]
    model = f"{report['parameters']:,} parameters ({size['layers']} layers, H {size['hidden']}, V {size['vocab']})"
    batch = f"{size['prompts']} prompts x {size['responses']} responses, {tokens:,} tokens in micro-batches of "
    batch += f"{size['budget']:,} at most"
    plan = f"A plan for {planning['sequences']:,} sequences and {planning['ranks']} ranks takes "
    plan += f"{planning['cpu_seconds']:.2f} CPU-seconds"
    rows = [
        [
            layout_label(record["layout"]),
            str(record["ranks"]),
            str(record["rounds"][0][0]["micro_batches"]),
            f"{tokens / median(rounds(record, 'wall_seconds')):,.0f}",
            f"{1 / ratio(record, 'wall_seconds'):.2f}x",
            f"{median(rounds(record, 'cpu_seconds')):.2f} ({ratio(record, 'cpu_seconds'):.2f}x)",
            f"{max(rounds(record, 'memory_gib')):.2f}",
        ]
        for record in report["results"]
    ]
    names = ["layout", "ranks", "micro-batches a rank", "tokens/s", f"x {layout_label(first['layout'])}"]
    names += ["CPU-seconds an update", "peak GiB a rank"]
    return "\n\n".join([measured_on(report), f"{model}; {batch}. {plan}.", table(names, rows)])


def layout_label(name: str) -> str:
    """Return a readable name: tp2-sp-pp2 is TP2 + SP x PP2."""
    return "one rank" if name == "dp1" else name.upper().replace("-SP", " + SP").replace("-", " x ")


SECTIONS = {
    "packing": packing,
    "layouts_cpu": layouts,
    "linear_logprob_cpu": head_cpu,
    "entropy_gradient_cpu": entropy_gradient,
    "checkpoints_cpu": checkpoints,
    "weight_sync_cpu": weight_sync,
    "export_cpu": export,
    "changed_values_cpu": changed_values,
    "rollout_cpu": overlap,
}


def written(page: str, results: Path) -> str:
    """Return ``page`` with every section rendered from ``results``: NAME.json, and the files of ``make gpu-report``."""
    bodies = {"gpu_report": performance(results)}
    for name, render in SECTIONS.items():
        file = results / f"{name}.json"
        bodies[name] = render(json.loads(file.read_text())) if file.exists() else "Not measured yet."
    for name, body in bodies.items():
        marked = re.compile(f"(<!-- {name} -->\\n).*?(<!-- end {name} -->)", re.DOTALL)
        page, count = marked.subn(lambda m, body=body: f"{m[1]}\n{body}\n\n{m[2]}", page)
        if count != 1:
            raise ValueError(f"{PAGE}: {count} places marked {name}, expected one")
    return page


def main() -> None:
    PAGE.write_text(written(PAGE.read_text(), RESULTS))
    STATUS.write_text(with_gpu_column(STATUS.read_text(), RESULTS))
    README.write_text(with_ticks(README.read_text(), RESULTS))


if __name__ == "__main__":
    main()
