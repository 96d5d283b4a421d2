#!/usr/bin/env python3
"""Make rows to train on (docs/data.md) from published data sets, teachers' traces, or files of your own.

    python tools/prepare_data.py IN [IN ...] --out FILE.jsonl|FILE.parquet [--decontaminate EVAL ...]

IN: a .jsonl, .json (a list) or .parquet file, a folder of them, or hub:NAME?config=..&split=..&revision=.. for a data
set of the Hugging Face hub. Traces of one problem are merged over all of them. Killed, the same command goes on where
it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_dypo.dataprep.formats import LAYOUTS
from megatron_dypo.dataprep.options import COLUMNS, INSTRUCTION, VERIFY, Options
from megatron_dypo.dataprep.prepare import prepare, print_counts
from megatron_dypo.errors import UserError
from megatron_dypo.runtime.console import run_tool


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="IN")
    add("--out", type=Path, required=True, metavar="FILE")
    add("--layout", choices=LAYOUTS, help="of all inputs; default: each file's, by its columns")
    add("--columns", type=_pairs, metavar="NAME=COLUMN,..", help=f"any other layout: {', '.join(COLUMNS)}")
    add("--instruction", help=f"follows each problem, after a blank line; '' for none (default: {INSTRUCTION!r})")
    add("--system", help="system message; '' for none (default: the row's own)")
    add("--teacher", metavar="NAME", help="who wrote all traces (default: as the layout has it)")
    add("--traces-per-teacher", type=int, default=1, metavar="N", help="of one problem; 0 for all (default: 1)")
    add(
        "--verify",
        choices=VERIFY,
        default="grader",
        help="a trace's answer: by our grader (default), by the data set's marks (and the grader where there is none)",
    )
    add("--extract", choices=("boxed", "marked", "number"), default="boxed", help="as reward.extract (default: boxed)")
    add("--tokenizer", metavar="DIR", help="for the two limits")
    add("--max-prompt-tokens", type=int, metavar="N", help="chat template included")
    add("--max-trace-tokens", type=int, metavar="N", help="end token included")
    add("--decontaminate", nargs="+", default=[], metavar="EVAL", help="evaluation files, folders or hub names")
    add("--ngram", type=int, default=8, metavar="N", help="words in a row that two problems share (default: 8)")
    add(
        "--overlap-share",
        type=float,
        default=0.5,
        metavar="S",
        help="problems overlap where so much of the shorter one is in shared n-grams (default: 0.5)",
    )
    add("--keep-without-trace", action="store_true", help="keep problems that no trace is left of")
    add("--skip-bad-rows", action="store_true", help="leave out (and count) malformed rows instead of stopping")
    escapes = "put back (and count) the backslash of LaTeX commands where a control character stands in its place"
    add("--repair-escapes", action="store_true", help=escapes)
    add("--workers", type=int, default=1, metavar="N", help="processes that grade (default: 1)")
    add("--restart", action="store_true", help="begin anew, whatever a killed run left")
    dry = "only count, over the first N rows (default: 1000)"
    add("--dry-run", type=int, nargs="?", const=1000, default=0, metavar="N", help=dry)
    return parser


def _pairs(text: str) -> dict[str, str]:
    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    if not all(name and column for name, column in pairs):
        raise argparse.ArgumentTypeError("expected NAME=COLUMN,NAME=COLUMN")
    return dict(pairs)


def main() -> int:
    arguments = vars(parser().parse_args())
    run = {name: arguments.pop(name) for name in ("out", "workers", "restart", "dry_run")}
    if run["workers"] < 1 or run["dry_run"] < 0:
        raise UserError("--workers is at least 1, --dry-run at least 0")
    tuples = {name: tuple(arguments.pop(name)) for name in ("inputs", "decontaminate")}
    counts = prepare(Options(**arguments, **tuples), **run)
    print_counts(f"dry run of {run['dry_run']} rows" if run["dry_run"] else str(run["out"]), counts)
    return 0


if __name__ == "__main__":
    run_tool("prepare_data", main)
