#!/usr/bin/env python3
"""Ask teachers behind OpenAI-compatible endpoints for reasoning traces, and keep those whose answer verifies.

    python tools/generate_teacher_traces.py PROMPTS.jsonl --teachers teachers.yaml --out traces.jsonl

teachers.yaml (docs/data.md) names each teacher's address, model, sampling, and the environment variable of its key.
Every answer is a line of OUT, with the model, the sampling, token counts and the verdict; nothing that OUT holds is
asked again, whatever ended the run before. tools/prepare_data.py makes rows to train on of it. Exit code 1: a teacher
was refused, or requests failed in spite of retries (the same command asks for those again).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dypo.dataprep.teachers import generate, print_tallies
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.console import run_tool


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("prompts", metavar="PROMPTS", help="rows of docs/data.md, .jsonl or .parquet; their own traces do not matter")
    add("--teachers", type=Path, required=True, metavar="YAML")
    add("--out", type=Path, required=True, metavar="JSONL")
    add("--attempts", type=int, default=1, metavar="N", help="of a teacher at a prompt until one verifies (default: 1)")
    add("--extract", choices=("boxed", "marked", "number"), default="boxed", help="as reward.extract (default: boxed)")
    add("--workers", type=int, default=1, metavar="N", help="processes that grade (default: 1)")
    add("--repair-escapes", action="store_true", help="as data.repair_escapes")
    arguments = parser.parse_args()
    if min(arguments.attempts, arguments.workers) < 1:
        raise UserError("--attempts and --workers are at least 1")
    tallies = generate(**vars(arguments))
    print_tallies(str(arguments.out), tallies)
    return int(any(tally.failed or tally.stopped for tally in tallies.values()))


if __name__ == "__main__":
    run_tool("generate_teacher_traces", main)
