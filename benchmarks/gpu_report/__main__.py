"""Run and time everything that needs a GPU, as one page: `make gpu-report`.

python -m benchmarks.gpu_report [--part trainer|engine|many] [--only STAGE[,STAGE]] [--out FOLDER]
python -m benchmarks.gpu_report --tiny      # every stage of trainer and engine on the CPU, measuring nothing

Writes gpu_report_GPU.json and .md into FOLDER (benchmarks/results; with --tiny a temporary one), after every stage. The
exit code is 1 if a stage failed, 2 if nothing can be run.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_report.results import CPU, report_file
from benchmarks.gpu_report.runner import ENVIRONMENT, Machine, Runner
from benchmarks.gpu_report.stages import PARTS, STAGES, Stage
from benchmarks.machine import RESULTS, ROOT
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.console import run_tool


def chosen(part: str | None, only: str | None, tiny: bool) -> list[Stage]:
    """Return at least one stage, in the table's order. Raises UserError for an unknown stage."""
    names = only.split(",") if only else list(STAGES)
    unknown = [name for name in names if name not in STAGES]
    if unknown:
        raise UserError(f"--only: no stage is called {', '.join(unknown)}; there are {', '.join(STAGES)}")
    parts = [part] if part else ["trainer", "engine"] if tiny else list(PARTS)
    stages = [stage for stage in STAGES.values() if stage.name in names and stage.part in parts]
    if not stages:
        raise UserError(f"--only: {only} is in no part that is run here ({', '.join(parts)})")
    return stages


def machine(tiny: bool) -> Machine:
    """Ask for the GPU in another process, because asking takes GPU memory. Raises UserError if there is none."""
    if tiny:
        return Machine(CPU, 0)
    command = [sys.executable, "-m", "benchmarks.gpu_report.hardware"]
    answer = subprocess.run(command, cwd=ROOT, env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, check=True)
    found = Machine(**json.loads(answer.stdout))
    if not found.gpus:
        raise UserError("torch sees no CUDA device here (`python -m megatron_dypo doctor` says why); --tiny needs none")
    return found


def git_commit() -> str:
    """Return the commit, with a + if the work tree has other changes; "unknown" without git."""
    if shutil.which("git") is None:
        return "unknown"
    command = ["git", "describe", "--always", "--abbrev=9", "--dirty=+", "--exclude=*"]
    described = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return described.stdout.strip() or "unknown"


def main() -> int:
    parser = argparse.ArgumentParser(prog="gpu_report", description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=PARTS, help="part to run; default: all (many needs two GPUs)")
    parser.add_argument("--only", metavar="STAGE[,STAGE]", help=f"stages to run, of {', '.join(STAGES)}")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="output folder; default: benchmarks/results")
    parser.add_argument("--commit", help="commit to name in the report, if git does not know it")
    parser.add_argument("--tiny", action="store_true", help="dry run on the CPU, at sizes that measure nothing")
    options = parser.parse_args()
    stages, here = chosen(options.part, options.only, options.tiny), machine(options.tiny)
    folder = options.out or (Path(tempfile.mkdtemp(prefix="gpu_report_")) if options.tiny else RESULTS)
    runner = Runner(report_file(folder, here.gpu), here, options.commit or git_commit(), options.tiny)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # through the runner's `finally`
    code = runner.run(stages)
    print(runner.file.with_suffix(".md"))
    return code


if __name__ == "__main__":
    run_tool("gpu_report", main)
