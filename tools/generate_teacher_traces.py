#!/usr/bin/env python3
"""Sample reasoning traces from teachers behind OpenAI-compatible endpoints, and mark those whose answer verifies.

    python tools/generate_teacher_traces.py PROMPTS.jsonl --teachers teachers.yaml --out traces.jsonl

teachers.yaml (docs/data.md) gives each teacher's address, model, sampling, and the environment variable of its key.
Each answer is one line of OUT with the model, the sampling, token counts and the verdict. If killed, run the same
command again: answers already in OUT are kept. tools/prepare_data.py turns OUT into training rows. Exit code 1: an
endpoint refused a teacher, or requests failed after all retries (the same command tries those again).
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
    add("prompts", metavar="PROMPTS", help="rows as in docs/data.md, .jsonl or .parquet; their own traces are ignored")
    add("--teachers", type=Path, required=True, metavar="YAML", help="the teachers (docs/data.md)")
    add("--out", type=Path, required=True, metavar="JSONL", help="file to write the answers to")
    attempts = "most attempts of each teacher at a prompt, until one verifies (default: 1)"
    add("--attempts", type=int, default=1, metavar="N", help=attempts)
    add("--extract", choices=("boxed", "marked", "number"), default="boxed", help="as reward.extract (default: boxed)")
    add("--workers", type=int, default=1, metavar="N", help="grading processes (default: 1)")
    add("--repair-escapes", action="store_true", help="as data.repair_escapes")
    arguments = parser.parse_args()
    if min(arguments.attempts, arguments.workers) < 1:
        raise UserError("--attempts and --workers must be at least 1")
    tallies = generate(**vars(arguments))
    print_tallies(str(arguments.out), tallies)
    return int(any(tally.failed or tally.stopped for tally in tallies.values()))


if __name__ == "__main__":
    run_tool("generate_teacher_traces", main)
