"""Copy benchmarks/results/gpu_report_*.json into README.md, docs/status.md and benchmarks/README.md.

python -m benchmarks.tables     # writes all three
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.gpu_report.page import STATES, cell, target_table
from benchmarks.gpu_report.results import DONE, FAILED, Report
from benchmarks.gpu_report.stages import STAGES
from benchmarks.machine import ROOT
from benchmarks.markdown import table

README, STATUS = ROOT / "README.md", ROOT / "docs" / "status.md"
OPEN = "not yet measured on a GPU"
NOT_ON_GPUS = "-"  # for rows that a GPU does not affect
_SERVERS = ("server_nccl", "server_sparse_nccl", "server_ipc")
# docs/status.md's rows, by their first words -> the stages that show them on a GPU
ROWS: dict[str, tuple[str, ...] | None] = {
    "TP, SP, PP, virtual PP": ("layouts",),
    "vLLM 0": ("engine", "agreement_model", "agreement_float32", "quickstart"),
    "vLLM servers": _SERVERS,
    "Weights to servers by NCCL": _SERVERS,
    "Llama, Mistral, Qwen2.5": (),
    "Killed at any moment": ("deterministic",),
    "Resume at another layout": (),
    "A second model in the step": (),
    "Same log-probs bit for bit": ("tests",),
    "Answers graded": None,
    "Data prepared": None,
    "`plan`": ("update_1.5b", "update_4b"),
    "Two nodes": (),
    "bf16 training": ("update_1.5b", "update_4b"),
    "CUDA, NCCL, flash attention": ("tests", "attention", "head", "quickstart"),
    "Mixtures of experts": ("layouts",),
    "Transformer Engine's grouped experts": (),
}
# README's rows -> the stages that show them on one GPU, on several; None: a GPU does not affect them
SUPPORT: dict[str, tuple[tuple[str, ...] | None, tuple[str, ...] | None]] = {
    "Training at any layout: TP, SP, PP, VPP, CP, EP, DP, bf16": (("tests", "update_1.5b", "update_4b"), ("layouts",)),
    "vLLM in process and as servers, weights synced after every update": (
        ("engine", "agreement_model", "quickstart"),
        ("server_nccl", "server_ipc"),
    ),
    "Llama, Mistral, Qwen2.5, Qwen3, Qwen2-MoE, Qwen3-MoE, Mixtral: in from Hugging Face and out again": (None, None),
    "Killed at any moment, resumed bit for bit; at another layout within 1e-5": (("deterministic",), ()),
    "Data, rewards, evaluation suites, `plan`": (None, None),
    "DYPO and the systems its paper compares with": ((), ()),  # no stage runs each of them
}
SHOWN = ("attention", "head", "update_1.5b", "update_4b", "engine", "layouts")  # with tables in benchmarks/README.md


def reports(results: Path) -> list[tuple[Path, Report]]:
    """Return the reports of GPUs, by name."""
    found = [(file, json.loads(file.read_text())) for file in sorted(results.glob("gpu_report_*.json"))]
    return [(file, report) for file, report in found if report["measured"]]


def row_on_gpus(name: str, measured: list[tuple[Path, Report]]) -> str:
    """Return the GPU's cell of docs/status.md's row that begins with ``name``."""
    stages = ROWS[name]
    if stages is None:
        return NOT_ON_GPUS
    said = []
    for file, report in measured:
        known = [f"`{each}` {STATES[report['stages'][each]['state']]}" for each in stages if each in report["stages"]]
        if known:
            page = f"benchmarks/results/{file.with_suffix('.md').name}"
            said.append(f"{report['gpu'].removeprefix('NVIDIA ')} (`{page}`): {', '.join(known)}")
    return "; ".join(said) or OPEN


def with_gpu_column(status: str, results: Path) -> str:
    """Return docs/status.md with the last column of its table rewritten.

    Raises ValueError for a row that is not in ROWS.
    """
    measured, rows = reports(results), set()

    def row(match: re.Match) -> str:
        line = match[0]
        names = [name for name in ROWS if line.startswith(f"| {name}")]
        if len(names) != 1:
            raise ValueError(
                f"{STATUS}: benchmarks/gpu_report/published.py: {len(names)} of ROWS are the row {line[:60]}"
            )
        rows.add(names[0])
        return f"{line[: line.rstrip(' |').rindex(' | ')]} | {row_on_gpus(names[0], measured)} |"

    head, begin, rest = status.partition("<!-- gpu column -->\n")
    rows_text, end, tail = rest.partition("<!-- end gpu column -->")
    if not (begin and end):
        raise ValueError(f"{STATUS}: the marks of the GPU column are missing")
    written = re.sub(r"^\| [^|\n-].*$", row, rows_text, flags=re.MULTILINE)
    if missing := ROWS.keys() - rows:
        raise ValueError(f"{STATUS}: no row begins with {', '.join(sorted(missing))}")
    return head + begin + written + end + tail


def with_ticks(readme: str, results: Path) -> str:
    """Return README with its support table rewritten."""
    states = [{name: found["state"] for name, found in report["stages"].items()} for _, report in reports(results)]

    def tick(stages: tuple[str, ...] | None) -> str:
        if stages is None:
            return NOT_ON_GPUS
        known = [{report[stage] for report in states if stage in report} for stage in stages]
        if any(FAILED in each for each in known):
            return "failed"
        return "✓" if known and all(DONE in each for each in known) else "open"

    rows = [[name, "✓", tick(one), tick(several)] for name, (one, several) in SUPPORT.items()]
    body = table(["", "CPU ranks", "one GPU", "several GPUs"], rows)
    head, begin, rest = readme.partition("<!-- support -->\n")
    _, end, tail = rest.partition("<!-- end support -->")
    if not (begin and end):
        raise ValueError(f"{README}: the marks of the table of support are missing")
    return f"{head}{begin}\n{body}\n\n{end}{tail}"


def performance(results: Path) -> str:
    """Return the GPU section of benchmarks/README.md."""
    parts = []
    for file, report in reports(results):
        page = f"results/{file.with_suffix('.md').name}"
        parts += [f"### {report['gpu']}", f"The whole page: [{page}]({page}).", target_table(report)]
        for name in (name for name in SHOWN if name in report["stages"]):
            found = report["stages"][name]
            parts.append(f"#### {STAGES[name].title} (commit {found['commit']}, {found['date']})")
            if found["says"]:
                parts.append(f"{STATES[found['state']]}: {cell(found['says'])}")
            for each in found["tables"]:
                parts += [f"{each['title']}:", table(each["header"], [list(map(cell, row)) for row in each["rows"]])]
    return "\n\n".join(parts) or "Not yet measured on a GPU."
