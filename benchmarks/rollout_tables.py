"""Render the tables of the rollout side: weight sync, changed values, overhead, overlap."""

from __future__ import annotations

from statistics import median
from typing import Any

from benchmarks.markdown import measured_on, table

Report = dict[str, Any]
WAYS = {
    "memcpy": "memcpy of the same tensors",
    "vllm_reload": "vLLM's own `reload_weights` of them, in process",
    "in_process": "**sync, vLLM in process**",
    "http_shared_memory": "**sync, vLLM server: HTTP + shared memory**",
    "in_process_sent": "in process, `verify_sync: sent`, a twentieth of the tensors",
    "in_process_stored": "in process, `verify_sync: stored`, a twentieth of the tensors",
    "in_process_stored_all": "in process, `verify_sync: stored`, `verify_syncs: 1`: all tensors",
}


def weight_sync(report: Report) -> str:
    """Return the table of weight sync; ratios are the medians of the rounds' ratios."""
    rounds = report["rounds"]

    def ratio(way: str, base: str) -> str:
        pairs = zip(rounds[way], rounds[base], strict=True)
        return f"{median(a['seconds'] / b['seconds'] for a, b in pairs):.2f}x"

    rows = [
        [
            label,
            f"{median(record['seconds'] for record in rounds[way]):.2f}",
            ratio(way, "memcpy"),
            ratio(way, "vllm_reload"),
        ]
        for way, label in WAYS.items()
        if way in rounds
    ]
    size = f"{report['bytes'] / 1e6:,.0f} MB, {len(rounds['memcpy'])} rounds"
    return f"{measured_on(report)} {size}.\n\n" + table(["", "seconds", "x memcpy", "x `reload_weights`"], rows)


def export(report: Report) -> str:
    """Return one row per commit, oldest first."""
    rows = [[name, f"{entry['calls']:,}", f"{median(entry['seconds']):.2f}"] for name, entry in report.items()]
    last = next(reversed(report.values()))
    return f"{measured_on(last)} {last['tensors']:,} tensors.\n\n" + table(["", "collectives a sync", "seconds"], rows)


def changed_values(report: Report) -> str:
    """Return one row per model: the shares of changed values, and their bytes relative to all."""
    rows = []
    for name, entry in report.items():
        for rate, run in entry["lr"].items():
            shares = run["changed"]
            cells = [f"{share:.1%}" for share in (shares[0], median(shares), max(shares))]
            size = f"{run['values'] / 1e6:,.1f}e6"
            rows.append([name, size, rate, str(len(shares)), *cells, f"{3 * median(shares):.2f}x"])
    header = ["task", "values", "`optimizer.lr`", "updates", "the first changes", "median", "most", "bytes, median"]
    return f"{measured_on(next(reversed(report.values())))}\n\n" + table(header, rows)


def overlap(report: Report) -> str:
    """Return the overhead of rollouts in process, and one row per round of both ways to run."""
    shares = [1 - record["inside_vllm"] / record["seconds"] for record in report["overhead"]]
    said = f"In process, {median(shares):.1%} of a rollout is spent outside of vLLM's `generate`"
    rows = []
    for number, pair in enumerate(report["overlap"], start=1):
        off, on = pair["False"], pair["True"]
        trained = off["time/logprob"] + off["time/update"]
        rows.append(
            [
                str(number),
                *(f"{seconds:.2f}" for seconds in (off["time/rollout"], trained, off["time/step"], on["time/step"])),
                f"{1 - on['time/step'] / off['time/step']:.0%}",
            ]
        )
    names = ["round", "samples, s", "trains, s", "step without overlap, s", "step with overlap, s", "saved"]
    span = f"{min(shares):.1%} to {max(shares):.1%} in {len(shares)} rounds"
    return f"{measured_on(report)}\n\n{said} ({span}).\n\n" + table(names, rows)
